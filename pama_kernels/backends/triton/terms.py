"""The contribution of one token, or of one sequence, to the statistics. A new field or row sum is added in
this file only.

Tuples of sums are in the order of `_call.FIELDS`, (TOKENS, N) each, then of `_call.TOTALS`, (TOKENS,). Every
term is weighted by the token weights of the aggregation: `share` (TOKENS,) float64, or 1 where it is None.

Advantages per sequence: with U = max(A, 0), V = min(A, 0) of the sequence (0 under Noon), and over its valid
tokens the sums of the factors (ROW_SUMS),

    sum I = U gp + V gn
    sum I_i I_j = U_i (gp^2 U_j + gp gn V_j) + V_i (gn^2 V_j + gp gn U_j)

and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pama_kernels._call import FIELDS, PAIRS, TOTALS

from .tokens import by_sign

FIELD_COUNT, TOTAL_COUNT, PAIR_COUNT = map(tl.constexpr, (len(FIELDS), len(TOTALS), len(PAIRS)))
COUNT = tl.constexpr(FIELDS.index("count"))
BOUND_SUM = tl.constexpr(FIELDS.index("bound_sum"))
BOUND_SQUARE_SUM = tl.constexpr(FIELDS.index("bound_square_sum"))
ADVANTAGE_SUM = tl.constexpr(FIELDS.index("advantage_sum"))
ADVANTAGE_SQUARE_SUM = tl.constexpr(FIELDS.index("advantage_square_sum"))
POSITIVE_COUNT = tl.constexpr(FIELDS.index("positive_count"))

CHUNK = tl.constexpr(32)  # terms that are added in float32

# The sums of a sequence that do not depend on the objectives, as in csrc/core/statistics.hpp: counts come
# first.
ROW_SUMS = 13
VALID, OFF_POS, OFF_NEG, GRAD_POS, GRAD_NEG, GRAD_POS_SQUARE, GRAD_NEG_SQUARE, GRAD_BOTH = map(
    tl.constexpr, range(8)
)
GRAD_POS_LOGP, GRAD_NEG_LOGP, POS, NEG, K3 = map(tl.constexpr, range(8, ROW_SUMS))
ROW_SUM_COUNT, ROW_COUNTED = tl.constexpr(ROW_SUMS), GRAD_POS


@triton.jit
def repeated(x, TIMES: tl.constexpr):
    result = ()
    for _ in tl.static_range(TIMES):
        result = result + (x,)
    return result


@triton.jit
def added(x, y, SIZE: tl.constexpr):
    """The sums of two tuples' elements."""
    result = ()
    for k in tl.static_range(SIZE):
        result = result + (x[k] + y[k],)
    return result


@triton.jit
def no_sums(TOKENS: tl.constexpr, N: tl.constexpr, NARROW: tl.constexpr):
    """NARROW: at most `CHUNK` terms in float32 with token weights 1, so that sums of linear terms are kept in
    float32 and counts in integers. Squares may leave the range of float32."""
    S: tl.constexpr = tl.float32 if NARROW else tl.float64
    C: tl.constexpr = tl.int32 if NARROW else tl.float64
    s = tl.zeros([TOKENS, N], S)
    c = tl.zeros([TOKENS, N], C)
    q = tl.zeros([TOKENS, N], tl.float64)
    return c, s, q, s, s, s, q, c, c, tl.zeros([TOKENS], C), tl.zeros([TOKENS], S)


@triton.jit
def add_token_terms(sums, factors, terms, share, NOON: tl.constexpr, SQUARES: tl.constexpr):
    """Without SQUARES, the sums of squares are left out, since they are the diagonals of the pairs."""
    valid, logp, _, _, _, _, _, off_pos, off_neg, kl = factors
    a, here, bound, surrogate = terms
    S: tl.constexpr = sums[1].dtype
    w = tl.full([], 1, sums[0].dtype)
    v = w
    if share is not None:
        w, v = share[:, None], share
    positive = a > 0
    clipped = positive & off_pos[:, None]
    if not NOON:
        clipped = clipped | ((a < 0) & off_neg[:, None])
    b = bound.to(S)
    x = a.to(S)
    wb, wx, g, k3 = b, x, surrogate.to(S), kl.to(S)
    if share is not None:
        wb, wx, g, k3 = w * b, w * x, w * g, v * k3
    zero = tl.zeros_like(sums[0])
    bounds, advantages = tl.zeros_like(sums[2]), tl.zeros_like(sums[2])
    if SQUARES:
        bounds = wb.to(tl.float64) * b.to(tl.float64)
        advantages = wx.to(tl.float64) * x.to(tl.float64)
    own = (
        tl.where(here, w, zero),
        wb,
        bounds,
        wb * logp.to(S)[:, None],
        g,
        wx,
        advantages,
        tl.where(positive, w, zero),
        tl.where(clipped, w, zero),
        tl.where(valid, v, tl.zeros_like(sums[FIELD_COUNT])),
        k3,
    )
    return added(sums, own, FIELD_COUNT + TOTAL_COUNT)


@triton.jit
def add_row_sums(counts, sums, factors):
    """Tokens added to the sums of their sequence: counts (int32), and the others (float64)."""
    valid, logp, _, pos, neg, gp, gn, off_pos, off_neg, kl = factors
    p = gp.to(tl.float64)
    q = gn.to(tl.float64)
    x = logp.to(tl.float64)
    counted = (valid.to(tl.int32), off_pos.to(tl.int32), off_neg.to(tl.int32))
    summed = (
        p, q, p * p, q * q, p * q, p * x, q * x, pos.to(tl.float64), neg.to(tl.float64), kl.to(tl.float64),
    )  # fmt: skip
    return added(counts, counted, ROW_COUNTED), added(sums, summed, ROW_SUM_COUNT - ROW_COUNTED)


@triton.constexpr_function
def factors_are_one(k):
    """If all factors are 1, sum k of a sequence is either its number of valid tokens (true) or 0 (false)."""
    return k not in (OFF_POS, OFF_NEG, GRAD_POS_LOGP, GRAD_NEG_LOGP, K3)


@triton.jit
def row_terms(a, here, s, NOON: tl.constexpr):
    """The terms of sequences, of a and here (ROWS, N), and sums `s` times the token weights (ROWS, 1)."""
    u, v = by_sign(a, NOON)
    clipped = tl.where(a > 0, s[OFF_POS], 0.0)
    if not NOON:
        clipped += tl.where(a < 0, s[OFF_NEG], 0.0)
    return (
        tl.where(here, s[VALID], 0.0),
        tl.where(here, u * s[GRAD_POS] + v * s[GRAD_NEG], 0.0),
        tl.where(here, u * u * s[GRAD_POS_SQUARE] + v * v * s[GRAD_NEG_SQUARE], 0.0),
        tl.where(here, u * s[GRAD_POS_LOGP] + v * s[GRAD_NEG_LOGP], 0.0),
        tl.where(here, u * s[POS] + v * s[NEG], 0.0),
        tl.where(here, a * s[VALID], 0.0),
        tl.where(here, a * a * s[VALID], 0.0),
        tl.where(a > 0, s[VALID], 0.0),
        tl.where(here, clipped, 0.0),
        tl.sum(s[VALID], axis=1),
        tl.sum(s[K3], axis=1),
    )


# --- pairs: in the order of `_call.PAIRS`, (TOKENS, N, N) each; only the first two if all objectives are
# present ---


def pairs_in_slot(present: bool) -> int:
    """The number of N x N blocks that are summed; the others follow from the fields if every objective is
    present."""
    return len(PAIRS) if present else 2


summed_pairs = triton.constexpr_function(pairs_in_slot)  # in kernels; calls from the host take 3 us


@triton.jit
def no_pairs(TOKENS: tl.constexpr, N: tl.constexpr, PRESENT: tl.constexpr):
    return repeated(tl.zeros([TOKENS, N, N], tl.float64), summed_pairs(PRESENT))


@triton.jit
def _add_pairs(sums, bound, wa, a, b, here, there, PRESENT: tl.constexpr):
    """bound: I_i I_j; wa, here: A'_i and presence times the token weights; b, there: of j, (TOKENS, 1, N)."""
    pairs = (bound, wa[:, :, None] * b)
    if PRESENT:
        moments = (here[:, :, None] * there, wa[:, :, None] * there, (wa * a)[:, :, None] * there)
        pairs = pairs + moments
    return added(sums, pairs, summed_pairs(PRESENT))


@triton.jit
def add_token_pairs(sums, x, y, share, PRESENT: tl.constexpr):
    """Adds the pairs of two blocks of objectives on the same tokens."""
    w = 1.0
    if share is not None:
        w = share[:, None]
    a = x[0].to(tl.float64)
    b = y[0].to(tl.float64)[:, None, :]
    bound = (w * x[2].to(tl.float64))[:, :, None] * y[2].to(tl.float64)[:, None, :]
    here = tl.where(x[1], w, tl.zeros_like(a))
    there = tl.where(y[1], 1.0, tl.zeros_like(a))[:, None, :]
    return _add_pairs(sums, bound, w * a, a, b, here, there, PRESENT)


@triton.jit
def _finite(x):
    return tl.where(x == x, x, 0.0)


@triton.jit
def add_row_pairs(sums, a, here, b, there, s, NOON: tl.constexpr, PRESENT: tl.constexpr):
    """Adds the pairs of two blocks of objectives of the same sequences."""
    u, v = by_sign(a, NOON)
    x, y = by_sign(b, NOON)
    pp, qq, pq = _finite(s[GRAD_POS_SQUARE]), _finite(s[GRAD_NEG_SQUARE]), _finite(s[GRAD_BOTH])
    first = (u * pp)[:, :, None] * x[:, None, :] + (u * pq)[:, :, None] * y[:, None, :]
    second = (v * qq)[:, :, None] * y[:, None, :] + (v * pq)[:, :, None] * x[:, None, :]
    own = s[GRAD_POS_SQUARE]
    bad = tl.where(own == own, 0.0, own)  # NaN wherever one of the two is present
    bound = first + second + tl.where(here, bad, 0.0)[:, :, None] + tl.where(there, bad, 0.0)[:, None, :]
    valid = here.to(tl.float64) * s[VALID]
    o = there.to(tl.float64)[:, None, :]
    return _add_pairs(sums, bound, a * s[VALID], a, b[:, None, :], valid, o, PRESENT)
