"""Theorems 1 and 2 of He & Maghsudi 2025 (arXiv 2508.07768), and what is known of the rules, as experiments.

Softmax bandits with a fixed baseline satisfy every assumption of Theorem 2: the Noon surrogate
F_i = E[max(R_i - b_i, 0)] is an expected reward within [0, 1], hence kappa-smooth in the logits with
kappa = 5/2 max(A+) (Mei et al. 2020, Lemma 2), and so is each convex combination. Gradients are exact: no
sampling, no clip, no Adam.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pama_kernels as pk

from .measures import improvable, min_norm, nondominated
from .problems import Bandit, Softmax, gram
from .rules import Combiner
from .store import FINAL, Row, Store
from .sweep import SETTINGS
from .sweep import agreement as falls

PART = "theory"
RULES = ("scores-r0", "scores-r0.1", "cosines-r0", "cosines-r0.1", "upgrad", "token-r0", "mgda", "fixed")
COMPARED = tuple(rule for rule in RULES if rule not in ("token-r0", "mgda"))  # in Theorem 1's table
ARMS = {  # rewards (K, N)
    "two-arms": [[1.0, 0.0], [0.0, 0.8]],
    "three-arms": [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
}
PROBLEMS = (*ARMS, "bandit-3")
SIZES = 1.0, 1.9  # step sizes times 1 / kappa; the theorem asks for less than 2


def arms_of(problem: str, seeds: int) -> Tensor:
    """(S, K, N)"""
    if problem in ARMS:
        return torch.tensor([ARMS[problem]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    return Bandit(int(problem[-1]), answers=8).tables(seeds, generator)[0][:, 0].double()


def gradients(policy: Tensor, rewards: Tensor) -> Tensor:
    """(S, N, K): of the expected rewards by the logits; policy (S, K), rewards (S, K, N)."""
    value = torch.einsum("sk,skn->sn", policy, rewards)
    return (policy.unsqueeze(-1) * (rewards - value.unsqueeze(1))).mT


def cosines(matrix: Tensor) -> Tensor:
    norms = matrix.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-150)
    return matrix / (norms.unsqueeze(1) * norms.unsqueeze(2))


def weights_of(rule: str, policy: Tensor, positive: Tensor, grads: Tensor) -> Tensor:
    """(S, N), or (S, K, N) per token, from the exact expectations of what the library estimates."""
    kind, _, r = rule.partition("-r")
    regularization = float(r or 0)
    if kind == "token":
        return pk.pama_weights(positive, regularization=regularization).weights
    if kind == "scores":
        scores = torch.einsum("sk,skn->sn", policy, positive)
        scale = torch.einsum("sk,skn->sn", policy, positive.square()).amax(-1).clamp(min=1e-30)
        return pk.pama_weights(scores, regularization=regularization, scale=scale).weights
    if kind in ("cosines", "upgrad"):
        moments = torch.einsum("sk,ski,skj->sij", policy, positive, positive)
        if kind == "upgrad":
            return pk.upgrad_weights(moments).weights
        return pk.min_norm_weights(cosines(moments), regularization=regularization).weights
    if kind == "mgda":
        return pk.min_norm_weights(grads @ grads.mT).weights
    return torch.full_like(positive[:, 0], 1 / positive.shape[-1])


def theorem_2(problem: str, rule: str, size: float, seeds: int, steps: int) -> list[Row]:
    """Gradient ascent on the rule's combination of Noon surrogates, with the initial baseline.

    `slack` is the smallest difference, over the steps, of the increase and the lower bound in the proof,
    which says that it is not negative. `promised` is the sum of these lower bounds.
    """
    rewards = arms_of(problem, seeds)
    runs, arms, _ = rewards.shape
    logits = torch.zeros(runs, arms, dtype=torch.float64)
    positive = (rewards - rewards.mean(1, keepdim=True)).clamp(min=0)
    smoothness = 2.5 * positive.amax((1, 2))
    eta = size / smoothness
    slack, promised = torch.full((runs,), torch.inf, dtype=torch.float64), 0.0
    for step in range(steps + 1):
        policy = logits.softmax(-1)
        grads = gradients(policy, positive)
        c = weights_of(rule, policy, positive, grads)
        combined = (c * positive).sum(-1) if c.dim() == 3 else torch.einsum("skn,sn->sk", positive, c)
        gradient = gradients(policy, combined.unsqueeze(-1))[:, 0]
        squared = gradient.square().sum(-1)
        if step == steps:
            break
        logits = logits + eta.unsqueeze(-1) * gradient
        promise = eta * (1 - eta * smoothness / 2) * squared
        rise = ((logits.softmax(-1) - policy) * combined).sum(-1)
        slack = torch.minimum(slack, rise - promise)
        promised = promised + promise
    true = gradients(policy, rewards)
    value = torch.einsum("sk,skn->sn", policy, rewards)
    return [
        key(f"theorem-2-{problem}", rule, run, size)
        | {
            "combined_norm": float(squared[run].sqrt()),
            "surrogate_min_norm": min_norm((grads[run] @ grads[run].T).numpy())[0],
            "true_min_norm": min_norm((true[run] @ true[run].T).numpy())[0],
            "improvable": max(improvable(value[run].numpy(), nondominated(rewards[run].numpy())), 0.0),
            "slack": float(slack[run]),
            "promised": float(torch.as_tensor(promised).expand(runs)[run]),
        }
        for run in range(runs)
    ]


def key(problem: str, rule: str, seed: int, rate: float = 1.0) -> Row:
    return {"part": PART, "problem": problem, "rule": rule, "rate": rate, "seed": seed, "step": FINAL}


def theorem_1(count: int) -> list[Row]:
    """The closed form compared with quadprog, and the gradient norm under PAMA's weights.

    At random policies of random bandits: |sum c_i grad F_i| for each choice of c, divided by its minimum over
    c; 1 is optimal.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for index in range(count):
        n = (2, 3, 4, 8, 16)[index % 5]
        scores = torch.randn(n, generator=generator, dtype=torch.float64)
        if index % 2:
            scores = scores.abs()
        optimum = abs(float(pk.pama_weights(scores).optimum))
        off = abs(optimum - min_norm(torch.outer(scores, scores).numpy())[0])
        rows.append(key(f"theorem-1-N{n}", "quadprog", index) | {"value": off})
        rewards = Bandit(n, answers=16).tables(1, generator)[0][:, 0].double()
        policy = torch.randn(1, 16, generator=generator, dtype=torch.float64).softmax(-1)
        value = torch.einsum("sk,skn->sn", policy, rewards)
        positive = (rewards - value.unsqueeze(1)).clamp(min=0)
        grads = gradients(policy, positive)
        matrix = (grads @ grads.mT)[0].numpy()
        least, _ = min_norm(matrix)
        for rule in COMPARED:
            c = weights_of(rule, policy, positive, grads)[0].numpy()
            ratio = float(np.sqrt(max(c @ matrix @ c, 0))) / least if least > 1e-9 else math.nan
            rows.append(key(f"theorem-1-N{n}", rule, index) | {"value": ratio})
    return rows


def natural_gram(count: int) -> list[Row]:
    """Cov(A_i, A_j) against g_i' F^+ g_j, F the Fisher matrix of a softmax policy: the largest difference."""
    generator = torch.Generator().manual_seed(1)
    rows: list[Row] = []
    for index in range(count):
        policy = torch.randn(12, generator=generator, dtype=torch.float64).softmax(-1)
        rewards = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        advantages = rewards - policy @ rewards
        covariance = advantages.T @ (policy.unsqueeze(-1) * advantages)
        fisher = policy.diag() - torch.outer(policy, policy)
        grads = policy.unsqueeze(-1) * advantages
        natural = grads.T @ torch.linalg.pinv(fisher, hermitian=True) @ grads
        rows.append(key("natural-gram", "", index) | {"value": float((natural - covariance).abs().max())})
    return rows


def agreement(count: int) -> list[Row]:
    """On random batches of N correlated advantages, whitened, or with deviations 0.1 to 10: the smallest
    Cov(A_j, Abar) / (sd(A_j) max sd(A_i)) of a rule, the smallest entry of the Gram matrix with Noon and
    without; with N = 2 the distance of the cosines' weights from 1/2."""
    generator = torch.Generator().manual_seed(2)
    rows: list[Row] = []
    for index in range(count):
        n = (2, 3, 4, 8)[index % 4]
        mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
        drawn = torch.randn(256, n, generator=generator, dtype=torch.float64) @ mixing
        white = pk.masked_whiten(drawn, None)
        scales = 10 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)
        for name, a in (("white", white), ("scales", white * scales)):
            deviation = a.std(0, correction=0)
            for label, rule in (
                ("cosines-r0", pk.Pama(regularization=0.0)),
                ("cosines-r0.1", pk.Pama()),
                ("upgrad", pk.UPGrad()),
                ("fixed", pk.Fixed()),
            ):
                combined = pk.combine_advantages(a, rule=rule)
                covariance = (a * combined.advantages.unsqueeze(-1)).mean(0)
                least = float((covariance / (deviation * deviation.max())).min())
                rows.append(key(f"agreement-{name}", label, index) | {"value": least})
                if n == 2 and label.startswith("cosines"):
                    off = float((combined.weights - 0.5).abs().max())
                    rows.append(key(f"half-{name}", label, index) | {"value": off})
        for label, a in (("noon", white.clamp(min=0)), ("signed", white)):
            rows.append(key("gram-entry", label, index) | {"value": float(gram(a.unsqueeze(0)).min()) / 256})
    return rows


def live_group() -> list[Row]:
    """A nearly solved reward that varies in one of 32 groups (7 of 8 succeed), and a reward that varies in
    all: the share of that group in the squared combined advantages, with equal weights."""
    rewards = torch.zeros(32, 8, 2, dtype=torch.float64)
    rewards[..., 0] = 1.0
    rewards[0, 0, 0] = 0.0
    rewards[:, ::2, 1] = 1.0
    rows: list[Row] = []
    for label, flat in (
        ("group", pk.group_normalize(rewards.flatten(0, 1), group_size=8)),
        ("batch", pk.masked_whiten(rewards.flatten(0, 1), None)),
    ):
        square = pk.combine_advantages(flat, rule="fixed").advantages.view(32, 8).square().sum(-1)
        rows.append(key("live-group", label, 0) | {"value": float(square[0] / square.sum())})
    return rows


FIRST_ORDER = ("bandit-8", "grpo-conflict")
FIRST_ORDER_RULES = ("fixed", "cosines-r0.1", "upgrad", "paper-token", "paper-batch", "mgda")


def first_order(problem_name: str, rule: str, seeds: int, steps: int) -> list[Row]:
    """Share of the steps in which some objective decreases to first order: `sample` by the covariances of the
    rollout that the weights are solved from, `exact` by the gradients of the expected rewards, `early` by
    these in the first 20 steps. Rate 0.1."""
    problem = SETTINGS[problem_name].make(seeds, [0.1])
    assert isinstance(problem, Softmax)
    combine = Combiner(rule, seeds)
    shares = {kind: torch.zeros(seeds) for kind in ("sample", "exact", "early")}
    early = min(20, steps)
    for step in range(steps):
        batch = problem.rollout()
        combined, _ = combine(batch, problem)
        shares["sample"] += (falls(batch.advantages, combined, None) < -1e-4).any(-1) / steps
        exact = (problem.exact_cosines(combined) < -1e-4).any(-1)
        shares["exact"] += exact / steps
        shares["early"] += exact / early if step < early else 0.0
        problem.update(combined)
    return [
        key(f"first-order-{problem_name}-{kind}", rule, seed) | {"value": float(values[seed])}
        for kind, values in shares.items()
        for seed in range(seeds)
    ]


def run(folder: Path, quick: bool) -> None:
    store = Store(folder / f"{PART}.csv.gz")
    count, seeds, steps = (20, 4, 64) if quick else (1000, 16, 2048)
    jobs = {("theorem-1-N2", "quadprog", 1.0): lambda: theorem_1(count)}
    jobs["natural-gram", "", 1.0] = lambda: natural_gram(count)
    jobs["agreement-white", "fixed", 1.0] = lambda: agreement(count)
    jobs["live-group", "group", 1.0] = live_group
    for problem in FIRST_ORDER:
        for rule in FIRST_ORDER_RULES:
            jobs[f"first-order-{problem}-exact", rule, 1.0] = lambda p=problem, r=rule: first_order(
                p, r, seeds, min(steps, 120)
            )
    for problem in PROBLEMS:
        for rule in RULES:
            for size in SIZES:
                jobs[f"theorem-2-{problem}", rule, size] = lambda p=problem, r=rule, z=size: theorem_2(
                    p, r, z, seeds, steps
                )
    for (problem, rule, rate), make in jobs.items():
        if not store.has(problem, rule, rate, 0):
            store.add(make())
    store.finish()
