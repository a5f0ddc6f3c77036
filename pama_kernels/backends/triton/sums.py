"""Sums over all tiles: kept by each program, stored in a slot of its own, added in fixed order by the last.

A slot holds [loss, optimum, sum of c (n)], then the statistics as the statistics buffer has them, but for the
pair blocks that follow from the fields.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pama_kernels._codes import FIELDS, TOTALS

from .simplex import solve
from .tile import bound_and_surrogate, load_advantages, load_tokens, locate, tile_sums

_FIELDS = tl.constexpr(len(FIELDS))
_TOTALS = tl.constexpr(len(TOTALS))
_BOUND_SUM = tl.constexpr(FIELDS.index("bound_sum"))
_BOUND_SQUARE_SUM = tl.constexpr(FIELDS.index("bound_square_sum"))
_ADVANTAGE_SUM = tl.constexpr(FIELDS.index("advantage_sum"))
_ADVANTAGE_SQUARE_SUM = tl.constexpr(FIELDS.index("advantage_square_sum"))


@triton.jit
def no_sums(N: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr):
    z = tl.zeros([N], tl.float64)
    total = tl.sum(z, axis=0)
    sums = (z, z, z, z, z, z, z, z, z, total, total)
    if PAIRS:
        pair = tl.zeros([N, N], tl.float64)
        sums = sums + (pair, pair)
        if PRESENT:
            sums = sums + (pair, pair, pair)
    return sums


@triton.jit
def added(x, y, PAIRS: tl.constexpr, PRESENT: tl.constexpr):
    sums = (
        x[0] + y[0],
        x[1] + y[1],
        x[2] + y[2],
        x[3] + y[3],
        x[4] + y[4],
        x[5] + y[5],
        x[6] + y[6],
        x[7] + y[7],
        x[8] + y[8],
        x[9] + y[9],
        x[10] + y[10],
    )
    if PAIRS:
        sums = sums + (x[11] + y[11], x[12] + y[12])
        if PRESENT:
            sums = sums + (x[13] + y[13], x[14] + y[14], x[15] + y[15])
    return sums


@triton.jit
def load_tile(
    problem, clip, row, token, inside, lead, n: tl.constexpr, N: tl.constexpr, NOON: tl.constexpr, D
):
    """The tokens' factors, then A', presence, I and g of N objectives from `lead` on."""
    objective = (lead + tl.arange(0, N))[None, :]
    tokens = load_tokens(problem, clip, row, token, inside, D)
    valid, _, _, pos, neg, grad_pos, grad_neg, _, _, _ = tokens
    a, here = load_advantages(
        problem, tl.expand_dims(row, 1), tl.expand_dims(token, 1), objective, valid[:, None], n, D
    )
    bound, surrogate = bound_and_surrogate(
        a, here, pos[:, None], neg[:, None], grad_pos[:, None], grad_neg[:, None], NOON
    )
    return tokens, a, here, bound, surrogate


@triton.jit
def place(at, cu, rows, width, row, LAYOUT: tl.constexpr, NARROW: tl.constexpr):
    """Row and position of tokens: of a launch over all, or (LAYOUT 3) of one row."""
    if LAYOUT == 3:
        return tl.zeros_like(at) + row, at
    return locate(at, cu, rows, width, LAYOUT, NARROW)


@triton.jit
def sums_of_tile(
    tile, problem, clip, first, last, cu, rows, width, row,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """The sums of a loaded tile; what float32 cannot hold is loaded again in pieces and summed in float64."""
    tokens, a, here, bound, surrogate = tile
    sums, fits = tile_sums(a, here, bound, surrogate, tokens, NOON, PAIRS, PRESENT)
    if a.dtype == tl.float32:
        if not fits:
            PIECE: tl.constexpr = TOKENS // 8 if TOKENS >= 8 else 1
            sums = no_sums(N, PAIRS, PRESENT)
            for start in range(0, TOKENS, PIECE):
                at = first + start + tl.arange(0, PIECE)
                r, t = place(at, cu, rows, width, row, LAYOUT, NARROW)
                wide = load_tile(problem, clip, r, t, at < last, 0, n, N, NOON, tl.float64)
                more, _ = tile_sums(wide[1], wide[2], wide[3], wide[4], wide[0], NOON, PAIRS, PRESENT)
                sums = added(sums, more, PAIRS, PRESENT)
    return sums


@triton.jit
def store_sums(slot, sums, n: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr):
    i = tl.arange(0, N)
    for field in tl.static_range(_FIELDS):
        tl.store(slot + field * n + i, sums[field], mask=i < n)
    tl.store(slot + _FIELDS * n, sums[_FIELDS])
    tl.store(slot + _FIELDS * n + 1, sums[_FIELDS + 1])
    if PAIRS:
        pair = slot + _FIELDS * n + _TOTALS
        both = (i[:, None] < n) & (i[None, :] < n)
        at = i[:, None] * n + i[None, :]
        blocks: tl.constexpr = 5 if PRESENT else 2
        for block in tl.static_range(blocks):
            tl.store(pair + block * n * n + at, sums[_FIELDS + _TOTALS + block], mask=both)


@triton.jit
def is_last(counter, slots):
    """Whether all other programs of the launch have stored their slots; the counter is then as it was."""
    tl.debug_barrier()  # every thread's stores come before the program is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel") == slots - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def added_slots(partial, slots, stride, at, inside, CHUNK: tl.constexpr):
    """The sum of element `at` (K,) over all slots, in fixed order."""
    total = tl.zeros(at.shape, tl.float64)
    for first in range(0, slots, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        x = tl.load(
            partial + slot[:, None].to(tl.int64) * stride + at[None, :],
            mask=(slot < slots)[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        total += tl.sum(x, axis=0)
    return total


@triton.jit
def store_statistics(
    partial, slots, stride, sums, n: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr
):  # fmt: skip
    """The slots' statistics, added, into the buffer; where all are present, pairs follow from the fields."""
    K: tl.constexpr = 64
    pairs: tl.constexpr = _FIELDS * n + _TOTALS
    size: tl.constexpr = pairs + 5 * n * n if PAIRS else pairs
    for first in range(0, size, K):
        k = first + tl.arange(0, K)
        source = k
        if PAIRS:
            if not PRESENT:
                block = (k - pairs) // (n * n)
                i = (k - pairs) % (n * n) // n
                follows = tl.where(block == 2, i, _ADVANTAGE_SUM * n + i)
                follows = tl.where(block == 4, _ADVANTAGE_SQUARE_SUM * n + i, follows)
                source = tl.where(block >= 2, follows, k)
        tl.store(sums + k, added_slots(partial, slots, stride, source, k < size, 32), mask=k < size)
    tl.debug_barrier()  # what is stored here is read again by other threads


@triton.jit
def scores(count, total):
    """Mean over the tokens where present; 0 where there are none."""
    return tl.where(count > 0, total / tl.where(count > 0, count, 1.0), 0.0)


@triton.jit
def solution(count, bound_sum, bound_square_sum, prior, regularization, n: tl.constexpr, N: tl.constexpr):
    """Weights (1, N) and optimum (1, 1) of one set of sums, (N,) each."""
    i = tl.arange(0, N)[None, :]
    count = count[None, :]
    moment = scores(count, bound_square_sum[None, :])
    scale = tl.max(moment, axis=1, keep_dims=True)
    unusable = tl.max((moment != moment).to(tl.int32), axis=1, keep_dims=True) > 0
    scale = tl.where(unusable, float("nan"), scale)
    p = tl.load(prior + i, mask=i < n, other=0.0)
    return solve(scores(count, bound_sum[None, :]), p, count > 0, regularization, scale, N)


@triton.jit
def batch_solution(sums, prior, regularization, n: tl.constexpr, N: tl.constexpr):
    """The same of the statistics buffer."""
    i = tl.arange(0, N)
    count = tl.load(sums + i, mask=i < n, other=0.0)
    bound_sum = tl.load(sums + _BOUND_SUM * n + i, mask=i < n, other=0.0)
    bound_square_sum = tl.load(sums + _BOUND_SQUARE_SUM * n + i, mask=i < n, other=0.0)
    return solution(count, bound_sum, bound_square_sum, prior, regularization, n, N)
