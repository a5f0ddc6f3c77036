"""Matrices that are singular up to rounding: the reference and the kernels find the minimisers nearest to the
preference, and the reference satisfies the optimality conditions to rounding."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from problems import EPS64
from rational import exact_solution, exact_upgrad, rational_gram
from solver_table import KKT, NEAREST, SOLVERS, Array, gram_of, gram_residual, repeated, wide
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels.reference.least_squares import SINGULAR

ROUNDING = 1e-11  # eps over the smallest ratio of eigenvalues of the cosines, which is above 1e-4 here


def _scaled(g: np.random.Generator, j: Array) -> Array:
    """Gradients with norms that span at most 100, so that no ratio of them is capped."""
    norm = np.linalg.norm(j, axis=-1, keepdims=True)
    return np.where(norm > 0, j / np.where(norm > 0, norm, 1) * 10.0 ** g.uniform(-1, 1, (len(j), 1)), 0.0)


def _low_rank(rank: Callable[[int], int], signs: bool = False) -> Callable[..., Array]:
    def make(g: np.random.Generator, n: int) -> Array:
        j = g.standard_normal((n, rank(n)))
        return _scaled(g, np.abs(j) * g.choice([-1.0, 1.0], (n, 1)) if signs else j)

    return make


# Factors J of M = JJ', exact up to the rounding of the products.
FACTORS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "rank 1": _low_rank(lambda n: 1),
    "rank 2": _low_rank(lambda n: 2),
    "rank n/2": _low_rank(lambda n: n // 2),
    "opposite cones": _low_rank(lambda n: 2, signs=True),
    "float32": lambda g, n: _low_rank(lambda n: 2)(g, n).astype(np.float32).astype(np.float64),
    "integers": lambda g, n: g.integers(-3, 4, (n, 2)).astype(np.float64),
    "duplicates": lambda g, n: repeated(g, 1, n, 1.0, False)[0],
    "opposites": lambda g, n: repeated(g, 1, n, -1.0, False)[0],
    "zero rows": lambda g, n: np.where(
        np.arange(n)[:, None] % 3 == 1, 0.0, _low_rank(lambda n: n // 2)(g, n)
    ),
}
every_factor = pytest.mark.parametrize("family", FACTORS)


@every_factor
@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_minimisers_nearest_to_the_preference(family: str, n: int) -> None:
    for seed in range(4):
        g = np.random.default_rng([seed, n])
        j = FACTORS[family](g, n)
        m, exact = gram_of(j), rational_gram(j)
        p = [1] * n if seed % 2 else g.integers(1, 4, n).tolist()
        least, _ = exact_solution(exact, [Fraction(x, sum(p)) for x in p], Fraction(0))
        for name, wanted in (("upgrad", exact_upgrad(exact, p)), ("min_norm", least)):
            solution = torch.tensor([float(x) for x in wanted], dtype=torch.float64)
            for library, error in ((reference, ROUNDING), (pk, NEAREST)):
                c = getattr(library, f"{name}_weights")(m, preference=p).weights
                torch.testing.assert_close(c, solution, rtol=0, atol=error)


@every_factor
@pytest.mark.parametrize("n", [8, 16])
def test_more_objectives_than_can_be_enumerated(family: str, n: int) -> None:
    for seed in range(4):
        m = gram_of(FACTORS[family](np.random.default_rng([seed, n]), n))
        assert (reference.upgrad_weights(m).weights - pk.upgrad_weights(m).weights).abs().max() <= NEAREST
        assert _residual(m, reference.upgrad_weights) <= _bound(n)
        assert _residual(m, pk.upgrad_weights) <= KKT
        assert gram_residual(m, reference.min_norm_weights(m).weights) <= _bound(n)


@pytest.mark.parametrize("angle", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("span", [0.0, 1.0])
def test_nearly_parallel_gradients(angle: float, span: float) -> None:
    """The weights may depend on the rounding of M; the conditions hold."""
    for n in (3, 5, 8, 16):
        for rank in (1, n):
            g = np.random.default_rng([n, rank])
            j = np.ones((1, n)) / n**0.5 + angle * g.standard_normal((n, rank)) @ g.standard_normal((rank, n))
            m = gram_of(j * g.choice([-1.0, 1.0], (n, 1)) * 10.0 ** g.uniform(-span, span, (n, 1)))
            assert _residual(m, reference.upgrad_weights) <= _bound(n)
            assert gram_residual(m, reference.min_norm_weights(m).weights) <= _bound(n)


def test_nearly_equal_and_opposite_gradients() -> None:
    for n in (3, 5, 9, 16):
        for seed in range(3):
            for m in SOLVERS["upgrad"].inputs("near duplicates", 3, n, seed):
                assert _residual(m, reference.upgrad_weights) <= KKT
                assert gram_residual(m, reference.min_norm_weights(m).weights) <= KKT


def _residual(m: Tensor, solve: Callable[..., reference.Solution | pk.WeightSolution]) -> float:
    """The largest violation of z >= 0, C (e_i + z) >= 0, z.C(e_i + z) = 0 over the projections i, with C the
    cosines and e_i + z scaled to sum 1."""
    d = m.diagonal().sqrt()
    inverse = torch.where(d > 0, 1 / d, 0.0)
    cosines = (m * inverse[:, None] * inverse).numpy()
    worst = 0.0
    for i in d.nonzero().squeeze(1).tolist():
        z = (solve(m, preference=torch.eye(len(m))[i]).weights * d).numpy()
        z = z / z.sum()
        assert (z >= 0).all()
        # i: its condition follows, as z.Cz = z_i (Cz)_i >= 0
        slack = np.delete(wide(cosines, z), i)
        worst = max(worst, -float(slack.min()), float(np.abs(slack * np.delete(z, i)).max()))
    return worst


def _bound(n: int) -> float:
    """Eigenvalues that count as 0, and sums of n products."""
    return SINGULAR + 16 * n * EPS64


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7])
def test_the_mean_of_parallel_gradients_with_rounding_errors(noise: float) -> None:
    """Of rank 1 but for the errors of each number, 1e-7 for float32. The objectives of the other sign balance
    e_i: z_j is proportional to |a_j|."""
    for seed in range(12):
        g = np.random.default_rng(seed)
        n = int(g.integers(3, 17))
        a = g.choice([-1.0, 1.0], n) * 10.0 ** g.uniform(-1, 1, n)
        rows = a * g.standard_normal((50, 1)) * (1 + noise * g.standard_normal((50, n)))
        other = np.where(a[:, None] * a < 0, np.abs(a), 0.0)  # of each i
        square = (other**2).sum(1, keepdims=True)
        total = 1 + (np.abs(a)[:, None] * other / np.where(square > 0, square, 1)).sum(0)
        m = gram_of(rows.T) / 50
        wanted = torch.from_numpy(total / total.sum())
        # a is known to noise / sqrt(50), for each of n weights; see NEAREST for the kernels
        error = ROUNDING + noise * n
        for solve, tolerance in ((reference.upgrad_weights, error), (pk.upgrad_weights, NEAREST + error)):
            torch.testing.assert_close(solve(m).weights, wanted, rtol=0, atol=tolerance)
