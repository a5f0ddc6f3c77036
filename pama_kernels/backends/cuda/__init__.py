"""The CUDA backend: statistics with the weights of the batch in one launch, and the batched solvers.

What nvcc built as `pama_kernels._cuda`. Kernels run on the current stream of the tensors' device, in memory
that torch allocates; nothing waits for the device. The second pass of `combine` and `loss` is Triton's;
without Triton they are not there. The other operators are left to the next backend.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from pama_kernels import _cuda

from .solvers import min_norm, min_norm_out, weights, weights_out
from .statistics import batch_weights, statistics

with contextlib.suppress(ImportError):
    from .passes import combine, loss

__all__ = [
    "batch_weights",
    "combine",
    "loss",
    "min_norm",
    "min_norm_out",
    "statistics",
    "unusable",
    "weights",
    "weights_out",
]


@functools.lru_cache(maxsize=4)
def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on this type of device; None where they can."""
    if device_type != "cuda":
        return f"runs on CUDA tensors only, not on {device_type!r}"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    problem: str = _cuda.device_problem()
    if problem:
        return problem
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"needs compute capability 8.0 or higher, {name} has {major}.{minor}"
    return None
