"""The short list on a small language model fitted to real text, after the paper's three experiments.

Algorithm 1 of He & Maghsudi 2025 (arXiv 2508.07768) with PPO: every rule gets the same start, prompts,
optimiser, steps and KL coefficient, and a learning rate tuned for it on another seed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pama_kernels as pk

from . import store
from .corpus import Corpus
from .measures import min_norm
from .rules import BY_NAME, Rule, mean_weights
from .store import Job, Rows
from .tiny_model import SCORERS, Policy, Rewards, Scorer, Shape, fit

SHAPE = Shape(vocabulary=2048, width=64, layers=2, new_tokens=24, fit_steps=800)
USUAL = 16  # tokens, in the place of the paper's 140 characters


def clipped_length(text: str, words: list[int], limit: int) -> float:
    """clip(l / usual, 1/2, 3/2), as in the paper's first experiment."""
    return min(max(len(words) / USUAL, 0.5), 1.5)


def information(text: str, words: list[int], limit: int) -> float:
    """Distinct words of more than three letters, as a share of 12; no more is asked for."""
    long = {word.strip(".,;:()!?'").lower() for word in text.split()}
    return min(sum(len(word) > 3 for word in long) / 12, 1.0)


def conciseness(text: str, words: list[int], limit: int) -> float:
    return 1 - len(words) / limit


EXPERIMENTS: dict[str, dict[str, Scorer]] = {
    "sentiment-length": {"sentiment": SCORERS["sentiment"], "length": clipped_length},
    "information-conciseness": {"information": information, "conciseness": conciseness},
    "three": {name: SCORERS[name] for name in ("sentiment", "length", "diversity")},
}
WORST = {  # the reference point of the hypervolume: the least that each reward can be
    "sentiment-length": (-1.0, 0.5),
    "information-conciseness": (0.0, 0.0),
    "three": (-1.0, 0.0, 0.0),
}

BEST = {
    "sentiment-length": (1.0, 1.5),
    "information-conciseness": (1.0, 1.0),
    "three": (1.0, 1.0, 1.0),
}

SHORT_LIST = (
    *("fixed", "cosines-r0", "cosines-r0.1", "upgrad", "softmin", "paper-batch", "paper-token"),
    *("mgda", "mgda-ub"),
)
SHARES = {2: ((0.2, 0.8), (0.8, 0.2)), 3: ((0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6))}


def rules(objectives: int) -> list[Rule]:
    fixed = [
        replace(
            BY_NAME["fixed"],
            name="fixed-p" + "-".join(f"{x:g}" for x in share),
            label="fixed, " + "/".join(f"{x:g}" for x in share),
            preference=share,
            tuned_as="fixed",
        )
        for share in SHARES[objectives]
    ]
    return [BY_NAME[name] for name in SHORT_LIST] + fixed


@dataclass(frozen=True)
class Budget:
    """What every rule gets. Clip, GAE, KL and its target are the paper's."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    tuned_on: str = "sentiment-length"
    rates: tuple[float, ...] = (3e-4, 1e-3)
    experiments: tuple[str, ...] = tuple(EXPERIMENTS)
    shape: Shape = SHAPE
    steps: int = 36
    batch: int = 64
    epochs: int = 2
    value_rate: float = 3e-3
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.2
    kl_target: float = 3.0  # per answer, in nats
    kl_horizon: int = 10_000  # answers; so few steps leave the coefficient nearly where it was
    log_every: int = 9
    log_prompts: int = 64
    final_answers: int = 2  # to each held-out prompt
    gradient_answers: int = 256


QUICK = Budget(
    seeds=(0, 1),
    rates=(1e-3,),
    experiments=("sentiment-length",),
    shape=replace(SHAPE, fit_steps=60),
    steps=4,
    batch=16,
    log_every=2,
    log_prompts=16,
    final_answers=1,
    gradient_answers=32,
)


@cache
def corpus() -> Corpus:
    return Corpus(SHAPE.vocabulary, SHAPE.prompt_tokens, 0)


@cache
def reference_model(path: Path, shape: Shape) -> dict[str, Tensor]:
    """The start of every run; fitted once and kept beside the logs."""
    if not path.exists():
        torch.manual_seed(0)
        policy = Policy(shape, 1)
        print(f"perplexity on held-out text: {fit(policy, corpus(), shape, 0):.0f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(policy.model.state_dict(), unfinished)
        unfinished.replace(path)
    return torch.load(path)


class Losses:
    """The policy loss of one rule."""

    def __init__(self, rule: Rule, policy: Policy, clip: float) -> None:
        self.rule, self.policy, self.module = rule, policy, rule.module(clip)
        self.representation: Tensor
        policy.model.lm_head.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.representation = inputs[0]

    def __call__(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the weights (N,) as a mean over sequences."""
        given: Tensor | None = None
        if self.rule.gradients:
            by_parameters = self.rule.gradients == "mgda"
            inputs = list(self.policy.model.parameters()) if by_parameters else [self.representation]
            grads = [
                torch.autograd.grad(
                    self.module(logprobs, old, advantages, mask, weights=one).loss, inputs, retain_graph=True
                )
                for one in torch.eye(advantages.shape[-1])
            ]
            given = pk.min_norm_weights(gram_of(grads)).weights.float()
        out = self.module(logprobs, old, advantages, mask, weights=given)
        return out.loss, mean_weights(out)


def gram_of(gradients: Iterable[Iterable[Tensor]]) -> Tensor:
    g = torch.stack([torch.cat([x.flatten() for x in row]).double() for row in gradients])
    return g @ g.T


class Experiment:
    """One set of rewards on the language model: what a run needs besides its rule."""

    def __init__(self, name: str, model: dict[str, Tensor], budget: Budget, seed: int) -> None:
        self.names, self.budget, self.seed = tuple(EXPERIMENTS[name]), budget, seed
        self.rewards = Rewards(corpus(), budget.shape, list(EXPERIMENTS[name].values()))
        torch.manual_seed(seed)
        self.start = Policy(budget.shape, len(self.names))
        self.start.model.load_state_dict(model)
        self.start.requires_grad_(False)
        # One scale for all rewards: mean 0 and deviation 1 at the start.
        scores = self.answers(self.start, self.prompts(512, seed), seed)[0]
        self.mean, self.std = scores.mean(0), scores.std(0)

    def prompts(self, size: int, seed: int | torch.Generator) -> Tensor:
        shuffle = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        pool = corpus().train_prompts
        return pool[torch.randint(len(pool), (size,), generator=shuffle)]

    @torch.no_grad()
    def answers(self, policy: Policy, prompts: Tensor, seed: int) -> tuple[Tensor, float]:
        """Rewards (B, N) of one answer to each prompt, and the KL to the start per answer."""
        generator = torch.Generator().manual_seed(seed)
        tokens = policy.sample(prompts, self.budget.shape.new_tokens, generator)
        scores, mask = self.rewards(tokens)
        log_ratio = policy(tokens, mask)[0] - self.start(tokens, mask)[0]
        return scores, float(log_ratio.sum(1).mean())

    def true_gram(self, policy: Policy, kl_coef: float) -> tuple[Tensor, Tensor]:
        """Two estimates of the Gram matrix (N, N) of the policy gradients: unbiased, and rough.

        Gradients of the expected rewards (KL penalty included, as they are optimised) by all parameters,
        without clamp, clip or value heads. The product of two independent halves has no bias by their noise;
        the rough form, from both together, has, but is positive semidefinite.
        """
        policy = copy.deepcopy(policy).requires_grad_(True)
        size = self.budget.gradient_answers // 2
        halves = []
        for half in range(2):
            generator = torch.Generator().manual_seed(7919 + 2 * self.seed + half)
            with torch.no_grad():
                tokens = policy.sample(self.prompts(size, generator), self.budget.shape.new_tokens, generator)
                scores, mask = self.rewards(tokens)
                kl = (policy(tokens, mask)[0] - self.start(tokens, mask)[0]).sum(1, keepdim=True)
                value = (scores - self.mean) / self.std - kl_coef * kl
                value = (value - value.mean(0)) * size / (size - 1)
            logprobs = policy(tokens, mask)[0].sum(1)
            halves.append(
                torch.stack(
                    [
                        torch.cat(
                            [
                                g.flatten().double()
                                for g in torch.autograd.grad(
                                    (logprobs * value[:, i]).mean(),
                                    list(policy.model.parameters()),
                                    retain_graph=i + 1 < len(self.names),
                                )
                            ]
                        )
                        for i in range(len(self.names))
                    ]
                )
            )
        cross = halves[0] @ halves[1].T
        both = (halves[0] + halves[1]) / 2
        return (cross + cross.T) / 2, both @ both.T


def train(name: str, rule: Rule, rate: float, seed: int, budget: Budget, model_path: Path) -> Rows:
    """One run; a row for every `log_every` steps, and one of kind "final"."""
    b = budget
    experiment = Experiment(name, reference_model(model_path, b.shape), b, seed)
    policy = copy.deepcopy(experiment.start).requires_grad_(True)
    losses = Losses(rule, policy, b.clip)
    optimiser = torch.optim.Adam(
        [
            {"params": policy.model.parameters(), "lr": rate},
            {"params": policy.value_heads.parameters(), "lr": b.value_rate},
        ]
    )
    shuffle = torch.Generator().manual_seed(seed)  # the same prompts for every rule
    generator = torch.Generator().manual_seed(seed)
    n = len(experiment.names)
    kl_coef, kl = b.kl_coef, 0.0
    total, jitter, count = torch.zeros(n), 0.0, 0
    before: Tensor | None = None
    step_cpu, loss_cpu = [], []
    held_out = corpus().valid_prompts
    rows: Rows = []

    def row(kind: str, step: int, scores: Tensor, kl: float) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": kind, "rate": rate, "step": step, "kl": kl, "kl_coef": kl_coef}
        found |= {f"reward_{i}": float(x) for i, x in enumerate(scores.mean(0))}
        found |= {f"weight_{i}": float(x) / count if count else float("nan") for i, x in enumerate(total)}
        found["jitter"] = jitter / count if count else float("nan")
        blank = ("true_min_norm", "rough_min_norm", "largest_norm", "loss_ms", "step_ms")
        return found | {key: float("nan") for key in blank}

    for step in range(b.steps + 1):
        if step % b.log_every == 0:
            rows.append(row("log", step, *experiment.answers(policy, held_out[: b.log_prompts], seed)))
            total, jitter, count = torch.zeros(n), 0.0, 0
        if step == b.steps:
            break
        began = time.process_time()
        prompts = experiment.prompts(b.batch, shuffle)
        tokens = policy.sample(prompts, b.shape.new_tokens, generator)
        scores, mask = experiment.rewards(tokens)
        with torch.no_grad():
            old, values = policy(tokens, mask)
            log_ratio = old - experiment.start(tokens, mask)[0]
        kl = float(log_ratio.sum(1).mean())
        token_rewards = (-kl_coef * log_ratio).unsqueeze(-1).repeat(1, 1, n)
        token_rewards[torch.arange(b.batch), mask.sum(1) - 1] += (scores - experiment.mean) / experiment.std
        advantages, returns = pk.multi_objective_gae(token_rewards, values, mask, gamma=b.gamma, lam=b.lam)
        advantages = pk.masked_whiten(advantages, mask)
        spent = 0.0
        for _ in range(b.epochs):
            logprobs, values = policy(tokens, mask)
            clock = time.process_time()
            loss, weights = losses(logprobs, old, advantages, mask)
            spent += time.process_time() - clock
            optimiser.zero_grad()
            (loss + (values - returns)[mask].square().mean()).backward()
            nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimiser.step()
        # The controller of the KL coefficient that PPO trainers use (Ziegler et al. 2019).
        kl_coef *= 1 + min(max(kl / b.kl_target - 1, -0.2), 0.2) * b.batch / b.kl_horizon
        step_cpu.append(1e3 * (time.process_time() - began))
        loss_cpu.append(1e3 * spent)
        jitter += 0.0 if before is None else float((weights - before).abs().sum()) / 2
        before = weights
        total, count = total + weights, count + 1

    answers = [experiment.answers(policy, held_out, seed + 1000 * (1 + i)) for i in range(b.final_answers)]
    final = row(
        "final",
        b.steps,
        torch.cat([scores for scores, _ in answers]),
        float(np.mean([k for _, k in answers])),
    )
    cross, rough = experiment.true_gram(policy, kl_coef)
    norm, c = min_norm(rough.numpy())
    final["rough_min_norm"] = norm
    final["true_min_norm"] = max(float(c @ cross.numpy() @ c), 0.0) ** 0.5
    final["largest_norm"] = max(float(cross.diagonal().max()), 0.0) ** 0.5
    final["loss_ms"], final["step_ms"] = float(np.median(loss_cpu)), float(np.median(step_cpu))
    rows.append(final)
    return rows


def start_rows(name: str, seed: int, budget: Budget, model_path: Path) -> Rows:
    """The start itself, measured as the end of a run is."""
    experiment = Experiment(name, reference_model(model_path, budget.shape), budget, seed)
    held_out = corpus().valid_prompts
    answers = [
        experiment.answers(experiment.start, held_out, seed + 1000 * (1 + i))[0]
        for i in range(budget.final_answers)
    ]
    cross, rough = experiment.true_gram(experiment.start, budget.kl_coef)
    norm, c = min_norm(rough.numpy())
    row = {f"reward_{i}": float(x) for i, x in enumerate(torch.cat(answers).mean(0))}
    row["rough_min_norm"] = norm
    row["true_min_norm"] = max(float(c @ cross.numpy() @ c), 0.0) ** 0.5
    row["largest_norm"] = max(float(cross.diagonal().max()), 0.0) ** 0.5
    return [row]


def score(rows: Rows, worst: tuple[float, ...]) -> float:
    """What a learning rate is chosen by: the hypervolume of the final rewards, over the worst ones."""
    final = rows[-1]
    return float(np.prod([max(final[f"reward_{i}"] - w, 0.0) for i, w in enumerate(worst)]))


def tuning_path(out: Path, budget: Budget, rule: Rule, rate: float) -> Path:
    return out / "tuning" / f"{budget.tuned_on}--{rule.name}--{rate:g}.csv"


def tuned_rate(out: Path, budget: Budget, rule: Rule) -> float:
    tuned = replace(rule, name=rule.tuned_as or rule.name)
    worst = WORST[budget.tuned_on]
    found = {rate: score(store.read(tuning_path(out, budget, tuned, rate)), worst) for rate in budget.rates}
    return max(found, key=lambda rate: found[rate])


def tuning_jobs(out: Path, budget: Budget) -> list[Job]:
    model = out / "model.pt"
    short = replace(budget, gradient_answers=4)
    return [
        (
            tuning_path(out, budget, BY_NAME[name], rate),
            partial(train, budget.tuned_on, BY_NAME[name], rate, budget.tuning_seed, short, model),
        )
        for rate in budget.rates
        for name in SHORT_LIST
    ]


def final_jobs(out: Path, budget: Budget) -> list[Job]:
    """Seed by seed, so that a study that was stopped early still compares all rules."""
    model = out / "model.pt"

    def job(name: str, rule: Rule, seed: int) -> Job:
        def make() -> Rows:
            return train(name, rule, tuned_rate(out, budget, rule), seed, budget, model)

        return out / name / f"{rule.name}--{seed}.csv", make

    jobs: list[Job] = []
    for seed in budget.seeds:
        for name in budget.experiments:
            jobs.append((out / name / f"start--{seed}.csv", partial(start_rows, name, seed, budget, model)))
            jobs += [job(name, rule, seed) for rule in rules(len(EXPERIMENTS[name]))]
    return jobs


def run(out: Path, budget: Budget) -> None:
    store.run(tuning_jobs(out, budget), "learning rates of the language model")
    store.run(final_jobs(out, budget), "language model")
