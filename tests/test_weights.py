"""pama_weights: properties of the scalar problem's solution, against the reference and against cvxpy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from problems import EPS32, EPS64
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def eps_of(dtype: torch.dtype) -> float:
    return EPS64 if dtype == torch.float64 else EPS32


def prior_of(prior: Any, n: int) -> Tensor:
    p = torch.tensor([1.0] * n if prior is None else prior, dtype=torch.float64)
    return p / p.sum()


def kkt_residual(scores: Tensor, c: Tensor, prior: Any, regularization: float, scale: Any = None) -> Tensor:
    """Wolfe gap max_j g.(c - e_j), g = s a + rho (c - p), over max a^2 + rho: 0 exactly at the solution."""
    a, c = scores.double(), c.double()
    unit = a.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    a = a / unit
    r = a.square().amax(-1, keepdim=True)
    if scale is not None:
        r = torch.as_tensor(scale).double().expand(a.shape[:-1]).unsqueeze(-1) / unit / unit
    rho = regularization * r
    gradient = (a * c).sum(-1, keepdim=True) * a + rho * (c - prior_of(prior, a.shape[-1]))
    gap = (gradient * c).sum(-1) - gradient.amin(-1)
    return gap / (1 + rho.squeeze(-1))


def check_solution(
    scores: Tensor, prior: Any = None, regularization: float = 0.0, scale: Any = None
) -> pk.WeightSolution:
    """On the simplex; optimal; the optimum reported is a.c, and exactly the projection of 0 without rho."""
    s = pk.pama_weights(scores, prior=prior, regularization=regularization, scale=scale)
    n, eps = scores.shape[-1], eps_of(scores.dtype)
    assert s.weights.shape == scores.shape
    assert s.optimum.shape == scores.shape[:-1]
    assert (
        s.weights.dtype
        == s.optimum.dtype
        == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    )
    c, a = s.weights.double(), scores.double()
    assert (c >= 0).all()
    # n weights, each with a rounding or two of numbers up to 1
    assert ((c.sum(-1) - 1).abs() <= 4 * n * eps).all()
    # the n-term sums behind lambda and the mean, each with a relative error of n eps
    assert (kkt_residual(scores, c, prior, regularization, scale) <= 8 * n * eps).all()
    if regularization == 0:
        projection = scores.amin(-1).clamp(min=0) + scores.amax(-1).clamp(max=0)
        assert torch.equal(s.optimum, projection.to(s.optimum.dtype))
    # n products of rounded weights; the result is rounded to a multiple of the smallest subnormal number
    rounding = torch.finfo(s.optimum.dtype).smallest_normal * eps
    size = a.abs().amax(-1)
    assert ((s.optimum.double() - (a * c).sum(-1)).abs() <= 4 * n * eps * size + rounding).all()
    return s


def assert_near_reference(
    scores: Tensor, prior: Any = None, regularization: float = 0.0, scale: Any = None, condition: float = 1.0
) -> None:
    """Weights against the reference. `condition`: how far rounding of the scores to eps can move c."""
    s = check_solution(scores, prior, regularization, scale)
    r = reference.pama_weights(scores, prior=prior, regularization=regularization, scale=scale)
    n, eps = scores.shape[-1], eps_of(scores.dtype)
    # the bisection of the reference stops at 1e-15 relative to lambda
    tolerance = condition * 8 * n * max(eps, 2 * EPS64)
    assert ((s.weights.double() - r.weights).abs() <= tolerance).all()
    size = scores.double().abs().amax(-1)
    assert ((s.optimum.double() - r.optimum).abs() <= tolerance * size).all()


# --- generators --------------------------------------------------------------------------------------

priors = st.one_of(
    st.none(),
    st.lists(st.integers(0, 4).map(float), min_size=8, max_size=8),
)


@st.composite
def grid_scores(draw: st.DrawFn, rows: int = 4) -> Tensor:
    """Rows of scores on a coarse grid: many ties, zeros, one sign or both."""
    n = draw(st.integers(1, 8))
    low, high = draw(st.sampled_from([(-8, 8), (0, 8), (-8, 0), (-1, 1), (1, 8)]))
    values = draw(st.lists(st.integers(low, high), min_size=rows * n, max_size=rows * n))
    return torch.tensor(values, dtype=torch.float64).reshape(rows, n) / 4


@st.composite
def any_scores(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of arbitrary finite scores, from subnormal to the largest, in one batch."""
    n, rows = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32 if dtype == torch.float32 else 64)
    values = draw(st.lists(numbers, min_size=rows * n, max_size=rows * n))
    return torch.tensor(values, dtype=dtype).reshape(rows, n)


def cut(prior: Any, n: int) -> Any:
    """The first n numbers of a prior; None where they give no mass."""
    return prior[:n] if prior is not None and sum(prior[:n]) > 0 else None


# --- against the specification and an independent judge -------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=grid_scores(), prior=priors, regularization=st.sampled_from([0.0, 0.01, 0.1, 1.0, 30.0]))
def test_matches_the_reference(dtype: torch.dtype, scores: Tensor, prior: Any, regularization: float) -> None:
    # On this grid scores differ by 1/8 of the largest or not at all: spread >= 1/64, so lambda <= 64.
    assert_near_reference(scores.to(dtype), cut(prior, scores.shape[-1]), regularization, condition=64)


@pytest.mark.parametrize("dtype", DTYPES)
@given(scores=grid_scores(), prior=priors, scale=st.sampled_from([0.25, 3.0, 64.0]), per_row=st.booleans())
def test_matches_the_reference_with_a_scale(
    dtype: torch.dtype, scores: Tensor, prior: Any, scale: float, per_row: bool
) -> None:
    size: Any = scale
    if per_row:
        size = torch.arange(1, len(scores) + 1, dtype=dtype) * scale
    assert_near_reference(scores.to(dtype), cut(prior, scores.shape[-1]), 0.1, size, condition=64)


@pytest.mark.parametrize("regularization", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("uniform", [True, False])
def test_matches_cvxpy(n: int, regularization: float, uniform: bool) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    g = torch.Generator().manual_seed(n)
    scores = torch.randint(-6, 7, (2, n), generator=g).double() / 4
    prior = None if uniform else [float(i) for i in range(n)]
    p = prior_of(prior, n).numpy()
    s = pk.pama_weights(scores, prior=prior, regularization=regularization)
    for a, c, optimum in zip(scores.numpy(), s.weights.numpy(), s.optimum.tolist(), strict=True):
        x = cvxpy.Variable(n, nonneg=True)
        rho = regularization * (a**2).max()
        distance = cvxpy.sum_squares(x - p)
        if rho > 0:
            objective = cvxpy.square(a @ x) / 2 + rho / 2 * distance
            cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(x) == 1]).solve(**CLARABEL)
        else:  # of the points with a.x = s*, the nearest to p
            least = cvxpy.Problem(cvxpy.Minimize(cvxpy.square(a @ x)), [cvxpy.sum(x) == 1])
            assert optimum**2 == pytest.approx(least.solve(**CLARABEL), abs=1e-6)
            face = [cvxpy.sum(x) == 1, a @ x == optimum]
            cvxpy.Problem(cvxpy.Minimize(distance), face).solve(**CLARABEL)
        # a duality gap of 1e-12 times a^2 <= 2.25: weights to sqrt(2 gap / rho), rho >= 0.1 a^2
        assert abs(x.value - c).max() < 1e-5


def test_written_out_examples() -> None:
    def solve(a: list[float], **options: Any) -> list[list[float]]:
        s = pk.pama_weights(torch.tensor([a], dtype=torch.float64), **options)
        return [s.weights[0].tolist(), s.optimum.tolist()]

    assert solve([3, 1, 2]) == [[0, 1, 0], [1]]
    assert solve([-3, -1, -1]) == [[0, 0.5, 0.5], [-1]]
    assert solve([2, 1, 1], prior=[2, 1, 1]) == [[0, 0.5, 0.5], [1]]
    assert solve([1, -1]) == [[0.5, 0.5], [0]]
    assert solve([2, 0, 1], prior=[0.5, 0, 0.5]) == [[0, 1, 0], [0]]
    assert solve([0, 0], prior=[3, 1]) == [[0.75, 0.25], [0]]
    # rho = 1: s = p.a / (1 + sum (a - mean)^2 / rho) = 0.5 / 1.5, c = p - s (a - 1/2)
    weights, optimum = solve([1, 0], regularization=1.0)
    assert weights == pytest.approx([1 / 3, 2 / 3], abs=1e-15)
    assert optimum == pytest.approx([1 / 3], abs=1e-15)


# --- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_finite_scores_are_solved(dtype: torch.dtype, data: st.DataObject) -> None:
    """Subnormal beside huge scores: the optimum is bitwise the projection of 0, the weights optimal."""
    check_solution(data.draw(any_scores(dtype)), regularization=0.0)


@given(scores=any_scores(torch.float32), regularization=st.sampled_from([0.01, 0.1, 10.0]))
def test_any_finite_scores_are_solved_with_regularization(scores: Tensor, regularization: float) -> None:
    check_solution(scores, regularization=regularization)


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("batched", [False, True])
def test_tiny_beside_huge_scores(regularization: float, batched: bool) -> None:
    """Scores that differ by more than the type's range of normal numbers, alone and beside other rows."""
    rows = [[1e-42, 1e-30, 1e38], [-1e-42, -1e-30, -1e38], [1e-45, -1e38, 3e38], [-1e-44, 1e-44, 2e-44]]
    if not batched:
        for row in rows:
            check_solution(torch.tensor([row]), regularization=regularization)
        return
    scores = torch.tensor([*rows, [1.0, -2.0, 3.0]])
    s = check_solution(scores, regularization=regularization)
    if regularization == 0:
        assert s.weights[:2].tolist() == [[1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("exponent", [6, 12, 18, 24, 30])
@pytest.mark.parametrize("prior", [None, [1.0, 2.0, 3.0]])
def test_nearest_to_prior_in_float32_when_magnitudes_differ(exponent: int, prior: Any) -> None:
    """Small scores on both sides of 0, or on one side, beside one large score of either sign.

    Each weight is a smooth function of the scores' ratios here, so that it is right to a few eps.
    """
    tiny = 2.0**-exponent
    small = torch.tensor([[1.0, 2.0], [1.0, -1.0], [3.0, -2.0], [-1.0, -3.0], [0.625, -0.75]]) * tiny
    scores = torch.cat([torch.cat([small, torch.full((5, 1), s)], 1) for s in (1.0, -1.0, 0.8125, -1.625)])
    s = pk.pama_weights(scores, prior=prior)
    r = reference.pama_weights(scores, prior=prior)
    # 3 objectives, a handful of float32 operations on numbers up to 1 for each
    assert ((s.weights.double() - r.weights).abs() <= 32 * EPS32).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 31, 32, 33, 64, 1000])
def test_every_number_of_objectives(n: int, dtype: torch.dtype) -> None:
    scores = torch.randint(-40, 41, (5, n)).to(dtype) / 8
    scores[1] = scores[1].abs()
    scores[2] = -scores[2].abs() - 1
    scores[3] = 0
    skewed = [float(1 + i % 3) for i in range(n)]
    for prior in (None, skewed):
        for regularization in (0.0, 0.1):
            s = check_solution(scores, prior, regularization)
            # the prior, normalised and rounded twice
            assert ((s.weights[3] - prior_of(prior, n)).abs() <= 2 * eps_of(dtype)).all()
            r = reference.pama_weights(scores[:1], prior=prior, regularization=regularization)
            # n-term sums of float32 or float64 on a grid with spread >= 1/80 of the largest score
            assert ((s.weights[0] - r.weights[0]).abs() <= 80 * max(n, 8) * eps_of(dtype)).all()


def test_instruction_sets_agree(isa: str) -> None:
    g = torch.Generator().manual_seed(1)
    for n in (1, 2, 3, 4, 7):
        scores = torch.randint(-8, 9, (21, n), generator=g).float() / 4
        for regularization, prior in ((0.0, None), (0.1, None), (0.1, [float(i) for i in range(1, n + 1)])):
            assert_near_reference(scores, prior, regularization, condition=64)
        check_solution(scores.abs())


# --- invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    scores=grid_scores(), prior=priors, regularization=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99)
)
def test_permuting_objectives_permutes_weights(
    dtype: torch.dtype, scores: Tensor, prior: Any, regularization: float, seed: int
) -> None:
    n = scores.shape[-1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    prior = cut(prior, n)
    moved = None if prior is None else [prior[i] for i in order]
    scores = scores.to(dtype)
    s = pk.pama_weights(scores, prior=prior, regularization=regularization)
    t = pk.pama_weights(scores[:, order], prior=moved, regularization=regularization)
    # sums in another order: n eps, times lambda <= 64 (see above)
    assert ((s.weights[:, order] - t.weights).abs() <= 64 * 8 * n * eps_of(dtype)).all()
    if regularization == 0:
        assert torch.equal(s.optimum, t.optimum)


@given(
    scores=grid_scores(),
    prior=priors,
    regularization=st.sampled_from([0.0, 0.1]),
    exponent=st.sampled_from([-100, -60, -13, 1, 5, 60, 100, 120]),
)
def test_scaling_by_powers_of_two_changes_nothing(
    scores: Tensor, prior: Any, regularization: float, exponent: int
) -> None:
    prior = cut(prior, scores.shape[-1])
    for dtype in DTYPES:
        a = scores.to(dtype)
        s = pk.pama_weights(a, prior=prior, regularization=regularization)
        t = pk.pama_weights(a * 2.0**exponent, prior=prior, regularization=regularization)
        assert torch.equal(s.weights, t.weights)
        assert torch.equal(s.optimum * 2.0**exponent, t.optimum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-100, -50, -1, 1, 50, 100])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_scale_scales_with_the_square_of_the_scores(
    dtype: torch.dtype, exponent: int, as_tensor: bool
) -> None:
    """Scores around 1e-30 or 1e30 have scales that float32 does not hold."""
    a = torch.tensor([[1.0, 3.0, 4.0], [-1.0, 2.0, 0.5], [0.0, 1.0, -1.0]], dtype=dtype)

    def solve(k: float) -> pk.WeightSolution:
        scale: Any = 5.0 * k * k
        if as_tensor:
            scale = torch.tensor([5.0, 1.0, 0.75], dtype=torch.float64) * k * k
        return pk.pama_weights(a * k, regularization=0.1, scale=scale)

    s, t = solve(1.0), solve(2.0**exponent)
    assert torch.equal(s.weights, t.weights)
    assert torch.equal(s.optimum * 2.0**exponent, t.optimum)


@pytest.mark.parametrize("k", [1e-30, 1e-9, 3.0, 1e9, 1e30])
def test_scaling_by_any_number_changes_little(k: float) -> None:
    a = torch.tensor([[1.0, 3.0, 4.0], [-1.0, 2.0, 0.5], [0.5, 0.5, 2.0]])
    s = pk.pama_weights(a, regularization=0.1)
    t = pk.pama_weights(a * k, regularization=0.1)
    # scores rounded to eps; c moves by at most 1 / regularization times that
    assert ((s.weights - t.weights).abs() <= 10 * 8 * EPS32).all()
    check_solution(a * k)


@given(scores=grid_scores(), regularization=st.sampled_from([0.0, 0.1, 1.0]), weight=st.integers(1, 3))
def test_equal_objectives_are_treated_equally(scores: Tensor, regularization: float, weight: int) -> None:
    """Bitwise equal weights for equal scores with equal prior, wherever they stand."""
    n = scores.shape[-1]
    doubled = torch.cat([scores, scores], -1)
    prior = [float(weight + i % 2) for i in range(n)] * 2
    for dtype in DTYPES:
        for p in (None, prior):
            c = pk.pama_weights(doubled.to(dtype), prior=p, regularization=regularization).weights
            assert torch.equal(c[:, :n], c[:, n:])


@given(
    scores=grid_scores(rows=3),
    prior=priors,
    regularization=st.sampled_from([0.03, 0.1, 1.0]),
    seed=st.integers(0, 99),
    delta=st.sampled_from([1e-9, 1e-6, 1e-3]),
)
def test_continuity_in_scores_and_scale(
    scores: Tensor, prior: Any, regularization: float, seed: int, delta: float
) -> None:
    """At fixed rho = 0.25 regularization: |dc| <= |d(gradient)| / rho by strong convexity."""
    n = scores.shape[-1]
    g = torch.Generator().manual_seed(seed)
    moved = scores + delta * (2 * torch.rand(scores.shape, generator=g, dtype=torch.float64) - 1)
    prior = cut(prior, n)
    s = pk.pama_weights(scores, prior=prior, regularization=regularization, scale=0.25)
    t = pk.pama_weights(moved, prior=prior, regularization=regularization, scale=0.25 * (1 + delta))
    # gradient s a + rho (c - p): a up to 2 + delta moves by delta in s and in a; rho moves by delta rho
    rho = 0.25 * regularization
    largest = float(scores.abs().max()) + delta
    bound = math.sqrt(n) * 2 * largest * delta / rho + 2 * delta
    distance = (s.weights - t.weights).norm(dim=-1)
    assert (distance <= bound + 64 * n * EPS64 / rho).all()


def test_regularization_zero_is_the_limit() -> None:
    scores = torch.tensor([[1.0, -2, 3, 0.5], [1, 1, 2, 3], [-1, -1, -4, -2], [0, 0, 1, 2]]).double()
    for prior in (None, [1.0, 2.0, 0.0, 1.0]):
        exact = pk.pama_weights(scores, prior=prior)
        near = pk.pama_weights(scores, prior=prior, regularization=1e-10)
        # the path c(rho) is Lipschitz: |c(rho) - c(0)| <= 16 / (smallest score gap)^2 rho
        assert ((exact.weights - near.weights).abs() <= 1e-8).all()


def test_large_regularization_gives_the_prior() -> None:
    scores = torch.tensor([[1.0, -2.0, 3.0], [1e30, 2e30, 0.0]])
    for huge in (1e20, 1e300):
        s = pk.pama_weights(scores, prior=[1, 2, 5], regularization=huge)
        assert torch.equal(s.weights, torch.tensor([0.125, 0.25, 0.625]).expand(2, 3))


@pytest.mark.parametrize("size", [1.1e-12, 1e-9, 1e-6, 1.0, 1e5, 9e11])
@pytest.mark.parametrize("regularization", [1e-29, 1e-20, 1e-15, 1e-10, 1e9])
def test_any_regularization_at_any_size(isa: str, size: float, regularization: float) -> None:
    """rho times the square of the scores is far outside float32: the weights still sum to 1."""
    for row in ([1.0, 1.0, 1.0], [1.5, 1.0, 1.0], [1.0, -0.25, 1.0]):
        for prior in (None, [1.0, 2.0, 3.0]):
            assert_near_reference(torch.tensor([row]) * size, prior, regularization, condition=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-290, -60, -39, 39, 60, 290])
def test_scale_and_regularization_beyond_float32(isa: str, dtype: torch.dtype, exponent: int) -> None:
    """Their product is 1."""
    a = torch.tensor([[1.0, 0.5], [1.0, -0.75], [0.0, 0.0]], dtype=dtype)
    s = pk.pama_weights(a, regularization=10.0**-exponent, scale=10.0**exponent)
    t = pk.pama_weights(a, regularization=1.0, scale=1.0)
    # 10^-x and 10^x are rounded: rho = 1 + 2 eps
    assert ((s.weights - t.weights).abs() <= 8 * eps_of(dtype)).all()


def test_scores_of_zero_with_a_tiny_scale_give_the_prior(isa: str) -> None:
    for n in (1, 2, 3, 8, 9):
        for scale in (1e-25, 1e-40, 1e-300):
            s = pk.pama_weights(torch.zeros(5, n), regularization=1e-14, scale=scale)
            # the prior, rounded; or 1 / n by a reciprocal good to one unit
            assert ((s.weights - 1 / n).abs() <= EPS32).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimum_lies_between_the_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores of the largest number: a.c, with weights whose sum is rounded up, would be infinite."""
    for n in range(1, 17):
        a = torch.full((3, n), torch.finfo(dtype).max, dtype=dtype)
        for sign in (1, -1):
            optimum = pk.pama_weights(sign * a, regularization=0.1).optimum
            assert torch.isfinite(optimum).all()
            assert ((optimum.abs() / a[:, 0] - 1).abs() <= 4 * n * eps_of(dtype)).all()


# --- bits ----------------------------------------------------------------------------------------------


def mixed_rows(n: int, rows: int = 100, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of every kind side by side, so that the lanes of a vector take different paths."""
    g = torch.Generator().manual_seed(n)
    a = torch.randn(rows, n, generator=g, dtype=torch.float64)
    a[::7] = a[::7].abs()
    a[1::7] = -a[1::7].abs()
    a[2::7] = (a[2::7] * 2).round() / 2
    a[3::7] *= 1e30
    a[4::14] *= 1e-42
    a[11::14] = 0
    a[5::21, 0] = NAN
    a[12::21, -1] = INF
    return a.to(dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 32, 40])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("uniform", [True, False])
def test_rows_are_independent(n: int, regularization: float, uniform: bool) -> None:
    """A row solved alone has the bits that it has inside a batch."""
    a = mixed_rows(n)
    prior = None if uniform else [float(1 + i % 3) for i in range(n)]
    whole = pk.pama_weights(a, prior=prior, regularization=regularization)
    scale = a.square().amax(-1).clamp(1e-30, 1e30)
    scaled = pk.pama_weights(a, prior=prior, regularization=regularization, scale=scale)
    for i in range(0, len(a), 3):
        for batch, size in ((whole, None), (scaled, scale[i])):
            alone = pk.pama_weights(a[i], prior=prior, regularization=regularization, scale=size)
            assert torch.equal(alone.weights.view(torch.int32), batch.weights[i].view(torch.int32))
            assert torch.equal(alone.optimum.view(torch.int32), batch.optimum[i].view(torch.int32))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 32])
def test_a_row_without_a_negative_score_has_its_bits_beside_any(isa: str, n: int) -> None:
    """Rows without a negative score go another way where no neighbour has one."""
    a = torch.randint(0, 3, (64, n), generator=torch.Generator().manual_seed(n)).float()
    a[::4] = 1  # all tied
    signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None]
    for prior in (None, [float(i % 3 == 0) for i in range(n)], [float(1 + i % 3) for i in range(n)]):
        s = pk.pama_weights(a, prior=prior)
        t = pk.pama_weights(a * signs, prior=prior)
        assert torch.equal(s.weights[::2], t.weights[::2])
        assert (s.weights >= 0).all()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_nan_hides_no_negative_score(isa: str, n: int) -> None:
    """One negative score anywhere beside a NaN, among scores of 1."""
    for at in range(n, 64 * n):
        a = torch.ones(64, n)
        a[0, 0] = NAN
        a.view(-1)[at] = -1
        s = pk.pama_weights(a)
        assert s.optimum[0].isnan()
        wanted = torch.ones(63)
        wanted[at // n - 1] = 0  # -1 and 1 on both sides of 0
        assert torch.equal(s.optimum[1:], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    a = mixed_rows(5, 12000, dtype)
    for regularization in (0.0, 0.1):
        s = pk.pama_weights(a, regularization=regularization)
        torch.set_num_threads(1)
        t = pk.pama_weights(a, regularization=regularization)
        torch.set_num_threads(threads)
        for x, y in zip(s, t, strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_out_receives_the_solution() -> None:
    for dtype in (*DTYPES, torch.float16):
        a = torch.randn(2, 3, 4).to(dtype)
        wanted = pk.pama_weights(a, regularization=0.1, scale=2.0)
        out = pk.WeightSolution(
            torch.full_like(wanted.weights, NAN),
            torch.full_like(wanted.optimum, NAN),
        )
        returned = pk.pama_weights(a, regularization=0.1, scale=2.0, out=out)
        assert returned is out
        assert torch.equal(out.weights, wanted.weights)
        assert torch.equal(out.optimum, wanted.optimum)


# --- inputs of every kind --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_solved_in_float32(dtype: torch.dtype) -> None:
    a = torch.randn(6, 5).to(dtype)
    for regularization in (0.0, 0.1):
        s = check_solution(a, regularization=regularization)
        t = pk.pama_weights(a.float(), regularization=regularization)
        assert torch.equal(s.weights, t.weights)
        assert torch.equal(s.optimum, t.optimum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides_and_any_number_of_axes(dtype: torch.dtype) -> None:
    a = torch.randn(4, 6, 5, 3).to(dtype)
    views = [
        a,
        a[0, 0],
        a[0, 0, 0],
        a.movedim(1, -1),
        a.transpose(0, 3)[..., 1:],
        a[:, ::2, 1::3],
        a[:1, :1, :1].expand(4, 6, 2, 3),
        a[..., :1].expand(4, 6, 5, 7),
    ]
    for view in views:
        for scale in (None, 2.0, torch.rand(view.shape[:-1]).add(1)):
            s = pk.pama_weights(view, regularization=0.1, scale=scale)
            t = pk.pama_weights(view.contiguous(), regularization=0.1, scale=scale)
            assert s.weights.shape == view.shape
            assert torch.equal(s.weights, t.weights)
            assert torch.equal(s.optimum, t.optimum)
    sizes = torch.rand(3, 8).add(1).T[::2]
    s = pk.pama_weights(a[:, :3, 0], regularization=0.1, scale=sizes)
    t = pk.pama_weights(a[:, :3, 0], regularization=0.1, scale=sizes.contiguous())
    assert torch.equal(s.weights, t.weights)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 1)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    s = pk.pama_weights(torch.zeros(shape), regularization=0.1)
    assert s.weights.shape == shape
    assert s.optimum.shape == shape[:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    scores=grid_scores(rows=5),
    bad=st.sampled_from([NAN, INF, -INF]),
    place=st.integers(0, 39),
    regularization=st.sampled_from([0.0, 0.1]),
)
def test_a_nan_or_infinity_concerns_its_own_row(
    dtype: torch.dtype, scores: Tensor, bad: float, place: int, regularization: float
) -> None:
    a = scores.to(dtype)
    before = pk.pama_weights(a, regularization=regularization)
    row, column = place % a.shape[0], place // 5 % a.shape[1]
    a[row, column] = bad
    after = pk.pama_weights(a, regularization=regularization)
    assert after.weights[row].isnan().all()
    assert after.optimum[row].isnan()
    rest = torch.arange(5) != row
    assert torch.equal(after.weights[rest], before.weights[rest])
    assert torch.equal(after.optimum[rest], before.optimum[rest])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_scale_that_is_not_finite_concerns_its_own_row(bad: float) -> None:
    for dtype in DTYPES:
        a = torch.randn(4, 3).to(dtype)
        scale = torch.ones(4, dtype=dtype)
        scale[2] = bad
        c = pk.pama_weights(a, regularization=0.1, scale=scale).weights
        assert c[2].isnan().all()
        assert not c[[0, 1, 3]].isnan().any()
        assert not pk.pama_weights(a, scale=scale).weights.isnan().any()


@given(prior=priors, scores=grid_scores(), tensor=st.booleans())
@example(prior=[0.0, 0, 0, 0, 0, 0, 0, 1], scores=torch.tensor([[1.0, 1, 2, 3, 4, 5, 6, 7]]), tensor=False)
def test_priors_with_zeros(prior: Any, scores: Tensor, tensor: bool) -> None:
    """A prior of 0 is not exclusion: what the scores decide, they decide."""
    n = scores.shape[-1]
    assume(prior is not None)
    prior = [prior[i] * (i % 2) for i in range(n)]
    assume(sum(prior) > 0)
    scores = scores.double()
    given_prior = torch.tensor(prior) if tensor else prior
    for regularization in (0.0, 0.1):
        s = pk.pama_weights(scores, prior=given_prior, regularization=regularization)
        r = reference.pama_weights(scores, prior=prior, regularization=regularization)
        # see test_matches_the_reference
        assert ((s.weights - r.weights).abs() <= 64 * 8 * n * 2 * EPS64).all()


def test_prior_forms_are_equal() -> None:
    a = torch.randn(7, 3)
    wanted = pk.pama_weights(a, prior=[0.25, 0.25, 0.5], regularization=0.1).weights
    for prior in ((1, 1, 2), torch.tensor([2, 2, 4]), torch.tensor([0.5, 0.5, 1.0]), [1e300, 1e300, 2e300]):
        assert torch.equal(pk.pama_weights(a, prior=prior, regularization=0.1).weights, wanted)


def test_uniform_prior_by_default() -> None:
    a = torch.randint(-8, 9, (50, 4)).double() / 4
    for regularization in (0.0, 0.1):
        s = pk.pama_weights(a, regularization=regularization)
        t = pk.pama_weights(a, prior=[1, 1, 1, 1], regularization=regularization)
        # two orders of the same elimination; lambda <= 64
        assert ((s.weights - t.weights).abs() <= 64 * 32 * EPS64).all()
