"""Simulated problems with exactly known rewards: bandits, and GRPO with groups of 8 and Bernoulli rewards.

A run is one seed at one learning rate; all runs of a rule are trained at once, with the runs as the first
axis R of every tensor (rate by rate, seed by seed within a rate). Random numbers are drawn for each seed and
repeated over the rates, and are the same for every rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import pama_kernels as pk


class Batch(NamedTuple):
    """One rollout of every run: B samples, for words of T tokens each."""

    advantages: Tensor  # (R, B, N) or (R, B, T, N), normalised for each objective
    raw: Tensor  # the same, centred but not scaled
    variances: Tensor  # (R, B, N): the variance of the rewards in the sample's group
    mask: Tensor | None = None  # (R, B, T)
    present: Tensor | None = None  # (B, N), the same for every run: which rewards apply


class Problem(Protocol):
    objectives: int
    runs: int

    def rollout(self) -> Batch: ...

    def update(self, combined: Tensor) -> None:
        """The optimiser's steps on combined advantages (R, B) or (R, B, T) of the last rollout."""

    def normalise(self, combined: Tensor) -> Tensor:
        """Combined raw advantages of the last rollout, normalised as one reward's would be."""

    def batch_gram(self) -> Tensor:
        """(R, N, N) of the parameter gradients of the last rollout's objectives: batch MGDA's."""

    def block_gram(self) -> Tensor:
        """(R, N, N) of the gradients by the shared representation, sample by sample: MGDA-UB's."""

    def exact_gram(self) -> Tensor:
        """(R, N, N) of the gradients of the expected rewards, in the scale of the advantages."""

    def value(self) -> tuple[Tensor, Tensor]:
        """Expected rewards (R, N), and KL to the start policy in nats a sequence (R,)."""


class Adam:
    """Adam with its own learning rate for each run."""

    def __init__(self, parameters: Sequence[Tensor], rates: Tensor) -> None:
        self.parameters, self.rates, self.steps = parameters, rates, 0
        self.first = [torch.zeros_like(x) for x in parameters]
        self.second = [torch.zeros_like(x) for x in parameters]

    @torch.no_grad()
    def ascend(self, gradients: Sequence[Tensor]) -> None:
        self.steps += 1
        one, two = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for x, m, v, g in zip(self.parameters, self.first, self.second, gradients, strict=True):
            m.lerp_(g, 0.1)
            v.lerp_(g.square(), 0.001)
            rate = self.rates.view(-1, *(1,) * (x.dim() - 1))
            x += rate * (m / one) / ((v / two).sqrt() + 1e-8)


@dataclass(frozen=True)
class Answers:
    """What a problem of prompts and completions consists of.

    Every prompt has `answers` possible ones. A reward of a completion is a Bernoulli variable whose logit is
    linear in the prompt's features, with pairwise `correlation` between the objectives; the offset is such
    that the start policy, uniform, has the success rates `start`. 1.0 is a saturated reward.
    """

    start: tuple[float, ...]
    correlation: float = 0.0
    spread: float = 2.0  # deviation of the logits over completions
    same: tuple[int, int] | None = None  # (i, j): reward j is reward i once more
    tasks: tuple[tuple[int, ...], ...] = ()  # objective i exists only at prompts p with p % len(tasks) in it
    answers: int = 16
    features: int = 4
    prompts: int = 48
    drawn: int = 16  # prompts of a step
    group: int = 8

    def tables(self, seeds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Success rates (S, P, K, N) and features (S, P, D), the first of which is 1."""
        n = len(self.start)
        x = torch.randn(seeds, self.prompts, self.features, generator=generator)
        x[..., 0] = 1.0
        x /= x.norm(dim=-1, keepdim=True)
        base = torch.randn(seeds, self.features, self.answers, n, generator=generator)
        mixing = torch.full((n, n), self.correlation).fill_diagonal_(1.0)
        base = base @ torch.linalg.cholesky(mixing).mT
        logits = self.spread * torch.einsum("spd,sdkn->spkn", x, base)
        low, high = torch.full((seeds, n), -30.0), torch.full((seeds, n), 30.0)
        for _ in range(60):  # bisection for the offsets
            middle = (low + high) / 2
            above = (logits + middle[:, None, None]).sigmoid().mean((1, 2)) > torch.tensor(self.start)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        success = (logits + low[:, None, None]).sigmoid()
        success[..., torch.tensor(self.start) == 1.0] = 1.0
        if self.same:
            success[..., self.same[1]] = success[..., self.same[0]]
        return success, x


@dataclass(frozen=True)
class Bandit:
    """A bandit of 32 arms in random directions of N objectives, a third of them efficient."""

    objectives: int
    noise: float = 0.0  # deviation of normal noise on the rewards
    scales: tuple[float, ...] = ()  # of the rewards in training; measured without
    answers: int = 32
    group: int = 64
    drawn: int = 1

    def tables(self, seeds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean rewards (S, 1, K, N), and one constant feature."""
        n = self.objectives
        direction = -torch.rand(seeds, self.answers, n, generator=generator).log()
        direction = (direction / direction.sum(-1, keepdim=True)).sqrt()
        radius = 0.1 + 0.7 * torch.rand(seeds, self.answers, 1, generator=generator)
        radius[:, : self.answers // 3] = 1.0
        return (radius * direction).unsqueeze(1), torch.ones(seeds, 1, 1)


class Softmax:
    """A softmax policy, linear in the features of the prompts, on tables of rewards."""

    def __init__(self, spec: Answers | Bandit, seeds: int, rates: Sequence[float]) -> None:
        self.spec, self.seeds, self.repeats = spec, seeds, len(rates)
        self.generator = torch.Generator().manual_seed(0)
        self.table, self.features = (self._repeat(x) for x in spec.tables(seeds, self.generator))
        self.runs, self.prompts, self.answers, self.objectives = self.table.shape
        self.scales = torch.tensor(getattr(spec, "scales", ()) or (1.0,) * self.objectives)
        self.weights = torch.zeros(self.runs, self.features.shape[-1], self.answers)
        self.adam = Adam([self.weights], torch.tensor(rates).repeat_interleave(seeds))
        self.present = torch.ones(self.prompts, self.objectives)
        if isinstance(spec, Answers) and spec.tasks:
            task = torch.arange(self.prompts) % len(spec.tasks)
            for i in range(self.objectives):
                self.present[:, i] = torch.tensor([float(i in spec.tasks[t]) for t in task])

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat(self.repeats, *(1,) * (x.dim() - 1))

    def _uniform(self, *shape: int) -> Tensor:
        return self._repeat(torch.rand(self.seeds, *shape, generator=self.generator))

    def _policy(self, prompts: Tensor | None = None) -> Tensor:
        x = self.features if prompts is None else self.features[:, prompts]
        return torch.einsum("rpd,rdk->rpk", x, self.weights).softmax(-1)

    def rollout(self) -> Batch:
        spec, n = self.spec, self.objectives
        p, g = spec.drawn, spec.group
        self.drawn = torch.randperm(self.prompts, generator=self.generator)[:p]
        self.policy = self._policy(self.drawn)
        chosen = self.policy.cumsum(-1).unsqueeze(2) < self._uniform(p, g, 1)
        self.chosen = chosen.sum(-1).clamp(max=self.answers - 1)  # (R, p, G)
        at = self.chosen.unsqueeze(-1).expand(*self.chosen.shape, n)
        rewards = self.table[:, self.drawn].gather(2, at)
        if isinstance(spec, Answers):
            coins = self._uniform(p, g, n)
            if spec.same:
                coins[..., spec.same[1]] = coins[..., spec.same[0]]
            rewards = (coins < rewards).float()
        else:
            if spec.noise:
                normal = torch.randn(self.seeds, p, g, n, generator=self.generator)
                rewards = rewards + spec.noise * self._repeat(normal)
            rewards = rewards * self.scales
        present = self.present[self.drawn].repeat_interleave(g, 0)
        flat = rewards.flatten(1, 2).masked_fill(present == 0, torch.nan).flatten(0, 1)
        shape = self.runs, p * g, n
        self.advantages = pk.group_normalize(flat, group_size=g).view(shape)
        raw = pk.group_normalize(flat, group_size=g, scale=False).view(shape)
        variances = raw.view(self.runs, p, g, n).square().mean(2, keepdim=True).expand(-1, -1, g, -1)
        self.deviation = raw.square().mean(1).sqrt()
        absent = None if bool(present.all()) else present
        return Batch(self.advantages, raw, variances.flatten(1, 2), present=absent)

    def normalise(self, combined: Tensor) -> Tensor:
        flat = combined.reshape(-1, 1)
        return pk.group_normalize(flat, group_size=self.spec.group).view_as(combined)

    def _gradients(self, advantages: Tensor) -> Tensor:
        """(R, D, K, M) of advantages (R, B, M): means over the batch of A grad log pi."""
        grouped = advantages.view(self.runs, *self.chosen.shape[1:], -1)
        taken = torch.zeros(*self.policy.shape, grouped.shape[-1])
        taken.scatter_add_(2, self.chosen.unsqueeze(-1).expand_as(grouped), grouped)
        score = taken - self.policy.unsqueeze(-1) * grouped.sum(2).unsqueeze(2)
        return torch.einsum("rpd,rpkm->rdkm", self.features[:, self.drawn], score) / advantages.shape[1]

    def update(self, combined: Tensor) -> None:
        """One step a rollout, as GRPO takes it by default: the ratio is 1 and nothing is clipped."""
        self.adam.ascend([self._gradients(combined.unsqueeze(-1))[..., 0]])

    def batch_gram(self) -> Tensor:
        return gram(self._gradients(self.advantages))

    def block_gram(self) -> Tensor:
        """The representation is the logits of a sample: |e_a - pi|^2 = 1 - 2 pi_a + |pi|^2."""
        square = 1 - 2 * self.policy.gather(2, self.chosen) + self.policy.square().sum(-1, keepdim=True)
        weighted = self.advantages * square.flatten(1).unsqueeze(-1)
        return torch.einsum("rbi,rbj->rij", weighted.double(), self.advantages.double())

    def exact_gradients(self) -> Tensor:
        """(R, D, K, N) of the expected rewards, in the scales of training."""
        policy = self._policy()
        centred = self.table - torch.einsum("rpk,rpkn->rpn", policy, self.table).unsqueeze(2)
        score = policy.unsqueeze(-1) * centred * self.present[:, None] * self.scales
        return torch.einsum("rpd,rpkm->rdkm", self.features, score)

    def exact_gram(self) -> Tensor:
        return scaled(gram(self.exact_gradients()), self.deviation)

    def exact_cosines(self, combined: Tensor) -> Tensor:
        """(R, N): of the expected rewards' gradients with the rollout's combined gradient, 0 without."""
        step = self._gradients(combined.unsqueeze(-1)).flatten(1).double()
        exact = self.exact_gradients().flatten(1, 2).double()
        norms = step.norm(dim=1, keepdim=True) * exact.norm(dim=1)
        inner = torch.einsum("rx,rxn->rn", step, exact)
        return torch.where(norms > 1e-12, inner / norms.clamp(min=1e-12), 0.0)

    def value(self) -> tuple[Tensor, Tensor]:
        policy = self._policy()
        each = torch.einsum("rpk,rpkn->rpn", policy, self.table)
        rewards = (each * self.present).sum(1) / self.present.sum(0)
        kl = (policy * (policy.clamp(min=1e-12) * self.answers).log()).sum(-1).mean(1)
        return rewards, kl


def gram(gradients: Tensor) -> Tensor:
    """(R, N, N) in float64 of gradients (R, ..., N)."""
    flat = gradients.flatten(1, -2).double()
    return flat.mT @ flat


def scaled(matrix: Tensor, deviation: Tensor) -> Tensor:
    """A Gram matrix (R, N, N) in units of the deviations (R, N); 0 for an objective without any."""
    inverse = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0).double()
    return matrix * inverse.unsqueeze(1) * inverse.unsqueeze(2)
