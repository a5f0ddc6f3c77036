"""A tile of tokens on the device: its inputs, the factors of the surrogate, and its masked sums.

A `problem` is the tuple (advantages, objective_mask, mask, logprobs, old_logprobs, importance_weights) of
arrays, an array the tuple (tensor or None, row stride, token stride[, objective stride]), that of advantages
with not None behind it where a token's n objectives stand together, one token after the other; a `clip` is
(1 - eps_low, 1 + eps_high, dual_clip) and the logarithms of the three. Tokens are told by row and position,
tiles of TOKENS x N objectives by `inside`, `objective` and their number n <= N. D is the type of the
computation. The rule is that of csrc/core/surrogate.hpp and csrc/cpu/tile.hpp: masked places hold 0; a NaN or
infinity makes its own advantage, or the factors of its token, NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def clip_numbers(low, high, dual, log_low, log_high, log_dual):
    return (
        tl.full([], low, tl.float64),
        tl.full([], high, tl.float64),
        tl.full([], dual, tl.float64),
        tl.full([], log_low, tl.float64),
        tl.full([], log_high, tl.float64),
        tl.full([], log_dual, tl.float64),
    )


@triton.jit
def exponential(x):
    """e^x, and e^x - 1 - x without cancellation."""
    small = tl.abs(x) <= 1
    y = tl.where(small, x, 0.0)
    series = tl.full(x.shape, 1.0, x.dtype)
    terms: tl.constexpr = 20 if x.dtype == tl.float64 else 12
    for k in tl.static_range(terms, 2, -1):
        series = series * y / k + 1
    rest = series * y * y * 0.5
    e = tl.where(small, 1 + (y + rest), tl.exp(x))
    return e, tl.where(small, rest, e - 1 - x)


@triton.jit
def locate(at, cu, rows, width, LAYOUT: tl.constexpr, NARROW: tl.constexpr):
    """Row and position of tokens in a launch over all of them.

    LAYOUT 0: one row; 1: rows of `width` tokens; 2: packed by offsets, positions counted through.
    """
    row = tl.zeros_like(at)
    token = at
    if LAYOUT == 1:
        if NARROW:
            row = (at.to(tl.int32) // width).to(tl.int64)
        else:
            row = at // width
        token = at - row * width
    if LAYOUT == 2:
        high = row + rows
        span = rows
        while span > 1:  # the last row that begins at or before the token
            middle = (row + high) // 2
            begins = tl.load(cu[0] + middle * cu[1]) <= at
            row = tl.where(begins & (middle < high), middle, row)
            high = tl.where(begins, high, middle)
            span = (span + 1) // 2
    return row, token


@triton.jit
def tokens_in_all(cu, rows, width, LAYOUT: tl.constexpr):
    """int64; packed, a negative width leaves it to the last offset."""
    total = tl.cast(width, tl.int64)
    if LAYOUT == 1:
        total = total * rows
    if LAYOUT == 2:
        if total < 0:
            total = tl.load(cu[0] + rows * cu[1]).to(tl.int64)
    return total


@triton.jit
def row_range(cu, row, width):
    """First token of a sequence and the one after its last. Offsets are not checked on the device, but
    nothing outside the tensors is touched."""
    begin = tl.zeros([], tl.int64)
    end = begin + width
    if cu[0] is not None:
        begin = tl.load(cu[0] + row * cu[1]).to(tl.int64)
        end = tl.load(cu[0] + (row + 1) * cu[1]).to(tl.int64)
        if width >= 0:
            begin = tl.maximum(begin, 0)
            end = tl.minimum(end, width)
    return begin, end


@triton.jit
def load(array, row, token, inside, D: tl.constexpr):
    x = tl.load(array[0] + row * array[1] + token * array[2], mask=inside, other=0.0)
    if x.dtype == tl.bfloat16 or x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x.to(D)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in dtype. The interpreter would cut the digits off that bfloat16 does not have."""
    if dtype == tl.bfloat16:
        if _INTERPRETED:
            x = x.to(tl.float32)
            bits = x.to(tl.int32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits) & -0x10000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_mask(array, row, token, inside):
    x = tl.load(array[0] + row * array[1] + token * array[2], mask=inside, other=0)
    if x.dtype == tl.bfloat16 or x.dtype == tl.float16:
        x = x.to(tl.float32)
    return inside & (x != 0)


@triton.jit
def valid_tokens(mask, row, token, inside):
    if mask[0] is not None:
        inside = load_mask(mask, row, token, inside)
    return inside


@triton.jit
def _usable(x, valid):
    """x, 0 where it is masked or not finite; and where it is not finite."""
    infinity: tl.constexpr = float("inf")
    x = tl.where(valid, x, 0.0)
    finite = tl.abs(x) < infinity
    return tl.where(finite, x, 0.0), valid & ~finite


@triton.jit
def load_tokens(problem, clip, row, token, inside, D: tl.constexpr):
    """valid, logp, ratio; for positive and negative advantages the factors (with w, mask) of the surrogate,
    those of the bound, and where there is no gradient; the k3 estimate of KL."""
    mask = problem[2]
    logprobs = problem[3]
    old_logprobs = problem[4]
    importance = problem[5]
    valid = valid_tokens(mask, row, token, inside)
    bad = valid & ~valid
    weight = tl.where(valid, 1.0, 0.0).to(D)
    logp = tl.zeros_like(weight)
    if importance[0] is not None:
        weight, bad = _usable(load(importance, row, token, inside, D), valid)
    if logprobs[0] is not None:
        logp, unusable = _usable(load(logprobs, row, token, inside, D), valid)
        bad = bad | unusable
    if old_logprobs[0] is not None:
        old, unusable = _usable(load(old_logprobs, row, token, inside, D), valid)
        bad = bad | unusable
        poison = tl.where(bad, float("nan"), 0.0).to(D)
        d = logp - old
        ratio, k3 = exponential(tl.minimum(tl.maximum(d, -20.0), 20.0))
        stopped = (tl.abs(d) > 20.0) & ~bad
        no_pos = stopped | ((d > tl.cast(clip[4], D)) & ~bad)
        no_neg = stopped | (((d > tl.cast(clip[5], D)) | (d < tl.cast(clip[3], D))) & ~bad)
        upper = tl.minimum(ratio, tl.cast(clip[1], D))
        lower = tl.maximum(tl.minimum(ratio, tl.cast(clip[2], D)), tl.cast(clip[0], D))
        pos = weight * upper + poison
        neg = weight * lower + poison
        grad_pos = tl.where(no_pos, 0.0, weight) + poison
        grad_neg = tl.where(no_neg, 0.0, weight) + poison
        kl = tl.where(valid, k3, 0.0) + poison
    else:
        ratio = tl.where(inside, 1.0, 1.0).to(D)
        kl = tl.where(bad, float("nan"), 0.0).to(D)
        pos = weight + kl
        neg = pos
        grad_pos = pos
        grad_neg = pos
        no_pos = valid & ~valid
        no_neg = no_pos
    return valid, logp, ratio, pos, neg, grad_pos, grad_neg, no_pos, no_neg, kl


@triton.jit
def load_advantages(problem, row, token, objective, valid, n: tl.constexpr, D: tl.constexpr):
    """A' (NaN where it is not finite), and where it is present. objective: (1, N), others (TOKENS, 1)."""
    advantages = problem[0]
    present = problem[1]
    here = valid & (objective < n)
    if present[0] is not None:
        offset = row * present[1] + token * present[2] + objective * present[3]
        x = tl.load(present[0] + offset, mask=here, other=0)
        if x.dtype == tl.bfloat16 or x.dtype == tl.float16:
            x = x.to(tl.float32)
        here = here & (x != 0)
    if advantages[4] is not None:
        offset = row * advantages[1] + token * n + objective
    else:
        offset = row * advantages[1] + token * advantages[2] + objective * advantages[3]
    a = tl.load(advantages[0] + offset, mask=here, other=0.0)
    if a.dtype == tl.bfloat16 or a.dtype == tl.float16:
        a = a.to(tl.float32)
    infinity: tl.constexpr = float("inf")
    a = tl.where(here, a.to(D), 0.0)
    return tl.where(tl.abs(a) < infinity, a, float("nan")), here


@triton.jit
def bound_and_surrogate(a, here, pos, neg, grad_pos, grad_neg, NOON: tl.constexpr):
    """I and g of each objective, 0 where it is absent. The factors are (TOKENS, 1)."""
    up = tl.where(a < 0, 0.0, a)
    bound = up * grad_pos
    surrogate = up * pos
    if not NOON:
        down = tl.where(a < 0, a, 0.0)
        bound += down * grad_neg
        surrogate += down * neg
    return tl.where(here, bound, 0.0), tl.where(here, surrogate, 0.0)


@triton.jit
def _outer(x, y):
    """sum over tokens of x_i y_j, (N, N), of few objectives."""
    return tl.sum(x[:, :, None] * y[:, None, :], axis=0)


@triton.jit
def tile_sums(
    a, here, bound, surrogate, tokens, NOON: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr
):
    """The sums of a tile, and whether the type of the computation can hold them.

    A tuple in the order of `_codes.FIELDS`, (N,) each; then `TOTALS`; then, with PAIRS, the first two of
    `_codes.PAIRS`, (N, N) each, and the others where presence makes them differ from the fields.
    """
    valid, logp, _, _, _, _, _, no_pos, no_neg, kl = tokens
    positive = a > 0
    clipped = positive & no_pos[:, None]
    if not NOON:
        clipped = clipped | ((a < 0) & no_neg[:, None])
    bound_sum = tl.sum(bound, axis=0)
    bound_square = tl.sum(bound * bound, axis=0)
    bound_logprob = tl.sum(bound * logp[:, None], axis=0)
    surrogate_sum = tl.sum(surrogate, axis=0)
    square = tl.sum(a * a, axis=0)
    fits = True
    if a.dtype == tl.float32:
        # Squares overflow above 1e19 and vanish below 1e-19.
        infinity: tl.constexpr = float("inf")
        tiny: tl.constexpr = 8.271806125530277e-25  # 2^-80
        size = bound_square + tl.abs(bound_logprob) + tl.abs(surrogate_sum) + square
        vanished = (square < tiny) & (tl.max(tl.abs(a), axis=0) > 0)
        vanished = vanished | ((bound_square < tiny) & (tl.max(tl.abs(bound), axis=0) > 0))
        outside = vanished | ~(size < infinity)
        fits = tl.max(outside.to(tl.int32), axis=0) == 0
    sums = (
        tl.sum(here.to(tl.int32), axis=0),
        bound_sum,
        bound_square,
        bound_logprob,
        surrogate_sum,
        tl.sum(a, axis=0),
        square,
        tl.sum(positive.to(tl.int32), axis=0),
        tl.sum(clipped.to(tl.int32), axis=0),
        tl.sum(valid.to(tl.int32), axis=0),
        tl.sum(kl, axis=0),
    )
    if PAIRS:
        sums = sums + (_outer(bound, bound), _outer(a, a))
        if PRESENT:
            present = here.to(a.dtype)
            # Not of a * a, which Triton 3.6 would share with `square` above and then fails to compile.
            squares = tl.sum(a[:, :, None] * a[:, :, None] * present[:, None, :], axis=0)
            sums = sums + (_outer(present, present), _outer(a, present), squares)
    return sums, fits
