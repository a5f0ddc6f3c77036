"""No unusual tensor crashes, is ignored, or gives a wrong number, for any argument."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from odd_tensors import KINDS, cases
from operator_table import EVERY

CASES = list(cases())
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    """The outcome of each case; a case that ends the process has none, and the others are run without it."""
    found: dict[int, str] = {}
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    begin = 0
    while begin < len(CASES):
        done = subprocess.run(
            [sys.executable, str(HERE / "odd_tensors.py"), str(begin)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for line in done.stdout.splitlines():
            number, _, said = line.partition(" ")
            found[int(number)] = said
        if done.returncode == 0:
            break
        last = max(found, default=-1)
        assert last >= begin, done.stderr
        found[last] = f"CRASH {done.returncode}: {done.stderr[-300:]}"
        begin = last + 1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_result_is_right_or_the_error_names_the_argument(kind: str, outcomes: dict[int, str]) -> None:
    good = KINDS[kind][2]
    bad = {
        case: outcomes.get(number, "not run")
        for number, case in enumerate(CASES)
        if case[2] == kind and outcomes.get(number) not in good
    }
    assert not bad


def test_every_argument_is_tried() -> None:
    tried = {(call, argument) for call, argument, _ in CASES}
    assert tried == {(call, name) for call, entry in EVERY.items() for name in entry.tensors(3, 4)}
