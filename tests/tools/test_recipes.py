"""The recipes of docs/integrations.md: accumulation and many processes are one process on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import test_docs
import torch
import torch.distributed as dist
from torch import Tensor

import pama_kernels as pk

PAGE = test_docs.ROOT / "docs" / "integrations.md"
ROWS, WIDTH, FEATURES = 13, 9, 6
# Rows of each of three ranks: 4, 1 and 2 micro-batches of 2. The last rank has no valid token.
RANKS = ((0, 8), (8, 10), (10, 13))


def recipe(name: str) -> Any:
    block = next(block for block in test_docs.blocks(PAGE) if (block.kind, block.value) == ("recipe", name))
    namespace: dict[str, Any] = {}
    exec(block.compiled(), namespace)
    return namespace[name]


class Problem:
    """A policy with shared parameters, and a rollout whose parts have other weights than the whole."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.features = torch.randn(ROWS, WIDTH, FEATURES, generator=generator)
        self.parameters = torch.randn(FEATURES, generator=generator)
        self.old = self.features @ self.parameters + 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
        self.advantages = torch.randn(ROWS, WIDTH, 3, generator=generator)
        self.advantages[:8, :, 0] += 0.6
        self.advantages[8:, :, 1] += 0.6
        self.advantages[..., 1] -= 1.2 * self.advantages[..., 0]
        self.advantages[::4, :, 2] -= 2 * self.advantages[::4, :, 1]
        self.mask = torch.rand(ROWS, WIDTH, generator=generator) < 0.8
        self.mask[10:] = False

    def rollout(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        return self.old[rows], self.advantages[rows], self.mask[rows]

    def gradient(self, run: Any, rows: slice = slice(None), **arguments: Any) -> tuple[Tensor, Tensor]:
        """Weights and the parameters' gradient of a recipe on some rows of the rollout."""
        parameters = self.parameters.clone().requires_grad_()
        features = self.features[rows]
        weights = run(lambda chosen: features[chosen] @ parameters, self.rollout(rows), 2, **arguments)
        assert parameters.grad is not None
        return weights, parameters.grad

    def expected(self) -> tuple[Tensor, Tensor]:
        """The specification on the whole batch."""
        parameters = self.parameters.double().requires_grad_()
        logprobs = self.features.double() @ parameters
        weights = pk.reference.combine_advantages(self.advantages, self.mask).weights
        output = pk.reference.pama_loss(logprobs, *self.rollout(), weights=weights)
        output.loss.backward()
        assert parameters.grad is not None
        return weights, parameters.grad


def _close(found: Tensor, wanted: Tensor) -> None:
    """float32 sums of some 80 terms of size 1."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-6)


def test_the_parts_disagree() -> None:
    """Weights of the rollout differ from those of its micro-batches, or the tests below prove nothing."""
    problem = Problem()
    weights, _ = problem.expected()
    for start in range(0, 10, 2):
        part = pk.combine_advantages(*problem.rollout(slice(start, start + 2))[1:]).weights
        assert (part.double() - weights).abs().max() > 0.01  # 100 times what `_close` accepts


def test_accumulate() -> None:
    problem = Problem()
    weights, gradient = problem.gradient(recipe("accumulate"))
    for found, wanted in zip((weights, gradient), problem.expected(), strict=True):
        _close(found, wanted)


@pytest.mark.parametrize("saturated", [False, True])
def test_weights_of_parts(saturated: bool) -> None:
    problem = Problem()
    _, advantages, mask = problem.rollout()
    if saturated:
        advantages[..., 1] = 0.0
    parts = zip(advantages.split(2), mask.split(2), strict=True)
    found = recipe("weights_of_parts")(parts)
    _close(found, pk.reference.combine_advantages(advantages, mask, rule=pk.UPGrad()).weights)


def _work(world: int, rank: int) -> dict[str, Any]:
    rows = slice(*RANKS[rank])
    weights, gradient = Problem().gradient(recipe("data_parallel"), rows)
    dist.all_reduce(gradient)  # as DDP does: the average
    return {"weights": weights, "gradient": gradient / world}


def test_data_parallel(tmp_path: Path) -> None:
    """Three ranks with different numbers of micro-batches: no deadlock, and the whole batch's gradient."""
    ranks = processes.run(_work, len(RANKS), tmp_path)
    weights, gradient = Problem().expected()
    for rank in ranks:
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        _close(rank["weights"], weights)
        _close(rank["gradient"], gradient)
