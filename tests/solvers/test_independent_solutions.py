"""The solvers and their reference against independent solutions: rational arithmetic over all supports,
cvxpy, and closed forms."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS64, ON_GPU, ON_TRITON
from rational import exact_solution
from solver_table import (
    CLARABEL,
    GRAMS,
    KKT,
    NEAREST,
    OBJECTIVE,
    SOLVERS,
    Array,
    check,
    gram_of,
    gram_residual,
    on_simplex,
    scores_residual,
    skewed,
)
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

MIN_NORM = SOLVERS["min_norm"]


@st.composite
def integer_factors(draw: st.DrawFn) -> Array:
    """Integer gradients (N, D), N <= 4: full rank or not, with repeated, opposite and zero rows."""
    n, d, largest = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    j = np.array(draw(st.lists(st.integers(-largest, largest), min_size=n * d, max_size=n * d))).reshape(n, d)
    for i in range(1, n):
        sign = draw(st.sampled_from([None, None, 1, -1, 0]))
        if sign is not None:
            j[i] = sign * j[draw(st.integers(0, i - 1))]
    return j.astype(np.float64)


preferences = st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=4, max_size=4))


@given(
    factor=integer_factors(),
    preference=preferences,
    regularization=st.sampled_from([0.0, 0.03125, 0.25, 32.0]),
)
def test_integer_matrices(factor: Array, preference: Any, regularization: float) -> None:
    m = gram_of(factor)
    n = m.shape[-1]
    preference = preference[:n] if preference and sum(preference[:n]) else None
    p = [Fraction(x) for x in preference or [1] * n]
    p = [x / sum(p) for x in p]
    s = check(MIN_NORM, m, preference, regularization=regularization)
    largest = float(m.diagonal().max())
    rho = Fraction(regularization * largest)
    rows = [[Fraction(x) for x in row] for row in m.tolist()]
    c, optimum = exact_solution(rows, p, Fraction(1) if regularization and not rho else rho)
    # strongly convex: n-term sums with relative error n eps, over rho >= max M_ii / 32
    tolerance = 32 * 16 * n * EPS64 if regularization else NEAREST
    assert (s.weights - torch.tensor([float(x) for x in c], dtype=torch.float64)).abs().max() <= tolerance
    # c'Mc moves by 2 |Mc| |dc| <= 2 n max M_ii |dc|
    error = 2 * n * tolerance if regularization else OBJECTIVE
    assert abs(float(s.optimum) - float(optimum)) <= error * largest


# --- cvxpy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [pk, reference], ids=["library", "reference"])
@pytest.mark.parametrize("regularization", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 5])
def test_cvxpy_agrees(library: Any, n: int, regularization: float) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    g = np.random.default_rng(n)
    for rank_one, preference in itertools.product((True, False), (None, skewed(n))):
        p = on_simplex(preference, n).numpy()
        options = {"preference": preference, "regularization": regularization}
        factor = g.integers(-6, 7, (n, 1)) / 4.0 if rank_one else g.standard_normal((n, 2 * n))
        if rank_one:
            s = library.pama_weights(torch.from_numpy(factor[:, 0]), **options)
        else:
            s = library.min_norm_weights(gram_of(factor), **options)
        c, largest = s.weights.numpy(), float((factor**2).sum(-1).max())
        rho = regularization * largest
        x = cvxpy.Variable(n, nonneg=True)
        distance = cvxpy.sum_squares(x - p)
        objective = cvxpy.sum_squares(factor.T @ x) / 2 + rho / 2 * distance
        least = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(x) == 1]).solve(**CLARABEL)
        # Clarabel's gap of 1e-13 and infeasibility of 1e-13, times objectives and gradients up to max M_ii
        value = ((factor.T @ c) ** 2).sum() / 2 + rho / 2 * ((c - p) ** 2).sum()
        assert value == pytest.approx(least, abs=1e-10 * max(largest, 1))
        if rank_one and rho == 0:  # of the points with a.x = optimum the nearest to p
            face = [cvxpy.sum(x) == 1, factor[:, 0] @ x == float(s.optimum)]
            cvxpy.Problem(cvxpy.Minimize(distance), face).solve(**CLARABEL)
        # that gap moves x by sqrt(2 gap / smallest eigenvalue), which is above 1e-3 max M_ii here
        assert abs(x.value - c).max() < 1e-5


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cvxpy_agrees_on_projections(n: int) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    g = np.random.default_rng(n)
    for _ in range(2):
        factor = g.standard_normal((n, n)) + 0.5
        factor = factor / np.linalg.norm(factor, axis=1, keepdims=True)
        p = on_simplex([1.0 + i for i in range(n)], n).numpy()
        total = np.zeros(n)
        for i in range(n):
            x = cvxpy.Variable(n)
            least = cvxpy.Minimize(cvxpy.sum_squares(factor.T @ x))
            cvxpy.Problem(least, [x >= np.eye(n)[i]]).solve(**CLARABEL)
            total += p[i] * x.value
        m = gram_of(factor)
        # a gap of 1e-13 moves x by sqrt(2 gap / smallest eigenvalue)
        error = (2e-13 / np.linalg.eigvalsh(m.numpy())[0]) ** 0.5 * 10
        for library in (pk, reference):
            c = library.upgrad_weights(m, preference=p).weights.numpy()
            assert abs(c - total / total.sum()).max() <= error


# --- closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("uniform", [True, False])
def test_where_the_minimiser_is_not_unique_it_is_the_nearest(n: int, uniform: bool) -> None:
    preference = None if uniform else skewed(n)
    p, index = on_simplex(preference, n), torch.arange(n)
    group = index // 2
    same = group[:, None] == group[None, :]

    def near(m: Tensor, wanted: Tensor) -> None:
        assert (check(MIN_NORM, m.double(), preference).weights - wanted).abs().max() <= NEAREST

    near(torch.zeros(n, n), p)
    near(torch.full((n, n), 3.0), p)  # every point is optimal
    # zero rows take everything, shared as near to the preference as can be
    zeros = index % 3 == 0
    near(torch.eye(n) * (~zeros) * 2, reference.project_on_simplex(torch.where(zeros, p, -9.0)))
    # copies of orthogonal gradients of different lengths: each group's mass is fixed
    length = 1 + 2 * group.double() % 5
    mass = torch.zeros(int(group[-1]) + 1).double().index_fill(0, group, 1.0) / length[::2]
    mass = mass / mass.sum()
    wanted = torch.zeros(n).double()
    for k, share in enumerate(mass):
        wanted[group == k] = share * reference.project_on_simplex(p[group == k] / share)
    near(same * length[:, None], wanted)
    if n % 2 == 0:  # pairs of opposite gradients: the minimum 0 needs equal weights within each pair
        sign = 1 - 2 * (index % 2)
        near(same * (sign[:, None] * sign), p.reshape(-1, 2).mean(-1).repeat_interleave(2))


def test_examples_by_hand() -> None:
    def scores(a: list[float], **options: Any) -> list[Any]:
        s = pk.pama_weights(torch.tensor(a, dtype=torch.float64), **options)
        return [s.weights.tolist(), s.optimum.tolist()]

    def gram(rows: list[list[float]], **options: Any) -> list[Any]:
        s = pk.min_norm_weights(torch.tensor(rows, dtype=torch.float64), **options)
        if ON_TRITON:  # rounds a quotient twice, and is within 1e-6 on singular matrices
            unit = 2.0 ** (-20 if ON_GPU else -49)
            s = pk.WeightSolution(*((x / unit).round() * unit for x in s))
        return [s.weights.tolist(), s.optimum.tolist()]

    assert scores([3, 1, 2]) == [[0, 1, 0], 1]
    assert scores([-3, -1, -1]) == [[0, 0.5, 0.5], -1]
    assert scores([2, 1, 1], preference=[2, 1, 1]) == [[0, 0.5, 0.5], 1]
    assert scores([1, -1]) == [[0.5, 0.5], 0]
    assert scores([2, 0, 1], preference=[0.5, 0, 0.5]) == [[0, 1, 0], 0]
    assert scores([0, 0], preference=[3, 1]) == [[0.75, 0.25], 0]
    # rho = 1: s = p.a / (1 + sum (a - mean)^2 / rho) = 0.5 / 1.5, c = p - s (a - 1/2)
    weights, optimum = scores([1, 0], regularization=1.0)
    assert [*weights, optimum] == pytest.approx([1 / 3, 2 / 3, 1 / 3], abs=1e-15)
    assert gram([[1, 0], [0, 1]]) == [[0.5, 0.5], 0.5]
    assert gram([[1, 0], [0, 3]]) == [[0.75, 0.25], 0.75]
    assert gram([[1, 2], [2, 5]]) == [[1, 0], 1]
    assert gram([[4, -4], [-4, 4]], preference=[3, 1]) == [[0.5, 0.5], 0]
    assert gram([[4, 4], [4, 4]], preference=[3, 1]) == [[0.75, 0.25], 4]
    assert gram([[7]]) == [[1], 7]
    # rho = 1 and p = (1, 0): 1/2 (c^2 + (1-c)^2) + (1-c)^2 is least where c = 3/4
    assert gram([[1, 0], [0, 1]], preference=[1, 0], regularization=1.0) == [[0.75, 0.25], 0.625]


def test_regressions() -> None:
    negated = torch.complex(torch.zeros(3), torch.tensor([0.2, 0.5, 0.1])).conj().imag
    assert pk.pama_weights(negated).optimum == torch.tensor(-0.1)  # the score nearest to 0
    m = 1e300 * torch.eye(3, dtype=torch.float64)
    c = pk.min_norm_weights(m, regularization=1e9).weights
    assert (c - 1 / 3).abs().max() <= EPS64  # by symmetry
    wide = torch.tensor([-7.442499949661396e-09, 0.7988680005073547, -5.385448087480427e-09])
    check(SOLVERS["scores"], wide, regularization=10**-25.478)
    wide = torch.tensor([1e-32, -3e32, 0.0, 0.0, 0.0], dtype=torch.float64)
    check(SOLVERS["scores"], wide)


# --- pareto_gap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_pareto_gap_bounds_the_possible_improvement(n: int) -> None:
    m = MIN_NORM.inputs("square", 30, n)
    c = torch.rand(30, n).double()
    c = c / c.sum(-1, keepdim=True)
    gap, least = pk.pareto_gap(m, c), pk.min_norm_weights(m)
    rounding = 4 * n * EPS64 * MIN_NORM.size(m)  # n^2 products up to max M_ii
    assert ((gap - reference.pareto_gap(m, c)).abs() <= rounding).all()
    # convex: 1/2 c'Mc - 1/2 optimum <= gap
    assert ((MIN_NORM.value(m, c) - least.optimum) / 2 <= gap + rounding).all()
    assert (pk.pareto_gap(m, least.weights).abs() <= KKT * MIN_NORM.size(m)).all()
    assert (gap >= -rounding).all()


def test_pareto_gap_examples_by_hand() -> None:
    m = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[4.0, -4.0], [-4.0, 4.0]]])
    c = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    assert pk.pareto_gap(m, c).tolist() == [0.0, 8.0]
    assert pk.pareto_gap(torch.tensor([[2.0]]), torch.ones(1)).tolist() == 0.0
    types = (torch.float32, torch.float64, torch.bfloat16)
    for first, second in itertools.product(types, types):
        gap = pk.pareto_gap(torch.eye(3).repeat(4, 2, 1, 1).to(first), torch.ones(4, 2, 3).to(second) / 4)
        assert gap.dtype == torch.promote_types(first, second)
        assert torch.equal(gap, torch.full_like(gap, -0.0625))  # 3/16 - 1/4
    m = torch.eye(3).repeat(4, 1, 1)
    m[2, 0, 1] = float("nan")
    assert pk.pareto_gap(m, torch.ones(4, 3) / 3).isnan().tolist() == [False, False, True, False]


# --- the reference by itself -------------------------------------------------------------------------


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=7))
def test_projection_on_the_simplex(values: list[int]) -> None:
    """The nearest point: v - c is largest, and equal, on the support."""
    v = torch.tensor(values).double() / 4
    c = reference.project_on_simplex(v)
    assert float(c.sum()) == pytest.approx(1, abs=1e-14)
    assert (c >= 0).all()
    assert (v - c <= (v - c)[c > 0].min() + 1e-14).all()


@given(values=st.lists(st.integers(-8, 8), min_size=1, max_size=6), shift=st.integers(0, 5))
def test_the_reference_satisfies_the_closed_form(values: list[int], shift: int) -> None:
    """On the support that was found, with multipliers of the right sign."""
    a = torch.tensor(values).double() / 4
    p = on_simplex([1.0 + (i + shift) % 3 for i in range(len(values))], len(values))
    for regularization in (0.05, 1.0):
        c, optimum = reference.pama_weights(a, preference=p, regularization=regularization)
        rho = regularization * float(a.square().max())
        if rho == 0:
            assert torch.allclose(c, p, rtol=0, atol=1e-15)
            continue
        on = c > 1e-12
        m, e, mean = int(on.sum()), p[on].sum() - 1, a[on].mean()
        s = (a[on] @ p[on] - mean * e) / (1 + (a[on].square().sum() - m * mean**2) / rho)
        tau = (rho * e - s * a[on].sum()) / m
        # rho >= 0.05 max a^2, six float64 terms; the bisection stops at 1e-15
        assert torch.allclose(c[on], p[on] - (s * a[on] + tau) / rho, rtol=0, atol=1e-12)
        assert float(optimum) == pytest.approx(float(s), abs=1e-12)
        assert (s * a + rho * (c - p) + tau >= -1e-12).all()


@pytest.mark.parametrize("family", GRAMS)
def test_the_reference_is_certified(family: str) -> None:
    for n in (2, 5, 9):
        m = MIN_NORM.inputs(family, 2, n)
        for regularization in (0.0, 0.1):
            c = reference.min_norm_weights(m, preference=skewed(n), regularization=regularization).weights
            # the ridge of 1e-13, and systems solved with it to n eps over it
            assert (gram_residual(m, c, skewed(n), regularization) <= 1e-6).all()
        for name in ("grid", "normal", "ties"):
            a = SOLVERS["scores"].inputs(name, 2, n)
            c = reference.pama_weights(a, regularization=0.1).weights
            assert (scores_residual(a, c, None, 0.1) <= 64 * n * EPS64).all()


def test_a_float32_gram_matrix_that_rounding_made_indefinite_is_solved() -> None:
    """Of rank 1 before it was rounded, with an eigenvalue of -2e-10: within the precision of float32."""
    row = torch.tensor(
        [[-0.08879882097244263, 0.35261523723602295, -0.5406988859176636, -0.8866809606552124]]
    )
    gram = row.mT @ row
    for solve in (pk.upgrad_weights, pk.min_norm_weights):
        weights, optimum = solve(gram)
        assert weights.min() >= 0
        assert abs(float(weights.sum()) - 1) < 1e-6  # four roundings of float32
        assert 0 <= optimum < 1e-6 * gram.amax()  # opposite gradients: some combination is 0
