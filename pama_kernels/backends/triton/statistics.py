"""The statistics of a batch, with its weights solved in the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._codes import statistics_size
from pama_kernels.backends._counter import counter
from pama_kernels.backends.inputs import TokenInputs

from .launch import launch, power_of_two
from .pairs import add_pairs, gram_weights
from .problem import COUNTED, PAIRS_IN_REGISTERS, Problem, flattened, problem, programs, slot_size
from .sums import (
    add_tile,
    batch_solution,
    clear,
    count_rows,
    is_last,
    load_tile,
    place,
    store_statistics,
)
from .tile import clip_numbers, tokens_in_all


@triton.jit
def statistics_kernel(
    problem, cu, rows, width,
    low: tl.float64, high: tl.float64, dual: tl.float64,
    log_low: tl.float64, log_high: tl.float64, log_dual: tl.float64,
    prior, regularization: tl.float64, partial, counter, sums, weights, optimum, row_counts,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr,
    STRIDE: tl.constexpr, SOLVE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """With `row_counts` the valid tokens of every row are counted too, COUNTED at a time."""
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    clip = clip_numbers(low, high, dual, log_low, log_high, log_dual)
    total = tokens_in_all(cu, rows, width, LAYOUT)
    slots = tl.num_programs(0)
    slot = partial + tl.program_id(0).to(tl.int64) * STRIDE
    clear(slot, STRIDE)
    for tile in range(tl.program_id(0), tl.cdiv(total, TOKENS), slots):
        first = tl.cast(tile, tl.int64) * TOKENS
        at = first + tl.arange(0, TOKENS)
        row, token = place(at, cu, rows, width, 0, LAYOUT, NARROW)
        loaded = load_tile(problem, clip, row, token, at < total, 0, n, N, NOON, D)
        add_tile(
            slot + 2 + n, loaded, problem, clip, first, total, cu, rows, width, 0,
            n, N, TOKENS, LAYOUT, NARROW, NOON, PAIRS, PRESENT,
        )  # fmt: skip
    if row_counts is not None:
        count_rows(problem[2], cu, rows, width, row_counts, COUNTED)
    if is_last(counter, slots):
        store_statistics(partial + 2 + n, slots, STRIDE, sums, n, PAIRS, PRESENT)
        if SOLVE:
            store_solution(sums, prior, regularization, weights, optimum, n, N)


@triton.jit
def store_solution(
    sums, prior, regularization, weights, optimum, n: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    c, value = batch_solution(sums, prior, tl.full([], regularization, tl.float64), n, N)
    i = tl.arange(0, N)[None, :]
    tl.store(weights + i, c, mask=i < n)
    tl.store(optimum + tl.zeros([1, 1], tl.int32), value)


@triton.jit
def batch_weights_kernel(
    sums, prior, regularization: tl.float64, weights, optimum, n: tl.constexpr, N: tl.constexpr
):
    store_solution(sums, prior, regularization, weights, optimum, n, N)


def run_statistics(
    given: Problem,
    pairs: bool,
    prior: Tensor | None,
    regularization: float,
    solved: tuple[Tensor, Tensor] | None,
    row_counts: Tensor | None = None,
) -> Tensor:
    """The statistics buffer; the batch's weights and optimum are written into `solved`, the valid tokens of
    each row into `row_counts`."""
    n = given.n
    sums = torch.empty(statistics_size(n, pairs), device=given.device, dtype=torch.float64)
    collapsed = given if row_counts is not None else flattened(given)
    inside = pairs and n <= PAIRS_IN_REGISTERS
    shape = collapsed.shape(inside, area=512 if inside else 1024)
    stride = slot_size(n, True, inside, shape.PRESENT)
    slots = programs(given.device, -(-collapsed.tokens() // shape.TOKENS), stride)
    partial = torch.empty(slots * stride, device=given.device, dtype=torch.float64)
    launch(
        statistics_kernel,
        given.device,
        slots,
        collapsed.arrays,
        collapsed.cu,
        collapsed.rows,
        collapsed.width,
        *collapsed.clip,
        prior,
        regularization,
        partial,
        counter(given.device),
        sums,
        *(solved or (None, None)),
        row_counts,
        **shape._asdict(),
        STRIDE=stride,
        SOLVE=solved is not None,
        COUNTED=COUNTED,
        num_warps=4,
    )
    if pairs and not inside:
        add_pairs(collapsed, sums)
    return sums


def statistics(given: TokenInputs, gram: bool) -> Tensor:
    return run_statistics(problem(given), gram, None, 0.0, None)


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    weights = torch.empty(objectives, device=sums.device, dtype=dtype)
    optimum = torch.empty((), device=sums.device, dtype=dtype)
    sums = sums.contiguous()
    if gram:
        gram_weights(sums, objectives, prior, regularization, weights, optimum)
    else:
        launch(
            batch_weights_kernel,
            sums.device,
            1,
            sums,
            prior,
            regularization,
            weights,
            optimum,
            objectives,
            power_of_two(objectives),
            num_warps=1,
        )
    return weights, optimum
