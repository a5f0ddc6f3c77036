"""`statistics` and `apply`: select the kernels of a call and allocate their results.

Weights per batch: one pass for the statistics, whose last program solves FIXED and SCORES (GRAM and UPGRAD
take a separate launch), then one pass over the tokens. Weights per row: the same, with sums per row. Other
weights: one pass; if the loss or the token weights need the number of valid tokens, it is counted first.
Advantages per sequence use `rows.py`, and a pass over the tokens only for the loss.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import (
    FIELDS,
    Aggregation,
    Kind,
    Number,
    Outputs,
    Results,
    Rule,
    Tokens,
    WeightsPer,
    one_result_per_row,
    statistics_size,
    weights_by_row,
)
from pama_kernels.backends.operators import empty_results

from .apply import Pass, run_tokens, weight_strides
from .combine import _ROW, _SCORES, BATCH, FACTORS, NONE, ROW, SCORES, SOFTMIN
from .launch import INTERPRETED, check_memory, launch, number, number_of, options_of, power_of_two, programs
from .problem import Problem, check_tokens_memory, problem
from .rows import Rows
from .rules import solve_into
from .simplex import preference_of, softmin, solve_scaled
from .statistics import PAIRS_IN_REGISTERS, store_pairs_of, valid_count
from .terms import ADVANTAGE_SUM, BOUND_SQUARE_SUM, BOUND_SUM, COUNT, FIELD_COUNT, added, repeated
from .tokens import read, row_range, valid_tokens
from .trace import element, larger, memory, smaller, strides

_SOLVED_INLINE = 16  # objectives whose weights the last program of the statistics finds without spilling


def _factorised(given: Tokens) -> bool:
    return given.per_sequence and (given.objective_mask is None or given.mask_per_sequence)


class _Call:
    """The passes of one call, over rows or over tokens."""

    def __init__(self, given: Tokens, by_token: bool, by_row: bool = False) -> None:
        self.given, self.n, self.device = given, given.objectives, given.advantages.device
        self.by_row = by_row
        self.rows = Rows(given) if _factorised(given) and not by_token else None
        self.row_counts: Tensor | None = None
        if self.rows is None and given.aggregation == Aggregation.SEQ_MEAN_TOKEN_MEAN:
            self.row_counts = valid_count(given, True)
        self.problem: Problem | None = None
        if self.rows is None:
            self.problem = problem(given, by_row or self.row_counts is not None)

    def run(self, x: Pass) -> None:
        """Runs the pass, and a separate kernel for the pair statistics if there are too many for
        registers."""
        pairs = x.pairs
        x.pairs, x.row_counts = pairs and self.n <= PAIRS_IN_REGISTERS, self.row_counts
        if self.rows is not None:
            self.rows.run(x, self.by_row)
        else:
            assert self.problem is not None
            run_tokens(self.problem, x)
        if pairs and not x.pairs:
            if self.rows is not None:
                self.rows.store_pairs(x.sums)
            else:
                assert self.problem is not None
                present = self.given.objective_mask is not None
                store_pairs_of(self.problem, present, self.row_counts, x.sums)

    def new(self, count: int) -> Tensor:
        """In float64."""
        return memory(self.device, count)


def empty_sums(tokens: Tokens, pairs: bool) -> Tensor:
    size, device = statistics_size(tokens.objectives, pairs), tokens.advantages.device
    return torch.empty(size, device=device, dtype=torch.float64)


def statistics(tokens: Tokens, pairs: bool, sums: Tensor) -> None:
    check_tokens_memory(tokens)
    _Call(tokens, by_token=False).run(Pass(sums, statistics=True, pairs=pairs))


@triton.jit(do_not_specialize=["parts", "rows", "c_row", "c_step"])
def row_weights_kernel(
    fields, parts: tl.int64, preference, value: tl.float64, value_at, c, c_row: tl.int64, c_step: tl.int64,
    weights, optimum, effective, rows: tl.int64,
    n: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, NOON: tl.constexpr,
):  # fmt: skip
    """Weights of rows from their fields (rows * parts, FIELD_COUNT, n), and the preference in each row. Given
    weights (ROW) have only their optimum a.c computed."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, N)
    inside = (row < rows)[:, None] & (i < n)[None, :]
    sums = repeated(tl.zeros([ROWS, N], tl.float64), FIELD_COUNT)
    for part in range(parts):
        at = fields + (row * parts + part)[:, None] * FIELD_COUNT * n + i[None, :]
        more = ()
        for field in tl.static_range(FIELD_COUNT):
            more = more + (tl.load(at + field * n, mask=inside, other=0.0),)
        sums = added(sums, more, FIELD_COUNT)
    count = sums[COUNT]
    here = inside & (count > 0)
    count = tl.where(here, count, 1.0)
    score = tl.where(here, sums[BOUND_SUM] / count, 0.0)
    if WEIGHTS == _ROW:
        x = read(c + row[:, None] * c_row + i[None, :] * c_step, inside, tl.float64)
        best = tl.sum(x * score, axis=1, keep_dims=True)
    else:
        p = preference_of(preference, n, N)[None, :]
        setting = number_of(value, value_at)
        if WEIGHTS == _SCORES:
            moments = tl.where(here, sums[BOUND_SQUARE_SUM] / count, 0.0)
            x, best = solve_scaled(score, moments, p, here, setting, N, NOON)
        else:
            x, best = softmin(tl.where(here, sums[ADVANTAGE_SUM] / count, 0.0), p, here, setting)
        mass = tl.sum(tl.where(here, p, 0.0), axis=1, keep_dims=True)
        many = tl.maximum(tl.sum(here.to(tl.float64), axis=1, keep_dims=True), 1.0)
        own = tl.where(mass > 0, p / tl.where(mass > 0, mass, 1.0), 1.0 / many)
        tl.store(effective + row[:, None] * n + i[None, :], tl.where(here, own, 0.0), mask=inside)
    tl.store(weights + row[:, None] * n + i[None, :], x, mask=inside)
    tl.store(optimum + row[:, None], best, mask=(row < rows)[:, None])


def _row_weights(call: _Call, x: Pass, fields: Tensor, parts: int, effective: Tensor) -> None:
    rows, n, block = call.given.rows, call.n, power_of_two(call.n)
    each = max(1, 256 // block)
    options = options_of(n=n, N=block, ROWS=each, WEIGHTS=x.weights, NOON=call.given.noon)
    launch(
        row_weights_kernel, call.device, larger(1, -(-rows // each)), options, fields, parts, x.preference,
        *number(x.setting), x.c, *weight_strides(x.c), x.reported, x.optimum, effective, rows,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m_token", "cu_step", "rows", "width"])
def first_token_kernel(
    mask, m_token: tl.int64, cu, cu_step: tl.int64, width: tl.int64, values, result, TOKENS: tl.constexpr
):
    """A packed sequence's value at its first valid token; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = row_range((cu, cu_step), row, width)
    place = end
    for first in range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        valid = valid_tokens((mask, 0, m_token), tl.zeros_like(at), at, at < end, False)
        place = tl.minimum(place, tl.min(tl.where(valid, at, end), axis=0))
    tl.store(result + row, tl.load(values + place, mask=place < end, other=0.0))


def _denominator(given: Tokens, outputs: Outputs, sums: Tensor | None) -> tuple[Number, bool]:
    """The denominator of the loss, and whether it is a count."""
    if outputs.normalizer is not None:
        return outputs.normalizer, False
    if given.aggregation != Aggregation.TOKEN_MEAN:
        return 1.0 * larger(given.rows, 1), False
    if given.mask is None and given.cu_seqlens is None:
        return 1.0 * larger(given.rows * given.width, 1), False
    if sums is not None:
        return element(sums, len(FIELDS) * given.objectives), True
    return valid_count(given, False), True


def _without_ref(tokens: Tokens, outputs: Outputs) -> Tokens:
    unused = not isinstance(outputs.kl_coef, Tensor) and outputs.kl_coef == 0
    return tokens._replace(ref_logprobs=None) if unused and tokens.ref_logprobs is not None else tokens


def empty(
    tokens: Tokens, rule: Rule, preference: Tensor | None, weights: Tensor | None, outputs: Outputs
) -> Results:
    results = empty_results(tokens, rule, weights, outputs)
    if _known_weights(weights, outputs):
        check_memory(weights=weights)
        assert weights is not None
        results.weights.copy_(weights)
        for left_out in (results.optimum, results.sums):
            left_out.fill_(math.nan)
    return results


def _known_weights(weights: Tensor | None, outputs: Outputs) -> bool:
    """Whether no kernel has to write weights and statistics."""
    return weights is not None and weights.dim() == 1 and not outputs.statistics


def apply(
    tokens: Tokens,
    rule: Rule,
    preference: Tensor | None,
    weights: Tensor | None,
    outputs: Outputs,
    results: Results,
) -> None:
    check_tokens_memory(tokens)
    check_memory(preference=preference, weights=weights)
    tokens = _without_ref(tokens, outputs)
    n, rows = tokens.objectives, tokens.rows
    by_row = weights_by_row(rule, weights)
    by_token = rule.weights_per == WeightsPer.TOKEN and weights is None and tokens.logprobs is not None
    batch = weights is None and rule.weights_per == WeightsPer.BATCH
    call = _Call(tokens, by_token, by_row)

    # whose weights
    if weights is not None:
        kind = ROW if by_row else BATCH
    else:
        kind = BATCH if batch else SOFTMIN if rule.kind == Kind.SOFTMIN else SCORES
    x = Pass(
        results.sums, weights=kind, statistics=True, pairs=outputs.pairs, preference=preference,
        setting=rule.number,
        c=weights, effective=preference,
        share=tokens.objective_mask is not None and kind in (BATCH, ROW) and rule.kind != Kind.GIVEN,
        reported=results.weights, optimum=results.optimum,
        square_sum=results.square_sum if outputs.advantages else None,
    )  # fmt: skip
    if _known_weights(weights, outputs):
        x.statistics, x.reported, x.optimum = False, None, None
    solved = batch or (by_row and call.rows is None)  # statistics come first, and x.c has the weights
    if solved:
        first = x.copy()
        first.weights = NONE
        x.statistics = x.pairs = False
        x.c, x.reported = results.weights, None
    if batch:
        inline = rule.kind in (Kind.FIXED, Kind.SCORES) and n <= _SOLVED_INLINE
        x.effective = first.effective = call.new(n)
        first.solve = int(rule.kind) if inline else -1
        call.run(first)
        if not inline:
            solve_into(results.sums, rule, preference, n, results.weights, results.optimum, x.effective)
        x.optimum = None
    elif solved:
        most = 1 if INTERPRETED else programs(call.device, 1 << 30, 2) // larger(rows, 1)
        parts = larger(1, smaller(most, 64))
        fields, x.effective = call.new(rows * parts * len(FIELDS) * n), call.new(rows * n)
        first.row_fields, first.parts, first.effective = fields, parts, None
        call.run(first)
        first.weights = kind
        _row_weights(call, first, fields, parts, x.effective)
        x.weights = ROW
        x.share = tokens.objective_mask is not None and not tokens.mask_per_sequence and weights is None
    _second_pass(call, x, rule, outputs, results, solved)


def apply_solved(
    tokens: Tokens,
    outputs: Outputs,
    results: Results,
    effective: Tensor | None,
    factors: Tensor | None,
    _: None = None,
) -> None:
    """Runs only the second pass; the weights per batch and the statistics are in `results`."""
    check_tokens_memory(tokens)
    tokens = _without_ref(tokens, outputs)
    if factors is not None and not outputs.advantages:
        _loss_of_rows(problem(tokens, True, True), tokens, outputs, results, factors, results.sums)
        return
    x = Pass(
        results.sums, weights=BATCH, c=results.weights, effective=effective,
        share=tokens.objective_mask is not None,
        square_sum=results.square_sum if outputs.advantages else None,
    )  # fmt: skip
    rule = Rule(Kind.SOLVED, WeightsPer.BATCH, 0.0)
    _second_pass(_Call(tokens, by_token=False), x, rule, outputs, results, True)


def _loss_of_rows(
    p: Problem, tokens: Tokens, outputs: Outputs, results: Results, factors: Tensor, sums: Tensor | None
) -> None:
    """The loss from sums of c_i A_i over positive and over negative advantages, and omega, of each row."""
    denominator, count = _denominator(tokens, outputs, sums)
    x = Pass(
        results.sums, weights=FACTORS, row_factors=factors, denominator=denominator, count=count,
        kl_coef=outputs.kl_coef, loss=results.loss, gradient=results.gradient if outputs.gradient else None,
    )  # fmt: skip
    run_tokens(p, x)


def _second_pass(call: _Call, x: Pass, rule: Rule, outputs: Outputs, results: Results, solved: bool) -> None:
    """Combined advantages and the loss. `solved`: the weights are in `x.c`, the statistics in `x.sums`."""
    tokens, rows = call.given, call.given.rows
    combined = results.advantages if outputs.advantages else None
    if call.rows is not None:
        factors = call.new(rows * 3) if outputs.loss else None
        if not solved or combined is not None or factors is not None:
            x.combined, x.row_factors = combined, factors
            call.run(x)
        if factors is not None:
            sums = results.sums if solved or x.statistics else None
            _loss_of_rows(call.rows.problem, tokens, outputs, results, factors, sums)
        return
    picked = combined
    if combined is not None and one_result_per_row(tokens, rule):
        # Presence may differ within a row: use that of its first valid token.
        combined = memory(call.device, tokens.width, combined.dtype)
    x.combined = combined
    if outputs.loss:
        x.denominator, x.count = _denominator(tokens, outputs, results.sums if solved else None)
        x.loss, x.kl_coef = results.loss, outputs.kl_coef
        x.gradient = results.gradient if outputs.gradient else None
    call.run(x)
    if combined is not picked:
        assert picked is not None
        assert tokens.cu_seqlens is not None
        mask = tokens.mask
        launch(
            first_token_kernel, call.device, rows, options_of(TOKENS=128), mask,
            0 if mask is None else strides(mask)[0], tokens.cu_seqlens, strides(tokens.cu_seqlens)[0],
            tokens.width, combined, picked,
        )  # fmt: skip
