"""`statistics` and `batch_weights`, and both in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_kernels import _cuda
from pama_kernels._codes import statistics_size
from pama_kernels.backends._counter import counter
from pama_kernels.backends._native import token_problem
from pama_kernels.backends.inputs import TokenInputs

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


def _statistics(given: TokenInputs, pairs: bool, solve: tuple[object, ...] | None) -> Tensor:
    like, problem = given.advantages, token_problem(given)
    stream = stream_of(like)
    most = _BLOCKS_PER_PROCESSOR * processors(stream[0])
    sums = doubles(statistics_size(given.objectives, pairs), like)
    partials = doubles(_cuda.statistics_partials(problem, pairs, most), like)
    count = counter(like.device)
    _cuda.statistics(
        problem, pairs, most, partials.data_ptr(), count.data_ptr(), sums.data_ptr(), solve, *stream
    )
    return sums


def statistics(given: TokenInputs, gram: bool) -> Tensor:
    return _statistics(given, gram, None)


def statistics_weights(
    given: TokenInputs, pairs: bool, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the batch, the optimum, and the statistics: one launch (two with `gram`)."""
    solve = _Solve(given.objectives, gram, prior, regularization, wide, given.advantages)
    sums = _statistics(given, pairs, solve.arguments)
    return solve.weights, solve.optimum, sums


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    solve = _Solve(objectives, gram, prior, regularization, wide, sums)
    _cuda.batch_weights(sums.data_ptr(), objectives, solve.arguments, *stream_of(sums))
    return solve.weights, solve.optimum
