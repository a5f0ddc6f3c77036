"""Raw figures: one compressed CSV for each part of the study, and a run is (part, problem, rule, rate, seed).

A run's rows are appended whole, as one gzip member, so an interrupted command resumes run by run.
`step` is an integer, a point of the run's curve, or "final", one row for each run. `finish` rewrites the file
sorted and without time stamps, so that the same figures give the same bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEYS = ("part", "problem", "rule", "rate", "seed", "step")
MEASURES = ("worst_gain", "balance", "kl", "gain_per_kl", "sacrifice", "mgda_tv")
EACH = ("reward", "gain", "weight")  # of every objective: reward_0, reward_1, ...
TEXT = ("part", "problem", "rule", "step")
FINAL = "final"


def results(part: str) -> Path:
    """The committed figures of a part."""
    return Path(__file__).parent / "results" / f"{part}.csv.gz"


def local(part: str) -> Path:
    """Where commands write by default; not committed."""
    return Path(__file__).parent / "local" / f"{part}.csv.gz"


def read(path: Path) -> list[Row]:
    """The rows: numbers as float, empty cells as NaN, an integer step as int; [] if there is no file."""
    if not path.exists():
        return []
    rows: list[Row] = []
    header: list[str] = []
    for line in csv.reader(io.StringIO(_whole_members(path.read_bytes()))):
        if line and line[0] == "part":  # each member has its own header
            header = line
        elif line:
            rows.append({key: _value(key, cell) for key, cell in zip(header, line, strict=True)})
    return rows


def _whole_members(data: bytes) -> str:
    """The text of all complete gzip members; an incomplete one of an interrupted command is ignored."""
    found = []
    while data:
        member = zlib.decompressobj(wbits=31)
        try:
            text = member.decompress(data)
        except zlib.error:
            break
        if not member.eof:
            break
        found.append(text)
        data = member.unused_data
    return b"".join(found).decode()


def _value(key: str, cell: str) -> Any:
    if key == "step":
        return cell if cell == FINAL else int(cell)
    if key in TEXT:
        return cell
    return float(cell) if cell else math.nan


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return str(value)


def _columns(rows: Iterable[Row]) -> list[str]:
    """Keys first, then measures, then the columns of each objective by number, then others."""
    present = {key for row in rows for key in row}

    def place(key: str) -> tuple[int, int, int, str]:
        name, _, number = key.rpartition("_")
        if key in KEYS:
            return 0, KEYS.index(key), 0, key
        if key in MEASURES:
            return 1, MEASURES.index(key), 0, key
        if name in EACH and number.isdigit():
            return 2, EACH.index(name), int(number), key
        return 3, 0, 0, key

    return sorted(present, key=place)


def _member(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    columns = _columns(rows)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(key, math.nan)) for key in columns] for row in rows)
    return gzip.compress(text.getvalue().encode(), mtime=0)


class Store:
    """The file of one part, to which runs are added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path)
        self._done = {self._key(row) for row in self.rows if row["step"] == FINAL}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # drops what a killed command left unfinished
            self._rewrite(self.rows)

    @staticmethod
    def _key(row: Row) -> tuple[str, str, str, str]:
        return row["problem"], row["rule"], f"{float(row['rate']):.5g}", f"{float(row['seed']):g}"

    def has(self, problem: str, rule: str, rate: float, seed: int) -> bool:
        return self._key({"problem": problem, "rule": rule, "rate": rate, "seed": seed}) in self._done

    def add(self, rows: Sequence[Row]) -> None:
        """Appends the rows of one or more whole runs."""
        with self.path.open("ab") as file:
            file.write(_member(rows))
        self.rows.extend(rows)
        self._done |= {self._key(row) for row in rows if row["step"] == FINAL}

    def finish(self) -> None:
        """Sorts the file and writes it as one member."""

        def order(row: Row) -> tuple[str, str, float, float, float]:
            step = math.inf if row["step"] == FINAL else float(row["step"])
            return row["problem"], row["rule"], float(row["rate"]), float(row["seed"]), step

        self._rewrite(sorted(self.rows, key=order))

    def _rewrite(self, rows: Sequence[Row]) -> None:
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_bytes(_member(rows) if rows else b"")
        unfinished.replace(self.path)
