"""No kernel touches memory beside a tensor, not even where it does not use what it reads there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nothing_out_of_bounds(backend: str, side: str) -> None:
    """A page of no access stands on one side of every tensor: out of bounds, the process ends by a signal."""
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
