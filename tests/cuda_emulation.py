"""pytest plugin (`-p cuda_emulation`): the CUDA backend serves CPU tensors; its kernels run on the host.

`PAMA_CUDA_EMULATED` names the module that `build` made: csrc/cuda compiled as plain C++ against
csrc/cuda/emulation.hpp. Only what asks PyTorch about the device is replaced; the backend's Python is its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
SOURCES = ("module.cpp", "statistics.cu", "solvers.cu")


def build(folder: Path) -> Path:
    """Compiles the emulated module (half a minute)."""
    import pybind11

    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-DPAMA_CUDA_EMULATION=1", "-DPAMA_CUDA_THREADS=32", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command += ["-x", "c++", *(str(ROOT / "csrc" / "cuda" / name) for name in SOURCES), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def _serve() -> None:
    import torch

    spec = importlib.util.spec_from_file_location("pama_kernels._cuda", os.environ["PAMA_CUDA_EMULATED"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info()["emulated"]
    sys.modules["pama_kernels._cuda"] = module

    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]

    import pama_kernels

    pama_kernels._cuda = module  # type: ignore[attr-defined]
    from pama_kernels import backends
    from pama_kernels.backends import cuda

    cuda.unusable = lambda device_type: None  # type: ignore[assignment]
    cuda.quick_weights = cuda.quick_min_norm = lambda *arguments: None  # type: ignore[attr-defined]
    backends.BACKENDS["cpu"] = ("cuda", "cpu")
    backends.find.cache_clear()
    assert backends.find("cpu", "statistics") is cuda.statistics


if "PAMA_CUDA_EMULATED" in os.environ:
    _serve()
