"""Sums over all tiles: kept by each program, stored in a slot of its own, added in fixed order by the last.

A slot holds [loss, optimum, sum of c (n)], then the statistics as the statistics buffer has them, but for the
pair blocks that follow from the fields.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pama_kernels._codes import FIELDS, TOTALS

from .simplex import solve
from .tile import (
    bound_and_surrogate,
    load_advantages,
    load_tokens,
    locate,
    row_range,
    tile_sums,
    valid_tokens,
)

_FIELDS = tl.constexpr(len(FIELDS))
_TOTALS = tl.constexpr(len(TOTALS))
_BOUND_SUM = tl.constexpr(FIELDS.index("bound_sum"))
_BOUND_SQUARE_SUM = tl.constexpr(FIELDS.index("bound_square_sum"))
_ADVANTAGE_SUM = tl.constexpr(FIELDS.index("advantage_sum"))
_ADVANTAGE_SQUARE_SUM = tl.constexpr(FIELDS.index("advantage_square_sum"))


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
def count_rows(mask, cu, rows, width, counts, TOKENS: tl.constexpr):
    """The valid tokens of each row, shared among the programs of a launch."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        begin, end = row_range(cu, row, width)
        count = tl.zeros([TOKENS], tl.int32)
        for first in range(begin, end, TOKENS):
            at = first + tl.arange(0, TOKENS)
            count += valid_tokens(mask, tl.zeros_like(at) + row, at, at < end).to(tl.int32)
        tl.store(counts + row, tl.sum(count.to(tl.int64), axis=0).to(tl.float64))


@triton.jit
def _add_to(pointer, x, inside):
    tl.store(pointer, x.to(tl.float64) + tl.load(pointer, mask=inside, other=0.0), mask=inside)


@triton.jit
def _add(slot, sums, n: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr):
    """Adds sums to a slot: kept in registers they would be many, in each thread."""
    i = tl.arange(0, N)
    for field in tl.static_range(_FIELDS):
        _add_to(slot + field * n + i, sums[field], i < n)
    one = tl.zeros([1], tl.int32)
    _add_to(slot + _FIELDS * n + one, sums[_FIELDS], one == 0)
    _add_to(slot + _FIELDS * n + 1 + one, sums[_FIELDS + 1], one == 0)
    if PAIRS:
        pair = slot + _FIELDS * n + _TOTALS
        both = (i[:, None] < n) & (i[None, :] < n)
        at = i[:, None] * n + i[None, :]
        blocks: tl.constexpr = 5 if PRESENT else 2
        for block in tl.static_range(blocks):
            _add_to(pair + block * n * n + at, sums[_FIELDS + _TOTALS + block], both)
    tl.debug_barrier()  # what is added next may be read by other threads


@triton.jit
def clear(slot, SIZE: tl.constexpr):
    tl.debug_barrier()  # all threads have read what was there
    for first in range(0, SIZE, 128):
        k = first + tl.arange(0, 128)
        tl.store(slot + k, tl.zeros([128], tl.float64), mask=k < SIZE)
    tl.debug_barrier()


@triton.jit
def add_slot(slot, other, SIZE: tl.constexpr):
    """Adds another slot of the same program."""
    for first in range(0, SIZE, 128):
        k = first + tl.arange(0, 128)
        _add_to(slot + k, tl.load(other + k, mask=k < SIZE, other=0.0), k < SIZE)
    tl.debug_barrier()


@triton.jit
def add_tile(
    slot, tile, problem, clip, first, last, cu, rows, width, row,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a loaded tile to a slot. What float32 cannot hold is loaded again in pieces, in
    float64."""
    tokens, a, here, bound, surrogate = tile
    sums, fits = tile_sums(a, here, bound, surrogate, tokens, NOON, PAIRS, PRESENT)
    if a.dtype == tl.float64 or fits:
        _add(slot, sums, n, N, PAIRS, PRESENT)
    else:
        PIECE: tl.constexpr = TOKENS // 8 if TOKENS >= 8 else 1
        for start in range(0, TOKENS, PIECE):
            at = first + start + tl.arange(0, PIECE)
            r, t = place(at, cu, rows, width, row, LAYOUT, NARROW)
            wide = load_tile(problem, clip, r, t, at < last, 0, n, N, NOON, tl.float64)
            more, _ = tile_sums(wide[1], wide[2], wide[3], wide[4], wide[0], NOON, PAIRS, PRESENT)
            _add(slot, more, n, N, PAIRS, PRESENT)


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
            partial + slot[:, None] * stride + at[None, :],
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
def batch_solution(sums, prior, regularization, n: tl.constexpr, N: tl.constexpr):
    """Weights (1, N) and optimum (1, 1) from the statistics of one sequence, or of the whole batch."""
    i = tl.arange(0, N)[None, :]
    count = tl.load(sums + i, mask=i < n, other=0.0)
    score = scores(count, tl.load(sums + _BOUND_SUM * n + i, mask=i < n, other=0.0))
    moment = scores(count, tl.load(sums + _BOUND_SQUARE_SUM * n + i, mask=i < n, other=0.0))
    scale = tl.max(moment, axis=1, keep_dims=True)
    unusable = tl.max((moment != moment).to(tl.int32), axis=1, keep_dims=True) > 0
    scale = tl.where(unusable, float("nan"), scale)
    p = tl.load(prior + i, mask=i < n, other=0.0)
    return solve(score, p, count > 0, regularization, scale, N)
