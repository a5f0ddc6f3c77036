"""Bits, non-finite input, strides, dtypes, `out=`, and empty batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from properties_setup import INF, NAN, assert_bits, both_dtypes, every_case, indefiniteness
from solver_table import (
    Solver,
    check,
    mixed,
    skewed,
)

import pama_kernels as pk


@pytest.mark.cpu
@every_case
@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 17, 33])
def test_bits_do_not_depend_on_batch_or_threads(
    solver: Solver, options: dict[str, Any], dtype: torch.dtype, n: int, threads: int
) -> None:
    rows = (40 if n > 8 else 700) if solver.axes == 2 else 1500
    x = mixed(solver, rows, n, dtype)
    for preference in (None, skewed(n)):
        whole = solver.solve(x, preference=preference, **options)
        for i in range(0, len(x), 13 if len(x) > 100 else 3):
            alone = solver.solve(x[i], preference=preference, **options)
            assert_bits(alone, (whole.weights[i], whole.optimum[i]))
        for size in (2, 7, 8, 15, 17, 33):
            part = solver.solve(x[3 : 3 + size], preference=preference, **options)
            assert_bits(part, (whole.weights[3 : 3 + size], whole.optimum[3 : 3 + size]))
        torch.set_num_threads(1)
        assert_bits(solver.solve(x, preference=preference, **options), whole)
        torch.set_num_threads(threads)


@pytest.mark.cpu
@every_case
@both_dtypes
def test_a_problem_alone_has_the_same_bits_under_every_instruction_set(
    solver: Solver, options: dict[str, Any], dtype: torch.dtype, isa: str
) -> None:
    """A single matrix is not solved by the code for several ones, with AVX-512 by that for AVX2."""
    for n in range(2, 15):
        x = mixed(solver, 40, n, dtype)
        whole = solver.solve(x, preference=skewed(n), **options)
        for i in range(len(x)):
            alone = solver.solve(x[i], preference=skewed(n), **options)
            assert_bits(alone, (whole.weights[i], whole.optimum[i]))


@every_case
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@both_dtypes
def test_a_nan_or_infinity_affects_only_its_row(
    solver: Solver, options: dict[str, Any], n: int, dtype: torch.dtype
) -> None:
    x = solver.inputs("grid" if solver.axes == 1 else "square", 20, n).to(dtype)
    before, rest = solver.solve(x, **options), torch.arange(20) != 7
    for place in {
        (0,) * solver.axes,
        (n - 1,) * solver.axes,
        (0, n - 1)[-solver.axes :],
        (n - 1, 0)[: solver.axes],
    }:
        for bad in (NAN, INF, -INF):
            y = x.clone()
            y[(7, *place)] = bad
            after = solver.solve(y, **options)
            assert after.weights[7].isnan().all()
            assert after.optimum[7].isnan()
            assert_bits(
                (after.weights[rest], after.optimum[rest]), (before.weights[rest], before.optimum[rest])
            )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_strides_axes_and_addresses(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    family, n = ("grid" if solver.axes == 1 else "tall"), 5
    x = solver.inputs(family, 24, n).reshape(4, 6, *([n] * solver.axes)).to(dtype)
    host = torch.zeros([2 * size + 1 for size in x.shape], dtype=dtype)
    spread = host[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)
    views = [
        x,
        x[0],
        x[0, 0],
        x[:, ::2],
        x.transpose(0, 1),
        x[:1, :1].expand_as(x),
        x[:, :1].expand_as(x),
        spread,
    ]
    views += [
        spread[2, 3],
        x.movedim(-1, 0).contiguous().movedim(0, -1),
        x[None, :, None],
        x[1:, 1:],
        x[..., 1:4],
    ]
    views += [x.mT] if solver.axes == 2 else [x[..., :1].expand(4, 6, 7)]
    if solver.axes == 2:
        views[-2] = x[..., 1:4, 1:4]
    for view in views:
        assert_bits(solver.solve(view, **options), solver.solve(view.contiguous().clone(), **options))
    for shift in range(4):
        memory = torch.empty(x.numel() + shift, dtype=dtype)
        assert_bits(solver.solve(memory[shift:].view_as(x).copy_(x), **options), solver.solve(x, **options))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_out_receives_the_solution(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    for n in (1, 2, 3, 9):
        x = solver.inputs("grid" if solver.axes == 1 else "tall", 6, n).to(dtype)
        for y in (x.reshape(2, 3, *x.shape[1:]), x[0]):
            wanted = solver.solve(y, preference=skewed(n), **options)
            out = pk.WeightSolution(*(torch.full_like(z, NAN) for z in wanted))
            assert solver.solve(y, preference=skewed(n), **options, out=out) is out
            assert_bits(out, wanted)
    factor = torch.ones(n, requires_grad=True)
    product = (factor * out.weights).sum()
    solver.solve(x[0], **options, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_case
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty_batches(solver: Solver, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    for n in (1, 2, 3, 70):
        s = solver.solve(torch.zeros(shape + (n,) * solver.axes), **options)
        assert s.weights.shape == (*shape, n)
        assert s.optimum.shape == shape


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Half types of scores are solved in float32, of matrices in float64 like float32, and rounded once."""
    wide = torch.float32 if solver.axes == 1 else torch.float64
    for family in ("grid", "ties") if solver.axes == 1 else ("tall", "duplicates", "zero rows", "signs"):
        for n in (1, 2, 3, 8, 12):
            x = solver.inputs(family, 5, n).to(dtype)
            s = solver.solve(x, preference=skewed(n), **options)
            t = solver.solve(x.to(wide), preference=skewed(n), **options)
            assert_bits(s, [y.float() for y in t])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dependent_gradients_with_rounding_errors_are_solved(
    solver: Solver, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Rounded, the matrix is not quite semidefinite: half gradients, more objectives than dimensions."""
    for n in (3, 8, 16) if solver.axes == 2 else ():
        for dimensions in (1, 2, 8, 64):
            factor = torch.randn(40, n, dimensions, generator=torch.Generator().manual_seed(n)) + 0.5
            m = (factor.double() @ factor.double().mT).to(dtype)
            # entries rounded by half an eps of max M_ii, and (Mc)_j by as much; a few such for a projection
            slack = indefiniteness(m) if options else 4 * torch.finfo(dtype).eps
            check(solver, m, None, slack, **options)
            rounded = (factor[:, :1] + 0.01 * factor).to(dtype)
            assert torch.isfinite(solver.solve(rounded @ rounded.mT, **options).weights).all()


@every_case
def test_results_have_no_gradient(solver: Solver, options: dict[str, Any]) -> None:
    leaf = solver.inputs("grid" if solver.axes == 1 else "square", 2, 3).requires_grad_()
    for x in (leaf, torch.nn.Parameter(leaf.detach()), 2 * leaf):
        assert not any(y.requires_grad for y in solver.solve(x, **options))
