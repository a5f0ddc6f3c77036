"""No kernel accesses memory beside a tensor, not even to read values that it does not use."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version(package).split(".")[:2])


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_access_out_of_bounds(backend: str, side: str) -> None:
    """A protected page is on one side of every tensor: an access out of bounds ends the process."""
    if backend == "triton" and _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    script = Path(__file__).with_name("guarded.py")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1" if backend == "triton" else "0",
        "PAMA_BACKEND": backend,
        "PAMA_TEST_DEVICE": "cpu",
    }
    command = [sys.executable, "-X", "faulthandler", str(script), side]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every kernel ran" in done.stdout
