"""pytest plugin (`-p cuda_emulation`): the CUDA backend serves CPU tensors; its kernels run on the host.

`PAMA_CUDA_EMULATED` names the module that `build` made: csrc/cuda compiled as plain C++ against
csrc/cuda/emulation.hpp. Only what asks PyTorch about the device is replaced; the backend's Python is its own.
`python cuda_emulation.py FOLDER` builds it there and prints its path.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = ("module.cpp", "sequences.cu", "statistics.cu", "weights.cu", "min_norm.cu", "upgrad.cu")


def build(folder: Path, *options: str) -> Path:
    """Compiles the emulated module (half a minute). `-DPAMA_CUDA_IDLE`: its launches run nothing."""
    import pybind11

    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        *options,
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    command += ["-DPAMA_CUDA_EMULATION=1", "-DPAMA_CUDA_THREADS=64", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command += ["-x", "c++", *(str(ROOT / "csrc" / "cuda" / name) for name in SOURCES), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def apply_solved(
    cpu: Any, tokens: Any, outputs: Any, results: Any, effective: Tensor | None, factors: Tensor | None
) -> None:
    """The second pass, where Triton has one: here by the whole pass of the CPU backend.

    Factors of sequences are the positive and the negative advantage of two objectives that are added up.
    """
    from pama_kernels._call import Kind, Rule, WeightsPer

    weights = results.weights
    if factors is not None:
        tokens = tokens._replace(advantages=factors[:, :2], objective_mask=None, noon=False)
        weights = torch.ones(2, dtype=torch.float64)
    kind = Kind.SOLVED if factors is None else Kind.GIVEN
    rule = Rule(kind, WeightsPer.BATCH, 0.0)
    given = outputs._replace(normalize=False, pairs=False)
    made = cpu.apply(tokens, rule, effective, weights, given)
    for name in ("advantages", "loss", "gradient") if factors is None else ("loss", "gradient"):
        if getattr(outputs, name):
            getattr(results, name).copy_(getattr(made, name))
    if factors is None:
        results.square_sum.copy_(made.square_sum)


def serve(second_pass: str = "cpu") -> None:
    """`second_pass`: the backend that follows this one."""
    name = "pama_kernels.backends._cuda"
    spec = importlib.util.spec_from_file_location(name, os.environ["PAMA_CUDA_EMULATED"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info()["emulated"]
    sys.modules[name] = module

    setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)  # noqa: B010
    properties = SimpleNamespace(multi_processor_count=3)
    setattr(torch.cuda, "get_device_properties", lambda device: properties)  # noqa: B010

    from pama_kernels import backends
    from pama_kernels.backends import registry

    setattr(backends, "_cuda", module)  # noqa: B010
    from pama_kernels.backends import cuda

    cpu, native, *others = registry.BACKENDS
    assert native.name == "cuda"
    emulated = replace(native, devices=("cpu", "cuda"), probe=lambda module, device: "emulated")
    if second_pass == "cpu":
        from pama_kernels.backends import cpu as following

        setattr(following, registry.SOLVED, functools.partial(apply_solved, following))
        others = [replace(cpu, functions=(*cpu.functions, registry.SOLVED)), *others]
    setattr(registry, "BACKENDS", (emulated, *others))  # noqa: B010
    registry.load.cache_clear()
    registry.find.cache_clear()
    found: object = registry.find("cpu", "statistics")
    assert found is cuda


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(build(Path(sys.argv[1]).absolute()))
elif "PAMA_CUDA_EMULATED" in os.environ:
    serve()
