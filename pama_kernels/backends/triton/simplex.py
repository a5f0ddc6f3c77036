"""The scalar problem of PAMA, the algorithm of csrc/core/simplex.hpp for tiles of rows, and softmin.

    minimise over c in the simplex   1/2 (a.c)^2 + rho/2 ||c - p||^2,   rho = regularization * scale,

rho = 0 standing for the limit rho -> 0. Tiles are (rows, objectives), the latter padded to a power of two;
`here` is false at padding and at absent objectives. Rows are independent: a row gets the same bits whatever
the other rows contain.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Number

from .launch import check_memory, launch, number, number_of, options_of, power_of_two
from .tokens import read

_TILE = 256  # scores per program: more would spill registers
_FEW = 64  # up to this number of rows, a program takes at most 4


@triton.jit
def power_of_two_of(x):
    """2^floor(log2 x) and its inverse, for positive normal x; the top binade counts as the one below it."""
    if x.dtype == tl.float64:
        exponent = tl.minimum((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF, 2045)
        unit = (exponent << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.minimum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 253)
        unit = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return unit, inverse


@triton.jit
def normalised(p, keep):
    """The preference normalised over the included objectives (keep 1, else 0); uniform if their preferences
    sum to 0."""
    p = keep * p
    mass = tl.sum(p, axis=1, keep_dims=True)
    count = tl.maximum(tl.sum(keep, axis=1, keep_dims=True), 1.0)
    return tl.where(mass > 0, p / tl.where(mass > 0, mass, 1.0), keep / count)


@triton.jit
def preference_of(preference, n: tl.constexpr, N: tl.constexpr):
    """(N,) float64, 0 at padding; without a tensor uniform."""
    i = tl.arange(0, N)
    if preference is not None:
        return tl.load(preference + i, mask=i < n, other=0.0)
    return tl.where(i < n, tl.full([N], 1.0, tl.float64) / n, 0.0)


@triton.jit
def _descend(a, p, rho, keep, N: tl.constexpr):
    """Newton's method along the path of the projection, see csrc/core/simplex.hpp.

    a, p, keep (R, N), rho (R, 1); keep is 1 for included objectives, else 0, and |a| < 4.
    """
    low = tl.min(tl.where(keep > 0, a, 8.0), axis=1, keep_dims=True)
    high = tl.max(tl.where(keep > 0, a, -8.0), axis=1, keep_dims=True)
    p_low = tl.min(tl.where(keep > 0, p, 2.0), axis=1, keep_dims=True)
    p_high = tl.max(tl.where(keep > 0, p, -1.0), axis=1, keep_dims=True)
    hold = p_low != p_high
    at_p = tl.sum(keep * a * p, axis=1, keep_dims=True)
    nearby = tl.where(at_p >= 0, low, high)
    # Scores are relative to that of the index that never leaves the support: exact for near ties with a large
    # multiplier.
    near = tl.where(keep > 0, a - nearby, 0.0)
    multiplier = tl.zeros_like(at_p)
    mean = tl.zeros_like(at_p)
    shift = tl.zeros_like(at_p)
    holding = tl.zeros_like(at_p) != 0
    active = 1
    turn = 0
    while (active > 0) & (turn < 2 * N + 2):
        members = tl.maximum(tl.sum(keep, axis=1, keep_dims=True), 1.0)
        mean = tl.sum(keep * near, axis=1, keep_dims=True) / members
        shift = tl.maximum((1.0 - tl.sum(keep * p, axis=1, keep_dims=True)) / members, 0.0)
        centred = near - mean
        curvature = rho + tl.sum(keep * centred * centred, axis=1, keep_dims=True)
        slope = tl.sum(keep * centred * p, axis=1, keep_dims=True)
        step = tl.where(curvature > 0, (nearby + mean + slope) / tl.where(curvature > 0, curvature, 1.0), 0.0)
        multiplier = tl.where(holding, multiplier, step)
        leaves = (keep > 0) & (near != 0) & (p + shift - multiplier * centred < 0)
        keep = tl.where(leaves, 0.0, keep)
        left = tl.max(leaves.to(tl.int32), axis=1, keep_dims=True)
        active = tl.max(tl.max(left | holding.to(tl.int32), axis=1), axis=0)
        holding = (left > 0) & hold  # the multiplier is held until no index leaves the support
        turn += 1
    weight = p + shift - multiplier * (near - mean)
    c = tl.where((keep > 0) & (weight > 0), weight, 0.0)
    total = tl.sum(c, axis=1, keep_dims=True)  # 1 up to rounding times the range of the scores
    c = tl.where(total > 0, c / tl.where(total > 0, total, 1.0), tl.where(keep > 0, normalised(p, keep), 0.0))
    optimum = tl.sum(c * a, axis=1, keep_dims=True)
    return c, tl.where(rho == 0, 0.0, optimum)


@triton.jit
def _rows(a, p, here, regularization, scale, N: tl.constexpr):
    """`solve` in the dtype of `a`, and in higher precision for rows with scores of both signs and very
    different magnitude."""
    wide: tl.constexpr = a.dtype == tl.float64
    least_rho: tl.constexpr = 1e-280 if wide else 1e-30  # for scores of size 1: a smaller rho is 0
    small: tl.constexpr = 1e-200 if wide else 1e-30
    nothing: tl.constexpr = 1e-150 if wide else 1e-18  # for scores of size 1: smaller squares underflow
    raised: tl.constexpr = 1.6069380442589903e60 if wide else 1.2676506002282294e30  # 2^200, 2^100
    lowered: tl.constexpr = 1.0 / raised
    spread: tl.constexpr = 0.0 if wide else 1e-3
    infinity: tl.constexpr = float("inf")
    one = tl.full([1, 1], 1.0, a.dtype)

    a = tl.where(here, a, 0.0)
    unusable = tl.max((here & ~(tl.abs(a) < infinity)).to(tl.int32), axis=1, keep_dims=True) > 0
    a = tl.where(unusable, 0.0, a)
    keep = tl.where(here, one, 0.0 * one)
    count = tl.sum(keep, axis=1, keep_dims=True)
    own = normalised(p, keep)

    # Every row is scaled, exactly, by the power of two of its largest score; subnormal scores are scaled up
    # first.
    largest = tl.max(tl.abs(a), axis=1, keep_dims=True)
    lift = tl.where(largest < small, tl.full([1, 1], raised, a.dtype), one)
    unlift = tl.where(largest < small, tl.full([1, 1], lowered, a.dtype), one)
    unit, inverse = power_of_two_of(tl.where(largest > 0, largest * lift, one))
    low = tl.min(tl.where(here, a, infinity), axis=1, keep_dims=True)
    high = tl.max(tl.where(here, a, -infinity), axis=1, keep_dims=True)
    x = (a * lift) * inverse
    x = tl.where(tl.abs(x) < nothing, 0.0, x)
    peak = (largest * lift) * inverse
    size = (peak * peak).to(tl.float64)
    if scale is not None:
        up = lift.to(tl.float64)
        down = inverse.to(tl.float64)
        size = tl.where(scale < 0, size, scale * up * down * up * down)
        if regularization > 0:
            unusable = unusable | ~(tl.abs(scale) < infinity)
    rho = (regularization * tl.where(unusable, 0.0, size)).to(a.dtype)
    rho = tl.where(rho > least_rho, rho, 0.0)

    # With rho = 0 and scores of one sign the answer is exact: the objectives with the score nearest 0 share
    # the weight.
    nearest = tl.where(low > 0, low, tl.where(high < 0, high, 0.0))
    one_sided = ((rho == 0) & ((low >= 0) | (high <= 0))) | (largest == 0)
    keep = tl.where(one_sided & (a != nearest), 0.0, keep)
    x = tl.where(one_sided, 0.0, x)
    c, optimum = _descend(x, own, tl.where(one_sided, 0.0, rho), keep, N)
    inner = tl.maximum(low, tl.minimum(high, (optimum * unit) * unlift))
    optimum = tl.where(one_sided, nearest, inner)

    missing = tl.full([1, 1], float("nan"), a.dtype)
    c = tl.where(unusable, missing, c)
    optimum = tl.where(unusable, missing, optimum)
    c = tl.where(count == 0, p, c)
    optimum = tl.where(count == 0, 0.0, optimum)
    smaller = tl.minimum(-low, high)
    unsure = (rho == 0) & (smaller > 0) & (smaller < largest * spread) & ~unusable
    return c, optimum, unsure


@triton.jit
def solve(a, p, here, regularization, scale, N: tl.constexpr, ONE_SIGN: tl.constexpr = False):
    """Weights c (R, N) and optima a.c (R, 1) in the dtype of `a`; c is 0 where not `here`.

    a (R, N) float32 or float64: scores; p (R, N) or (1, N) float64, 0 at padding; here (R, N) bool;
    regularization: a float64 value; scale: (R, 1) float64, or None for max a^2. A row without included
    objectives gets p, a row with a NaN or infinity gets NaN. ONE_SIGN: no row has scores of both signs.
    """
    c, optimum, unsure = _rows(a, tl.cast(p, a.dtype), here, regularization, scale, N)
    if a.dtype != tl.float64 and not ONE_SIGN:
        if tl.max(tl.max(unsure.to(tl.int32), axis=1), axis=0) > 0:
            exact_c, exact_optimum, _ = _rows(a.to(tl.float64), p, here, regularization, scale, N)
            c = tl.where(unsure, exact_c.to(c.dtype), c)
            optimum = tl.where(unsure, exact_optimum.to(c.dtype), optimum)
    return c, optimum


@triton.jit
def solve_scaled(a, moments, p, here, regularization, N: tl.constexpr, ONE_SIGN: tl.constexpr = False):
    """`solve` with the largest of the moments (R, N) as the scale; NaN if one of them is NaN. Moments that
    underflow (below 2^-972) give no scale: -1 stands for max a^2."""
    scale = tl.max(moments, axis=1, keep_dims=True)
    scale = tl.where(scale < 2.5057e-293, -1.0, scale)
    unusable = tl.max((moments != moments).to(tl.int32), axis=1, keep_dims=True) > 0
    return solve(a, p, here, regularization, tl.where(unusable, float("nan"), scale), N, ONE_SIGN)


@triton.jit
def softmin(a, p, here, temperature):
    """c_i proportional to p_i exp(-a_i / temperature) over the included objectives, and c.a; arguments as for
    `solve`."""
    infinity: tl.constexpr = float("inf")
    keep = tl.where(here, tl.full([1, 1], 1.0, a.dtype), 0.0)
    p = tl.cast(p, a.dtype)
    own = normalised(p, keep)
    a = tl.where(here, a, 0.0)
    unusable = tl.max((~(tl.abs(a) < infinity)).to(tl.int32), axis=1, keep_dims=True) > 0
    low = tl.min(tl.where(own > 0, a, infinity), axis=1, keep_dims=True)
    power = tl.where(own > 0, (a - low) / tl.cast(temperature, a.dtype), 0.0)
    part = own * tl.exp(-power)
    total = tl.sum(part, axis=1, keep_dims=True)
    c = part / tl.where(total > 0, total, 1.0)
    c = tl.where(unusable, float("nan"), c)
    none_present = tl.sum(keep, axis=1, keep_dims=True) == 0
    return tl.where(none_present, p, c), tl.where(none_present, 0.0, tl.sum(c * a, axis=1, keep_dims=True))


@triton.jit(do_not_specialize=["rows", "row", "column", "scale_stride"])
def weights_kernel(
    scores, row: tl.int64, column: tl.int64, preference, value: tl.float64, at, scale, scale_stride: tl.int64,
    weights, optimum, rows: tl.int64, n: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, N).to(tl.int64)
    here = (i < rows)[:, None] & (j < n)[None, :]
    a = read(scores + i[:, None] * row + j[None, :] * column, here, weights.dtype.element_ty)
    size = None
    if scale is not None:
        size = read(scale + i * scale_stride, i < rows, tl.float64)[:, None]
    c, best = solve(a, preference_of(preference, n, N)[None, :], here, number_of(value, at), size, N)
    tl.store(weights + i[:, None] * n + j[None, :], c, here)
    tl.store(optimum + i[:, None], best, (i < rows)[:, None])


def weights(
    scores: Tensor,
    preference: Tensor | None,
    regularization: Number,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    if scores.numel() == 0:
        return
    check_memory(scores=scores, preference=preference, scale=scale, weights=result, optimum=optimum)
    n = scores.shape[-1]
    source, stride = scores.reshape(-1, n), 0
    if scale is not None and scale.dim():
        scale = scale.reshape(-1)
        stride = scale.stride(0)
    rows, block = source.shape[0], power_of_two(n)
    each = max(1, min(_TILE // block, 4 if rows <= _FEW else _TILE))  # two variants, for few rows and many
    launch(
        weights_kernel, scores.device, triton.cdiv(rows, each), options_of(n=n, ROWS=each, N=block), source,
        *source.stride(), preference, *number(regularization), scale, stride, result, optimum, rows,
    )  # fmt: skip
