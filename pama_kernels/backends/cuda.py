"""The CUDA C++ backend: statistics, the weights of a batch, and the batched solvers.

Kernels run on the current stream of the tensors' device, in memory that torch allocates; nothing waits for
the device. Passes that apply weights, and settings that are tensors, are left to the next backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pama_kernels._call import Number, Rule, Tokens

from . import _cuda
from ._counter import counter
from .native import computed, scale_of_rows

build_info = _cuda.build_info
if hasattr(Tensor, "__dlpack_c_exchange_api__"):
    _cuda.use_exchange(Tensor.__dlpack_c_exchange_api__)

Batch = tuple[Tensor, Tensor, Tensor]  # weights, optimum, effective preference


@functools.lru_cache(maxsize=4)
def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on this type of device; None where they can."""
    if device_type != "cuda":
        return f"runs on CUDA tensors only, not on {device_type!r}"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    problem = _cuda.device_problem()
    if problem:
        return problem
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"needs compute capability 8.0 or higher, {name} has {major}.{minor}"
    return None


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _where(x: Tensor) -> _cuda.Where:
    device: int = x.get_device()
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return device, _multiprocessors(device), stream


def _memory(like: Tensor) -> Callable[[int], Tensor]:
    return lambda count: torch.empty(count, dtype=torch.float64, device=like.device)


def _batch(objectives: int, like: Tensor) -> Batch:
    buffer = torch.empty(2 * objectives + 1, dtype=torch.float64, device=like.device)
    return buffer[:objectives], buffer[2 * objectives], buffer[objectives : 2 * objectives]


# --- statistics and the weights of a batch ------------------------------------------------------------


def statistics(tokens: Tokens, pairs: bool) -> Tensor:
    like = tokens.advantages
    count = counter(like.device)
    return _cuda.statistics(tokens, pairs, None, None, None, count, _memory(like), _where(like))


def statistics_and_scores(
    tokens: Tokens, rule: Rule, preference: Tensor | None, pairs: bool = False
) -> tuple[Tensor, Batch]:
    """Statistics and, of the kinds FIXED and SCORES, the weights of the batch, in one launch."""
    like = tokens.advantages
    batch, count = _batch(tokens.objectives, like), counter(like.device)
    sums = _cuda.statistics(tokens, pairs, rule, preference, batch, count, _memory(like), _where(like))
    return sums, batch


def solve(sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int) -> Batch:
    batch, given = _batch(objectives, sums), sums.contiguous()
    _cuda.solve(given, objectives, rule, preference, batch, _memory(sums), _where(sums))
    return batch


# --- many problems ------------------------------------------------------------------------------------


def weights(
    scores: Tensor,
    preference: Tensor | None,
    regularization: Number,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    rows, sizes = computed(scores).reshape(-1, scores.shape[-1]), scale_of_rows(scale, scores)
    memory, where = _memory(rows), _where(rows)
    _cuda.weights(rows, preference, float(regularization), sizes, result, optimum, memory, where)


def _matrices(
    solver: Callable[..., None],
    gram: Tensor,
    preference: Tensor | None,
    regularization: Number,
    result: Tensor,
    optimum: Tensor,
) -> None:
    matrices = computed(gram).reshape(-1, *gram.shape[-2:])
    memory, where = _memory(matrices), _where(matrices)
    solver(matrices, preference, float(regularization), result, optimum, memory, where)


def min_norm(
    gram: Tensor, preference: Tensor | None, regularization: Number, result: Tensor, optimum: Tensor
) -> None:
    _matrices(_cuda.min_norm, gram, preference, regularization, result, optimum)


def upgrad(gram: Tensor, preference: Tensor | None, result: Tensor, optimum: Tensor) -> None:
    _matrices(_cuda.upgrad, gram, preference, 0.0, result, optimum)
