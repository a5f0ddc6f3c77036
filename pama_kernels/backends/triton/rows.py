"""Advantages per sequence: the tokens of a row contribute sums that do not depend on the objectives, see
`terms.py`. The loss needs up = sum c_i max(A_i, 0) and down = sum c_i min(A_i, 0) of each row. All in
float64.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Aggregation, Tokens
from pama_kernels.backends._counter import counter

from .apply import Pass, weight_strides
from .combine import _BATCH, _NONE, _SCORES, _SOFTMIN, NONE, coefficients, combine, finish
from .launch import INTERPRETED, Options, launch, number, number_of, options_of, power_of_two, programs
from .problem import BEFORE_REF, FROM_OFFSETS, OFFSETS, objective_strides, problem
from .reduce import HEAD, clear, slot_size, store_pair_tile, store_pairs, store_sums
from .row_sums import ROW_TOKENS, load_row_advantages, load_rows, row_sums_kernel, sums_options
from .simplex import preference_of, softmin, solve_scaled
from .statistics import finish_pairs, pair_slots
from .terms import (
    BOUND_SQUARE_SUM,
    BOUND_SUM,
    FIELD_COUNT,
    ROW_SUMS,
    TOTAL_COUNT,
    VALID,
    add_row_pairs,
    added,
    no_pairs,
    no_sums,
    pairs_in_slot,
    row_terms,
)
from .tokens import by_sign, rounded
from .trace import larger, memory, smaller

_BLOCK = 8  # objectives of a block of pairs
_HEAD = tl.constexpr(HEAD)
_ROW_SIZES = ["a_row", "a_objective", "o_row", "o_objective", "cu_step", "rows", "width", "parts"]


@triton.jit(do_not_specialize=[*_ROW_SIZES, "c_row", "c_step"])
def rows_kernel(
    advantages, a_row: tl.int64, a_objective: tl.int64, presence, o_row: tl.int64, o_objective: tl.int64,
    cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64, row_sums, parts: tl.int64,
    preference, value: tl.float64, value_at, c, c_row: tl.int64, c_step: tl.int64, effective,
    combined, row_factors, square_sum, weights, optimum, sums, partial, counter,
    n: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, NOON: tl.constexpr, PLAIN: tl.constexpr,
    OMEGA: tl.constexpr, WEIGHTS: tl.constexpr, STATISTICS: tl.constexpr, PAIRS: tl.constexpr,
    SHARE: tl.constexpr,
    SOLVE: tl.constexpr, BY_ROW: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Computes statistics, weights and combined advantages of rows; `row_factors` receives (rows, 3) up, down
    and omega. BY_ROW: weights and optimum are stored for each row."""
    PRESENT: tl.constexpr = presence is not None
    own = (advantages, a_row, 0, a_objective)
    present = (presence, o_row, 0, o_objective)
    cu = (cu, cu_step)
    c = (c, c_row, c_step)
    setting = number_of(value, value_at)
    i = tl.arange(0, N)
    slots = tl.num_programs(0)
    slot = partial
    if partial is not None:
        slot = partial + tl.program_id(0).to(tl.int64) * STRIDE
        clear(slot, STRIDE)
    if (WEIGHTS == _SCORES) | (WEIGHTS == _SOFTMIN):
        p = preference_of(preference, n, N)[None, :]
    acc = no_sums(ROWS, N, False)
    if PAIRS:
        pair_acc = no_pairs(ROWS, N, PRESENT)
    squares = tl.zeros([ROWS], tl.float64)
    best_sum = tl.zeros([ROWS], tl.float64)
    c_sum = tl.zeros([ROWS, N], tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), slots):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        tokens, omega, s = load_rows(row_sums, cu, row, inside, width, parts, PLAIN, OMEGA)
        a, here = load_row_advantages(own, present, row, tokens, 0, n, N)
        if STATISTICS or BY_ROW:
            terms = row_terms(a, here, s, NOON)
        if STATISTICS:
            acc = added(acc, terms, FIELD_COUNT + TOTAL_COUNT)
            if PAIRS:
                pair_acc = add_row_pairs(pair_acc, a, here, a, here, s, NOON, PRESENT)
        if WEIGHTS != _NONE:
            mass = tl.sum(s[VALID], axis=1)
            count = tl.where(here, s[VALID], 1.0)
            if WEIGHTS == _SCORES:
                if BY_ROW:
                    score = tl.where(here, terms[BOUND_SUM] / count, 0.0)
                    moment = tl.where(here, terms[BOUND_SQUARE_SUM] / count, 0.0)
                else:
                    above, below = by_sign(a, NOON)
                    score = above + below
                    moment = tl.where(here, a * a, 0.0)
                x, best = solve_scaled(score, moment, p, here, setting, N, NOON)
                best = tl.sum(best, axis=1)
            elif WEIGHTS == _SOFTMIN:
                x, best = softmin(a, p, here, setting)
                best = tl.sum(best, axis=1)
            else:
                x = coefficients(
                    c,
                    (effective, 0),
                    row[:, None],
                    inside[:, None],
                    here & inside[:, None],
                    n,
                    N,
                    SHARE,
                    tl.float64,
                )
                best = tl.zeros([ROWS], tl.float64)
                if BY_ROW:
                    best = tl.sum(x * tl.where(here, terms[BOUND_SUM] / count, 0.0), axis=1)
            if BY_ROW:
                tl.store(weights + row[:, None] * n + i[None, :], x, mask=inside[:, None] & (i < n)[None, :])
                tl.store(optimum + row, best, mask=inside)
            elif WEIGHTS != _BATCH:
                some = tokens > 0
                c_sum += tl.where(some[:, None], x * mass[:, None], 0.0)
                best_sum += tl.where(some, best * mass, 0.0)
            up, down = combine(x, a, NOON)
            if combined is not None:
                together = tl.where(tokens > 0, up + down, 0.0)
                squares += mass * together * together
                tl.store(combined + row, rounded(together, combined.dtype.element_ty), mask=inside)
            if row_factors is not None:
                tl.store(row_factors + 3 * row, up, mask=inside)
                tl.store(row_factors + 3 * row + 1, down, mask=inside)
                tl.store(row_factors + 3 * row + 2, omega, mask=inside)
    if partial is not None:
        tl.store(slot + 1, tl.sum(best_sum, axis=0))
        tl.store(slot + 2, tl.sum(squares, axis=0))
        tl.store(slot + _HEAD + i, tl.sum(c_sum, axis=0), mask=i < n)
        if STATISTICS:
            store_sums(slot + _HEAD + n, acc, n, N)
            if PAIRS:
                store_pairs(slot + _HEAD + n, pair_acc, n, N, PRESENT, False)
        finish(
            partial, counter, setting, c, preference, None, square_sum, weights, optimum, sums, effective,
            n, N, _NONE if BY_ROW else WEIGHTS, STATISTICS, PAIRS, PRESENT, SOLVE, STRIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_ROW_SIZES, "slots"])
def row_pairs_kernel(
    advantages, a_row: tl.int64, a_objective: tl.int64, presence, o_row: tl.int64, o_objective: tl.int64,
    cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64, row_sums, parts: tl.int64, partial,
    slots: tl.int64,
    n: tl.constexpr, ROWS: tl.constexpr, NOON: tl.constexpr, PLAIN: tl.constexpr, OMEGA: tl.constexpr,
    BLOCK: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Computes the N x N sums for many objectives: each program has a block of pairs and a share of the
    rows."""
    own = (advantages, a_row, 0, a_objective)
    present = (presence, o_row, 0, o_objective)
    cu = (cu, cu_step)
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    blocks: tl.constexpr = (n + BLOCK - 1) // BLOCK
    i = block // blocks * BLOCK
    j = block % blocks * BLOCK
    sums = no_pairs(ROWS, BLOCK, PRESENT)
    for tile in range(slot, tl.cdiv(rows, ROWS), slots):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        tokens, _, s = load_rows(row_sums, cu, row, row < rows, width, parts, PLAIN, OMEGA)
        a, here = load_row_advantages(own, present, row, tokens, i, n, BLOCK)
        b, there = load_row_advantages(own, present, row, tokens, j, n, BLOCK)
        sums = add_row_pairs(sums, a, here, b, there, s, NOON, PRESENT)
    store_pair_tile(partial, slot, sums, i, j, n, BLOCK, PRESENT)


class _Constants(NamedTuple):
    n: int
    NOON: bool
    PLAIN: bool
    OMEGA: bool


class _Plan(NamedTuple):
    options: Options
    count: int  # rows of a tile
    stride: int  # of a slot


@functools.cache
def _plan(
    c: _Constants, present: bool, by_row: bool, weights: int, statistics: bool, pairs: bool, share: bool,
    solve: int,
) -> _Plan:  # fmt: skip
    """All that does not depend on sizes."""
    block = power_of_two(c.n)
    area = (256 if present else 512) // block**2 if pairs else 256 // block
    count = max(1, min(area, 64 if INTERPRETED else 128))
    stride = slot_size(c.n, statistics, pairs, present)
    options = options_of(
        N=block, ROWS=count, WEIGHTS=weights, STATISTICS=statistics, PAIRS=pairs, SHARE=share, SOLVE=solve,
        BY_ROW=by_row and weights != NONE, STRIDE=stride, **c._asdict(),
    )  # fmt: skip
    return _Plan(options, count, stride)


class Rows:
    """A call whose advantages are per sequence, with the sums over its tokens."""

    def __init__(self, given: Tokens) -> None:
        self.given, self.n, self.device = given, given.objectives, given.advantages.device
        self.plain = given.logprobs is None and given.importance_weights is None
        self.sums: Tensor | None = None
        self.parts = 1
        self.problem = p = problem(given, True, without_objectives=True)
        if not self.plain or given.mask is not None:
            rows = larger(given.rows, 1)
            each = -(-p.total // rows)
            most = programs(self.device, 1 << 30, 8) // rows
            self.parts = larger(1, smaller(most, -(-each // ROW_TOKENS)))
            units = given.rows * self.parts
            size = units * (1 if self.plain else ROW_SUMS)
            self.sums = memory(self.device, size)
            options = sums_options(p.constants.UNIT, p.constants.WIDE, self.plain)
            launch(
                row_sums_kernel, self.device, programs(self.device, units, 8), options,
                *p.arguments[BEFORE_REF], *p.arguments[FROM_OFFSETS], self.sums, self.parts,
            )  # fmt: skip
        a = objective_strides(given.advantages, True)
        o = objective_strides(given.objective_mask, True)
        self.arguments = (
            given.advantages, a[0], a[2], given.objective_mask, o[0], o[2], *p.arguments[OFFSETS], self.sums,
            self.parts,
        )  # fmt: skip
        omega = given.aggregation == Aggregation.SEQ_MEAN_TOKEN_MEAN
        self.constants = _Constants(self.n, given.noon, self.plain, omega)
        self.present = given.objective_mask is not None

    def run(self, x: Pass, by_row: bool = False) -> None:
        """Runs the pass; writes `x.row_factors`."""
        plan = _plan(self.constants, self.present, by_row, x.weights, x.statistics, x.pairs, x.share, x.solve)
        # The last program adds all slots: few of them, unless there are many rows.
        slots = programs(self.device, -(-self.given.rows // plan.count), 2)
        slots = smaller(slots, larger(64, self.given.rows // 256))
        partial = memory(self.device, slots * plan.stride)
        launch(
            rows_kernel, self.device, slots, plan.options, *self.arguments, x.preference, *number(x.setting),
            x.c, *weight_strides(x.c), x.effective, x.combined, x.row_factors, x.square_sum, x.reported,
            x.optimum, x.sums, partial, counter(self.device),
        )  # fmt: skip

    def store_pairs(self, sums: Tensor) -> None:
        """Writes the N x N blocks of a buffer whose fields are computed already."""
        n, present = self.n, self.present
        count = 8 if present else 16
        slots = pair_slots(self.device, n, -(-self.given.rows // count))
        partial = memory(self.device, slots * pairs_in_slot(present) * n * n)
        options = options_of(ROWS=count, BLOCK=_BLOCK, PRESENT=present, **self.constants._asdict())
        blocks = (-(-n // _BLOCK)) ** 2
        launch(row_pairs_kernel, self.device, slots * blocks, options, *self.arguments, partial, slots)
        finish_pairs(partial, slots, sums, n, present)
