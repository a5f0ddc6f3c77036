"""The Triton kernels build for absent GPUs, the hot ones spill no register, and calls come to launch them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")


TESTS = Path(__file__).parent


def _lines(cache: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env={
            **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
            "PAMA_BACKEND": "triton",
            "TRITON_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(found: list[dict[str, Any]]) -> None:
    for line in found:
        print(line)
        assert line["registers"] > 0
        if line["target"].startswith("sm_"):  # a processor holds 2^16, handed out by 8 to a thread
            assert 32 * line["warps"] * 8 * -(-line["registers"] // 8) <= 2**16
            assert line["shared"] <= 163 * 1024  # what a program may take on sm_80
    spilled = [line for line in found if line["hot"] and line["spills"]]
    assert not spilled


@pytest.mark.timeout(900)
def test_sample(pytestconfig: pytest.Config) -> None:
    found = _lines(pytestconfig.cache.mkdir("triton"), "triton_compile.py", "sm_90")
    assert {"tokens_kernel", "rows_kernel", "solve_kernel"} <= {line["kernel"] for line in found}
    _check(found)


@pytest.mark.timeout(900)
def test_calls_reach_the_driver(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Through Triton's own launcher, down to a CUDA driver that does nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which Triton needs to launch anything")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    library = ["-o", str(tmp_path / "libcuda.so.1"), str(TESTS / "no_driver.c")]
    subprocess.run([compiler, *options, *library], check=True)
    found = _lines(pytestconfig.cache.mkdir("triton"), "triton_launch.py", str(tmp_path))
    launched = [" ".join(line["kernels"]).replace("_kernel", "") for line in found if "kernels" in line]
    assert launched == [
        *("tokens solve tokens", "tokens tokens", "count tokens", "tokens solve tokens"),
        *("row_sums rows solve rows tokens", "row_sums rows rows tokens", "count tokens"),
        "row_sums rows solve rows",
    ]
    lengths = [line for line in found if "later" in line]
    assert lengths
    for line in lengths:  # no step of other lengths compiles anything
        assert line["later"] == line["first"], line["call"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kind(pytestconfig: pytest.Config, target: str) -> None:
    found = _lines(pytestconfig.cache.mkdir("triton"), "triton_compile.py", "--all", target)
    kernels = {line["kernel"] for line in found}
    wanted = "tokens count pairs add_pairs row_sums rows row_pairs row_weights solve "
    wanted += "weights gram gae group_normalize"
    missing = {f"{name}_kernel" for name in wanted.split()} - kernels
    assert not missing, missing
    _check(found)
