"""Problems off the grid of `problems`, where every sum is rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from problems import Problem, make
from torch import Tensor

import pama_kernels as pk

UNIQUE = ("cosines", "gram noon", "scores", "paper batch", "fixed", "sequence", "token", "softmin")


def rough(
    layout: str = "padded", rows: int = 6, width: int = 40, n: int = 4, seed: int = 0, **optional: Any
) -> Problem:
    """Normally distributed float32 inputs, off the grid."""
    g = torch.Generator().manual_seed(seed)
    problem = make(layout, rows=rows, width=width, objectives=n, seed=seed, **optional)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=g)

    logp = problem.logprobs + 0.3 * noise(problem.logprobs)
    old = problem.old_logprobs
    return replace(
        problem,
        logprobs=logp,
        old_logprobs=None if old is None else old + 0.3 * noise(old),
        advantages=problem.advantages + noise(problem.advantages),
    )


def close(x: Tensor, y: Tensor, error: Any) -> None:
    assert ((x - y).abs() <= error).all(), (x, y)


def results(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    leaf = arguments["logprobs"].detach().requires_grad_()
    output = pk.pama_loss(**{**arguments, "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    without = {k: v for k, v in arguments.items() if k not in ("importance_weights", "ref_logprobs")}
    combined = pk.combine_advantages(**without, clip_range=0.2, rule=options["rule"])
    flat = [output.loss.detach(), output.weights, output.optimum, output.statistics.buffer]
    return [*flat, gradient.flatten(), combined.advantages.flatten()]
