"""Loads tokens: the factors of the surrogate, and the terms of each objective.

    d = logp - old, u = exp(clamp(d, -20, 20)), w the importance weight
    g = w min(min(u, dual) A, clip(u, 1 - eps_low, 1 + eps_high) A) = max(A, 0) pos + min(A, 0) neg
    I = w A where g has a gradient in logp                          = max(A, 0) grad_pos + min(A, 0) grad_neg

An array is the tuple (pointer or None, row stride, token stride[, objective stride]). Tokens are identified
by row and position, tiles of TOKENS x N objectives by `inside`, `objective` and their number n <= N. D is the
type of the computation. Masked values are replaced by 0; a NaN or infinity makes its own advantage, or the
factors of its token, NaN.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .launch import INTERPRETED, number_of

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def clip_of(low, low_at, high, high_at, dual, dual_at):
    """1 - eps_low, 1 + eps_high, dual_clip and their logarithms, in float64."""
    lower = 1.0 - number_of(low, low_at)
    upper = 1.0 + number_of(high, high_at)
    d = number_of(dual, dual_at)
    return lower, upper, d, tl.log(lower), tl.log(upper), tl.log(d)


COEFFICIENTS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(21)))  # of e^x


@triton.jit
def exponential(x):
    """e^x, and e^x - 1 - x without cancellation."""
    small = tl.abs(x) <= 1
    y = tl.where(small, x, 0.0)
    terms: tl.constexpr = 20 if x.dtype == tl.float64 else 12
    series = tl.full([], COEFFICIENTS[terms], x.dtype)
    for k in tl.static_range(terms - 1, 1, -1):
        series = series * y + tl.full([], COEFFICIENTS[k], x.dtype)
    rest = series * y * y
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
            row = (at.to(tl.int32) // tl.cast(width, tl.int32)).to(tl.int64)
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
    """int64; Number of tokens as int64; for packed tokens with a negative width, the last offset."""
    total = tl.cast(width, tl.int64)
    if LAYOUT == 1:
        total = total * rows
    if cu[0] is not None:
        if total < 0:
            total = tl.load(cu[0] + rows * cu[1]).to(tl.int64)
    return total


@triton.jit
def row_range(cu, row, width):
    """First token of a sequence and the one after its last. Offsets are not checked on the device, but no
    memory outside the tensors is accessed."""
    begin = tl.zeros([], tl.int64)
    end = begin + width
    if cu[0] is not None:
        begin = tl.load(cu[0] + row * cu[1]).to(tl.int64)
        end = tl.load(cu[0] + (row + 1) * cu[1]).to(tl.int64)
        if width >= 0:
            begin = tl.maximum(begin, 0)
            end = tl.minimum(end, tl.cast(width, tl.int64))
    return begin, end


@triton.jit
def part_range(cu, row, width, part, parts, TOKENS: tl.constexpr):
    """First token of one part of a sequence that is divided into `parts`, and the one after its last."""
    begin, end = row_range(cu, row, width)
    length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), parts), TOKENS) * TOKENS
    begin += part * length
    return begin, tl.minimum(end, begin + length)


@triton.jit
def read(pointer, here, D: tl.constexpr):
    """Values in D (float32, float64), 0 where not `here`."""
    x = tl.load(pointer, mask=here, other=0.0)
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)  # the interpreter can convert it to float64, unlike bfloat16
    return x.to(D)


@triton.jit
def truth(pointer, here):
    """Whether a mask of any type is not 0; false where not `here`."""
    x = tl.load(pointer, mask=here, other=0)
    if x.dtype.is_floating() and x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return here & (x != 0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in dtype. The interpreter would truncate to bfloat16 instead of rounding."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        if _INTERPRETED:
            bits = x.to(tl.int32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000) & -0x10000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def at_tokens(array, row, token, UNIT: tl.constexpr):
    if UNIT:
        return array[0] + (row * array[1] + token)
    return array[0] + (row * array[1] + token * array[2])


@triton.jit
def valid_tokens(mask, row, token, inside, UNIT: tl.constexpr):
    if mask[0] is not None:
        inside = truth(at_tokens(mask, row, token, UNIT), inside)
    return inside


@triton.jit
def _usable(x, valid):
    """x with 0 where it is masked or not finite, and whether it is valid but not finite."""
    infinity: tl.constexpr = float("inf")
    x = tl.where(valid, x, 0.0)
    finite = tl.abs(x) < infinity
    return tl.where(finite, x, 0.0), valid & ~finite


@triton.jit
def load_factors(
    mask, logprobs, old, importance, clip, row, token, inside, UNIT: tl.constexpr, D: tl.constexpr
):
    """valid, logp, ratio; pos, neg, grad_pos, grad_neg (with w and mask); where the latter two have no
    gradient; the k3 estimate of KL. All (TOKENS,)."""
    valid = valid_tokens(mask, row, token, inside, UNIT)
    bad = valid & ~valid
    weight = tl.where(valid, 1.0, 0.0).to(D)
    logp = tl.zeros_like(weight)
    if importance[0] is not None:
        weight, bad = _usable(read(at_tokens(importance, row, token, UNIT), inside, D), valid)
    if logprobs[0] is not None:
        logp, unusable = _usable(read(at_tokens(logprobs, row, token, UNIT), inside, D), valid)
        bad = bad | unusable
    if old[0] is not None:
        before, unusable = _usable(read(at_tokens(old, row, token, UNIT), inside, D), valid)
        bad = bad | unusable
        poison = tl.where(bad, float("nan"), 0.0).to(D)
        d = logp - before
        ratio, k3 = exponential(tl.minimum(tl.maximum(d, -20.0), 20.0))
        stopped = (tl.abs(d) > 20.0) & ~bad
        off_pos = valid & (stopped | ((d > tl.cast(clip[4], D)) & ~bad))
        off_neg = valid & (stopped | (((d > tl.cast(clip[5], D)) | (d < tl.cast(clip[3], D))) & ~bad))
        upper = tl.minimum(ratio, tl.cast(clip[1], D))
        lower = tl.maximum(tl.minimum(ratio, tl.cast(clip[2], D)), tl.cast(clip[0], D))
        pos = weight * upper + poison
        neg = weight * lower + poison
        grad_pos = tl.where(off_pos, 0.0, weight) + poison
        grad_neg = tl.where(off_neg, 0.0, weight) + poison
        kl = tl.where(valid, k3, 0.0) + poison
    else:
        ratio = tl.full(weight.shape, 1.0, D)
        kl = tl.where(bad, float("nan"), 0.0).to(D)
        pos = weight + kl
        neg = pos
        grad_pos = pos
        grad_neg = pos
        off_pos = valid & ~valid
        off_neg = off_pos
    return valid, logp, ratio, pos, neg, grad_pos, grad_neg, off_pos, off_neg, kl


@triton.jit
def load_advantages(
    advantages, presence, row, token, objective, valid, n: tl.constexpr, DENSE: tl.constexpr, D: tl.constexpr
):
    """A' (NaN where it is not finite), and where it is present. objective: (1, N) int64, others (TOKENS,
    1)."""
    infinity: tl.constexpr = float("inf")
    here = valid & (objective < n)
    if presence[0] is not None:
        offset = row * presence[1] + token * presence[2] + objective * presence[3]
        here = truth(presence[0] + offset, here)
    if DENSE:
        offset = row * advantages[1] + token * n + objective
    else:
        offset = row * advantages[1] + token * advantages[2] + objective * advantages[3]
    a = tl.where(here, read(advantages[0] + offset, here, D), 0.0)
    return tl.where(tl.abs(a) < infinity, a, float("nan")), here


@triton.jit
def by_sign(a, NOON: tl.constexpr):
    """max(A, 0) and min(A, 0), the latter only without Noon. A NaN gives NaN in each."""
    return tl.where(a < 0, 0.0, a), tl.where(a < 0, tl.zeros_like(a) if NOON else a, 0.0)


@triton.jit
def load_terms(
    advantages, presence, factors, row, token, lead,
    n: tl.constexpr, N: tl.constexpr, NOON: tl.constexpr, DENSE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A', presence, I and g (TOKENS, N) of the objectives from `lead` on; I and g are 0 where it is
    absent."""
    objective = (tl.cast(lead, tl.int64) + tl.arange(0, N))[None, :]
    valid, _, _, pos, neg, grad_pos, grad_neg, _, _, _ = factors
    a, here = load_advantages(
        advantages, presence, row[:, None], token[:, None], objective, valid[:, None], n, DENSE, D
    )
    up, down = by_sign(a, NOON)
    bound = up * grad_pos[:, None]
    surrogate = up * pos[:, None]
    if not NOON:
        bound += down * grad_neg[:, None]
        surrogate += down * neg[:, None]
    return a, here, tl.where(here, bound, 0.0), tl.where(here, surrogate, 0.0)
