"""The weights of a batch from its statistics: signal, effective preference, then the rule.

    FIXED c = p;  SCORES the scalar problem on a_i = mean I_i;  GRAM min-norm on the cosines of I;  UPGRAD on
    its Gram matrix M_ij = sum I_i I_j / sqrt(count_i count_j)

p is the preference normalised over the objectives with a signal; the other objectives get weight 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Kind, Rule

from .launch import check_memory, launch, number, number_of, options_of, power_of_two
from .min_norm import UPGRAD as PROJECTIONS
from .min_norm import check_objectives, min_norm_of, upgrad_of
from .simplex import normalised, preference_of, solve_scaled
from .terms import (
    ADVANTAGE_SUM,
    BOUND_SQUARE_SUM,
    BOUND_SUM,
    COUNT,
    FIELD_COUNT,
    POSITIVE_COUNT,
    TOTAL_COUNT,
)
from .trace import strides

FIXED, SCORES = tl.constexpr(int(Kind.FIXED)), tl.constexpr(int(Kind.SCORES))
GRAM, UPGRAD = tl.constexpr(int(Kind.GRAM)), tl.constexpr(int(Kind.UPGRAD))


@triton.jit
def ratio(total, count):
    """total / count, the mean over the tokens where the objective is present; 0 if there are none."""
    return tl.where(count != 0, total / tl.where(count != 0, count, 1.0), 0.0)


@triton.jit
def scores_of(sums, n: tl.constexpr, N: tl.constexpr):
    """count and mean I (N,)."""
    i = tl.arange(0, N)
    count = tl.load(sums + COUNT * n + i, mask=i < n, other=0.0)
    return count, ratio(tl.load(sums + BOUND_SUM * n + i, mask=i < n, other=0.0), count)


@triton.jit
def _root(x):
    return tl.sqrt(tl.where(x > 0.0, x, 1.0))


@triton.jit
def batch_weights(
    sums,
    preference,
    regularization,
    n: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    PROBLEMS: tl.constexpr,
):
    """Weights (N,), optimum (1,) and effective preference (N,) of a buffer."""
    i = tl.arange(0, N)
    here = i < n
    count, score = scores_of(sums, n, N)
    square = tl.load(sums + BOUND_SQUARE_SUM * n + i, mask=here, other=0.0)
    positive = tl.load(sums + POSITIVE_COUNT * n + i, mask=here, other=0.0)
    advantage = tl.load(sums + ADVANTAGE_SUM * n + i, mask=here, other=0.0)
    signal = here & (count > 0) & ((positive > 0) | (advantage != 0))
    if KIND == GRAM:
        signal = signal & (square != 0)
    given = preference_of(preference, n, N)
    keep = tl.where(signal, 1.0, tl.zeros_like(given))[None, :]
    mass = tl.sum(tl.where(signal, given, 0.0), axis=0)
    effective = given
    if mass > 0:
        effective = tl.sum(normalised(given[None, :], keep), axis=0)
    if KIND == FIXED:
        c = effective
        best = tl.sum(c * score, axis=0)[None]
    elif KIND == SCORES:
        moments = tl.where(signal, ratio(square, count), 0.0)[None, :]
        c, best = solve_scaled(score[None, :], moments, given[None, :], signal[None, :], regularization, N)
        best = tl.sum(best, axis=1)
        c = tl.sum(c, axis=0)
    else:
        pairs = sums + FIELD_COUNT * n + TOTAL_COUNT
        both = signal[:, None] & signal[None, :]
        m = tl.load(pairs + i[:, None] * n + i[None, :], mask=both, other=0.0)
        if KIND == GRAM:
            diagonal = i[:, None] == i[None, :]
            own = tl.where(square == square, square, 1.0)
            m = tl.where(diagonal & (m == m), 1.0, m / _root(own)[:, None] / _root(own)[None, :])
            c, best = min_norm_of(
                tl.where(both, m, 0.0)[None, :, :], signal[None, :], given[None, :], regularization, n, N
            )
        else:
            m = m / _root(count)[:, None] / _root(count)[None, :]
            c, best = upgrad_of(m[None, :, :], signal[None, :], given[None, :], n, N, PROBLEMS)
        c = tl.sum(c, axis=0)
    none_present = tl.max(signal.to(tl.int32), axis=0) == 0
    return tl.where(none_present, given, c), tl.where(none_present, 0.0, best), effective


@triton.jit
def store_batch_weights(
    sums,
    preference,
    regularization,
    weights,
    optimum,
    effective,
    n: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    PROBLEMS: tl.constexpr,
):
    c, best, p = batch_weights(sums, preference, regularization, n, N, KIND, PROBLEMS)
    i = tl.arange(0, N)
    tl.store(weights + i, c, mask=i < n)
    tl.store(optimum + tl.zeros([1], tl.int32), best)
    tl.store(effective + i, p, mask=i < n)


@triton.jit
def solve_kernel(
    sums, preference, value: tl.float64, at, weights, optimum, effective,
    n: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, PROBLEMS: tl.constexpr,
):  # fmt: skip
    store_batch_weights(
        sums, preference, number_of(value, at), weights, optimum, effective, n, N, KIND, PROBLEMS
    )


def solve_into(
    sums: Tensor,
    rule: Rule,
    preference: Tensor | None,
    n: int,
    weights: Tensor,
    optimum: Tensor,
    effective: Tensor,
) -> None:
    kind, block = int(rule.kind), power_of_two(n)
    matrix = kind in (Kind.GRAM, Kind.UPGRAD)
    if matrix:
        check_objectives(n)
    problems, warps = PROJECTIONS[block] if matrix else (0, 1)
    options = options_of(n=n, N=block, KIND=kind, PROBLEMS=problems, num_warps=warps)
    launch(
        solve_kernel, sums.device, 1, options, sums, preference, *number(rule.number), weights, optimum,
        effective,
    )  # fmt: skip


Solution = tuple[Tensor, Tensor, Tensor]


def empty_solution(sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int) -> Solution:
    weights = torch.empty(objectives, dtype=torch.float64, device=sums.device)
    optimum = torch.empty((), dtype=torch.float64, device=sums.device)
    return weights, optimum, torch.empty_like(weights)


def solve(sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int, result: Solution) -> None:
    check_memory(sums=sums, preference=preference)
    if strides(sums)[0] != 1:
        sums = sums.contiguous()
    solve_into(sums, rule, preference, objectives, *result)
