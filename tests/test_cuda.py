"""The CUDA backend as far as a machine without a GPU can prove it.

The kernels run on the host, thread by thread, under the property tests of the public functions; the module
that nvcc built loads without a device, says what is missing, and holds machine code without spills.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
from interpreter import needs_interpreter

TESTS = Path(__file__).parent
EMULATED = ("test_statistics.py", "test_weights.py", "test_min_norm.py")
# A device does not refuse what only reading a matrix could tell; and emulation is slow with many objectives.
LEFT_OUT = "not clearly_no_gram and not refused and not threads and not instruction_set"
QUICKLY = LEFT_OUT + " and not 70 and not 512 and not cvxpy and not priors_with_zeros"


def _pytest(arguments: list[str], **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the module."""
    return str(cuda_emulation.build(tmp_path_factory.mktemp("cuda")))


@pytest.mark.parametrize("file", EMULATED)
@pytest.mark.timeout(900)
def test_kernels_on_the_host(emulated: str, file: str) -> None:
    """As a user calls them, against the reference: any layout, stride and dtype."""
    which = "(certified or dependent) and " + QUICKLY if file == "test_min_norm.py" else QUICKLY
    arguments = ["-p", "cuda_emulation", "-m", "not slow", "-k", which, file]
    said = _pytest(arguments, PAMA_CUDA_EMULATED=emulated, HYPOTHESIS_PROFILE="quick")
    assert int(re.findall(r"(\d+) passed", said)[0]) > 20, said


@needs_interpreter
def test_weights_of_the_batch_take_both_backends(emulated: str) -> None:
    environment = {"PAMA_CUDA_EMULATED": emulated, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "cuda_two_passes.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "both passes ran" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", EMULATED)
@pytest.mark.timeout(3600)
def test_kernels_on_the_host_thoroughly(emulated: str, file: str) -> None:
    arguments = ["-p", "cuda_emulation", "-k", LEFT_OUT, file]
    _pytest(arguments, PAMA_CUDA_EMULATED=emulated, HYPOTHESIS_PROFILE="default")


@pytest.mark.timeout(600)
def test_the_stages_of_test_gpu_run() -> None:
    """`make test-gpu` and what it starts, without a GPU."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "run_gpu.py"), "--device", "cpu", "--installed", "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "every kernel ran" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_the_gpu_runs(tmp_path: Path) -> None:
    """`make bench-gpu` on small sizes on the CPU: every row, the CSV and the plot."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(tmp_path)]
    subprocess.run(command, cwd=TESTS.parent, check=True)
    written = (tmp_path / "gpu-dry-run.csv").read_text(encoding="utf-8")
    for work in (
        "ceiling",
        "statistics and weights",
        "pama_loss per token",
        "min_norm_weights",
        "policy step",
    ):
        assert work in written


def _module() -> str:
    """The path of the module that nvcc built."""
    found = importlib.util.find_spec("pama_kernels._cuda")
    if found is None or found.origin is None:
        if shutil.which("nvcc") is None:
            pytest.skip("no nvcc: pama_kernels._cuda is not built")
        pytest.fail("nvcc is here, but pama_kernels._cuda was not built: install the package again")
    return found.origin


def test_the_module_loads_without_a_device() -> None:
    _module()
    from pama_kernels import _cuda

    info = _cuda.build_info()
    assert not info["emulated"]
    assert float(str(info["cuda"])) >= 11.8
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    assert _cuda.device_problem(), "no device, and no reason"
    with pytest.raises(RuntimeError, match=r"^CUDA: .*(driver|device)"):
        _cuda.batch_weights(0, 2, (False, 0, 0.0, False, 0, 0, 0), 0, 0)
    from pama_kernels.backends import cuda

    assert cuda.unusable("cpu")
    assert cuda.unusable("cuda")


def _cuobjdump() -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not Path(tool).exists():
        pytest.skip("no cuobjdump")
    return tool


def test_no_kernel_spills() -> None:
    """Registers of every kernel as the machine code has them; nothing of theirs is in local memory."""
    module = _module()
    said = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", module], capture_output=True, text=True, check=True
    ).stdout
    architecture, kernels = "", {}
    for line in said.splitlines():
        if line.startswith("arch ="):
            architecture = line.split("=")[1].strip()
        found = re.search(r"Function (\S+?):", line)
        if found:
            name = found[1]
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        if usage:
            kernels[architecture, name] = [int(x) for x in usage.groups()]
    assert kernels, said[:2000]
    wanted = str(importlib.import_module("pama_kernels._cuda").build_info()["architectures"])
    for number in re.findall(r"\d+", wanted):
        names = [name for place, name in kernels if place == f"sm_{number}"]
        assert sum("statistics_kernel" in name for name in names) == 7, number
        assert any("min_norm_kernel" in name for name in names), number
    for (place, name), (registers, stack, shared, local) in sorted(kernels.items()):
        print(f"{place} {registers:>3} registers {shared:>5} bytes shared  {name}")
        if (
            "min_norm_kernel" in name
        ):  # printed only: it takes all 255 registers, and is not one of microseconds
            continue
        assert local == 0, f"{name} spills on {place}"
        assert stack == 0, f"{name} has a stack of {stack} bytes on {place}"
        if "statistics_kernel" in name:
            assert registers <= 168, f"{name} on {place}: fewer than three blocks fit a multiprocessor"
