"""The CUDA backend as far as a machine without a GPU can prove it.

The module that nvcc built loads without a device, says what is missing, and holds machine code that
does not spill.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pama_kernels._call import Kind, Rule, WeightsPer

SOLVERS = ("matrices_kernel", "matrix_kernel", "sequences_kernel")
ARCHITECTURES = re.compile(r"\d+")


def _module() -> str:
    """The path of the module that nvcc built."""
    found = importlib.util.find_spec("pama_kernels.backends._cuda")
    if found is None or found.origin is None:
        pytest.skip("the CUDA module is not built")
    return found.origin


def test_the_module_loads_without_a_device() -> None:
    _module()
    from pama_kernels.backends import _cuda, cuda

    info = _cuda.build_info()
    assert not info["emulated"]
    assert float(str(info["cuda"])) >= 11.8
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    assert _cuda.device_problem(), "no device, and no reason"
    sums, rule = torch.zeros(20).double(), Rule(Kind.FIXED, WeightsPer.BATCH, 0.0)
    with pytest.raises(RuntimeError, match=r"^CUDA: .*(driver|device)"):
        _cuda.solve(sums, 2, rule, None, (torch.zeros(5).double(),), (0, 1, 0))
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
    command = [_cuobjdump(), "--dump-resource-usage", module]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architecture, kernels = "", {}
    for line in printed.splitlines():
        if line.startswith("arch ="):
            architecture = line.split("=")[1].strip()
        found = re.search(r"Function (\S+?):", line)
        if found:
            name = found[1]
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        if usage:
            kernels[architecture, name] = [int(x) for x in usage.groups()]
    assert kernels, printed[:2000]
    from pama_kernels.backends import _cuda

    for number in ARCHITECTURES.findall(str(_cuda.build_info()["architectures"])):
        names = [name for place, name in kernels if place == f"sm_{number}"]
        for kernel in ("flat_kernel", "tokens_kernel", "row_sums_kernel", "rows_kernel", *SOLVERS):
            assert any(kernel in name for name in names), (kernel, number)
    for (place, name), (registers, stack, shared, local) in sorted(kernels.items()):
        print(f"{place} {registers:>3} registers {shared:>5} bytes shared  {name}")
        if any(kernel in name for kernel in SOLVERS):  # printed only: their solvers take all registers
            continue
        assert local == 0, f"{name} spills on {place}"
        # the frame of a call out of line; two numbers kept outside the main loop (benchmarks/gpu_code.py)
        most = 64 if "flat_kernel" in name else 16 if "row_sums_kernel" in name else 0
        assert stack <= most, f"{name} has a stack of {stack} bytes on {place}"
