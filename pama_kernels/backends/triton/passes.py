"""`combine` and `loss`: which kernels a call takes, and what they write into.

Weights of the batch: the statistics pass with its solution, then a pass over the tokens. Other weights: one
pass, before which the valid tokens are counted where the loss is a mean over masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pama_kernels._codes import BATCH, FIELDS, GIVEN, GRAM, SEQUENCE, TOKEN, statistics_size
from pama_kernels.backends._counter import counter
from pama_kernels.backends.inputs import TokenInputs

from .apply import count_kernel, rows_kernel, tokens_kernel
from .launch import launch, more_warps, power_of_two
from .pairs import add_pairs, gram_weights
from .problem import COUNTED, PAIRS_IN_REGISTERS, Problem, flattened, problem, programs, slot_size
from .statistics import run_statistics

_TOKEN_MEAN, _SEQUENCE_MEAN_TOKEN_SUM, SEQUENCE_MEAN_TOKEN_MEAN = range(3)
# What a first pass by another backend found: the weights of the batch, the optimum and the statistics.
Solved = tuple[Tensor, Tensor, Tensor]

_KERNEL_WEIGHTS = {GIVEN: 0, BATCH: 0, GRAM: 0, SEQUENCE: 1, TOKEN: 2}


def _counts(given: Problem, rows: Tensor | None = None) -> Tensor:
    """Valid tokens of each row, into `rows`; without it in parts whose sum is that of all."""
    by_row = rows is not None
    source = given if by_row else flattened(given)
    shape = source.shape(False)
    units = given.rows if by_row else -(-source.tokens() // COUNTED)
    slots = programs(given.device, units)
    counts = torch.empty(slots, device=given.device, dtype=torch.float64) if rows is None else rows
    launch(
        count_kernel,
        given.device,
        slots,
        source.arrays[2],
        source.cu,
        source.rows,
        source.width,
        counts,
        TOKENS=COUNTED,
        LAYOUT=0 if source.cu[0] is not None else shape.LAYOUT,
        NARROW=shape.NARROW,
        BY_ROW=by_row,
    )
    return counts


def _denominator(
    given: Problem, aggregation: int, fixed: float, normalizer: Tensor | None, batch_sums: Tensor | None
) -> tuple[float, Tensor | None, bool]:
    """What a token's loss is multiplied by, whose sum it is divided by, and whether that is a count."""
    if fixed != -math.inf:
        return 1 / fixed, None, False
    if normalizer is not None:
        return 1.0, normalizer, False
    if aggregation != _TOKEN_MEAN:
        return 1 / max(given.rows, 1), None, False
    if given.arrays[2][0] is None:
        return 1 / max(given.tokens(), 1), None, False
    if batch_sums is not None:
        return 1.0, batch_sums[len(FIELDS) * given.n :][:1], True
    return 1.0, _counts(given), True


def _apply(
    given: Problem,
    weights_per: int,
    weights: Tensor | None,
    prior: Tensor,
    regularization: float,
    pairs: bool,
    dtype: torch.dtype,
    combined: Tensor | None,
    one_result: bool = False,
    value: Tensor | None = None,
    gradient: Tensor | None = None,
    kl_coef: float = 0.0,
    aggregation: int = _TOKEN_MEAN,
    fixed: float = -math.inf,
    normalizer: Tensor | None = None,
    first: Solved | None = None,
) -> Solved:
    """Weights, optimum and statistics; the rest is written into what is given."""
    n, rows, device = given.n, given.rows, given.device
    by_row = weights_per == SEQUENCE or (weights is not None and weights.dim() == 2)
    batch_sums = None
    if first is None:
        solved = torch.empty((rows, n) if by_row else (n,), device=device, dtype=dtype)
        optimum = torch.empty((rows,) if by_row else (), device=device, dtype=dtype)
    else:
        solved, optimum, batch_sums = first
    row_mean = value is not None and aggregation == SEQUENCE_MEAN_TOKEN_MEAN
    over_rows = by_row or one_result
    row_counts = None
    if row_mean and not over_rows:
        row_counts = torch.empty(rows, device=device, dtype=torch.float64)
    if first is None and weights_per == BATCH:
        batch_sums = run_statistics(given, pairs, prior, regularization, (solved, optimum), row_counts)
    elif first is None and weights_per == GRAM:
        batch_sums = run_statistics(given, True, None, 0.0, None, row_counts)
        gram_weights(batch_sums, n, prior, regularization, solved, optimum)
    elif row_counts is not None:
        _counts(given, row_counts)
    sums = batch_sums
    if sums is None:
        sums = torch.empty(statistics_size(n, pairs), device=device, dtype=torch.float64)
    source = solved if weights is None else weights.detach()
    statistics = batch_sums is None

    scale, denominator, is_count = 1.0, None, False
    if value is not None:
        scale, denominator, is_count = _denominator(given, aggregation, fixed, normalizer, batch_sums)
    if not over_rows and row_counts is None:
        given = flattened(given)
    inside = statistics and pairs and n <= PAIRS_IN_REGISTERS
    # Statistics beside the results take registers, and so does the float64 that both signs may want.
    many = over_rows and n > 8
    area = 1024 if not statistics else 256 if many or (weights_per == TOKEN and not given.noon) else 512
    shape = given.shape(inside, row_counts is not None, area)
    if over_rows:
        length = given.width if given.cu[0] is None else 256
        shape = shape._replace(TOKENS=min(shape.TOKENS, power_of_two(length)))
    stride = slot_size(n, statistics, inside, shape.PRESENT)
    own = stride - 2 - n if over_rows else 0
    stride += own
    units = rows if over_rows else -(-given.tokens() // shape.TOKENS)
    slots = programs(device, units, stride)
    partial = count = None
    if statistics or value is not None:
        partial = torch.empty(slots * stride, device=device, dtype=torch.float64)
        count = counter(device)
    denominators = 0 if denominator is None else denominator.numel()
    extra: dict[str, Any] = {"BY_ROW": by_row, "ONE_RESULT": one_result, "ROW_MEAN": row_mean, "OWN": own}
    launch(
        rows_kernel if over_rows else tokens_kernel,
        device,
        slots,
        given.arrays,
        given.ref,
        given.cu,
        given.rows,
        given.width,
        *given.clip,
        (source, source.stride(0) if by_row else 0, source.stride(-1)),
        prior,
        regularization,
        scale,
        denominator,
        denominators,
        *(() if over_rows else (row_counts,)),
        kl_coef,
        combined,
        gradient,
        value,
        solved,
        optimum,
        sums,
        partial,
        count,
        **shape._asdict(),
        STRIDE=stride,
        WEIGHTS=_KERNEL_WEIGHTS[weights_per],
        STATISTICS=statistics,
        SLOTS=power_of_two(denominators),
        COUNT=is_count,
        **(extra if over_rows else {}),
        num_warps=more_warps() if many else 4,
    )
    if statistics and pairs and not inside:
        add_pairs(given, sums)
    return solved, optimum, sums


def combine(
    given: TokenInputs,
    weights: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    token_shape: Sequence[int] | None,
    pairs: bool,
    *,
    first: Solved | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages = given.advantages
    dtype = torch.float64 if advantages.dtype == torch.float64 else torch.float32
    shape = advantages.shape[:-1] if token_shape is None else token_shape
    combined = torch.empty(shape, device=advantages.device, dtype=advantages.dtype)
    one_result = bool(given.layout[2]) and token_shape is None
    return combined, *_apply(
        *(problem(given), weights_per, weights, prior, regularization, pairs, dtype, combined, one_result),
        first=first,
    )


def loss(
    given: TokenInputs,
    weights: Tensor | None,
    normalizer: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    aggregation: int,
    fixed_normalizer: float,
    kl_coef: float,
    need_gradient: bool,
    *,
    first: Solved | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs = given.logprobs
    assert logprobs is not None
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    value = torch.empty((), device=logprobs.device, dtype=dtype)
    gradient = torch.empty(logprobs.shape if need_gradient else (0,), device=logprobs.device, dtype=dtype)
    rest = _apply(
        problem(given),
        weights_per,
        weights,
        prior,
        regularization,
        weights_per == GRAM,
        dtype,
        None,
        value=value,
        gradient=gradient if need_gradient else None,
        kl_coef=kl_coef,
        aggregation=aggregation,
        fixed=fixed_normalizer,
        normalizer=normalizer,
        first=first,
    )
    return value, gradient, *rest
