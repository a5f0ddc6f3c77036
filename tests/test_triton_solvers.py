"""Runs `triton_solvers.py` in a process of its own, where the kernels are made for Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter


@needs_interpreter
@pytest.mark.timeout(600)
def test_solvers_and_advantages_in_the_interpreter() -> None:
    file = Path(__file__).with_name("triton_solvers.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PAMA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
