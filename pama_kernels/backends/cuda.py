"""The CUDA C++ backend: statistics, the weights of a batch, and the batched solvers.

Kernels run on the current stream of the tensors' device, in memory that torch allocates; no call synchronises
with the device. `apply` handles weights per batch: it computes statistics and weights and, with advantages
per sequence, the combined advantages, in one launch; a pass that writes per-token results is left to the next
backend. Calls with any other weights, or with settings that are tensors, are passed on to the next backend
completely.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pama_kernels._call import (
    Number,
    Outputs,
    Results,
    Rule,
    Tokens,
    WeightsPer,
    statistics_size,
)

from . import _cuda
from ._counter import counter
from .native import computed, scale_of_rows
from .normalize import with_normalize
from .operators import NOTHING, dtype_of_results, empty_loss, empty_results
from .registry import SOLVED, find

build_info = _cuda.build_info
if hasattr(Tensor, "__dlpack_c_exchange_api__"):
    _cuda.use_exchange(Tensor.__dlpack_c_exchange_api__)


@functools.lru_cache(maxsize=4)
def unusable(device_type: str) -> str | None:
    """The reason why these kernels cannot run on this type of device, or None."""
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


def _batch(objectives: int, like: Tensor) -> Tensor:
    """For weights, effective preference and optimum."""
    return torch.empty(2 * objectives + 1, dtype=torch.float64, device=like.device)


# --- statistics and the weights of a batch ------------------------------------------------------------


def _sequences(
    tokens: Tokens,
    rule: Rule | None,
    preference: Tensor | None,
    asked: tuple[bool, bool, bool, bool, bool],
) -> _cuda.Sequences | None:
    """Computes a call with advantages per sequence in one launch; None if one launch cannot. `asked`: pairs,
    combined advantages, those normalized, factors for the loss, weights in float64."""
    if not tokens.per_sequence:
        return None
    like = tokens.advantages
    return _cuda.sequences(tokens, rule, preference, asked, counter(like.device), _where(like))


def statistics(tokens: Tokens, pairs: bool) -> Tensor:
    found = _sequences(tokens, None, None, (pairs, False, False, False, False))
    if found is not None:
        return found[3]
    like = tokens.advantages
    size = statistics_size(tokens.objectives, pairs)
    sums = torch.empty(size, dtype=torch.float64, device=like.device)
    _cuda.statistics(tokens, pairs, sums, None, None, None, counter(like.device), _where(like))
    return sums


def solve(
    sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, given, n = _batch(objectives, sums), sums.contiguous(), objectives
    _cuda.solve(given, n, rule, preference, (batch,), _where(sums))
    return batch[:n], batch[2 * n], batch[n : 2 * n]


# --- weights of the batch, applied --------------------------------------------------------------------


def apply(
    tokens: Tokens, rule: Rule, preference: Tensor | None, weights: Tensor | None, outputs: Outputs
) -> Results:
    if weights is not None or rule.weights_per != WeightsPer.BATCH:
        following = find(tokens.advantages.device.type, "apply", after="cuda")
        return following.apply(tokens, rule, preference, weights, outputs)
    dtype = dtype_of_results(tokens, outputs)
    asked = outputs.pairs, outputs.advantages, outputs.normalize, outputs.loss, dtype is torch.float64
    found = _sequences(tokens, rule, preference, asked)
    if found is None:
        return _apply_by_token(tokens, rule, preference, None, outputs)
    combined, c, optimum, sums, square, factors = found
    assert c is not None
    assert optimum is not None
    assert square is not None
    loss, gradient = empty_loss(tokens, outputs, optimum)
    results = Results(NOTHING if combined is None else combined, loss, gradient, c, optimum, sums, square)
    if outputs.loss:
        if outputs.advantages:
            outputs = outputs._replace(advantages=False)
        _second_pass(tokens, outputs, results, None, factors)
    return results


@with_normalize
def _apply_by_token(
    tokens: Tokens, rule: Rule, preference: Tensor | None, weights: Tensor | None, outputs: Outputs
) -> Results:
    like, n = tokens.advantages, tokens.objectives
    batch, results = _batch(n, like), empty_results(tokens, rule, weights, outputs)
    rounded = batch, results.weights, results.optimum
    _cuda.statistics(
        tokens, outputs.pairs, results.sums, rule, preference, rounded, counter(like.device), _where(like)
    )
    effective = None if tokens.objective_mask is None else batch[n : 2 * n]
    _second_pass(tokens, outputs, results, effective, None)
    return results


def _second_pass(
    tokens: Tokens, outputs: Outputs, results: Results, effective: Tensor | None, factors: Tensor | None
) -> None:
    following = find(tokens.advantages.device.type, SOLVED, after="cuda")
    following.apply_solved(tokens, outputs, results, effective, factors)


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
