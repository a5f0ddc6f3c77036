"""The N x N sums of many objectives, block by block; and the min-norm weights of their Gram matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._codes import FIELDS, PAIRS, TOTALS

from .launch import launch
from .problem import Problem, programs
from .solvers import min_norm_out
from .sums import added_slots, load_tile, place
from .tile import clip_numbers, tokens_in_all

_BLOCK = 16  # objectives, the least that tl.dot takes
_TOKENS = {False: 32, True: 8}  # by whether the computation is in float64
_FIELDS = tl.constexpr(len(FIELDS))
_TOTALS = tl.constexpr(len(TOTALS))
_ADVANTAGE_SUM = tl.constexpr(FIELDS.index("advantage_sum"))
_ADVANTAGE_SQUARE_SUM = tl.constexpr(FIELDS.index("advantage_square_sum"))


@triton.jit
def _product(x, y):
    """sum over tokens of x_i y_j in float64, (BLOCK, BLOCK)."""
    if x.dtype == tl.float64:  # not every target has a dot product of these
        product = tl.sum(x[:, :, None] * y[:, None, :], axis=0)
    else:
        product = tl.dot(tl.trans(x), y, input_precision="ieee")
    return product.to(tl.float64)


@triton.jit
def _fits(x):
    """Whether float32 holds the squares of every objective."""
    largest = tl.max(tl.abs(x), axis=0)
    outside = (largest > 1e15) | ((largest > 0) & (largest < 1e-12))
    return tl.max(outside.to(tl.int32), axis=0) == 0


@triton.jit
def _pairs_of(x, y, PRESENT: tl.constexpr):
    """Of two blocks of objectives on the same tokens, in the order of `_codes.PAIRS`."""
    _, a, here, bound, _ = x
    _, b, there, other, _ = y
    sums = (_product(bound, other), _product(a, b))
    if PRESENT:
        also = there.to(a.dtype)
        sums = sums + (_product(here.to(a.dtype), also), _product(a, also), _product(a * a, also))
    return sums


@triton.jit
def _added(x, y, PRESENT: tl.constexpr):
    sums = (x[0] + y[0], x[1] + y[1])
    if PRESENT:
        sums = sums + (x[2] + y[2], x[3] + y[3], x[4] + y[4])
    return sums


@triton.jit
def pairs_kernel(
    problem, cu, rows, width,
    low: tl.float64, high: tl.float64, dual: tl.float64,
    log_low: tl.float64, log_high: tl.float64, log_dual: tl.float64,
    partial, slots,
    n: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    NOON: tl.constexpr, WIDE: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    clip = clip_numbers(low, high, dual, log_low, log_high, log_dual)
    total = tokens_in_all(cu, rows, width, LAYOUT)
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    blocks: tl.constexpr = (n + BLOCK - 1) // BLOCK
    i = block // blocks * BLOCK
    j = block % blocks * BLOCK
    z = tl.zeros([BLOCK, BLOCK], tl.float64)
    sums = (z, z)
    if PRESENT:
        sums = (z, z, z, z, z)
    for tile in range(slot, tl.cdiv(total, TOKENS), slots):
        first = tl.cast(tile, tl.int64) * TOKENS
        at = first + tl.arange(0, TOKENS)
        row, token = place(at, cu, rows, width, 0, LAYOUT, NARROW)
        x = load_tile(problem, clip, row, token, at < total, i, n, BLOCK, NOON, D)
        y = load_tile(problem, clip, row, token, at < total, j, n, BLOCK, NOON, D)
        more = _pairs_of(x, y, PRESENT)
        if not WIDE:
            if not (_fits(x[1]) & _fits(x[3]) & _fits(y[1]) & _fits(y[3])):
                more = (z, z)
                if PRESENT:
                    more = (z, z, z, z, z)
                for start in range(0, TOKENS, 4):
                    part = first + start + tl.arange(0, 4)
                    r, t = place(part, cu, rows, width, 0, LAYOUT, NARROW)
                    u = load_tile(problem, clip, r, t, part < total, i, n, BLOCK, NOON, tl.float64)
                    v = load_tile(problem, clip, r, t, part < total, j, n, BLOCK, NOON, tl.float64)
                    more = _added(more, _pairs_of(u, v, PRESENT), PRESENT)
        sums = _added(sums, more, PRESENT)
    many: tl.constexpr = 5 if PRESENT else 2
    p = i + tl.arange(0, BLOCK)[:, None]
    q = j + tl.arange(0, BLOCK)[None, :]
    for pair in tl.static_range(many):
        offset = (slot.to(tl.int64) * many + pair) * n * n
        tl.store(partial + offset + p * n + q, sums[pair], mask=(p < n) & (q < n))


@triton.jit
def add_pairs_kernel(partial, slots, sums, n: tl.constexpr, K: tl.constexpr, PRESENT: tl.constexpr):
    many: tl.constexpr = 5 if PRESENT else 2
    k = tl.program_id(0) * K + tl.arange(0, K)
    value = added_slots(partial, slots, many * n * n, k, k < many * n * n, 16)
    if not PRESENT:  # the others follow from the fields
        i = k % (n * n) // n
        block = k // (n * n)
        field = tl.where(block == 2, i, _ADVANTAGE_SUM * n + i)
        field = tl.where(block == 4, _ADVANTAGE_SQUARE_SUM * n + i, field)
        value = tl.where(block < 2, value, tl.load(sums + field, mask=(block >= 2) & (block < 5), other=0.0))
    tl.store(sums + _FIELDS * n + _TOTALS + k, value, mask=k < 5 * n * n)


def add_pairs(given: Problem, sums: Tensor) -> None:
    """Writes the N x N blocks of a buffer whose other fields are there."""
    n = given.n
    shape = given.shape(False)
    blocks = (-(-n // _BLOCK)) ** 2
    many = len(PAIRS) if shape.PRESENT else 2
    tokens = _TOKENS[shape.WIDE]
    slots = max(1, programs(given.device, -(-given.tokens() // tokens)) // blocks)
    partial = torch.empty(slots * many * n * n, device=given.device, dtype=torch.float64)
    launch(
        pairs_kernel,
        given.device,
        slots * blocks,
        given.arrays,
        given.cu,
        given.rows,
        given.width,
        *given.clip,
        partial,
        slots,
        n,
        _BLOCK,
        tokens,
        shape.LAYOUT,
        shape.NARROW,
        shape.NOON,
        shape.WIDE,
        shape.PRESENT,
        num_warps=4,
    )
    k = 256
    launch(add_pairs_kernel, given.device, -(-5 * n * n // k), partial, slots, sums, n, k, shape.PRESENT)


def gram_weights(
    sums: Tensor, n: int, prior: Tensor, regularization: float, weights: Tensor, optimum: Tensor
) -> None:
    """Of M_ij = sum I_i I_j / sqrt(count_i count_j) over the objectives that have a token."""
    products = sums[len(FIELDS) * n + len(TOTALS) :][: n * n].view(n, n)
    min_norm_out(products, prior, regularization, weights, optimum, sums)
