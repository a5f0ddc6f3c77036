"""TorchJD's weightings as rules, and its UPGrad compared with ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
projectors = pytest.importorskip("torchjd._linalg", reason="TorchJD's QP solver needs qpsolvers")

WEIGHTINGS = (
    "UPGradWeighting",
    "DualProjWeighting",
    "MGDAWeighting",
    "PCGradWeighting",
    "AlignedMTLWeighting",
)


def plugged(weighting: Callable[[Tensor], Tensor]) -> Callable[[pk.ObjectiveStatistics], Tensor]:
    def rule(statistics: pk.ObjectiveStatistics) -> Tensor:
        weights = weighting(statistics.gram)
        return weights / weights.sum()

    return rule


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Whitened advantages of four objectives, two of which conflict."""
    raw = torch.randn(6, 20, 4)
    raw[..., 3] -= 1.5 * raw[..., 0]
    mask = torch.rand(6, 20) < 0.8
    return pk.masked_whiten(raw, mask), mask


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighting_is_a_rule(name: str, batch: tuple[Tensor, Tensor]) -> None:
    advantages, mask = batch
    rule = plugged(getattr(aggregation, name)())
    torch.manual_seed(1)  # PCGrad draws an order
    combined = pk.combine_advantages(advantages, mask, rule=rule)
    torch.manual_seed(1)
    expected = rule(pk.objective_statistics(None, None, advantages, mask, pairs=True))
    torch.testing.assert_close(combined.weights.double(), expected, rtol=0, atol=1e-6)
    found = torch.where(mask, (advantages * combined.weights).sum(-1), 0.0)
    torch.testing.assert_close(combined.advantages, found, rtol=1e-5, atol=1e-6)
    logprobs = torch.randn(6, 20, requires_grad=True)
    loss = pk.pama_loss(logprobs, logprobs.detach(), advantages, mask, rule=rule).loss
    torch.testing.assert_close(loss, -combined.advantages.sum() / mask.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preference", [None, [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize("ridge", [1e-4, 1e-10])
def test_upgrad_is_torchjds_within_its_ridge(ridge: float, preference: list[float] | None) -> None:
    """Its ridge moves weights by about its size times the condition of the matrix, below 100 here."""
    projector = projectors.QuadprogProjector(norm_eps=1e-12, reg_eps=ridge)
    given = None if preference is None else torch.tensor(preference, dtype=torch.float64)
    theirs = aggregation.UPGradWeighting(given, projector=projector)
    for _ in range(50):
        gradients = torch.randn(4, 6, dtype=torch.float64)
        gram = gradients @ gradients.T
        weights = theirs(gram)
        ours = pk.upgrad_weights(gram, preference=preference).weights
        torch.testing.assert_close(ours, weights / weights.sum(), rtol=0, atol=100 * ridge)


def test_upgrad_rule_is_torchjds(batch: tuple[Tensor, Tensor]) -> None:
    advantages, mask = batch
    projector = projectors.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)
    rule = plugged(aggregation.UPGradWeighting(projector=projector))
    theirs = pk.combine_advantages(advantages, mask, rule=rule).weights
    ours = pk.combine_advantages(advantages, mask, rule="upgrad").weights
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
