"""The pass over tokens: computes any of the statistics, the combined advantages, and the loss with its
gradient."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Number
from pama_kernels.backends._counter import counter

from .combine import (
    _BATCH,
    _FACTORS,
    _HEAD,
    _NONE,
    _ROW,
    _SCORES,
    _SOFTMIN,
    FACTORS,
    NONE,
    SCORES,
    SOFTMIN,
    coefficients,
    combine,
    finish,
    loss_and_slope,
)
from .launch import Options, launch, number, number_of, options_of, programs
from .problem import ANY_SIZE, Constants, Problem
from .reduce import (
    clear,
    slot_size,
    store_pairs,
    store_sums,
)
from .simplex import preference_of, softmin, solve
from .statistics import share_of
from .terms import CHUNK, FIELD_COUNT, add_token_pairs, add_token_terms, no_pairs, no_sums
from .tokens import (
    clip_of,
    load_factors,
    load_terms,
    locate,
    part_range,
    rounded,
    tokens_in_all,
)
from .trace import memory, strides


@triton.jit(do_not_specialize=[*ANY_SIZE, "c_row", "c_step", "e_row", "parts"])
def tokens_kernel(
    advantages, a_row: tl.int64, a_token: tl.int64, a_objective: tl.int64,
    presence, o_row: tl.int64, o_token: tl.int64, o_objective: tl.int64,
    mask, m_row: tl.int64, m_token: tl.int64, logprobs, l_row: tl.int64, l_token: tl.int64,
    old, b_row: tl.int64, b_token: tl.int64, importance, w_row: tl.int64, w_token: tl.int64,
    ref, r_row: tl.int64, r_token: tl.int64, cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64,
    low: tl.float64, low_at, high: tl.float64, high_at, dual: tl.float64, dual_at,
    preference, value: tl.float64, value_at,
    c, c_row: tl.int64, c_step: tl.int64, effective, e_row: tl.int64, row_counts, row_factors,
    denominator: tl.float64, denominator_at, kl: tl.float64, kl_at,
    combined, gradient, loss, square_sum, weights, optimum, sums, row_fields, parts: tl.int64, partial,
    counter,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    UNIT: tl.constexpr, DENSE: tl.constexpr, NOON: tl.constexpr, WIDE: tl.constexpr,
    WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, PAIRS: tl.constexpr, SHARE: tl.constexpr,
    SOLVE: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Programs take tiles of all tokens in turn; with `row_fields`, which receives their fields (rows *
    parts, FIELD_COUNT, n), they take whole parts of rows. SOLVE: the kind of weights that the last program
    solves from the statistics, or -1. COUNT: a denominator below 1 counts as 1."""
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    PRESENT: tl.constexpr = presence is not None
    NARROW_SUMS: tl.constexpr = STATISTICS and not WIDE and row_counts is None and row_fields is None
    SQUARES: tl.constexpr = not PAIRS or row_fields is not None
    clip = clip_of(low, low_at, high, high_at, dual, dual_at)
    setting = number_of(value, value_at)
    own = (advantages, a_row, a_token, a_objective)
    present = (presence, o_row, o_token, o_objective)
    mask = (mask, m_row, m_token)
    logprobs = (logprobs, l_row, l_token)
    old = (old, b_row, b_token)
    importance = (importance, w_row, w_token)
    ref = (ref, r_row, r_token)
    cu = (cu, cu_step)
    c = (c, c_row, c_step)
    effective = (effective, e_row)
    slots = tl.num_programs(0)
    program = tl.program_id(0).to(tl.int64)
    slot = partial
    if partial is not None:
        slot = partial + program * STRIDE
        clear(slot, STRIDE)
    if loss is not None:
        divisor = number_of(denominator, denominator_at)
        if COUNT:
            divisor = tl.maximum(divisor, 1.0)
        coefficient = number_of(kl, kl_at)
    if (WEIGHTS == _SCORES) | (WEIGHTS == _SOFTMIN):
        p = preference_of(preference, n, N)[None, :]
        c_sum = tl.zeros([TOKENS, N], tl.float64)
    zero = tl.zeros([TOKENS], tl.float64)
    loss_sum = zero
    best_sum = zero
    squares = zero
    units = slots
    if row_fields is not None:
        units = rows * parts
    for unit in range(tl.program_id(0), units, slots):
        begin = program * TOKENS
        end = tokens_in_all(cu, rows, width, LAYOUT)
        step = tl.cast(slots, tl.int64) * TOKENS
        own_row = tl.zeros([], tl.int64)
        if row_fields is not None:
            own_row = tl.cast(unit, tl.int64) // parts
            begin, end = part_range(cu, own_row, width, tl.cast(unit, tl.int64) % parts, parts, TOKENS)
            step = tl.full([], TOKENS, tl.int64)
        if STATISTICS:
            acc = no_sums(TOKENS, N, NARROW_SUMS)
            if PAIRS:
                pair_acc = no_pairs(TOKENS, N, PRESENT)
        chunk = tl.maximum(end - begin, 1)
        if NARROW_SUMS:
            chunk = step * CHUNK
        for lead in range(begin, end, chunk):
            for first in range(lead, tl.minimum(lead + chunk, end), step):
                at = first + tl.arange(0, TOKENS)
                inside = at < end
                if row_fields is not None:
                    row = tl.zeros_like(at) + own_row
                    token = at
                else:
                    row, token = locate(at, cu, rows, width, LAYOUT, NARROW)
                factors = load_factors(mask, logprobs, old, importance, clip, row, token, inside, UNIT, D)
                valid = factors[0]
                if WEIGHTS == _FACTORS:
                    up = tl.load(row_factors + 3 * row, mask=inside, other=0.0).to(D)
                    down = tl.load(row_factors + 3 * row + 1, mask=inside, other=0.0).to(D)
                    share = tl.load(row_factors + 3 * row + 2, mask=inside, other=0.0)
                else:
                    share = share_of(row, inside, row_counts)
                    terms = load_terms(own, present, factors, row, token, 0, n, N, NOON, DENSE, D)
                    a, here, bound, _ = terms
                    if STATISTICS:
                        acc = add_token_terms(acc, factors, terms, share, NOON, SQUARES)
                        if PAIRS:
                            pair_acc = add_token_pairs(pair_acc, terms, terms, share, PRESENT)
                    if WEIGHTS == _BATCH:
                        up, down = combine(
                            coefficients(c, effective, 0, tl.full([1, 1], 1, tl.int1), here, n, N, SHARE, D),
                            a,
                            NOON,
                        )
                    elif WEIGHTS == _ROW:
                        up, down = combine(
                            coefficients(c, effective, row[:, None], inside[:, None], here, n, N, SHARE, D),
                            a,
                            NOON,
                        )
                    elif WEIGHTS != _NONE:
                        if WEIGHTS == _SCORES:
                            x, best = solve(bound, p, here, setting, None, N, NOON)
                        else:
                            x, best = softmin(a, p, here, setting)
                        x_sum = x.to(tl.float64)
                        best = tl.sum(best, axis=1).to(tl.float64)
                        if share is not None:
                            x_sum *= share[:, None]
                            best *= share
                        c_sum += tl.where(valid[:, None], x_sum, 0.0)
                        best_sum += tl.where(valid, best, 0.0)
                        up, down = combine(x, a, NOON)
                if combined is not None:
                    together = tl.where(valid, up + down, 0.0)
                    square = together.to(tl.float64) * together.to(tl.float64)
                    if share is not None:
                        square *= share
                    squares += square
                    tl.store(combined + at, rounded(together, combined.dtype.element_ty), mask=inside)
                if loss is not None:
                    factor = 1.0 / divisor
                    if share is not None:
                        factor = share / divisor
                    amount, slope = loss_and_slope(
                        factors, up, down, ref, coefficient, factor, row, token, inside, UNIT, NOON, D
                    )
                    loss_sum += tl.where(valid, amount * factor, 0.0)
                    if gradient is not None:
                        slope = tl.where(valid, slope, 0.0)
                        tl.store(gradient + at, rounded(slope, gradient.dtype.element_ty), mask=inside)
            if NARROW_SUMS:
                store_sums(slot + _HEAD + n, acc, n, N)
                acc = no_sums(TOKENS, N, NARROW_SUMS)
        if STATISTICS:
            if not NARROW_SUMS:
                store_sums(slot + _HEAD + n, acc, n, N)
            if PAIRS:
                store_pairs(slot + _HEAD + n, pair_acc, n, N, PRESENT, not SQUARES)
            if row_fields is not None:
                i = tl.arange(0, N)
                to = row_fields + tl.cast(unit, tl.int64) * FIELD_COUNT * n + i
                for field in tl.static_range(FIELD_COUNT):
                    tl.store(to + field * n, tl.sum(acc[field], axis=0), mask=i < n)
    if partial is not None:
        i = tl.arange(0, N)
        tl.store(slot, tl.sum(loss_sum, axis=0))
        tl.store(slot + 1, tl.sum(best_sum, axis=0))
        tl.store(slot + 2, tl.sum(squares, axis=0))
        if (WEIGHTS == _SCORES) | (WEIGHTS == _SOFTMIN):
            tl.store(slot + _HEAD + i, tl.sum(c_sum, axis=0), mask=i < n)
        finish(
            partial, counter, setting, c, preference, loss, square_sum, weights, optimum, sums, effective[0],
            n, N, WEIGHTS, STATISTICS, PAIRS, PRESENT, SOLVE, STRIDE,
        )  # fmt: skip


@dataclass
class Pass:
    """What a launch of `tokens_kernel` does, and where its results go."""

    sums: Tensor  # the statistics
    weights: int = NONE  # WEIGHTS
    statistics: bool = False
    pairs: bool = False
    share: bool = False
    solve: int = -1
    preference: Tensor | None = None
    setting: Number = 0.0  # regularization or temperature
    c: Tensor | None = None  # (N,), or (B, N) with weights per row
    effective: Tensor | None = None
    row_counts: Tensor | None = None
    row_factors: Tensor | None = None
    denominator: Number = 1.0
    count: bool = False  # the denominator is one
    kl_coef: Number = 0.0
    combined: Tensor | None = None
    gradient: Tensor | None = None
    loss: Tensor | None = None
    square_sum: Tensor | None = None
    reported: Tensor | None = None
    optimum: Tensor | None = None
    row_fields: Tensor | None = None
    parts: int = 1

    def copy(self) -> Pass:
        made = Pass.__new__(Pass)
        made.__dict__.update(self.__dict__)
        return made


class _Plan(NamedTuple):
    options: Options
    tokens: int  # of a tile
    stride: int  # of a slot
    each: int  # programs per SM


@functools.cache
def _plan(
    c: Constants,
    form: tuple[bool, bool, bool],
    weights: int,
    statistics: bool,
    pairs: bool,
    share: bool,
    solve: int,
    count: bool,
) -> _Plan:
    """All that does not depend on sizes. form: whether there are an objective mask, `row_fields` and
    `row_counts`."""
    present, by_part, counted = form
    # Sums need registers in addition to the results, and so does float64, which scores of both signs may
    # need.
    by_token = weights in (SCORES, SOFTMIN)
    if pairs:
        tokens = c.tile((512 if present else 1024) // (2 if by_token else 1), max(2, c.N**2))
    elif weights == FACTORS:
        tokens = c.tile(256, 1)
    else:
        signed = weights == SCORES and not c.NOON
        tokens = c.tile(128 if signed else 256 if by_token else 512 if statistics else 1024)
    # The programs on one SM share its registers; more programs hide more memory latency.
    simple = c.DENSE and c.LAYOUT == 0 and not counted
    few = by_token or present or by_part
    each = 8 if not statistics else 2 if few else 4 if simple and not pairs else 3
    stride = slot_size(c.n, statistics, pairs, present)
    options = options_of(
        each if statistics else 1, TOKENS=tokens, WEIGHTS=weights, STATISTICS=statistics, PAIRS=pairs,
        SHARE=share, SOLVE=solve, COUNT=count, STRIDE=stride, **c._asdict(),
    )  # fmt: skip
    return _Plan(options, tokens, stride, each)


def run_tokens(p: Problem, x: Pass) -> None:
    form = p.arguments[4] is not None, x.row_fields is not None, x.row_counts is not None
    plan = _plan(p.constants, form, x.weights, x.statistics, x.pairs, x.share, x.solve, x.count)
    units = -(-p.total // plan.tokens) if x.row_fields is None else p.rows * x.parts
    slots = programs(p.device, units, plan.each)
    partial = count = None
    if x.statistics or x.loss is not None or x.square_sum is not None:
        partial = memory(p.device, slots * plan.stride)
        count = counter(p.device)
    c_row, c_step = weight_strides(x.c)
    launch(
        tokens_kernel, p.device, slots, plan.options, *p.arguments, x.preference, *number(x.setting),
        x.c, c_row, c_step, x.effective, p.constants.n if c_row else 0, x.row_counts, x.row_factors,
        *number(x.denominator), *number(x.kl_coef), x.combined, x.gradient, x.loss, x.square_sum,
        x.reported, x.optimum, x.sums, x.row_fields, x.parts, partial, count,
    )  # fmt: skip


def weight_strides(c: Tensor | None) -> tuple[int, ...]:
    """The row stride and the stride of weights (N,) or (B, N)."""
    if c is None:
        return 0, 0
    steps = strides(c)
    return tuple(steps) if len(steps) == 2 else (0, *steps)
