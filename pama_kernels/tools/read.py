"""Tables of rewards per completion: CSV and JSONL by the standard library, Parquet by pyarrow."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
ABSENT = ("", "nan", "none", "null", "na", "n/a")
BOOLEANS = {"true": 1.0, "false": 0.0}

DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+([eE][-+]?\d+)?")

STEP_COLUMNS = ("step", "global_step", "train/global_step", "iteration")
GROUP_COLUMNS = ("prompt_id", "group_id", "group", "uid", "prompt", "prompts", "input", "question", "query")
# Numbers that are no rewards: counters, identifiers, and the advantage that a trainer logs beside them.
NO_REWARDS = (
    *(*STEP_COLUMNS, *GROUP_COLUMNS, "epoch", "index", "idx", "id", "rank", "seed", "sample", "row"),
    *("advantage", "advantages", "timestamp", "time", "unnamed: 0", "__index_level_0__", ""),
)


class Table(NamedTuple):
    """Columns of equal length, as they were read."""

    source: str
    columns: dict[str, list[Any]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def listed(self) -> str:
        return ", ".join(self.columns) or "none"


def read_table(path: Path) -> Table:
    """A file, or all files of a folder (TRL's ``completions`` folder, or the run folder that it is in).

    Raises:
        FileNotFoundError, ValueError: it is not there, has no table, or is of an unknown format.
        ImportError: Parquet without pyarrow.
    """
    if not path.exists():
        raise FileNotFoundError(f"file: expected {' '.join(SUFFIXES)} or a folder of them, found no {path}")
    if path.is_file():
        return _checked(Table(path.name, _columns(path)))
    folder = path / "completions" if (path / "completions").is_dir() else path
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"file: expected {' '.join(SUFFIXES)} files in the folder, found none in {folder}")
    parts = [_columns(file) for file in files]
    return _checked(Table(f"{folder.name}/ ({len(files)} files)", _concatenated(parts)))


def _checked(table: Table) -> Table:
    if table.rows == 0:
        raise ValueError(
            f"file: expected a header and at least one row, got an empty table in {table.source}"
        )
    return table


def _concatenated(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Concatenates the parts; a column that a part lacks is empty in its rows."""
    result: dict[str, list[Any]] = {name: [] for part in parts for name in part}
    for part in parts:
        rows = len(next(iter(part.values()), []))
        for name, values in result.items():
            values.extend(part.get(name, [None] * rows))
    return result


def _columns(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".csv", ".tsv"):
        return _csv(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    packed = "; unpack it" if path.suffix in (".gz", ".zip", ".zst", ".xz", ".bz2") else ""
    raise ValueError(f"file: expected a name that ends in {' '.join(SUFFIXES)}, got {path.name}{packed}")


def _csv(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows = _rows(reader, path)
        names = next(rows, [])
        for separator, called in ((";", "semicolons"), ("\t", "tabs")):
            if len(names) < 2 and separator in "".join(names):
                raise ValueError(
                    f"file: expected commas between the columns (tabs in a .tsv), got {called} in the header "
                    f"of {path.name}"
                )
        if len(set(names)) != len(names):
            raise ValueError(f"file: expected different column names, got {', '.join(names)} in {path.name}")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"file: expected {len(names)} cells as in the header, got {len(row)} in line "
                    f"{reader.line_num} of {path.name}"
                )
            for name, cell in zip(names, row, strict=True):
                columns[name].append(cell)
    return columns


def _rows(reader: Iterable[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"file: expected CSV in {path.name}: {error}") from None
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, error) from None


def _wrong_encoding(path: Path, error: UnicodeDecodeError) -> ValueError:
    known = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a gzip archive"}
    with path.open("rb") as file:
        found = known.get(file.read(2), f"byte {error.object[error.start]:#04x}")
    return ValueError(f"file: expected text in UTF-8 in {path.name}, got {found}")


def _json_lines(path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(_decoded(lines, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"file: expected a JSON object in line {number} of {path.name}: {error}"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"file: expected a JSON object, got {type(row).__name__} in line {number} of {path.name}"
                )
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _decoded(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, error) from None


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path.name} is Parquet, which needs pyarrow: pip install pyarrow") from None
    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"file: expected Parquet in {path.name}: {error}") from None
    return columns


# --- columns ------------------------------------------------------------------------------------------------


def number(cell: Any) -> float:
    """NaN where the cell is empty. Raises ValueError where it is no number."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        text = cell.strip().lower()
        return math.nan if text in ABSENT else BOOLEANS[text] if text in BOOLEANS else float(text)
    if isinstance(cell, (bool, int, float)):
        try:
            return float(cell)
        except OverflowError:
            return math.inf
    raise ValueError(type(cell).__name__)


def reward_columns(table: Table, asked: Sequence[str] | None, others: Sequence[str | None] = ()) -> list[str]:
    """The reward columns: the requested ones, or all numeric columns except counters, identifiers and
    `others`."""
    if asked is not None:
        for i, name in enumerate(asked):
            if name not in table.columns:
                raise ValueError(
                    f"rewards: expected columns of {table.source}, got {name}; it has {table.listed()}"
                )
            if name in asked[:i]:
                raise ValueError(f"rewards: expected different columns, got {name} twice")
        names = list(asked)
    else:
        names = [
            name
            for name, cells in table.columns.items()
            if _may_be_reward(name) and name not in others and _numeric(cells)
        ]
        for name, cells in table.columns.items():
            if _may_be_reward(name) and name not in others and _decimal_commas(cells):
                raise ValueError(
                    f"{name}: expected numbers with a decimal point, got decimal commas in {table.source}"
                )
        if not names:
            raise ValueError(f"rewards: expected numeric columns, found none among {table.listed()}")
    if len(names) < 2:
        raise ValueError(
            f"rewards: expected at least two columns, got {', '.join(names)}; the columns of {table.source} "
            f"are {table.listed()}"
        )
    return names


def _may_be_reward(name: str) -> bool:
    low = name.lower()
    return low not in NO_REWARDS and not low.endswith(("_id", "_ids", "_idx", "_index", "_step"))


def _numeric(cells: Sequence[Any]) -> bool:
    """Whether all cells are numbers. True for an empty column, since a reward that never applied is logged
    like that."""
    try:
        for cell in cells:
            number(cell)
    except ValueError:
        return False
    return True


def _decimal_commas(cells: Sequence[Any]) -> bool:
    """Whether all cells that aren't empty are numbers, some of them with a decimal comma."""
    known = [cell for cell in cells if isinstance(cell, str) and cell.strip().lower() not in ABSENT]
    commas = [DECIMAL_COMMA.fullmatch(cell.strip()) is not None for cell in known]
    rest = (cell for cell, comma in zip(known, commas, strict=True) if not comma)
    return any(commas) and _numeric(list(rest))


def reward_matrix(table: Table, names: Sequence[str]) -> Tensor:
    """(rows, N) float64, NaN where a cell is empty: the reward does not apply there."""
    columns = []
    for name in names:
        values = []
        for row, cell in enumerate(table.columns[name], 1):
            try:
                value = number(cell)
            except ValueError:
                value = math.inf
            if math.isinf(value):
                text = repr(cell) if not isinstance(cell, int) else "an integer beyond 1e308"
                raise ValueError(f"{name}: expected finite numbers or empty cells, got {text} in row {row}")
            values.append(value)
        columns.append(values)
    return torch.tensor(columns, dtype=torch.float64).T.contiguous()


def find_column(table: Table, asked: str | None, usual: Sequence[str], argument: str) -> str | None:
    """The requested column, or the first one with a usual name."""
    if asked is not None:
        if asked not in table.columns:
            raise ValueError(
                f"{argument}: expected a column of {table.source}, got {asked}; it has {table.listed()}"
            )
        return asked
    by_name = {name.lower(): name for name in table.columns}
    return next((by_name[name] for name in usual if name in by_name), None)
