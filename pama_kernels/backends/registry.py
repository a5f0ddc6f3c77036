"""Selects the backend for a tensor. There is one record per backend; dispatch and the `info` command read it.

For each function and device type, dispatch uses the first backend of `BACKENDS` that lists the device and the
function, can be imported and is usable there. A backend may therefore implement only some functions, and the
next backend is used for the others; a backend that handles only some calls of a function passes the others on
with `find(..., after=its name)`. The environment variable `PAMA_BACKEND` names the first backend to try (with
PAMA_BACKEND=cuda, triton is still used for functions that cuda lacks); that backend must be usable.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pama_kernels._call import Number, Outputs, Results, Rule, Tokens

from .arguments import Gae

SOLVERS = ("weights", "min_norm", "upgrad")
ALL = ("statistics", "solve", "apply", *SOLVERS, "gae", "group_normalize")
SOLVED = "apply_solved"  # the second pass of `apply`, which a backend may leave to the next one

Solution = tuple[Tensor, Tensor]  # weights, optimum


class Functions(Protocol):
    """The functions of a backend's module. `preference` is (N,) float64 on the simplex, or None for uniform.

    The solvers of many problems write into `result` and `optimum`, contiguous and in `result_dtype`.
    """

    def statistics(self, tokens: Tokens, pairs: bool) -> Tensor: ...
    def solve(
        self, sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (N,), optimum and the preference over the objectives with a signal (N,), in float64."""

    def apply(
        self,
        tokens: Tokens,
        rule: Rule,
        preference: Tensor | None,
        weights: Tensor | None,
        outputs: Outputs,
    ) -> Results: ...
    def apply_solved(
        self,
        tokens: Tokens,
        outputs: Outputs,
        results: Results,
        effective: Tensor | None,
        factors: Tensor | None,
    ) -> None:
        """The second pass of `apply`. Writes into `results`, which has the weights per batch and the
        statistics.

        effective: the preference (N,) normalised over the objectives with a signal; with an objective mask,
            weights are divided by its sum over the objectives present.
        factors: optional, (B, 3): for each sequence the sums of c_i A_i over its positive and over its
            negative advantages, and its token weight; advantages are then not read.

        `normalize` is ignored.
        """

    def weights(
        self,
        scores: Tensor,
        preference: Tensor | None,
        regularization: Number,
        scale: Tensor | None,
        result: Tensor,
        optimum: Tensor,
    ) -> None: ...
    def min_norm(
        self,
        gram: Tensor,
        preference: Tensor | None,
        regularization: Number,
        result: Tensor,
        optimum: Tensor,
    ) -> None: ...
    def upgrad(self, gram: Tensor, preference: Tensor | None, result: Tensor, optimum: Tensor) -> None: ...
    def gae(self, problem: Gae) -> tuple[Tensor, Tensor]: ...
    def group_normalize(
        self, rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    name: str  # of its module in this package
    devices: tuple[str, ...]
    functions: tuple[str, ...]
    probe: Callable[[ModuleType, str], str]  # details for a device type; raises RuntimeError where unusable
    extension: str | None = None  # the native module that it needs
    floats_only: bool = False  # calls with settings that are tensors go to the next backend


def _probe_cpu(module: ModuleType, device_type: str) -> str:
    build: dict[str, Any] = module.build_info()
    openmp = "OpenMP" if build["openmp"] else "no OpenMP: one thread"
    return f"{build['isa']} (built: {', '.join(build['isas'])}), {openmp}, {build['compiler']}"


def _probe_triton(module: ModuleType, device_type: str) -> str:
    reason: str | None = module.unusable(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    return "interpreter on the CPU (TRITON_INTERPRET=1)" if device_type == "cpu" else gpus()


def _probe_cuda(module: ModuleType, device_type: str) -> str:
    build: dict[str, Any] = module.build_info()
    built = f"CUDA {build['cuda']}, architectures {build['architectures']}"
    reason: str | None = module.unusable(device_type)
    if reason is not None:
        raise RuntimeError(f"{reason} ({built})")
    return f"{gpus()} ({built})"


def gpus() -> str:
    """Names of the GPUs that torch finds."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


# Best first for each device type.
BACKENDS = (
    Backend("cpu", ("cpu",), ALL, _probe_cpu, extension="_cpu"),
    Backend(
        "cuda", ("cuda",), ("statistics", "solve", "apply", *SOLVERS), _probe_cuda, "_cuda", floats_only=True
    ),
    Backend("triton", ("cuda", "cpu"), (*ALL, SOLVED), _probe_triton),
)


@functools.lru_cache(maxsize=64)
def load(name: str, device_type: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be used on this type of device."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    if device_type not in backend.devices:
        return f"does not serve {device_type!r}"
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        backend.probe(module, device_type)
    except (ImportError, RuntimeError) as error:
        return str(error)
    return module


def built(backend: Backend) -> bool:
    """Whether the backend is part of this installation."""
    return importlib.util.find_spec(f"{__package__}.{backend.extension or backend.name}") is not None


def candidates(device_type: str) -> tuple[Backend, ...]:
    """The backends to try, best first."""
    row = tuple(backend for backend in BACKENDS if device_type in backend.devices)
    forced = os.environ.get("PAMA_BACKEND")
    if not forced:
        return row
    if all(backend.name != forced for backend in BACKENDS):
        known = ", ".join(sorted(backend.name for backend in BACKENDS))
        raise ValueError(f"PAMA_BACKEND: expected one of {known}, got {forced!r}")
    names = [backend.name for backend in row]
    return row[names.index(forced) :] if forced in names else ()


@functools.lru_cache(maxsize=256)
def find(device_type: str, function: str, tensors: bool = False, after: str = "") -> Functions:
    """The first backend that has this function on this type of device. tensors: whether some setting is a
    tensor. after: only consider backends behind the one with this name."""
    forced = os.environ.get("PAMA_BACKEND")
    reasons = ""
    row = candidates(device_type)
    names = [backend.name for backend in row]
    for backend in row[names.index(after) + 1 :] if after in names else row:
        module = load(backend.name, device_type)
        if isinstance(module, str):
            reasons += f"; {backend.name}: {module}"
            if backend.name == forced:
                break
        elif function in backend.functions and not (tensors and backend.floats_only):
            return cast(Functions, module)
        else:
            reasons += f"; {backend.name}: does not have {function!r}"
    raise RuntimeError(
        f"no backend implements {function!r} on device type {device_type!r}"
        + (f" behind {after}, which leaves it to the next" if after else "")
        + (f" with PAMA_BACKEND={forced}" if forced else "")
        + reasons
        + "; `python -m pama_kernels info` lists what is built and why not"
    )
