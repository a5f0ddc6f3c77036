"""PAMA's share of one policy step: forward pass, loss, backward pass, optimiser.

Compared with the same step with the single-objective loss, and with MGDA (one gradient of all parameters per
objective). Random weights in the shape of GPT-2, AdamW, one thread.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk

from . import headline, models, peers
from .harness import Row, Session
from .timing import Contestant

ROWS, WIDTH, N = 4, 64, 4
PAMA, SINGLE = "step with pama_loss", "step with eager PPO, one objective"
MGDA = f"step with MGDA, {N} gradients"
PAMA_SHARE, SINGLE_SHARE = "pama_loss within its step", "eager PPO within its step"

Parts = list[tuple[float, float]]  # microseconds of the loss with its gradient, and of the whole step


def run(session: Session) -> None:
    session.notes += [
        f"{ROWS} completions of {WIDTH} tokens on {models.device().type}, AdamW; size: parameters",
        "ratio of the other steps: their time over that of the step with pama_loss",
        f"{PAMA_SHARE}, {SINGLE_SHARE}: from log-probabilities to their gradient; ratio: its share",
    ]
    shapes = models.shapes(session.quick)
    session.each([functools.partial(work, session, shape) for shape in shapes])


def work(session: Session, shape: models.Shape) -> None:
    step(session, models.policy(shape, WIDTH), shape.name)


def step(session: Session, policy: models.Policy, name: str) -> None:
    device = models.device()
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.model.config.vocab_size, (ROWS, WIDTH + 1), generator=g).to(device)
    advantages = torch.randn(ROWS, WIDTH, N, generator=g).to(device)
    single = advantages.mean(-1)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool, device=device)
    with torch.no_grad():
        old = policy(tokens).detach()
    # A rate of 0: no step moves the weights, so each does the same work on the same ratios.
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    within: dict[str, Parts] = {PAMA_SHARE: [], SINGLE_SHARE: []}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter_ns() * 1e-3

    def pama(logprobs: Tensor) -> Tensor:
        return pk.pama_loss(logprobs, old, advantages, mask, clip_range=peers.CLIP).loss

    def one(logprobs: Tensor) -> Tensor:
        return peers.ppo_loss(logprobs, old, single, mask)

    def whole(loss: Callable[[Tensor], Tensor], kept: Parts) -> Callable[[Any], Any]:
        def call(_: Any) -> None:
            start = now()
            logprobs = policy(tokens)
            before = now()
            leaf = logprobs.detach().requires_grad_()
            loss(leaf).backward()
            after = now()
            optimiser.zero_grad()
            logprobs.backward(leaf.grad)
            optimiser.step()
            kept.append((after - before, now() - start))

        return call

    def mgda(_: Any) -> None:
        logprobs = policy(tokens)
        losses = [peers.ppo_loss(logprobs, old, a, mask) for a in advantages.unbind(-1)]
        parameters = list(policy.parameters())
        rows = headline.gradients(losses, parameters)
        weights = pk.min_norm_weights(headline.gram(rows)).weights.to(rows)
        combined = (weights @ rows).split([p.numel() for p in parameters])
        for p, gradient in zip(parameters, combined, strict=True):
            p.grad = gradient.view_as(p)
        optimiser.step()

    ours = Contestant(PAMA, whole(pama, within[PAMA_SHARE]), [None])
    peer = Contestant(SINGLE, whole(one, within[SINGLE_SHARE]), [None])
    session.measure("policy step", name, N, [ours, peer, Contestant(MGDA, mgda, [None])], size=policy.size)
    for part, parts in within.items():
        low, middle, high = statistics.quantiles([loss for loss, _ in parts], n=4)
        share = statistics.median(loss / total for loss, total in parts)
        spread = (high - low) / middle
        session.add([Row("policy step", name, N, part, 1, middle, spread, share, None, "", policy.size)])
