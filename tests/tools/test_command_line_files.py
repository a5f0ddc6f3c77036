"""Files that `inspect` reads, and wrong ones."""

from __future__ import annotations

import re
import subprocess
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
        ("rewards.csv", "a;b\n1;2\n", "file: expected commas between the columns .*, got semicolons"),
        ("rewards.csv", "a\tb\n1\t2\n", "file: expected commas between the columns .*, got tabs"),
        (
            "rewards.csv",
            'id,a,b\n0,"1,5",2\n0,2,3\n',
            "a: expected numbers with a decimal point, got decimal",
        ),
        ("rewards.csv", "id,a\n0,1\n0,2\n", "rewards: expected at least two columns, got a"),
        ("rewards.csv", b"id,a,b\n0,1,\xe9\n", "file: expected text in UTF-8 in rewards.csv, got byte 0xe9"),
        ("rewards.csv", "a,b\n1,2\n".encode("utf-16"), "file: expected text in UTF-8 .*, got UTF-16"),
        ("rewards.csv", b"\x1f\x8b\x08\x08", "file: expected text in UTF-8 .*, got a gzip archive"),
        (
            "rewards.csv.gz",
            b"\x1f\x8b\x08\x08",
            "file: expected a name that .*, got rewards.csv.gz; unpack it",
        ),
        ("rewards.jsonl", b'{"a": 1, "\xe9": 2}\n', "file: expected text in UTF-8 in rewards.jsonl"),
        (
            "rewards.jsonl",
            f'{{"id": 0, "a": {10**400}, "b": 1}}\n{{"id": 0, "a": 2, "b": 2}}\n',
            "a: expected finite numbers or empty cells, got an integer beyond 1e308 in row 1",
        ),
    ],
)
def test_wrong_files(
    name: str, text: str | bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
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


def test_scales_of_any_size_are_readable(tmp_path: Path) -> None:
    """Neither 0.00 for a small reward nor 300 digits for a large one; sums and squares stay in range."""
    path = tmp_path / "rewards.csv"
    path.write_text("id,small,large,plain\n0,1e-5,1e300,1\n0,2e-5,3e300,2\n0,3e-300,1e308,-4\n0,3e-5,1e9,2\n")
    found = inspect_rewards(read_table(path), group_column="id")
    assert found.mean.isfinite().all()
    assert found.deviation.isfinite().all()
    text = format_inspection(found)
    assert re.search(r"small +1\.5e-05 +1\.1e-05 ", text)
    assert re.search(r"large +2\.5e\+307 +4\.3e\+307 ", text)
    assert re.search(r"plain +0\.25 +2\.49 ", text)


def test_nested_values_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    rows = ('{"id": 0, "a": %d, "b": %d, "more": {"x": 1}, "list": [1]}' % (i, -i) for i in range(4))  # noqa: UP031
    path.write_text("\ufeff" + "\n".join(rows))
    found = inspect_rewards(read_table(path), group_column="id")
    assert found.names == ["a", "b"]
    assert found.left_out == ["id", "more", "list"]


def test_a_picture_needs_a_folder_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for command in (["plot", str(tmp_path), "--out"], ["inspect", str(tmp_path), "--plot"]):
        assert main([*command, str(tmp_path / "gone" / "picture.png")]) == 2
        assert (
            f"picture: expected a folder that exists, found no {tmp_path / 'gone'}" in capsys.readouterr().err
        )
    assert not (tmp_path / "gone").exists()


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    """`inspect FILE | head` ends without a traceback."""
    path = write(tmp_path / "rewards.csv", small_table())
    command = [sys.executable, "-m", "pama_kernels", "inspect", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said == ""
    assert process.returncode == 0
