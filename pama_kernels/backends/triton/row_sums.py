"""The sums over the tokens of each sequence, which do not depend on the objectives, see `terms.py`."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .launch import INTERPRETED, Options, options_of
from .problem import ANY_SIZE
from .terms import (
    ROW_COUNTED,
    ROW_SUM_COUNT,
    VALID,
    add_row_sums,
    factors_are_one,
    repeated,
)
from .tokens import clip_of, load_advantages, load_factors, part_range, valid_tokens

ROW_TOKENS = 128 if INTERPRETED else 256  # of a tile


@triton.jit(do_not_specialize=[*ANY_SIZE, "parts"])
def row_sums_kernel(
    mask, m_row: tl.int64, m_token: tl.int64, logprobs, l_row: tl.int64, l_token: tl.int64,
    old, b_row: tl.int64, b_token: tl.int64, importance, w_row: tl.int64, w_token: tl.int64,
    cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64,
    low: tl.float64, low_at, high: tl.float64, high_at, dual: tl.float64, dual_at, row_sums, parts: tl.int64,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(rows * parts, ROW_SUMS); or, PLAIN, (rows * parts, 1): if all factors are 1, the number of valid
    tokens suffices."""
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    mask = (mask, m_row, m_token)
    cu = (cu, cu_step)
    clip = clip_of(low, low_at, high, high_at, dual, dual_at)
    for unit in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        own = tl.cast(unit, tl.int64) // parts
        begin, end = part_range(cu, own, width, tl.cast(unit, tl.int64) % parts, parts, TOKENS)
        counts = repeated(tl.zeros([TOKENS], tl.int32), ROW_COUNTED)
        sums = repeated(tl.zeros([TOKENS], tl.float64), ROW_SUM_COUNT - ROW_COUNTED)
        for first in range(begin, end, TOKENS):
            at = first + tl.arange(0, TOKENS)
            row = tl.zeros_like(at) + own
            if PLAIN:
                valid = valid_tokens(mask, row, at, at < end, UNIT).to(tl.int32)
                counts = (counts[VALID] + valid, counts[1], counts[2])
            else:
                factors = load_factors(
                    mask, (logprobs, l_row, l_token), (old, b_row, b_token), (importance, w_row, w_token),
                    clip, row, at, at < end, UNIT, D,
                )  # fmt: skip
                counts, sums = add_row_sums(counts, sums, factors)
        to = row_sums + tl.cast(unit, tl.int64) * (1 if PLAIN else ROW_SUM_COUNT)
        for k in tl.static_range(1 if PLAIN else ROW_COUNTED):
            tl.store(to + k, tl.sum(counts[k].to(tl.int64), axis=0).to(tl.float64))
        if not PLAIN:
            for k in tl.static_range(ROW_SUM_COUNT - ROW_COUNTED):
                tl.store(to + ROW_COUNTED + k, tl.sum(sums[k], axis=0))


@triton.jit
def _sum_of(row_sums, row, inside, parts, k: tl.constexpr, size: tl.constexpr):
    total = tl.zeros(row.shape, tl.float64)
    for part in range(parts):
        total += tl.load(row_sums + (row * parts + part) * size + k, mask=inside, other=0.0)
    return total


@triton.jit
def load_rows(row_sums, cu, row, inside, width, parts, PLAIN: tl.constexpr, OMEGA: tl.constexpr):
    """The valid tokens, omega, and the sums times omega of rows, (ROWS, 1) each. OMEGA: it is 1 / tokens,
    else 1."""
    if row_sums is None:
        if cu[0] is not None:
            begin = tl.load(cu[0] + row * cu[1], mask=inside, other=0).to(tl.int64)
            end = tl.load(cu[0] + (row + 1) * cu[1], mask=inside, other=0).to(tl.int64)
            if width >= 0:
                begin = tl.maximum(begin, 0)
                end = tl.minimum(end, tl.cast(width, tl.int64))
            tokens = tl.maximum(end - begin, 0).to(tl.float64)
        else:
            tokens = tl.where(inside, tl.cast(width, tl.float64), tl.zeros(row.shape, tl.float64))
    else:
        tokens = _sum_of(row_sums, row, inside, parts, VALID, 1 if PLAIN else ROW_SUM_COUNT)
    omega = tl.where(tokens > 0, 1.0, tl.zeros_like(tokens))
    if OMEGA:
        omega /= tl.maximum(tokens, 1.0)
    w = omega[:, None]
    t = tokens[:, None] * w
    sums = (t,)
    for k in tl.static_range(1, ROW_SUM_COUNT):
        if not PLAIN:
            sums = sums + (_sum_of(row_sums, row, inside, parts, k, ROW_SUM_COUNT)[:, None] * w,)
        elif factors_are_one(k):
            sums = sums + (t,)
        else:
            sums = sums + (tl.zeros_like(t),)
    return tokens, omega, sums


@triton.jit
def load_row_advantages(advantages, presence, row, tokens, lead, n: tl.constexpr, N: tl.constexpr):
    """A' and presence (ROWS, N) of the objectives from `lead` on, in rows with a valid token."""
    objective = (tl.cast(lead, tl.int64) + tl.arange(0, N))[None, :]
    zero = tl.zeros_like(row)[:, None]
    return load_advantages(
        advantages, presence, row[:, None], zero, objective, (tokens > 0)[:, None], n, False, tl.float64
    )


@functools.cache
def sums_options(unit: bool, wide: bool, plain: bool) -> Options:
    return options_of(4, TOKENS=ROW_TOKENS, UNIT=unit, WIDE=wide, PLAIN=plain)
