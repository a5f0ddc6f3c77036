"""Files that `inspect` reads, and wrong ones."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line_setup import inspected, small_table, write

from pama_kernels.__main__ import main
from pama_kernels.tools import pictures
from pama_kernels.tools.inspect import inspect_rewards
from pama_kernels.tools.read import read_table
from pama_kernels.tools.report import format_inspection


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_formats_agree(suffix: str, tmp_path: Path) -> None:
    columns = small_table()
    expected = inspect_rewards(read_table(write(tmp_path / "rewards.csv", columns)))
    found = inspect_rewards(read_table(write(tmp_path / f"rewards{suffix}", columns)))
    assert found.names == expected.names
    assert format_inspection(found).replace(suffix, ".csv") == format_inspection(expected)


def test_cells(tmp_path: Path) -> None:
    """Booleans are 1 and 0; empty cells, NaN, None and null are absent."""
    path = tmp_path / "rewards.csv"
    path.write_text("passed,score\nTrue,1\nfalse,nan\nTrue,\nFalse,None\nTRUE,null\nfalse,2e0\n")
    found = inspect_rewards(read_table(path), group_size=6)
    assert found.mean.tolist() == [0.5, 1.5]
    assert found.applies[1] == pytest.approx(1 / 3)


def test_folder_of_files(tmp_path: Path) -> None:
    """A column that a file lacks is absent there."""
    write(tmp_path / "a.csv", {"x": [1, 2], "y": [1, 3]})
    write(tmp_path / "b.csv", {"x": [1, 2]})
    found = inspect_rewards(read_table(tmp_path), group_size=2)
    assert found.rows == 4
    assert found.applies.tolist() == [1, 0.5]


FINE: dict[str, list[Any]] = {"a": [1, 2, 3, 4], "b": [4, 3, 1, 1], "text": ["w", "x", "y", "z"]}


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"text": ["a", "b"]}, {}, "rewards: expected numeric columns, found none among text"),
        ({"a": [1, 2], "step": [1, 1]}, {}, "rewards: expected at least two columns, got a;"),
        (FINE, {"rewards": ["a"]}, "rewards: expected at least two columns, got a;"),
        (FINE, {"rewards": ["a", "a"]}, "rewards: expected different columns, got a twice"),
        (FINE, {"rewards": ["a", "c"]}, "rewards: expected columns of table, got c; it has a, b, text"),
        (
            FINE,
            {"rewards": ["a", "text"], "group_size": 2},
            "text: expected finite numbers .* got 'w' in row 1",
        ),
        (
            {"a": [1, 2], "b": [1, "inf"]},
            {"group_size": 2},
            "b: expected finite numbers .* got 'inf' in row 2",
        ),
        (FINE, {}, r"group_size: expected the number .* \(--group-size\), or a column .* a, b, text"),
        (FINE, {"group_size": 3}, "group_size: expected a divisor of the 4 rows, at least 2, got 3"),
        (FINE, {"group_size": 1}, "group_size: expected a divisor"),
        (
            FINE,
            {"group_size": 2, "group_column": "text"},
            "group_column: expected None with group_size, got text",
        ),
        (FINE, {"group_column": "task"}, "group_column: expected a column of table, got task"),
        (FINE, {"group_column": "text"}, "group_column: expected several completions with the same text"),
        (FINE, {"group_size": 2, "step_column": "iter"}, "step_column: expected a column of table, got iter"),
        (
            {**FINE, "step": [1, 2, 2, 2]},
            {"group_size": 2},
            "group_size: expected the rows of a group in one step, got rows 1 to 2 with steps 1, 2",
        ),
        (FINE, {"group_size": 2, "preference": [1.0]}, "preference: expected 2 numbers, .* a, b, got 1"),
        (FINE, {"group_size": 2, "preference": [1.0, -1.0]}, "preference: "),
    ],
)
def test_wrong_tables(columns: dict[str, list[Any]], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspected(columns, **arguments)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.csv", None, "file: expected .* found no "),
        ("rewards.xlsx", "a", "file: expected a name that ends in .csv"),
        ("rewards.csv", "", "file: expected a header and at least one row, got an empty table"),
        ("rewards.csv", "a,b\n", "file: expected a header and at least one row"),
        ("rewards.csv", "a,a\n1,2\n", "file: expected different column names, got a, a"),
        ("rewards.csv", "a,b\n1,2\n1\n", "file: expected 2 cells as in the header, got 1 in line 3"),
        ("rewards.jsonl", '{"a": 1}\n{"a"\n', "file: expected a JSON object in line 2"),
        ("rewards.jsonl", "[1]\n", "file: expected a JSON object, got list in line 1"),
    ],
)
def test_wrong_files(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["inspect", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert re.match(f"python -m pama_kernels inspect: error: {message}", said.err)


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("pyarrow", "a.parquet", "a.parquet is Parquet, which needs pyarrow: pip install pyarrow"),
        ("tensorboard", "events.out.tfevents.1", "a TensorBoard folder needs the tensorboard package"),
        (
            "matplotlib",
            "trainer_state.json",
            r"a picture needs matplotlib: pip install 'pama-kernels\[plot\]'",
        ),
    ],
)
def test_missing_packages(
    missing: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / name).write_text("")
    command = "inspect" if missing == "pyarrow" else "plot"
    if missing == "tensorboard":
        monkeypatch.setattr(pictures, "check_picture", lambda path: None)
    assert main([command, str(tmp_path / name)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_group_size_that_contradicts_the_prompt_column_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "interleaved.csv"
    path.write_text("prompt_id,a,b\n" + "".join(f"{i % 8},{i},{-i * i}\n" for i in range(64)))
    with pytest.raises(
        ValueError, match=r"^group_size: .* same prompt_id, got different ones in rows 1 to 8"
    ):
        inspect_rewards(read_table(path), group_size=8)
    assert inspect_rewards(read_table(path)).group_sizes == (8, 8)
