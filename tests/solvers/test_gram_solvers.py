"""What holds only for matrices: validation, and UPGrad's projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import EPS32
from solver_table import (
    FAMILIES,
    KKT,
    SOLVERS,
    Solver,
    on_simplex,
)

import pama_kernels as pk

# --- only matrices -----------------------------------------------------------------------------------

matrices = pytest.mark.parametrize(
    "solver", [SOLVERS["min_norm"], SOLVERS["upgrad"]], ids=["min_norm", "upgrad"]
)
_EYE = torch.eye(3, dtype=torch.float64)
BAD_MATRICES = {
    "not symmetric": torch.tensor([[1.0, 0.5, 0], [0.3, 1, 0], [0, 0, 1]]),
    "triangular": torch.tensor([[2.0, 1], [0, 2]]),
    "antisymmetric": torch.tensor([[1.0, 0.5], [-0.5, 1]]),
    "negative diagonal": torch.diag(torch.tensor([1.0, -0.5, 2])),
    "only negative": -torch.ones(1, 1),
    "large correlation": torch.tensor([[1.0, 2], [2, 1]]),
    "large anticorrelation": torch.tensor([[1.0, -2], [-2, 1]]),
    "zero diagonal": torch.tensor([[0.0, 1], [1, 0]]),
    "negative at the middle": 1.9 * _EYE - 0.9,
    "indefinite, no negative entry": torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.9], [0.1, 0.9, 1]]),
}


@pytest.mark.cpu
@matrices
@pytest.mark.parametrize("name", BAD_MATRICES)
def test_a_matrix_that_is_not_positive_semidefinite_is_an_error(solver: Solver, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for k in (1e-30, 1.0, 1e30):
            bad = (k * BAD_MATRICES[name].double()).to(dtype)
            with pytest.raises(ValueError, match="gram: expected a symmetric positive semidefinite matrix"):
                solver.solve(bad)
            batch = (torch.eye(len(bad), dtype=dtype) * k).repeat(5, 1, 1)
            batch[3] = bad
            with pytest.raises(ValueError, match="batch index 3"):
                solver.solve(batch)
            out = pk.WeightSolution(torch.empty(len(bad), dtype=dtype), torch.empty((), dtype=dtype))
            with pytest.raises(ValueError, match="gram"):
                solver.solve(bad, out=out)


@matrices
def test_asymmetry_by_rounding_is_averaged(solver: Solver) -> None:
    for n in (2, 3, 8, 20):
        m = solver.inputs("tall", 5, n).float()
        noisy = m * (1 + EPS32 * torch.randn(m.shape))
        s = solver.solve(noisy)
        t = solver.solve((noisy.double() + noisy.double().mT) / 2)
        # rounding to float32, and n-term sums of float64 over an eigenvalue of max M_ii / 10
        assert ((s.weights - t.weights).abs() <= EPS32).all()
        assert torch.equal(solver.solve(noisy.mT).weights, s.weights)


# --- only UPGrad -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for name, family in FAMILIES if name == "upgrad"])
def test_each_projection_is_certified(family: str) -> None:
    """With all preference on one objective the weights are its projection: v_i = 1, v >= 0, (Mv)_j >= 0 for
    the others, and 0 where v_j is not."""
    for n in (2, 3, 5, 8, 17):
        m = SOLVERS["upgrad"].inputs(family, 3, n)
        size = m.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
        for i in range(min(n, 4)):
            c = pk.upgrad_weights(m, preference=torch.eye(n)[i]).weights
            assert (c[:, i] > 0).all()
            others = torch.arange(n) != i
            product = torch.from_numpy(
                ((m / size[:, None, None]).numpy().astype(np.longdouble) * c.numpy()[:, None, :])
                .sum(-1)
                .astype(float)
            )
            assert (product[:, others] >= -KKT).all()
            assert ((product * c)[:, others].abs() <= KKT).all()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_upgrad_is_the_sum_of_projections_and_linear_under_scaling(n: int) -> None:
    """D M D with preference p is M with preference p_i d_i, divided by d: each projection scales with its own
    objective alone."""
    solver, g = SOLVERS["upgrad"], np.random.default_rng(n)
    m = solver.inputs("a common direction", 5, n)
    d, p = torch.from_numpy(10.0 ** g.uniform(-2, 2, n)), on_simplex([1.0 + i % 3 for i in range(n)], n)
    scaled = solver.solve(d[:, None] * m * d, preference=p).weights
    plain = solver.solve(m, preference=p * d).weights / d
    plain = plain / plain.sum(-1, keepdim=True)
    assert ((scaled - plain).abs() <= 1e-9).all()
    unit = torch.stack([solver.solve(m, preference=torch.eye(n)[i]).weights for i in range(n)])
    total = sum(p[i] * unit[i] / unit[i][:, i, None] for i in range(n))
    assert ((solver.solve(m, preference=p).weights - total / total.sum(-1, keepdim=True)).abs() <= 1e-9).all()
    r = solver.reference(m, preference=p)
    # the residual at which the kernels stop, 1e-13, over eigenvalues from 1e-3 max M_ii on
    assert ((solver.solve(m, preference=p).weights - r.weights).abs() <= 1e-9).all()


def test_upgrad_without_conflict_is_the_preference() -> None:
    m = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    assert pk.upgrad_weights(m, preference=[1, 3]).weights.tolist() == [0.25, 0.75]
    # v_1 = 1 calls for v_2 = 1/2, v_2 = 1 for v_1 = 1/2: (1.5, 1.5) / 3
    assert pk.upgrad_weights(torch.tensor([[2.0, -1], [-1, 2]]).double()).weights.tolist() == [0.5, 0.5]
