"""The tests of the public API once more, on the Triton kernels in their interpreter, in a process of its own.

By default a sample with few examples each: the interpreter is a thousand times slower than a GPU. Slow: all
but those of the CPU kernels' threads and instruction sets and those with many tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter

pytestmark = needs_interpreter
TESTS = Path(__file__).parent

SAMPLE = (
    "test_tokens.py::test_every_option",
    "test_tokens.py::test_packed_without_tokens",
    "test_rules.py::test_a_saturated_objective_takes_no_part",
    "test_symmetries.py::test_sums_of_any_magnitude",
    "test_rewards.py::test_equal_rewards_give_exactly_0",
)
FILES = ("tokens", "rules", "influence", "rewards", "symmetries", "module")
NOT_HERE = ("many_tokens", "more_than_a_block", "instruction_sets", "threads")


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PAMA_BACKEND": "triton", "HYPOTHESIS_PROFILE": "interpreter", **environment},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def _run(*arguments: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--timeout", "3600")
    done = _python("-m", "pytest", *options, *arguments, TRITON_INTERPRET="1")
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(1200)
def test_sample() -> None:
    _run("-m", "not slow", *(str(TESTS / "properties" / name) for name in SAMPLE))


@pytest.mark.timeout(600)
def test_launches() -> None:
    _run(str(TESTS / "triton_launches.py"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FILES)
def test_whole_file(name: str) -> None:
    _run(
        "-k", " and ".join(f"not {word}" for word in NOT_HERE), str(TESTS / "properties" / f"test_{name}.py")
    )


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    done = _python(
        "-c", "import torch, pama_kernels as pk; pk.pama_weights(torch.ones(3))", TRITON_INTERPRET="0"
    )
    assert done.returncode != 0
    assert "no backend serves device type 'cpu' with PAMA_BACKEND=triton" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
