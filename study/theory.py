"""Theorems 1 and 2 of He & Maghsudi 2025 (arXiv 2508.07768) as experiments, with exact expectations.

Softmax bandits with a fixed baseline satisfy every assumption: the Noon surrogate F_i = E[max(R_i - b_i, 0)]
is an expected reward within [0, 1], hence kappa-smooth in the logits with kappa = 5/2 max(A+) (Mei et al.
2020, Lemma 2), and so is each convex combination. Gradients are exact: no sampling, no clip, no Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pama_kernels as pk

from . import store
from .measures import improvable, min_norm, nondominated
from .problems import sphere
from .store import Job, Rows

RULES = ("scores-r0", "scores-r0.1", "cosines-r0", "cosines-r0.1", "upgrad", "token-r0", "mgda", "fixed")
SHOWN = ("scores-r0", "scores-r0.1", "cosines-r0", "cosines-r0.1", "upgrad", "fixed")  # of Theorem 1
ARMS = {  # rewards (K, N)
    "two-arms": [[1.0, 0.0], [0.0, 0.8]],
    "three-arms": [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
}
PROBLEMS = (*ARMS, "bandit-2", "bandit-3")


@dataclass(frozen=True)
class Budget:
    runs: int = 16
    arms: int = 8
    steps: int = 8192
    step_sizes: tuple[float, ...] = (1.0, 1.9)  # times 1 / kappa; the theorem asks for less than 2
    rows: int = 2000  # of Theorem 1


QUICK = Budget(runs=4, steps=500, rows=200)


def arms_of(problem: str, budget: Budget) -> Tensor:
    if problem in ARMS:
        return torch.tensor([ARMS[problem]], dtype=torch.float64)
    return sphere(budget.runs, int(problem[-1]), budget.arms, seed=3).double()


def gradients(policy: Tensor, rewards: Tensor) -> Tensor:
    """(S, N, K): of the expected rewards by the logits; policy (S, K), rewards (S, K, N)."""
    value = torch.einsum("sk,skn->sn", policy, rewards)
    return (policy.unsqueeze(-1) * (rewards - value.unsqueeze(1))).mT


def weights_of(rule: str, policy: Tensor, positive: Tensor, grads: Tensor) -> Tensor:
    """(S, N), or (S, K, N) per token, from the exact expectations of what `pk.pama_loss` estimates."""
    kind, _, r = rule.partition("-r")
    regularization = float(r or 0)
    if kind == "token":
        return pk.pama_weights(positive, regularization=regularization).weights
    if kind == "scores":
        scores = torch.einsum("sk,skn->sn", policy, positive)
        scale = torch.einsum("sk,skn->sn", policy, positive.square()).amax(-1).clamp(min=1e-30)
        return pk.pama_weights(scores, regularization=regularization, scale=scale).weights
    if kind in ("cosines", "upgrad"):
        gram = torch.einsum("sk,ski,skj->sij", policy, positive, positive)
        if kind == "upgrad":
            return pk.upgrad_weights(gram).weights
        norms = gram.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-150)
        cosines = gram / (norms.unsqueeze(1) * norms.unsqueeze(2))
        return pk.min_norm_weights(cosines, regularization=regularization).weights
    if kind == "mgda":
        return pk.min_norm_weights(grads @ grads.mT).weights
    return torch.full_like(positive[:, 0], 1 / positive.shape[-1])


def descend(problem: str, rule: str, size: float, baseline: str, budget: Budget) -> Rows:
    """Gradient ascent on the rule's combination of Noon surrogates.

    `baseline` "fixed" is that of the start, as the theorem needs it; "moving" is the policy's own value, as
    training has it, where no single function is ascended and `slack` means nothing.
    """
    rewards = arms_of(problem, budget)
    runs, arms, n = rewards.shape
    logits = torch.zeros(runs, arms, dtype=torch.float64)
    start = rewards.mean(1, keepdim=True)
    logged = {0, *(budget.steps >> i for i in range(12))}
    fronts = [nondominated(rewards[run].numpy()) for run in range(runs)]
    slack = torch.full((runs,), torch.inf, dtype=torch.float64)
    total = torch.zeros(runs, dtype=torch.float64)
    rows: Rows = []
    for step in range(budget.steps + 1):
        policy = logits.softmax(-1)
        value = torch.einsum("sk,skn->sn", policy, rewards)
        positive = (rewards - (start if baseline == "fixed" else value.unsqueeze(1))).clamp(min=0)
        smoothness = 2.5 * positive.amax((1, 2))
        grads = gradients(policy, positive)
        c = weights_of(rule, policy, positive, grads)
        # One reward for each arm: with weights per token these differ from arm to arm.
        combined = (c * positive).sum(-1) if c.dim() == 3 else torch.einsum("skn,sn->sk", positive, c)
        gradient = gradients(policy, combined.unsqueeze(-1))[:, 0]
        squared = gradient.square().sum(-1)
        if step in logged:
            true = gradients(policy, rewards)
            for run in range(runs):
                rows.append(
                    {
                        "run": run,
                        "step": step,
                        "combined_norm": float(squared[run].sqrt()),
                        "surrogate_min_norm": min_norm((grads[run] @ grads[run].T).numpy())[0],
                        "true_min_norm": min_norm((true[run] @ true[run].T).numpy())[0],
                        "improvable": max(improvable(value[run].numpy(), fronts[run]), 0.0),
                        "slack": float(slack[run]),
                        "telescoped": float(total[run]),
                    }
                    | {f"reward_{i}": float(x) for i, x in enumerate(value[run])}
                    | {f"weight_{i}": float(x) for i, x in enumerate(c[run].reshape(-1, n).mean(0))}
                )
        if step == budget.steps:
            break
        eta = size / smoothness.clamp(min=1e-12)
        logits = logits + eta.unsqueeze(-1) * gradient
        # The proof's inequality: the combination that was ascended rises by at least this much.
        promised = eta * (1 - eta * smoothness / 2) * squared
        rise = ((logits.softmax(-1) - policy) * combined).sum(-1)
        slack = torch.minimum(slack, rise - promised)
        total += promised
    return rows


def theorem_1(budget: Budget) -> Rows:
    """The closed form against quadprog, and how near PAMA's weights come to the least gradient.

    At random policies of random bandits: | sum c_i grad F_i | for each choice of c, over the least that any
    c reaches. 1 is perfect.
    """
    generator = torch.Generator().manual_seed(0)
    rows: Rows = []
    for index in range(budget.rows):
        n = (2, 3, 4, 8, 16)[index % 5]
        scores = torch.randn(n, generator=generator, dtype=torch.float64)
        if index % 2:
            scores = scores.abs()
        solution = pk.pama_weights(scores)
        row = {"n": n, "optimum": abs(float(solution.optimum))}
        row["by_quadprog"] = min_norm(torch.outer(scores, scores).numpy())[0]
        rewards = sphere(1, n, 16, seed=10_000 + index).double()
        policy = torch.randn(1, 16, generator=generator, dtype=torch.float64).softmax(-1)
        value = torch.einsum("sk,skn->sn", policy, rewards)
        positive = (rewards - value.unsqueeze(1)).clamp(min=0)
        grads = gradients(policy, positive)
        gram = (grads @ grads.mT)[0].numpy()
        least, _ = min_norm(gram)
        for rule in SHOWN:
            c = weights_of(rule, policy, positive, grads)[0].numpy()
            row[rule] = float(np.sqrt(max(c @ gram @ c, 0))) / max(least, 1e-12)
        rows.append(row)
    return rows


def jobs(out: Path, budget: Budget) -> list[Job]:
    found: list[Job] = [(out / "theorem-1.csv", partial(theorem_1, budget))]
    for problem in PROBLEMS:
        for rule in RULES:
            for size in budget.step_sizes:
                path = out / f"{problem}--{rule}--{size:g}--fixed.csv"
                found.append((path, partial(descend, problem, rule, size, "fixed", budget)))
            path = out / f"{problem}--{rule}--1--moving.csv"
            found.append((path, partial(descend, problem, rule, 1.0, "moving", budget)))
    return found


def run(out: Path, budget: Budget) -> None:
    store.run(jobs(out, budget), "theorems")
