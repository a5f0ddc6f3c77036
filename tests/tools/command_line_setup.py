"""Tables of rewards, and what a training logged, for the tests of the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pama_kernels.tools.inspect import Inspection, inspect_rewards
from pama_kernels.tools.read import Table


def small_table(rows: int = 48) -> dict[str, list[Any]]:
    """Groups of 8. `brief` is the opposite of `long`, `longer` its copy; `format` is saturated, `never`
    absent, `sometimes` applies to every second completion."""
    generator = torch.Generator().manual_seed(5)
    long = torch.rand(rows, generator=generator, dtype=torch.float64)
    helpful = torch.rand(rows, generator=generator, dtype=torch.float64)
    return {
        "prompt_id": [row // 8 for row in range(rows)],
        "helpful": helpful.tolist(),
        "long": long.tolist(),
        "longer": (2 * long + 1).tolist(),
        "brief": (-100 * long).tolist(),
        "format": [1.0] * rows,
        "never": [None] * rows,
        "sometimes": [value if row % 2 else None for row, value in enumerate(helpful.square().tolist())],
    }


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def inspected(columns: dict[str, list[Any]], **arguments: Any) -> Inspection:
    return inspect_rewards(Table("table", columns), **arguments)


def history(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "pama/optimum" in entry]


def words(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
