"""The Triton kernels build for absent GPUs, and the hot ones spill no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")
HERE = Path(__file__).parent
# Of a batch or a matrix, not of tokens: a solver of many objectives may spill.
SOLVERS = {"solve_kernel", "gram_kernel", "weights_kernel"}


def lines(config: pytest.Config, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "triton_variants.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(config.cache.mkdir("triton"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for line in found:
        print(line)
        assert line["registers"] > 0
        if line["target"].startswith("sm_"):  # an SM has 2^16 registers, allocated in units of 8 per thread
            assert 32 * line["warps"] * 8 * -(-line["registers"] // 8) <= 2**16
            assert line["shared"] <= 163 * 1024  # the most shared memory of a program on sm_80
            # Fused multiply-adds make copies of a number unequal (launch.py); float64's exponential has some.
            assert line["kernel"] not in SOLVERS or "softmin" in line["call"] or line["fused"] == 0
    assert not [x for x in found if x["hot"] and x["spills"] and x["kernel"] not in SOLVERS]


@pytest.mark.timeout(900)
def test_sample(pytestconfig: pytest.Config) -> None:
    found = lines(pytestconfig, "compile", "sm_90")
    names = {line["kernel"] for line in found}
    assert {"tokens_kernel", "rows_kernel", "row_sums_kernel", "solve_kernel"} <= names
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kind(pytestconfig: pytest.Config, target: str) -> None:
    found = lines(pytestconfig, "compile", "--all", target)
    wanted = "tokens rows row_sums row_pairs row_weights first_token add_pairs solve gram weights gae"
    wanted += " group_normalize"
    missing = {f"{name}_kernel" for name in wanted.split()} - {line["kernel"] for line in found}
    assert not missing, missing
    check(found)
