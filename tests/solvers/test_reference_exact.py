"""The matrix solvers of the reference against solutions in exact rational arithmetic: the specification is at
least as exact as any backend, for objectives of any scale and for singular matrices."""

from __future__ import annotations

import pytest
import torch
from rational import exact_upgrad, rational_gram
from solver_table import NEAREST

import pama_kernels as pk
from pama_kernels import reference


@pytest.mark.parametrize(
    "diagonal",
    [
        [1e-8, 1.0, 1e8],
        [1e-8, 2e-8, 1e8],
        [2.0, 1e-8, 3e8, 1e-8],
        [1e-100, 1.0, 1e100],
        [1e-3, 1.0, 1e3],
        [5.0, 1e-150],
    ],
)
def test_min_norm_of_orthogonal_gradients_of_any_scale(diagonal: list[float]) -> None:
    """c_i is proportional to 1 / M_ii; the relative error of each weight is a few roundings."""
    d = torch.tensor(diagonal, dtype=torch.float64)
    inverse = d.min() / d
    found = reference.min_norm_weights(torch.diag(d))
    torch.testing.assert_close(found.weights, inverse / inverse.sum(), rtol=4e-16 * len(d), atol=0)
    torch.testing.assert_close(found.optimum, d.min() / inverse.sum(), rtol=4e-16 * len(d), atol=0)


def test_min_norm_beside_an_objective_without_a_gradient() -> None:
    found = reference.min_norm_weights(torch.diag(torch.tensor([1e-6, 0.0, 1.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(found.weights, torch.tensor([0, 0.5, 0, 0.5]).double(), rtol=0, atol=NEAREST)
    assert found.optimum <= 1e-20


# --- singular matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "n"), [(1, 3), (2, 3), (2, 4), (3, 5), (2, 5)])
def test_upgrad_with_fewer_rows_than_objectives(rows: int, n: int, span: float) -> None:
    """The Gram matrix is singular; the weights are those nearest to the preference, in the Euclidean norm."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.logspace(0, span, n, dtype=torch.float64)
        advantages = torch.randn(rows, n, generator=generator, dtype=torch.float64) * scales
        wanted = torch.tensor([float(x) for x in exact_upgrad(rational_gram(advantages.T), [1] * n)]).double()
        for solve in (reference.upgrad_weights, pk.upgrad_weights):
            found = solve(advantages.T @ advantages).weights
            torch.testing.assert_close(found, wanted, rtol=0, atol=NEAREST)


def test_min_norm_of_singular_matrices() -> None:
    """A duplicated objective shares its weight as the preference says: c_1 - c_2 = p_1 - p_2."""
    for scale in (1e-8, 1.0, 1e8):
        m = torch.diag(torch.tensor([scale, scale, 2 * scale, 1e8]).double())
        m[0, 1] = m[1, 0] = m[0, 0]
        preference = [0.2, 0.4, 0.1, 0.3]
        # What the kernels promise is relative to the largest diagonal entry.
        solvers = (reference.min_norm_weights, pk.min_norm_weights)[: 1 if scale < 1 else 2]
        for solve in solvers:
            c = solve(m, preference=preference).weights
            inverse = torch.tensor([1 / scale, 1 / (2 * scale), 1e-8], dtype=torch.float64)
            shares = inverse / inverse.sum()
            found = torch.stack([c[0] + c[1], c[2], c[3]])
            torch.testing.assert_close(found, shares, rtol=0, atol=NEAREST)
            if shares[0] > 0.2:
                torch.testing.assert_close(c[1] - c[0], torch.tensor(0.2).double(), rtol=0, atol=NEAREST)
