"""The Python code in the README runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
# (line of the first statement, code)
BLOCKS = [
    (TEXT.count("\n", 0, found.start(1)) + 1, found.group(1))
    for found in re.finditer(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
]


def test_there_is_something_to_run() -> None:
    assert BLOCKS or TEXT.count("\n") <= 20, "a README of more than 20 lines shows how the library is used"


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_block(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on its own: in a fresh namespace and an empty directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # Blank lines in front, so that a traceback shows the line of the README.
    program = compile("\n" * (line - 1) + code, str(README), "exec")
    exec(program, {"__name__": "__readme__"})
