"""What the passes over tokens and over rows share: the weights of a tile, the combined advantage, the loss of
tokens, and what the last program of a launch does.

Abar_t = sum_i c_i(t) A_{i,t} = up_t + down_t;  loss_t = -up_t pos_t - down_t neg_t + kl_coef (e^r - r - 1)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import HEAD, added_number, added_slots, is_last, store_statistics
from .rules import ratio, scores_of, store_batch_weights
from .simplex import preference_of
from .terms import FIELD_COUNT
from .tokens import at_tokens, by_sign, exponential, read

# WEIGHTS: none (statistics alone); one set; one for each row; solved per token; already in up and down of
# each row
NONE, BATCH, ROW, SCORES, SOFTMIN, FACTORS = range(6)
_NONE, _BATCH, _ROW, _SCORES, _SOFTMIN, _FACTORS = map(tl.constexpr, range(6))
_HEAD = tl.constexpr(HEAD)


@triton.jit
def coefficients(
    weights, effective, row, inside, here,
    n: tl.constexpr, N: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The weights c (1 or TOKENS, N), given or solved. SHARE: divided by the sum of the preferences of the
    objectives present.

    row: (TOKENS, 1), and whether it exists; 0 and true if all rows have the same weights.
    """
    i = tl.arange(0, N)[None, :]
    some = inside & (i < n)
    c = read(weights[0] + row * weights[1] + i * weights[2], some, D)
    if SHARE:
        if effective[0] is not None:
            p = read(effective[0] + row * effective[1] + i, some, D)
        else:
            p = tl.where(i < n, tl.full([1, N], 1.0 / n, D), 0.0)
        share = tl.sum(tl.where(here, p, 0.0), axis=1, keep_dims=True)
        c = tl.where(share > 0, tl.where(here, c, 0.0 * c) / tl.where(share > 0, share, 1.0), 0.0)
    return c


@triton.jit
def combine(c, a, NOON: tl.constexpr):
    """The sums of c_i A_i over positive and over negative advantages, (TOKENS,) each."""
    up, down = by_sign(a, NOON)
    return tl.sum(c * up, axis=1), tl.sum(c * down, axis=1)


@triton.jit
def loss_and_slope(
    factors,
    up,
    down,
    ref,
    kl_coef,
    factor,
    row,
    token,
    inside,
    UNIT: tl.constexpr,
    NOON: tl.constexpr,
    D: tl.constexpr,
):
    """Each token's loss, and `factor` times its derivative in logp, (TOKENS,) float64: these few products may
    leave the range of float32 where their result does not."""
    valid, logp, ratio, pos, neg, grad_pos, grad_neg, _, _, _ = factors
    up = up.to(tl.float64)
    value = -up * pos.to(tl.float64)
    slope = -up * grad_pos.to(tl.float64)
    if not NOON:
        down = down.to(tl.float64)
        value -= down * neg.to(tl.float64)
        slope -= down * grad_neg.to(tl.float64)
    slope *= ratio.to(tl.float64) * factor
    if ref[0] is not None:
        infinity: tl.constexpr = float("inf")
        r = tl.where(valid, read(at_tokens(ref, row, token, UNIT), inside, D) - logp, 0.0)
        clamped = tl.minimum(tl.maximum(r, -20.0), 20.0)
        _, rest = exponential(clamped)
        usable = tl.abs(r) < infinity
        value += kl_coef * tl.where(usable, rest, float("nan")).to(tl.float64)
        rise = tl.where(tl.abs(r) > 20.0, 0.0, clamped + rest)
        slope -= kl_coef * factor * tl.where(usable, rise, float("nan")).to(tl.float64)
    return value, slope


@triton.jit
def report(
    partial,
    slots,
    STRIDE: tl.constexpr,
    sums,
    weights,
    preference,
    reported,
    optimum,
    n: tl.constexpr,
    N: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    """Stores the reported weights and optimum: one set of weights with a.c, or the means over tokens of
    weights per token (the preference if there are no valid tokens)."""
    i = tl.arange(0, N)
    if BY_TOKEN:
        tokens = tl.load(sums + FIELD_COUNT * n)
        c = ratio(added_slots(partial + _HEAD, slots, STRIDE, i, i < n, 32), tokens)
        c = tl.where(tokens != 0, c, preference_of(preference, n, N))
        best = ratio(added_number(partial, slots, STRIDE, 1), tokens)
    else:
        c = read(weights[0] + i * weights[2], i < n, tl.float64)
        _, score = scores_of(sums, n, N)
        best = tl.sum(c * score, axis=0)
    tl.store(reported + i, c, mask=i < n)
    tl.store(optimum, best)


@triton.jit
def finish(
    partial, counter, setting, c, preference, loss, square_sum, weights, optimum, sums, effective,
    n: tl.constexpr, N: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, PAIRS: tl.constexpr,
    PRESENT: tl.constexpr, SOLVE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """In the last program: adds the slots, and solves for or reports the weights."""
    slots = tl.num_programs(0)
    if is_last(counter, slots):
        if loss is not None:
            tl.store(loss, added_number(partial, slots, STRIDE, 0))
        if square_sum is not None:
            tl.store(square_sum, added_number(partial, slots, STRIDE, 2))
        if STATISTICS:
            store_statistics(partial + _HEAD + n, slots, STRIDE, sums, n, PAIRS, PRESENT)
            if SOLVE >= 0:
                store_batch_weights(sums, preference, setting, weights, optimum, effective, n, N, SOLVE, 1)
            elif WEIGHTS != _NONE:
                report(partial, slots, STRIDE, sums, c, preference, weights, optimum, n, N, WEIGHTS != _BATCH)
