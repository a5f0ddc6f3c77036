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


class _Solve:
    """The weights and optimum of a batch to be solved for, and what the native module takes to do it."""

    def __init__(
        self, n: int, gram: bool, prior: Tensor, regularization: float, wide: bool, like: Tensor
    ) -> None:
        dtype = torch.float64 if wide else torch.float32
        self.weights = torch.empty(n, dtype=dtype, device=like.device)
        self.optimum = torch.empty((), dtype=dtype, device=like.device)
        self.work = doubles(_cuda.solve_work(n, gram), like)
        places = (self.weights.data_ptr(), self.optimum.data_ptr(), self.work.data_ptr())
        self.arguments = (gram, prior.data_ptr(), regularization, wide, *places)


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
    solve = _Solve(n, gram, prior, regularization, wide, advantages)
    sums = _statistics(advantages, problem, n, pairs, solve.arguments)
    return solve.weights, solve.optimum, sums


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    solve = _Solve(objectives, gram, prior, regularization, wide, sums)
    _cuda.batch_weights(sums.data_ptr(), objectives, solve.arguments, *stream_of(sums))
    return solve.weights, solve.optimum
