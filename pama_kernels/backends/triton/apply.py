"""Weights applied to tokens: the combined advantage, or the loss with its gradient.

`tokens_kernel` is launched over all tokens: with weights for the batch, or solved per token.
`rows_kernel` is launched over sequences: with weights solved or given for each, or one result for each.
Where weights are not those of a statistics pass before, the statistics are summed in the same launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .simplex import solve
from .sums import (
    add_slot,
    add_tile,
    added_slots,
    batch_solution,
    clear,
    count_rows,
    is_last,
    load_tile,
    place,
    scores,
    store_statistics,
)
from .tile import (
    clip_numbers,
    exponential,
    load,
    load_advantages,
    rounded,
    row_range,
    tokens_in_all,
    valid_tokens,
)

GIVEN, SEQUENCE, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # whose weights: WEIGHTS below


@triton.jit
def load_weights(given, row, n: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """(1, N) of one row of given weights."""
    i = tl.arange(0, N)[None, :]
    c = tl.load(given[0] + row * given[1] + i * given[2], mask=i < n, other=0.0)
    if c.dtype == tl.bfloat16 or c.dtype == tl.float16:
        c = c.to(tl.float32)
    return c.to(D)


@triton.jit
def share(scale, denominator, slots, SLOTS: tl.constexpr, COUNT: tl.constexpr):
    """What every token's loss is multiplied by: scale, over the sum of the denominator's slots where there is
    one. A count of no tokens is 1."""
    if denominator is not None:
        k = tl.arange(0, SLOTS)
        total = tl.sum(tl.load(denominator + k, mask=k < slots, other=0.0).to(tl.float64), axis=0)
        if COUNT:
            total = tl.maximum(total, 1.0)
        scale = scale / total
    return scale


@triton.jit
def combine_tile(tile, c, NOON: tl.constexpr):
    """sum of c_i A_i over positive and over negative advantages, (TOKENS,)."""
    a = tile[1]
    up = tl.sum(c * tl.where(a < 0, 0.0, a), axis=1)
    down = tl.zeros_like(up)
    if not NOON:
        down = tl.sum(c * tl.where(a < 0, a, 0.0), axis=1)
    return up, down


@triton.jit
def store_loss(
    tile, up, down, ref, row, token, at, inside, scale, kl_coef, gradient,
    NOON: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a tile's tokens; returns the sum of their losses. scale: one or (TOKENS,)."""
    valid, logp, ratio, pos, neg, grad_pos, grad_neg, _, _, _ = tile[0]
    value = -up * pos
    slope = -up * grad_pos
    if not NOON:
        value -= down * neg
        slope -= down * grad_neg
    slope *= ratio
    if ref[0] is not None:
        infinity: tl.constexpr = float("inf")
        r = tl.where(valid, load(ref, row, token, inside, D) - logp, 0.0)
        _, rest = exponential(r)
        finite = tl.abs(r) < infinity
        coefficient = tl.cast(kl_coef, D)
        value += coefficient * tl.where(finite, rest, float("nan"))
        slope -= coefficient * tl.where(finite, r + rest, float("nan"))
    scale = tl.cast(scale, D)
    if gradient is not None:
        tl.store(gradient + at, tl.where(valid, scale * slope, 0.0), mask=inside)
    return tl.sum(tl.where(valid, scale * value, 0.0), axis=0).to(tl.float64)


@triton.jit
def store_results(
    partial, slots, sums, value, weights, optimum, given, prior,
    n: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr,
    BY_ROW: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """By the last program: adds the slots. Weights that are not per row are reported here."""
    if value is not None:
        zero = tl.zeros([1], tl.int32)
        tl.store(value + zero, added_slots(partial, slots, STRIDE, zero, zero == 0, 64))
    if STATISTICS:
        store_statistics(partial + 2 + n, slots, STRIDE, sums, n, PAIRS, PRESENT)
        if not BY_ROW:
            i = tl.arange(0, N)
            if WEIGHTS == TOKEN:
                one = tl.zeros([1], tl.int32) + 1
                count = tl.load(sums + 9 * n)
                c = added_slots(partial, slots, STRIDE, 2 + i, i < n, 32) / tl.maximum(count, 1.0)
                c = tl.where(count > 0, c, tl.load(prior + i, mask=i < n, other=0.0))
                total = tl.sum(added_slots(partial, slots, STRIDE, one, one == 1, 64), axis=0)
                total = total / tl.maximum(count, 1.0)
            else:
                c = tl.sum(load_weights(given, 0, n, N, tl.float64), axis=0)
                present = tl.load(sums + i, mask=i < n, other=0.0)
                total = tl.sum(c * scores(present, tl.load(sums + n + i, mask=i < n, other=0.0)), axis=0)
            tl.store(weights + i, c, mask=i < n)
            tl.store(optimum, total)


@triton.jit
def tokens_kernel(
    problem, ref, cu, rows, width,
    low: tl.float64, high: tl.float64, dual: tl.float64,
    log_low: tl.float64, log_high: tl.float64, log_dual: tl.float64,
    given, prior, regularization: tl.float64, scale: tl.float64, denominator, denominators, row_counts,
    kl_coef: tl.float64, combined, gradient, value, weights, optimum, sums, partial, counter,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
    STRIDE: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    clip = clip_numbers(low, high, dual, log_low, log_high, log_dual)
    regularization = tl.full([], regularization, tl.float64)
    kl_coef = tl.full([], kl_coef, tl.float64)
    scale = share(tl.full([], scale, tl.float64), denominator, denominators, SLOTS, COUNT)
    total = tokens_in_all(cu, rows, width, LAYOUT)
    slots = tl.num_programs(0)
    i = tl.arange(0, N)
    p = tl.load(prior + i, mask=i < n, other=0.0)[None, :]
    if WEIGHTS == GIVEN:
        c = load_weights(given, 0, n, N, D)
    if partial is not None:
        slot = partial + tl.program_id(0).to(tl.int64) * STRIDE
        clear(slot, STRIDE)
    loss = tl.zeros([], tl.float64)
    optimum_sum = tl.zeros([], tl.float64)
    weights_sum = tl.zeros([N], tl.float64)
    for tile_index in range(tl.program_id(0), tl.cdiv(total, TOKENS), slots):
        first = tl.cast(tile_index, tl.int64) * TOKENS
        at = first + tl.arange(0, TOKENS)
        inside = at < total
        row, token = place(at, cu, rows, width, 0, LAYOUT, NARROW)
        tile = load_tile(problem, clip, row, token, inside, 0, n, N, NOON, D)
        valid = tile[0][0]
        if STATISTICS:
            add_tile(
                slot + 2 + n, tile, problem, clip, first, total, cu, rows, width, 0,
                n, N, TOKENS, LAYOUT, NARROW, NOON, PAIRS, PRESENT,
            )  # fmt: skip
        if WEIGHTS == TOKEN:
            c, s = solve(tile[3], p, tile[2], regularization, None, N, NOON)
            weights_sum += tl.sum(tl.where(valid[:, None], c, 0.0), axis=0).to(tl.float64)
            optimum_sum += tl.sum(tl.sum(tl.where(valid[:, None], s, 0.0), axis=1), axis=0).to(tl.float64)
        up, down = combine_tile(tile, c, NOON)
        if combined is not None:
            together = rounded(tl.where(valid, up + down, 0.0), combined.dtype.element_ty)
            tl.store(combined + at, together, mask=inside)
        if value is not None:
            factor = scale
            if row_counts is not None:
                factor = scale / tl.maximum(tl.load(row_counts + row, mask=inside, other=1.0), 1.0)
            loss += store_loss(
                tile, up, down, ref, row, token, at, inside, factor, kl_coef, gradient, NOON, D
            )
    if partial is not None:
        tl.store(slot, loss)
        tl.store(slot + 1, optimum_sum)
        tl.store(slot + 2 + i, weights_sum, mask=i < n)
        if is_last(counter, slots):
            store_results(
                partial, slots, sums, value, weights, optimum, given, prior,
                n, N, STRIDE, WEIGHTS, STATISTICS, False, PAIRS, PRESENT,
            )  # fmt: skip


@triton.jit
def rows_kernel(
    problem, ref, cu, rows, width,
    low: tl.float64, high: tl.float64, dual: tl.float64,
    log_low: tl.float64, log_high: tl.float64, log_dual: tl.float64,
    given, prior, regularization: tl.float64, scale: tl.float64, denominator, denominators,
    kl_coef: tl.float64, combined, gradient, value, weights, optimum, sums, partial, counter,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
    STRIDE: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
    BY_ROW: tl.constexpr, ONE_RESULT: tl.constexpr, ROW_MEAN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """BY_ROW: weights and optimum are stored for each row; ONE_RESULT: so is the combination; ROW_MEAN: the
    loss of a row is the mean over its tokens. A row is summed in the last OWN numbers of the
    program's slot."""
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    clip = clip_numbers(low, high, dual, log_low, log_high, log_dual)
    regularization = tl.full([], regularization, tl.float64)
    kl_coef = tl.full([], kl_coef, tl.float64)
    scale = share(tl.full([], scale, tl.float64), denominator, denominators, SLOTS, COUNT)
    slots = tl.num_programs(0)
    i = tl.arange(0, N)
    if partial is not None:
        slot = partial + tl.program_id(0).to(tl.int64) * STRIDE
        clear(slot, STRIDE)
        own = slot + STRIDE - OWN
    loss = tl.zeros([], tl.float64)
    optimum_sum = tl.zeros([], tl.float64)
    weights_sum = tl.zeros([N], tl.float64)
    for row_index in range(tl.program_id(0), rows, slots):
        row = tl.cast(row_index, tl.int64)
        begin, end = row_range(cu, row, width)
        valid_count = tl.zeros([], tl.float64)
        if STATISTICS:
            clear(own, OWN)
        for first in range(begin, end, TOKENS):
            at = first + tl.arange(0, TOKENS)
            if STATISTICS:
                token_row = tl.zeros_like(at) + row
                tile = load_tile(problem, clip, token_row, at, at < end, 0, n, N, NOON, D)
                add_tile(
                    own, tile, problem, clip, first, end, cu, rows, width, row,
                    n, N, TOKENS, 3, NARROW, NOON, PAIRS, PRESENT,
                )  # fmt: skip
            else:
                here = valid_tokens(problem[2], tl.zeros_like(at) + row, at, at < end)
                valid_count += tl.sum(here.to(tl.int32), axis=0).to(tl.float64)
        if STATISTICS:
            add_slot(slot + 2 + n, own, OWN)
            valid_count = tl.load(own + 9 * n)
        if ONE_RESULT:
            a, here = row_advantages(problem, row, n, N, NOON, D)
        if WEIGHTS == SEQUENCE:
            c, s = batch_solution(own, prior, regularization, n, N)
        elif WEIGHTS == TOKEN:  # all tokens of the row have the same bound terms
            p = tl.load(prior + i, mask=i < n, other=0.0)[None, :]
            counts = tl.zeros([1, N], tl.float64) + valid_count
            c, s = solve(a.to(tl.float64), p, here & (counts > 0), regularization, None, N)
            weights_sum += tl.where(valid_count > 0, valid_count * tl.sum(c, axis=0), 0.0)
            optimum_sum += tl.where(valid_count > 0, valid_count * tl.sum(tl.sum(s, axis=1), axis=0), 0.0)
        else:
            c = load_weights(given, row, n, N, tl.float64)
            s = tl.zeros([1, 1], tl.float64)
            if STATISTICS:
                count = tl.load(own + i, mask=i < n, other=0.0)
                bound_sum = tl.load(own + n + i, mask=i < n, other=0.0)
                s = tl.sum(c * scores(count, bound_sum)[None, :], axis=1, keep_dims=True)
        if BY_ROW:
            tl.store(weights + row * n + i[None, :], c, mask=i[None, :] < n)
            tl.store(optimum + row + tl.zeros([1, 1], tl.int32), s)
        if ONE_RESULT:
            together = tl.sum(tl.sum(c * a.to(tl.float64), axis=1), axis=0)
            together = tl.where(valid_count > 0, together, 0.0)
            tl.store(combined + row, rounded(together, combined.dtype.element_ty))
        else:
            c = c.to(D)
            factor = scale
            if ROW_MEAN:
                factor = scale / tl.maximum(valid_count, 1.0)
            base = row * width
            if cu[0] is not None:
                base = tl.zeros([], tl.int64)
            for first in range(begin, end, TOKENS):
                at = first + tl.arange(0, TOKENS)
                inside = at < end
                token_row = tl.zeros_like(at) + row
                tile = load_tile(problem, clip, token_row, at, inside, 0, n, N, NOON, D)
                up, down = combine_tile(tile, c, NOON)
                if combined is not None:
                    together = rounded(tl.where(tile[0][0], up + down, 0.0), combined.dtype.element_ty)
                    tl.store(combined + base + at, together, mask=inside)
                if value is not None:
                    loss += store_loss(
                        tile, up, down, ref, token_row, at, base + at, inside, factor, kl_coef, gradient,
                        NOON, D,
                    )  # fmt: skip
    if partial is not None:
        tl.store(slot, loss)
        tl.store(slot + 1, optimum_sum)
        tl.store(slot + 2 + i, weights_sum, mask=i < n)
        if is_last(counter, slots):
            store_results(
                partial, slots, sums, value, weights, optimum, given, prior,
                n, N, STRIDE, WEIGHTS, STATISTICS, BY_ROW, PAIRS, PRESENT,
            )  # fmt: skip


@triton.jit
def row_advantages(problem, row, n: tl.constexpr, N: tl.constexpr, NOON: tl.constexpr, D: tl.constexpr):
    """A and presence (1, N) of a sequence, whatever its tokens' mask."""
    objective = tl.arange(0, N)[None, :]
    everywhere = objective >= 0
    zero = tl.zeros([1, 1], tl.int64)
    a, here = load_advantages(problem, zero + row, zero, objective, everywhere, n, D)
    if NOON:
        a = tl.where(a < 0, 0.0, a)
    return a, here


@triton.jit
def count_kernel(
    mask, cu, rows, width, counts,
    TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Valid tokens: of each row (BY_ROW), or of each program's share of all."""
    if BY_ROW:
        count_rows(mask, cu, rows, width, counts, TOKENS)
    else:
        total = tokens_in_all(cu, rows, width, LAYOUT)
        count = tl.zeros([TOKENS], tl.int32)
        for tile in range(tl.program_id(0), tl.cdiv(total, TOKENS), tl.num_programs(0)):
            at = tl.cast(tile, tl.int64) * TOKENS + tl.arange(0, TOKENS)
            row, token = place(at, cu, rows, width, 0, LAYOUT, NARROW)
            count += valid_tokens(mask, row, token, at < total).to(tl.int32)
        tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), axis=0).to(tl.float64))
