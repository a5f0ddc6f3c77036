"""Raw logs: one CSV for each run (or batch of seeds), written whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows of a CSV, numbers as float."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _number(x) for key, x in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _text(row: dict[str, Any]) -> dict[str, str]:
    return {key: f"{x:.4g}" if isinstance(x, float) else str(x) for key, x in row.items()}


def write(path: Path, rows: Rows) -> None:
    """Under another name first: a run that is killed leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(_text(row))
    unfinished.replace(path)


Job = tuple[Path, Callable[[], Rows]]


def run(jobs: Sequence[Job], title: str) -> None:
    """Makes every log that is not there yet, with a progress bar."""
    left = [(path, make) for path, make in jobs if not path.exists()]
    if len(left) < len(jobs):
        print(f"{title}: {len(jobs) - len(left)} of {len(jobs)} logs are there already")
    progress = tqdm(left, desc=title, unit="run", mininterval=1.0)
    for path, make in progress:
        progress.set_postfix_str(path.stem)
        if not path.exists():  # another process may have made it meanwhile
            write(path, make())
