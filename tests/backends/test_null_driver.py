"""Calls launch the Triton kernels in few variants, without a GPU: `null_driver.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, which Triton needs to launch"),
]


def lines(config: pytest.Config, *command: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(config.cache.mkdir("triton"))
    script, *arguments = command
    whole = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_calls_launch_kernels(pytestconfig: pytest.Config) -> None:
    """Through Triton's own launcher, down to a CUDA driver that does nothing."""
    launched = {line["call"]: line["kernels"] for line in lines(pytestconfig, "null_driver.py", "launches")}
    padded, rows = ", padded, N=4, float32, few tensors", ", per-sequence, N=4, float32, few tensors"
    assert launched[f"loss gram{padded}"] == ["tokens_kernel", "solve_kernel", "tokens_kernel"]
    assert launched[f"loss fixed{padded}"] == ["tokens_kernel", "tokens_kernel"]
    assert launched[f"combine fixed{rows}"] == ["row_sums_kernel", "rows_kernel", "rows_kernel"]


def test_other_lengths_and_batch_sizes_compile_no_kernel(pytestconfig: pytest.Config) -> None:
    """One variant of each launch for whole tensors, a second for slices, none in a capture."""
    found = lines(pytestconfig, "null_driver.py", "lengths")
    assert len(found) > 10
    *calls, beyond = found
    for line in calls:
        assert set(line["whole"].values()) == {1}, line
        assert max(line["sliced"].values()) <= 2, line
        assert line["captured"] == line["sliced"], line
    assert sum(count - 1 for count in beyond["whole"].values()) <= 1, beyond


def test_kernels_compiled_ahead_cover_all_launches(pytestconfig: pytest.Config) -> None:
    found = lines(pytestconfig, "null_driver.py", "warmed")
    assert len(found) > 10
    for line in found:
        assert line["kernels"] > 0
        assert line["missing"] == 0, line
        assert line["launchers"], line


def test_repeated_launches_are_those_of_a_first_call(pytestconfig: pytest.Config) -> None:
    """With other sizes, strides and settings than the recorded ones, of which a few functions repeat almost
    all; what torch's own kernels compute is not repeated."""
    *calls, by_ids, two, kept = lines(pytestconfig, "repeated_calls.py")
    assert len(calls) > 1000
    for line in calls:
        assert line["differences"] == 0, line
        assert line["repeated"] >= 10, line  # of twelve
        assert line["recorded"] <= 3, line
    assert by_ids["call"] == "normalize by ids"
    assert by_ids["repeated"] == by_ids["recorded"] == 0
    assert two == {"call": "two arguments", "differences": 0}
    assert kept == {"call": "many", "tensors": 0, "signatures": 0}
