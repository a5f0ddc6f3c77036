"""The two weight problems in batches: `weights` and `min_norm`, and the same into given tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .active_set import LARGEST, VECTORS, min_norm_solve, power_of_two_scale
from .launch import launch, power_of_two
from .simplex import solve

_TILE = 256  # scores per program: more spills
_PAIRS = 256  # problems of two objectives per program
_IN_REGISTERS = 64  # objectives; more go through the workspace
_PROGRAMS = 128  # with a workspace each


@triton.jit
def read(pointer, here, D: tl.constexpr):
    """Values in D (float32, float64), 0 where not `here`."""
    x = tl.load(pointer, here, 0.0)
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)  # which the interpreter converts to float64, unlike bfloat16
    return x.to(D)


# --- the scalar problem --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "n"])
def weights_kernel(
    scores, row, column, prior, regularization: tl.float64, scale, scale_stride, weights, optimum, rows, n,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    here = (i < rows)[:, None] & (j < n)[None, :]
    a = read(scores + i[:, None] * row + j[None, :] * column, here, weights.dtype.element_ty)
    p = tl.load(prior + j, j < n, 0.0)[None, :]
    size = None
    if scale is not None:
        size = read(scale + i * scale_stride, i < rows, tl.float64)[:, None]
    c, value = solve(a, p, here, tl.full([], regularization, tl.float64), size, BLOCK)
    tl.store(weights + i[:, None] * n + j[None, :], c, here)
    tl.store(optimum + i[:, None], value, (i < rows)[:, None])


def weights(
    scores: Tensor, prior: Tensor, uniform: bool, regularization: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    result = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    optimum = torch.empty(scores.shape[:-1], dtype=dtype, device=scores.device)
    weights_out(scores, prior, uniform, regularization, scale, result, optimum)
    return result, optimum


def weights_out(
    scores: Tensor,
    prior: Tensor,
    uniform: bool,
    regularization: float,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    if scores.numel() == 0:
        return
    n = scores.shape[-1]
    source, stride = scores.reshape(-1, n), 0
    if scale is not None and scale.dim():
        scale = scale.reshape(-1)
        stride = scale.stride(0)
    rows, block = source.shape[0], power_of_two(n)
    each = max(1, min(_TILE // block, power_of_two(rows)))
    launch(
        weights_kernel, scores.device, triton.cdiv(rows, each), source, *source.stride(), prior,
        regularization, scale, stride, result, optimum, rows, n, ROWS=each, BLOCK=block,
    )  # fmt: skip


# --- the min-norm problem, two objectives --------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def min_norm_pairs_kernel(
    gram, stride, row, column, prior, regularization: tl.float64, weights, optimum, rows, BLOCK: tl.constexpr
):
    """With a = M_11, b = M_12, d = M_22 the first weight is s / (s + s'), where s and s' are the descents
    from the second vertex and from the first, cut off at 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < rows
    at = gram + i * stride
    a = read(at, here, tl.float64)
    d = read(at + row + column, here, tl.float64)
    b = 0.5 * read(at + row, here, tl.float64) + 0.5 * read(at + column, here, tl.float64)
    p, q = tl.load(prior), tl.load(prior + 1)
    mass = p + q
    p = tl.where(mass != 0.0, p / mass, 0.5)
    size = 0.25 * tl.abs(a) + 0.25 * tl.abs(b) + 0.25 * tl.abs(d)
    scale = power_of_two_scale(size)
    scale = tl.where((size > 0.0) & (size <= LARGEST), scale, 1.0)
    a, b, d = scale * a, scale * b, scale * d
    largest = tl.where(a > d, a, d)
    regularization = tl.full([], regularization, tl.float64)
    rho = regularization * largest
    descent = d - b + 2.0 * rho * p
    descent_back = a - b + 2.0 * rho * (1.0 - p)
    s, s_back = descent + tl.abs(descent), descent_back + tl.abs(descent_back)
    total = s + s_back
    regular = (total > 0.0) & (total <= LARGEST)
    poison = 0.0 * a + 0.0 * b + 0.0 * d + 0.0 * regularization + 0.0 * p
    vertex = tl.where(descent > descent_back, 1.0, 0.0)  # not positive semidefinite
    other = poison + tl.where(descent == descent_back, p, vertex)  # or duplicates
    divisor = tl.where(regular, total, 1.0)
    first = tl.where(regular, s / divisor, other)
    second = tl.where(regular, s_back / divisor, 1.0 - other)
    value = first * (first * a + second * b) + second * (first * b + second * d)
    kept = weights.dtype.element_ty
    tl.store(weights + 2 * i, first.to(kept), here)
    tl.store(weights + 2 * i + 1, second.to(kept), here)
    tl.store(optimum + i, (value / scale).to(kept), here)


# --- and any number ------------------------------------------------------------------------------------


@triton.jit
def _root(x):
    """sqrt x; 1 where x is 0."""
    return tl.sqrt(tl.where(x > 0.0, x, 1.0))


@triton.jit
def _min_norm_rows(
    gram, stride, row, column, prior, counts, regularization, weights, optimum, work, rows, N, first,
    PROBLEMS: tl.constexpr, BLOCK: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    """Problems first to first + PROBLEMS - 1; with GLOBAL one, in `work`."""
    index = tl.arange(0, BLOCK)
    problem = first + tl.arange(0, PROBLEMS).to(tl.int64)
    here = problem < rows
    inside = here[:, None] & (index < N)[None, :]
    takes_part = index < N
    if counts is not None:
        count = tl.load(counts + index, takes_part, 0.0)
        takes_part = count > 0.0
    present = here[:, None] & takes_part[None, :]
    at = gram + problem * stride
    own = at[:, None] + index.to(tl.int64)[None, :] * (row + column)
    diagonal = read(own, present, tl.float64)
    if counts is not None:
        diagonal /= _root(count * count)[None, :]
    largest = tl.max(tl.where(diagonal > 0.0, diagonal, 0.0), 1)
    scale = tl.where(largest > 0.0, power_of_two_scale(largest), 1.0)
    half = 0.5 * scale
    if GLOBAL:
        tl.debug_barrier()  # the problem before has been read
        matrix = gram + first * stride
        factor = tl.sum(half, 0)
        poison = tl.zeros((BLOCK,), tl.float64)
        column_offset = index.to(tl.int64)
        for i in range(N):
            there = takes_part
            if counts is not None:
                both = tl.load(counts + i) * count
                there = both > 0.0
            x = read(matrix + i * row + column_offset * column, there, tl.float64)
            y = read(matrix + i * column + column_offset * row, there, tl.float64)
            poison += 0.0 * x + 0.0 * y
            entry = factor * x + factor * y
            if counts is not None:
                entry /= _root(both)
            tl.store(work + i * N + index, entry, index < N)
        finite = tl.sum(poison, 0)[None] == 0.0
        m = 0.0
        tl.debug_barrier()
    else:
        i, j = index.to(tl.int64)[None, :, None], index.to(tl.int64)[None, None, :]
        both = present[:, :, None] & present[:, None, :]
        x = read(at[:, None, None] + i * row + j * column, both, tl.float64)
        y = read(at[:, None, None] + j * row + i * column, both, tl.float64)
        m = half[:, None, None] * x + half[:, None, None] * y
        if counts is not None:
            m /= _root(count[:, None] * count[None, :])[None, :, :]
        finite = tl.sum(tl.sum(0.0 * x + 0.0 * y, 2), 1) == 0.0
    given = tl.load(prior + index, index < N, 0.0)[None, :]
    p = tl.where(present, given, 0.0)
    mass = tl.sum(p, 1)
    many = tl.maximum(tl.sum(present.to(tl.int32), 1), 1)
    p = tl.where((mass != 0.0)[:, None], p / mass[:, None], present.to(tl.float64) / many[:, None])
    finite = finite & (0.0 * mass + 0.0 * regularization == 0.0)
    solvable = here & finite
    diagonal = tl.where(solvable[:, None], diagonal * scale[:, None], 0.0)
    usable = present & solvable[:, None]
    c, value = min_norm_solve(m, work, diagonal, usable, p, regularization + 0.0 * scale, N, BLOCK, GLOBAL)
    c = tl.where(finite[:, None], c, float("nan"))
    value = tl.where(finite, value / scale, float("nan"))
    if counts is not None:
        nobody = tl.max(present.to(tl.int32), 1) == 0
        c = tl.where(nobody[:, None], given, c)
        value = tl.where(nobody, 0.0, value)
    kept = weights.dtype.element_ty
    tl.store(weights + problem[:, None] * N + index[None, :], c.to(kept), inside)
    tl.store(optimum + problem, value.to(kept), here)


@triton.jit(do_not_specialize=["rows", "N"])
def min_norm_kernel(
    gram, stride, row, column, prior, counts, regularization: tl.float64, weights, optimum, work, rows, N,
    PROBLEMS: tl.constexpr, BLOCK: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    regularization = tl.full([], regularization, tl.float64)
    if GLOBAL:
        own = work + tl.program_id(0).to(tl.int64) * (2 * N * N + VECTORS * BLOCK)
        for first in range(tl.program_id(0), rows, tl.num_programs(0)):
            _min_norm_rows(
                gram, stride, row, column, prior, counts, regularization, weights, optimum, own, rows, N,
                tl.cast(first, tl.int64), PROBLEMS, BLOCK, GLOBAL,
            )  # fmt: skip
    else:
        first = tl.program_id(0).to(tl.int64) * PROBLEMS
        _min_norm_rows(
            gram, stride, row, column, prior, counts, regularization, weights, optimum, work, rows, N,
            first, PROBLEMS, BLOCK, GLOBAL,
        )  # fmt: skip


# problems per program and warps, by objectives (padded): as many as spill no register
_SHAPES = {1: (32, 1), 2: (8, 1), 4: (8, 2), 8: (2, 1), 16: (1, 1), 32: (1, 4), 64: (1, 8)}


def min_norm(gram: Tensor, prior: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if gram.dtype == torch.float64 else torch.float32
    weights = torch.empty(gram.shape[:-1], dtype=dtype, device=gram.device)
    optimum = torch.empty(gram.shape[:-2], dtype=dtype, device=gram.device)
    min_norm_out(gram, prior, regularization, weights, optimum)
    return weights, optimum


def min_norm_out(
    gram: Tensor,
    prior: Tensor,
    regularization: float,
    weights: Tensor,
    optimum: Tensor,
    counts: Tensor | None = None,
) -> None:
    """counts (N or more,): M_ij is divided by sqrt(count_i count_j). An objective with a count of 0 takes no
    part: its weight is 0, its entries are not read."""
    if gram.numel() == 0:
        return
    n = gram.shape[-1]
    source = gram.reshape(-1, n, n)
    rows = source.shape[0]
    results = (regularization, weights, optimum)
    if n == 2 and counts is None:
        launch(
            min_norm_pairs_kernel, gram.device, triton.cdiv(rows, _PAIRS), source, *source.stride(), prior,
            *results, rows, BLOCK=_PAIRS,
        )  # fmt: skip
        return
    block = power_of_two(n)
    if n <= _IN_REGISTERS:
        problems, warps = _SHAPES[block]
        programs, work = triton.cdiv(rows, problems), None
    else:
        problems, warps, programs = 1, 8, min(rows, _PROGRAMS)
        size = programs * (2 * n * n + int(VECTORS) * block)
        work = torch.empty(size, dtype=torch.float64, device=gram.device)
    launch(
        min_norm_kernel, gram.device, programs, source, *source.stride(), prior, counts, *results, work,
        rows, n, PROBLEMS=problems, BLOCK=block, GLOBAL=work is not None, num_warps=warps,
    )  # fmt: skip
