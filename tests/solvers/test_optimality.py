"""Solutions satisfy the optimality conditions, for all sizes, dtypes, scales and families of problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import EPS64, ON_TRITON
from properties_setup import both_dtypes, every_case, every_family, every_solver, indefiniteness
from solver_table import (
    OBJECTIVE,
    SIZES,
    SOLVERS,
    Solver,
    check,
    on_simplex,
    skewed,
)
from torch import Tensor


@every_family
@both_dtypes
def test_certified(name: str, family: str, dtype: torch.dtype) -> None:
    """Every number of objectives, with and without regularization and preference."""
    solver = SOLVERS[name]
    for n in SIZES:
        x = solver.inputs(family, 4, n)
        if dtype == torch.float32:
            x = x.clamp(-3e38, 3e38).float() if solver.axes == 1 else _normal_range(x).float()
        slack = indefiniteness(x) if solver.axes == 2 else 0.0
        for preference in (None, skewed(n)):
            for options in solver.options:
                check(solver, x, preference, slack, **options)


def _normal_range(m: Tensor) -> Tensor:
    return m / m.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)


@pytest.mark.cpu
@every_solver
def test_certified_under_every_instruction_set(solver: Solver, isa: str) -> None:
    for family in solver.families:
        for n in (2, 3, 5, 8, 17):
            check(solver, solver.inputs(family, 9, n, seed=1))
            check(solver, solver.inputs(family, 9, n, seed=1), skewed(n), **solver.options[-1])


@every_solver
@pytest.mark.parametrize("exponent", [-300, -150, -75, 75, 150, 300])
def test_certified_at_every_scale(solver: Solver, exponent: int) -> None:
    for family in set(solver.families) - {"float64 range", "any magnitude", "largest"}:
        for n in (1, 2, 3, 8, 20):
            x = solver.inputs(family, 2, n)
            x = x / x.abs().amax().clamp(min=1e-300) * 10.0**exponent
            for options in solver.options:
                check(solver, x, skewed(n), **options)


@every_solver
def test_more_objectives(solver: Solver) -> None:
    if ON_TRITON and solver.axes == 2:
        pytest.skip("Triton's solvers of matrices take up to 64 objectives")
    families = ("grid", "normal") if solver.axes == 1 else ("square", "tall", "rank deficient", "signs")
    for n in (65, 128, 256):
        for family in families:
            for options in solver.options:
                check(solver, solver.inputs(family, 1, n)[0], skewed(n), **options)


@every_family
def test_solutions_are_at_least_as_good_as_the_reference(name: str, family: str) -> None:
    """In the objective; and its weights where they are unique by regularization."""
    solver = SOLVERS[name]
    for n in (2, 3, 5, 8):
        x = solver.inputs(family, 3, n, seed=2)
        size = solver.size(x)
        for preference in (None, skewed(n)):
            p = on_simplex(preference, n)
            for options in solver.options:
                s = solver.solve(x, preference=preference, **options)
                r = solver.reference(x, preference=preference, **options)
                rho = options.get("regularization", 0.0)
                if solver.axes == 1:
                    assert rho or (s.optimum.abs() - r.optimum.abs() <= 64 * n * EPS64 * size).all()
                elif name == "min_norm":
                    unit = torch.where(size > 0, size, 1.0)
                    values = [
                        solver.value(x, c) / unit / 2 + rho / 2 * (c - p).square().sum(-1)
                        for c in (s.weights, r.weights)
                    ]
                    assert (values[0] - values[1] <= OBJECTIVE * (1 + rho)).all()
                if rho:
                    # strongly convex: n-term sums with relative error n eps, over rho
                    assert ((s.weights - r.weights).abs() <= 16 * n * EPS64 / rho).all()


@every_case
def test_the_optimum_is_never_negative(solver: Solver, options: dict[str, Any]) -> None:
    """Its square root is the norm of the combined gradient. Zero lies in the hull of these gradients."""
    if solver.axes == 2:
        for n in (2, 3, 8, 33):
            for dtype in (torch.float32, torch.float64):
                m = solver.inputs("opposites", 50, n).to(dtype)
                assert (solver.solve(m, **options).optimum >= 0).all()
