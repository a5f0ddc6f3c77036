"""What holds only for scores: any magnitude, scales, and rank-one matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS32, EPS64
from properties_setup import INF, NAN, assert_bits, both_dtypes
from solver_table import (
    NEAREST,
    SOLVERS,
    check,
    eps_of,
    skewed,
)

import pama_kernels as pk


@both_dtypes
@given(data=st.data(), regularization=st.sampled_from([0.0, 0.01, 0.1, 10.0]))
def test_any_finite_scores_are_solved(dtype: torch.dtype, data: st.DataObject, regularization: float) -> None:
    """From subnormal to the largest number, in one row."""
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32 if dtype == torch.float32 else 64)
    n = data.draw(st.integers(1, 6))
    values = data.draw(st.lists(numbers, min_size=3 * n, max_size=3 * n))
    check(SOLVERS["scores"], torch.tensor(values, dtype=dtype).reshape(3, n), regularization=regularization)


@both_dtypes
@given(
    data=st.data(),
    regularization=st.sampled_from([0.0, 0.01, 0.1, 1.0, 30.0]),
    scale=st.sampled_from([None, 0.25, 64.0, "rows"]),
)
def test_scores_on_a_grid_match_the_reference(
    dtype: torch.dtype, data: st.DataObject, regularization: float, scale: Any
) -> None:
    n, low = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([-8, 0, 1]))
    values = data.draw(st.lists(st.integers(low, 8), min_size=4 * n, max_size=4 * n))
    x = torch.tensor(values, dtype=dtype).reshape(4, n) / 4
    preference = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    preference = preference if preference and sum(preference) else None
    scale = torch.arange(1, 5, dtype=dtype) if scale == "rows" else scale
    options = {"regularization": regularization, "scale": scale}
    s = check(SOLVERS["scores"], x, preference, **options)
    r = SOLVERS["scores"].reference(x, preference=preference, **options)
    # scores differ by 1/8 of the largest or not at all: lambda <= 64; the reference stops at 1e-15
    tolerance = 64 * 8 * n * max(eps_of(dtype), 2 * EPS64)
    assert ((s.weights - r.weights).abs() <= tolerance).all()
    assert ((s.optimum - r.optimum).abs() <= 2 * tolerance).all()


@pytest.mark.parametrize("preference", [None, [1.0, 2.0, 3.0]])
def test_nearest_to_the_preference_in_float32_when_magnitudes_differ(preference: Any) -> None:
    """Small scores around 0 beside one large one: each weight is a smooth function of their ratios."""
    for exponent in (6, 12, 18, 24, 30):
        small = torch.tensor([[1.0, 2], [1, -1], [3, -2], [-1, -3], [0.625, -0.75]]) * 2.0**-exponent
        x = torch.cat([torch.cat([small, torch.full((5, 1), s)], 1) for s in (1.0, -1.0, 0.8125, -1.625)])
        s, r = (solve(x, preference=preference) for solve in SOLVERS["scores"][:2])
        # a handful of float32 operations on numbers up to 1 for each of 3 objectives
        assert ((s.weights.double() - r.weights).abs() <= 32 * EPS32).all()


@both_dtypes
@pytest.mark.parametrize("exponent", [-290, -60, -39, 39, 60, 290])
def test_scale_and_regularization_beyond_float32(dtype: torch.dtype, exponent: int) -> None:
    """Their product is 1, or the square of the scores, which is out of float32's range as well."""
    a = torch.tensor([[1.0, 0.5], [1.0, -0.75], [0.0, 0.0]], dtype=dtype)
    s = pk.pama_weights(a, regularization=10.0**-exponent, scale=10.0**exponent)
    t = pk.pama_weights(a, regularization=1.0, scale=1.0)
    # 10^-x and 10^x are rounded: rho = 1 + 2 eps
    assert ((s.weights - t.weights).abs() <= 8 * eps_of(dtype)).all()
    k = 2.0 ** (exponent // 3)
    scale = torch.tensor([5.0, 1.0, 0.75], dtype=torch.float64)
    s, t = (pk.pama_weights(x * a, regularization=0.1, scale=scale * x * x) for x in (1.0, k))
    assert_bits((s.weights, s.optimum * k), t)


@both_dtypes
def test_a_non_finite_scale_affects_only_its_row(dtype: torch.dtype) -> None:
    a, scale = torch.randn(4, 3, dtype=dtype), torch.ones(4, dtype=dtype)
    for bad in (NAN, INF):
        scale[2] = bad
        rows = pk.pama_weights(a, regularization=0.1, scale=scale).weights.isnan()
        assert rows.all(-1).tolist() == rows.any(-1).tolist() == [False, False, True, False]
        assert not pk.pama_weights(a, scale=scale).weights.isnan().any()


@both_dtypes
@pytest.mark.parametrize("regularization", [1e-300, 1e-46, 1e-29, 1e-15])
def test_a_vanishing_regularization_is_the_limit(dtype: torch.dtype, regularization: float) -> None:
    a = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 3.0]], dtype=dtype)
    for size in (1.1e-12, 1.0, 9e11):
        got, wanted = pk.pama_weights(size * a, regularization=regularization), pk.pama_weights(size * a)
        # lambda <= 1 here: rho moves c by rho itself
        assert ((got.weights - wanted.weights).abs() <= 8 * eps_of(dtype) + 2 * regularization).all()


@pytest.mark.cpu
@both_dtypes
def test_the_optimum_lies_between_the_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores of the largest number: a.c, with weights whose sum is rounded up, would be infinite."""
    for n in range(1, 17):
        a = torch.full((3, n), torch.finfo(dtype).max, dtype=dtype)
        for sign in (1, -1):
            optimum = pk.pama_weights(sign * a, regularization=0.1).optimum
            assert ((optimum.abs() / a[:, 0] - 1).abs() <= 4 * n * eps_of(dtype)).all()


@pytest.mark.cpu
@pytest.mark.parametrize("n", [2, 3, 4, 8, 32])
def test_rows_of_different_signs_are_independent(isa: str, n: int) -> None:
    """Rows without a negative score take a faster path if no neighbour has one; a NaN does not hide one."""
    a = torch.randint(0, 3, (64, n)).float()
    a[::4] = 1  # all tied
    signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None]
    for preference in (None, skewed(n), [float(1 + i % 3) for i in range(n)]):
        s, t = pk.pama_weights(a, preference=preference), pk.pama_weights(a * signs, preference=preference)
        assert torch.equal(s.weights[::2], t.weights[::2])
    for at in range(n, 64 * n, 7):
        a = torch.ones(64, n)
        a[0, 0] = NAN
        a.view(-1)[at] = -1
        optimum = pk.pama_weights(a).optimum
        assert optimum[0].isnan()
        assert optimum[1:].tolist() == [0.0 if row == at // n else 1.0 for row in range(1, 64)]


def test_rank_one_matrices_are_the_scalar_problem() -> None:
    """M = a a': the same weights as from the scores a, ties and signs included."""
    for n in (2, 3, 8, 9, 40):
        for low, high in ((1, 6), (-5, 6), (-6, 0), (0, 4)):
            a = torch.randint(low, high, (4, n)).double()
            for preference in (None, skewed(n)):
                for options in SOLVERS["min_norm"].options:
                    s = pk.min_norm_weights(a[:, :, None] * a[:, None, :], preference=preference, **options)
                    t = pk.pama_weights(a, preference=preference, **options)
                    # with rho >= max M_ii / 10: n-term sums with relative error n eps, over rho
                    tolerance = 10 * 16 * n * EPS64 if options["regularization"] else NEAREST
                    assert ((s.weights - t.weights).abs() <= tolerance).all()
