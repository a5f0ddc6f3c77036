"""`statistics` and `batch_weights`, and both in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pama_kernels import _cuda
from pama_kernels._codes import statistics_size
from pama_kernels.backends._counter import counter
from pama_kernels.backends._native import token_problem

from .launch import doubles, processors, stream_of

_BLOCKS_PER_PROCESSOR = 3  # as csrc/cuda/statistics.cuh has it


def _solution(n: int, wide: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    return (
        torch.empty(n, dtype=dtype, device=like.device),
        torch.empty((), dtype=dtype, device=like.device),
    )


def _statistics(
    like: Tensor, problem: tuple[object, ...], objectives: int, pairs: bool, solve: tuple[object, ...] | None
) -> Tensor:
    stream = stream_of(like)
    most = _BLOCKS_PER_PROCESSOR * processors(stream[0])
    sums = doubles(statistics_size(objectives, pairs), like)
    partials = doubles(_cuda.statistics_partials(problem, pairs, most), like)
    count = counter(like.device)
    _cuda.statistics(
        problem, pairs, most, partials.data_ptr(), count.data_ptr(), sums.data_ptr(), solve, *stream
    )
    return sums


def statistics(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: Sequence[int],
    clip: Sequence[float],
    noon: bool,
    gram: bool,
) -> Tensor:
    problem = token_problem(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective_mask,
        importance_weights,
        None,
        cu_seqlens,
        layout,
        clip,
        noon,
    )
    return _statistics(advantages, problem, advantages.shape[-1], gram, None)


def statistics_weights(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: Sequence[int],
    clip: Sequence[float],
    noon: bool,
    pairs: bool,
    gram: bool,
    prior: Tensor,
    regularization: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the batch, the optimum, and the statistics: one launch (two with `gram`)."""
    n = advantages.shape[-1]
    problem = token_problem(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective_mask,
        importance_weights,
        None,
        cu_seqlens,
        layout,
        clip,
        noon,
    )
    weights, optimum = _solution(n, wide, advantages)
    work = doubles(_cuda.solve_work(n, gram), advantages)
    solve = (
        gram,
        prior.data_ptr(),
        regularization,
        wide,
        weights.data_ptr(),
        optimum.data_ptr(),
        work.data_ptr(),
    )
    sums = _statistics(advantages, problem, n, pairs, solve)
    return weights, optimum, sums


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    weights, optimum = _solution(objectives, wide, sums)
    work = doubles(_cuda.solve_work(objectives, gram), sums)
    solve = (
        gram,
        prior.data_ptr(),
        regularization,
        wide,
        weights.data_ptr(),
        optimum.data_ptr(),
        work.data_ptr(),
    )
    _cuda.batch_weights(sums.data_ptr(), objectives, solve, *stream_of(sums))
    return weights, optimum
