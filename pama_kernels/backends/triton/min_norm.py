"""The min-norm problem and UPGrad on Gram matrices of up to 64 objectives.

min-norm:  minimise over c in the simplex  1/2 c'Mc + rho/2 ||c - p||^2,  rho = regularization * max_i M_ii
UPGrad:    c = sum_i c^(i) / its sum,  c^(i) = argmin of c'Mc over c >= p_i e_i

c^(i) = p_i (e_i + v) with v >= 0 minimising 1/2 v'Mv + (M_i)'v.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Number

from .active_set import any_of, minimise, multiply
from .launch import check_memory, launch, number, number_of, options_of, power_of_two
from .simplex import normalised, power_of_two_of, preference_of
from .tokens import read

MOST = 64  # objectives: larger tiles would spill registers
LARGEST_REGULARIZATION = tl.constexpr(1e100)  # above it c = p; the limit avoids an overflow

# by objectives (padded): problems to a program, and warps
_MIN_NORM = {1: (32, 1), 2: (8, 1), 4: (8, 2), 8: (2, 2), 16: (1, 2), 32: (1, 8), 64: (1, 8)}
UPGRAD = {1: (1, 1), 2: (2, 1), 4: (4, 1), 8: (8, 4), 16: (4, 4), 32: (2, 8), 64: (1, 8)}


def check_objectives(n: int) -> None:
    if n > MOST:
        raise ValueError(
            f"gram: expected at most {MOST} objectives on this backend, got {n}; solve it on the CPU"
        )


@triton.jit
def _prepared(m, present, p, BLOCK: tl.constexpr):
    """M symmetric and scaled to 1 <= max_i M_ii < 2, the scale, the preference over those present, M_ii;
    whether all is finite. M is 0 where that is not so, or no M_ii is positive."""
    row = tl.arange(0, BLOCK)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    both = present[:, :, None] & present[:, None, :]
    m = tl.where(both, 0.5 * m + 0.5 * tl.trans(m, 0, 2, 1), 0.0)
    finite = tl.sum(tl.sum(0.0 * m, 2), 1) == 0.0
    diagonal = tl.sum(tl.where(row == column, m, 0.0), 1)
    largest = tl.max(tl.where(diagonal > 0.0, diagonal, 0.0), 1)
    _, scale = power_of_two_of(tl.where(finite & (largest > 0.0), largest, 1.0))
    usable = finite & (largest > 0.0)
    m = tl.where(usable[:, None, None], m * scale[:, None, None], 0.0)
    diagonal = tl.where(usable[:, None], diagonal * scale[:, None], 0.0)
    p = normalised(p, present.to(tl.float64))
    return m, scale, p, diagonal, finite, usable


@triton.jit
def _optimum(m, c, scale):
    """c'Mc, clamped at 0 since rounding could make it negative."""
    value = tl.sum(c * multiply(m, c), 1) / scale
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def min_norm_of(m, present, p, regularization, N, BLOCK: tl.constexpr):
    """c (P, BLOCK) and c'Mc (P,) of M (P, BLOCK, BLOCK); NaN where an entry is not finite, or no solution is
    certified. If no objective is present, c = p. regularization: a float64 value."""
    m, scale, own, diagonal, finite, usable = _prepared(m, present, p, BLOCK)
    finite = finite & (0.0 * tl.sum(own, 1) + 0.0 * regularization == 0.0)
    part = present & (usable & finite)[:, None]
    largest = tl.max(diagonal, 1)
    factor = tl.where(regularization < LARGEST_REGULARIZATION, regularization, LARGEST_REGULARIZATION)
    weight = tl.where(finite, factor, 0.0) * largest
    c, failed = minimise(m, diagonal, part, own, p, tl.zeros_like(own), weight, N, BLOCK, True)
    value = _optimum(m, c, scale)
    good = finite & ~failed
    none_present = ~any_of(present)
    c = tl.where(good[:, None], tl.where(none_present[:, None], p, c), float("nan"))
    return c, tl.where(good, value, float("nan"))


@triton.jit
def upgrad_of(m, present, p, N, BLOCK: tl.constexpr, PROBLEMS: tl.constexpr):
    """The same by UPGrad, of one M (1, BLOCK, BLOCK), PROBLEMS projections at a time. No mass present: p."""
    index = tl.arange(0, BLOCK)[None, :]
    mass = tl.sum(tl.where(present, p, 0.0), 1)
    m, scale, own, diagonal, finite, usable = _prepared(m, present, p, BLOCK)
    finite = finite & (0.0 * mass == 0.0)
    c = tl.where(present, own, 0.0)
    failed = finite & ~finite
    for first in range(0, N, PROBLEMS):
        i = first + tl.arange(0, PROBLEMS)[:, None]
        share = tl.sum(tl.where(index == i, own, 0.0), 1)
        part = present & usable[:, None] & (share > 0.0)[:, None]
        chosen = (tl.arange(0, BLOCK)[None, :, None] == i[:, :, None]).to(tl.float64)
        q = tl.where(part, -tl.sum(m * chosen, 1), 0.0)
        zero = tl.zeros_like(q)
        v, lost = minimise(m, diagonal + zero, part, zero, zero, q, tl.sum(zero, 1), N, BLOCK, False)
        c += tl.sum(share[:, None] * v, 0)[None, :]
        failed = failed | (tl.max(lost.to(tl.int32), 0) > 0)
    c /= tl.sum(c, 1)[:, None]
    c = tl.where((mass > 0.0)[:, None], c, p)
    value = _optimum(m, c, scale)
    good = finite & ~failed
    return tl.where(good[:, None], c, float("nan")), tl.where(good, value, float("nan"))


@triton.jit(do_not_specialize=["stride", "row", "column", "rows"])
def gram_kernel(
    gram, stride: tl.int64, row: tl.int64, column: tl.int64, preference, value: tl.float64, at, weights,
    optimum,
    rows: tl.int64, n: tl.constexpr, PROBLEMS: tl.constexpr, N: tl.constexpr, PROJECTIONS: tl.constexpr,
):  # fmt: skip
    """PROJECTIONS > 0: UPGrad, with this many projections at a time and one matrix per program."""
    index = tl.arange(0, N).to(tl.int64)
    problem = tl.program_id(0).to(tl.int64) * PROBLEMS + tl.arange(0, PROBLEMS)
    here = problem < rows
    inside = here[:, None] & (index < n)[None, :]
    entry = index[:, None] * row + index[None, :] * column
    both = (index < n)[:, None] & (index < n)[None, :]
    if PROBLEMS == 1:  # two-dimensional, since that layout spills fewer registers
        m = read(gram + tl.program_id(0).to(tl.int64) * stride + entry, both, tl.float64)[None, :, :]
    else:
        at_entry = (gram + problem * stride)[:, None, None] + entry[None, :, :]
        m = read(at_entry, here[:, None, None] & both[None, :, :], tl.float64)
    p = preference_of(preference, n, N)[None, :] + tl.zeros([PROBLEMS, N], tl.float64)
    if PROJECTIONS > 0:
        c, best = upgrad_of(m, inside, p, n, N, PROJECTIONS)
    else:
        c, best = min_norm_of(m, inside, p, number_of(value, at), n, N)
    kept = weights.dtype.element_ty
    tl.store(weights + problem[:, None] * n + index[None, :], c.to(kept), inside)
    tl.store(optimum + problem, best.to(kept), here)


def _solve(
    gram: Tensor,
    preference: Tensor | None,
    regularization: Number,
    result: Tensor,
    optimum: Tensor,
    upgrad: bool,
) -> None:
    n = gram.shape[-1]
    check_objectives(n)
    if gram.numel() == 0:
        return
    check_memory(gram=gram, preference=preference, weights=result, optimum=optimum)
    source = gram.reshape(-1, n, n)
    block = power_of_two(n)
    problems, warps = (1, UPGRAD[block][1]) if upgrad else _MIN_NORM[block]
    projections = UPGRAD[block][0] if upgrad else 0
    options = options_of(n=n, PROBLEMS=problems, N=block, PROJECTIONS=projections, num_warps=warps)
    launch(
        gram_kernel, gram.device, triton.cdiv(source.shape[0], problems), options, source, *source.stride(),
        preference, *number(regularization), result, optimum, source.shape[0],
    )  # fmt: skip


def min_norm(
    gram: Tensor, preference: Tensor | None, regularization: Number, result: Tensor, optimum: Tensor
) -> None:
    _solve(gram, preference, regularization, result, optimum, False)


def upgrad(gram: Tensor, preference: Tensor | None, result: Tensor, optimum: Tensor) -> None:
    _solve(gram, preference, 0.0, result, optimum, True)
