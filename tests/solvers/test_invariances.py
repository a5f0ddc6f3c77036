"""How weights change with the problem: permutation, scaling, duplicates, continuity, limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import EPS64, ON_GPU, ON_TRITON
from properties_setup import assert_bits, every_case, every_family, every_solver
from solver_table import (
    SOLVERS,
    Solver,
    eps_of,
    gram_of,
    normal,
    on_simplex,
    skewed,
)

import pama_kernels as pk


@every_case
@pytest.mark.parametrize("n", [2, 3, 8, 9, 33])
def test_permuting_objectives_permutes_weights(solver: Solver, options: dict[str, Any], n: int) -> None:
    order = torch.randperm(n)
    p = on_simplex(skewed(n), n)
    unique = ("grid", "normal") if solver.axes == 1 else ("tall", "a common direction")
    for family in unique:
        x = solver.inputs(family, 4, n)
        s = solver.solve(x, preference=p, **options)
        t = solver.solve(solver.permuted(x, order), preference=p[order], **options)
        # n-term sums in another order, over eigenvalues or gaps of scores from 1/64 of the largest on; where
        # scores nearly tie lambda is as large as their gap is small
        tolerance = 64 * 16 * n * EPS64 * (64 if family == "normal" else 1)
        assert ((s.weights[..., order] - t.weights).abs() <= tolerance).all()


@every_family
def test_weights_are_bitwise_invariant_to_powers_of_two(name: str, family: str) -> None:
    solver = SOLVERS[name]
    for n in (1, 2, 3, 8, 9, 20):
        x = solver.inputs(family, 3, n)
        if family in ("float64 range", "any magnitude", "largest", "subnormal", "float32 range"):
            x = x / x.abs().amax(tuple(range(1, x.dim())), keepdim=True)
            x = torch.where(x.abs() < 1e-80, 0.0, x)  # to stay in the normal numbers
        for options in solver.options:
            s = solver.solve(x, preference=skewed(n), **options)
            for exponent in (-600, -101, 2, 700):
                t = solver.solve(x * 2.0**exponent, preference=skewed(n), **options)
                assert_bits((t.weights, t.optimum), (s.weights, s.optimum * 2.0**exponent))


@every_case
def test_duplicates_get_equal_weights(solver: Solver, options: dict[str, Any]) -> None:
    """Bitwise, for equal objectives with equal preference, wherever they are."""
    g = np.random.default_rng(5)
    for n in (2, 3, 4, 8, 9, 16, 33):
        distinct = max(n // 2, 1)
        origin = torch.from_numpy(np.append(np.arange(distinct), g.integers(distinct, size=n - distinct)))
        origin = origin[torch.from_numpy(g.permutation(n))]
        for family in ("grid", "normal") if solver.axes == 1 else ("square", "rank 1", "low rank"):
            x = solver.permuted(solver.inputs(family, 6, distinct), origin)
            for preference in (None, [float(1 + int(i) % 3) for i in origin]):
                for dtype in (torch.float32, torch.float64):
                    c = solver.solve(x.to(dtype), preference=preference, **options).weights
                    for i in range(n):
                        first = int((origin == origin[i]).nonzero()[0])
                        assert torch.equal(c[:, i], c[:, first])


@pytest.mark.parametrize("name", ["scores", "min_norm"])
@pytest.mark.parametrize("regularization", [0.03, 0.1, 1.0])
def test_continuity(name: str, regularization: float) -> None:
    """|dc| <= |d(gradient)| / rho by strong convexity, with rho and the change of the problem bounded."""
    solver, g = SOLVERS[name], np.random.default_rng(3)
    for n in (2, 3, 8, 16):
        for delta in (1e-9, 1e-5):
            if solver.axes == 1:
                x = solver.inputs("grid", 6, n) / 2
                moved = x + delta * torch.from_numpy(g.uniform(-1, 1, x.shape))
                extra: dict[str, Any] = {"scale": 1.0}
                # the gradient s a, |a| <= 1: changes by delta in s and in a
                change = torch.full((6,), 2 * math.sqrt(n) * delta * (1 + delta))
            else:
                factor = np.concatenate([normal(g, 6, n, n) / n, np.zeros((6, n, 1))], -1)
                factor[:, 0, -1] = 2.0  # the largest M_ii, always 4 or above
                x, moved = gram_of(factor), gram_of(factor + delta * normal(g, *factor.shape) / n)
                extra, change = {}, (x - moved).norm(dim=(-2, -1)) * (1 + regularization) / 4
            options = {"regularization": regularization, **extra}
            s, t = solver.solve(x, **options), solver.solve(moved, **options)
            noise = 64 * n * EPS64 / regularization
            assert ((s.weights - t.weights).norm(dim=-1) <= change / regularization + noise).all()


@pytest.mark.parametrize("name", ["scores", "min_norm"])
def test_the_limits_of_regularization(name: str) -> None:
    """0 is the limit of small ones; large ones, of any size, give the preference."""
    solver = SOLVERS[name]
    for n in (2, 3, 5, 9):
        for family in (
            ("grid", "ties") if solver.axes == 1 else ("rank 1", "duplicates", "opposites", "zero rows")
        ):
            x = solver.inputs(family, 5, n)
            exact = solver.solve(x, preference=skewed(n)).weights
            near = solver.solve(x, preference=skewed(n), regularization=1e-9).weights
            # the path is Lipschitz: its constant is a ratio of eigenvalues or gaps of small integers
            assert ((exact - near).abs() <= (4e-6 if ON_TRITON else 1e-6)).all()
            for huge, k in ((1e9, 1e300), (1e20, 1.0), (1e300, 1e-100), (1e300, 1e100)):
                for dtype in (torch.float64, torch.float32):
                    if dtype == torch.float64 or k == 1.0:
                        c = solver.solve((k * x).to(dtype), preference=skewed(n), regularization=huge).weights
                        # the largest eigenvalue over rho, and the rounding of n weights
                        size = n * 1e-9 if huge == 1e9 else 0.0
                        assert ((c - on_simplex(skewed(n), n)).abs() <= size + 4 * eps_of(dtype)).all()


@every_solver
def test_zero_problems_give_the_preference(solver: Solver) -> None:
    for n in (1, 2, 3, 8, 9, 40):
        for preference in (None, skewed(n), [1.0] * (n - 1) + [0.0] if n > 1 else [3.0]):
            for dtype in (torch.float32, torch.float64):
                x = torch.zeros((4,) + (n,) * solver.axes, dtype=dtype)
                for options in solver.options:
                    s = solver.solve(x, preference=preference, **options)
                    assert (s.weights - on_simplex(preference, n)).abs().max() <= 2 * eps_of(dtype)
                    assert (s.optimum == 0).all()
                    assert torch.equal(s.optimum.signbit(), torch.zeros(4, dtype=torch.bool))


@every_case
def test_one_objective_gets_all_the_weight(solver: Solver, options: dict[str, Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.tensor([7.0, 0.5, 0.0], dtype=dtype).reshape((3,) + (1,) * solver.axes)
        s = solver.solve(x, **options)
        assert s.weights.flatten().tolist() == [1.0, 1.0, 1.0]
        assert s.optimum.tolist() == [7.0, 0.5, 0.0]


@every_case
def test_a_preference_of_zero_does_not_exclude_an_objective(solver: Solver, options: dict[str, Any]) -> None:
    """It may get weight; under UPGrad only if objectives conflict with it."""
    x = torch.tensor([1.0, 4.0, 4.0]).double()
    x = x if solver.axes == 1 else torch.diag(x)
    if solver.solve is pk.upgrad_weights:
        x[0, 1] = x[1, 0] = -1.5
    c = solver.solve(x, preference=[0, 1, 1], **options).weights
    assert c[0] > 0.2


@every_case
def test_types_of_the_preference_and_of_numbers(solver: Solver, options: dict[str, Any]) -> None:
    x = solver.inputs("grid" if solver.axes == 1 else "square", 7, 3)
    wanted = solver.solve(x, preference=[0.25, 0.25, 0.5], **options)
    forms = (
        (1, 1, 2),
        torch.tensor([2, 2, 4]),
        np.array([0.5, 0.5, 1.0]),
        [1e300, 1e300, 2e300],
        [1e-300] * 2 + [2e-300],
    )
    for preference in forms:
        assert_bits(solver.solve(x, preference=preference, **options), wanted)
    uniform = solver.solve(x, **options)
    # 1/3 as a sum of three shares may differ by a rounding, over gaps of at least 1/64
    for found, default in zip(solver.solve(x, preference=[1, 1, 1], **options), uniform, strict=True):
        assert ((found - default).abs() <= 64 * 64 * EPS64).all()
    for name, value in options.items():
        for dtype in (torch.float64, torch.float32):
            exact = {name: float(torch.tensor(value, dtype=dtype))}
            given, wanted = (
                solver.solve(x, **{name: torch.tensor(value, dtype=dtype)}),
                solver.solve(x, **exact),
            )
            if ON_GPU:  # CUDA C++ takes numbers, Triton tensors
                assert (given.weights - wanted.weights).abs().max() <= 64 * EPS64
            else:
                assert_bits(given, wanted)
