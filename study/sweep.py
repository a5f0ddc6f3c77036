"""The broad sweep: every rule on every problem with a known front, at learning rates tuned for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import store
from .measures import improvable, min_norm
from .problems import SPECS, Problem, build
from .rules import Losses, Rule, rules
from .store import Job, Rows


@dataclass(frozen=True)
class Budget:
    """What every rule gets, whatever it is."""

    bandit_runs: int = 16
    words_runs: int = 10
    steps: int = 300
    epochs: int = 2
    clip: float = 0.2
    halvings: int = 5  # logged: the start, the end, and half, a quarter ... of the steps
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    problems: tuple[str, ...] = tuple(SPECS)

    def runs(self, problem: str) -> int:
        return self.words_runs if is_words(problem) else self.bandit_runs

    def logged(self) -> set[int]:
        return {0, *(self.steps >> i for i in range(self.halvings + 1))}


QUICK = Budget(
    bandit_runs=4,
    words_runs=4,
    steps=32,
    rates=(0.03, 0.1),
    problems=("three-arms", "bandit-2", "bandit-3", "bandit-dead", "words-2"),
)
SEED, TUNING_SEED = 0, 1
TUNED_ON = {False: "bandit-3", True: "words-2"}  # the problem whose scores choose a learning rate


def is_words(problem: str) -> bool:
    return SPECS[problem].kind == "words"


def true_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Exact rewards (S, N) and Gram matrices (S, N, N) of their gradients: no clamp, clip or noise."""
    value = problem.exact()
    rows = []
    for i in range(problem.objectives):
        grads = torch.autograd.grad(
            value[:, i].sum(), problem.parameters, retain_graph=True, allow_unused=True
        )
        rows.append(torch.cat([g.flatten(1) for g in grads if g is not None], 1))
    gradients = torch.stack(rows, 1).double()
    return value.detach(), gradients @ gradients.mT


def train(name: str, rule: Rule, rate: float, budget: Budget, seed: int) -> Rows:
    """All runs of one rule at once; a row for each run at each logged step."""
    torch.manual_seed(seed)
    runs = budget.runs(name)
    problem = build(name, runs, seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(problem.parameters, lr=rate)
    losses = Losses(rule, runs, budget.clip)
    n, logged = problem.objectives, budget.logged()
    fronts = [problem.vertices(run) for run in range(runs)]
    rows: Rows = []
    total, jitter, count = torch.zeros(runs, n), torch.zeros(runs), 0
    before: Tensor | None = None
    first: Tensor | None = None
    for step in range(budget.steps + 1):
        if step in logged:
            value, gram = true_gradients(problem)
            largest = gram.diagonal(dim1=1, dim2=2).amax(-1).sqrt()
            first = largest if first is None else first
            for run in range(runs):
                norm, _ = min_norm(gram[run].numpy())
                row = {"seed": seed * runs + run, "step": step}
                row |= {f"reward_{i}": x for i, x in enumerate(value[run].tolist())}
                row["improvable"] = max(improvable(value[run].numpy(), fronts[run]), 0.0)
                row["true_min_norm"] = norm / float(first[run])
                row |= {
                    f"weight_{i}": x / count if count else float("nan")
                    for i, x in enumerate(total[run].tolist())
                }
                row["jitter"] = float(jitter[run]) / count if count else float("nan")
                rows.append(row)
            total.zero_()
            jitter.zero_()
            count = 0
        if step == budget.steps:
            break
        batch = problem.rollout(generator)
        for _ in range(budget.epochs):
            logprobs = problem.logprobs(batch)
            tensors = batch.old_logprobs, batch.advantages, batch.mask
            loss, weights = losses(logprobs, *tensors, problem.parameters, problem.representation)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        problem.fit_values(batch)
        if before is not None:
            jitter += (weights - before).abs().sum(-1) / 2
        before = weights
        total += weights
        count += 1
    return rows


def score(rows: Rows) -> float:
    """What a learning rate is chosen by: the mean over runs of the geometric mean of the final rewards."""
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last]
    values = np.array([[x for key, x in row.items() if key.startswith("reward_")] for row in final])
    return float(np.exp(np.log(values.clip(1e-6)).mean(1)).mean())


def tuning_path(out: Path, problem: str, rule: Rule, rate: float) -> Path:
    return out / "tuning" / f"{problem}--{rule.name}--{rate:g}.csv"


def tuned_rate(out: Path, words: bool, rule: Rule, budget: Budget) -> float:
    """The best of the rates for this rule, on other seeds than those that are reported."""
    problem = TUNED_ON[words]
    tuned = replace(rule, name=rule.tuned_as or rule.name)
    scores = {rate: score(store.read(tuning_path(out, problem, tuned, rate))) for rate in budget.rates}
    return max(scores, key=lambda rate: scores[rate])


def tuning_jobs(out: Path, budget: Budget, words: bool) -> list[Job]:
    name, short = TUNED_ON[words], replace(budget, halvings=0)
    return [
        (tuning_path(out, name, rule, rate), partial(train, name, rule, rate, short, TUNING_SEED))
        for rule in rules(SPECS[name].objectives, words)
        for rate in budget.rates
    ]


def final_jobs(out: Path, budget: Budget, words: bool) -> list[Job]:
    def job(name: str, rule: Rule) -> Job:
        def make() -> Rows:
            rate = tuned_rate(out, words, rule, budget)
            return [{"rate": rate} | row for row in train(name, rule, rate, budget, SEED)]

        return out / name / f"{rule.name}.csv", make

    return [
        job(name, rule)
        for name in budget.problems
        if is_words(name) == words
        for rule in rules(SPECS[name].objectives, words, SPECS[name].grids)
    ]


def run(out: Path, budget: Budget) -> None:
    for words, title in ((False, "bandits"), (True, "words")):
        store.run(tuning_jobs(out, budget, words), f"learning rates, {title}")
        store.run(final_jobs(out, budget, words), f"broad sweep, {title}")
