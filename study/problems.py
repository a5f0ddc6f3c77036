"""Problems of the broad sweep whose exact rewards, gradients and Pareto fronts are known.

Each holds S independent runs (seeds) at once; tensors have the runs as their first axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

import pama_kernels as pk

from .measures import Array, nondominated


class Batch(NamedTuple):
    """What a policy did: `index` finds the log-probabilities (S, B, T) again."""

    index: Tensor
    old_logprobs: Tensor
    advantages: Tensor  # (S, B, T, N), raw or whitened
    mask: Tensor


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Each objective of each run (S, B, T, N) to mean 0 and deviation 1 over its valid tokens."""
    return torch.stack([pk.masked_whiten(a, m) for a, m in zip(advantages, mask, strict=True)])


class Bandit:
    """A softmax policy over K arms; an arm pays its row of `means` (S, K, N), plus noise.

    What a policy can reach is the convex hull of the arms, so its Pareto front is known exactly.
    """

    batch = 64

    def __init__(
        self, means: Tensor, noise: str = "", scales: tuple[float, ...] = (), white: bool = True
    ) -> None:
        self.means, self.noise, self.white = means, noise, white
        self.scales = means.new_tensor(scales or (1.0,) * means.shape[2])
        self.logits = torch.zeros(means.shape[:2], requires_grad=True)
        self.parameters = [self.logits]
        self.representation: Tensor | None = None

    @property
    def objectives(self) -> int:
        return self.means.shape[2]

    def vertices(self, run: int) -> Array:
        return nondominated(self.means[run].double().numpy())

    def exact(self) -> Tensor:
        """Expected rewards (S, N) in their own units, without the scales."""
        return torch.einsum("sk,skn->sn", self.logits.softmax(-1), self.means)

    def logprobs(self, batch: Batch) -> Tensor:
        return self.logits.log_softmax(-1).gather(1, batch.index).unsqueeze(-1)

    @torch.no_grad()
    def rollout(self, generator: torch.Generator) -> Batch:
        runs, _, n = self.means.shape
        arms = torch.multinomial(self.logits.softmax(-1), self.batch, True, generator=generator)
        rewards = self.means.gather(1, arms.unsqueeze(-1).expand(runs, self.batch, n))
        if self.noise == "bernoulli":
            rewards = (torch.rand(rewards.shape, generator=generator) < rewards).float()
        elif self.noise == "normal":
            rewards = rewards + torch.randn(rewards.shape, generator=generator)
        rewards = (rewards * self.scales).unsqueeze(2)
        mask = torch.ones(runs, self.batch, 1)
        advantages = whiten(rewards, mask) if self.white else rewards - rewards.mean(1, keepdim=True)
        index = Batch(arms, mask, advantages, mask)
        return index._replace(old_logprobs=self.logprobs(index))

    def fit_values(self, batch: Batch) -> None:
        """The mean of the batch is the baseline: nothing to fit."""


def sphere(runs: int, objectives: int, arms: int = 32, seed: int = 0) -> Tensor:
    """Arms in random directions; a third at distance 1 from 0, so efficient, the others nearer."""
    generator = torch.Generator().manual_seed(1000 * objectives + seed)
    direction = -torch.rand(runs, arms, objectives, generator=generator).log()
    direction = (direction / direction.sum(-1, keepdim=True)).sqrt()
    radius = 0.1 + 0.7 * torch.rand(runs, arms, 1, generator=generator)
    radius[:, : arms // 3] = 1.0
    return radius * direction


class Sequences:
    """Words of a vocabulary of 8, up to 12 of them, written by a network of one hidden layer.

    The policy sees the position and the last word. Rewards: information, the sum of the worths of the
    distinct words used (falling, 1/k, so that the front is curved); conciseness, 1 - length / 12; tone, a
    mean of the words' tones, where the most informative words have the lowest. The value heads are tables.
    """

    words, longest, hidden, batch = 8, 12, 16, 64

    def __init__(
        self, runs: int, objectives: int, scales: tuple[float, ...] = (), white: bool = True, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        v, length, h = self.words, self.longest, self.hidden
        self.runs, self.objectives, self.white = runs, objectives, white
        self.scales = torch.tensor(scales or (1.0,) * objectives)
        self.worth = 1 / torch.arange(1.0, v + 1)
        self.worth /= self.worth.sum()
        self.tone = torch.linspace(-1, 1, v)

        def normal(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(runs, *shape, generator=generator)).requires_grad_()

        self.previous, self.position = normal(v + 1, h, scale=0.5), normal(length, h, scale=0.5)
        self.out, self.bias = normal(h, v + 1, scale=0.3), normal(v + 1, scale=0.0)
        self.parameters = [self.previous, self.position, self.out, self.bias]
        self.representation: Tensor | None = None
        self.values = torch.zeros(runs, length * (v + 1), objectives)
        self._front: Array | None = None

    def log_policy(self) -> Tensor:
        """(S, positions, last word, next word) log-probabilities; the last next word ends the sequence."""
        hidden = torch.tanh(self.position.unsqueeze(2) + self.previous.unsqueeze(1))
        self.representation = hidden
        return (hidden @ self.out.unsqueeze(1) + self.bias[:, None, None]).log_softmax(-1)

    def logprobs(self, batch: Batch) -> Tensor:
        flat = self.log_policy().flatten(1)
        return flat.gather(1, batch.index.flatten(1)).view(batch.mask.shape) * batch.mask

    def score(self, words: Tensor, mask: Tensor) -> Tensor:
        """(..., N) of words (..., T), where those of mask (..., T) were written and `self.words` ends."""
        used = (words[..., None] == torch.arange(self.words)) & mask.bool()[..., None]
        length = used.sum((-1, -2))
        tones = (used.sum(-2) * self.tone).sum(-1) / self.longest
        rewards = ((used.any(-2) * self.worth).sum(-1), 1 - length / self.longest, (1 + tones) / 2)
        return torch.stack(rewards[: self.objectives], -1)

    @torch.no_grad()
    def rollout(self, generator: torch.Generator) -> Batch:
        s, b, v = self.runs, self.batch, self.words
        table = self.log_policy()
        last = torch.full((s, b), v)
        alive = torch.ones(s, b)
        words, contexts, masks = [], [], []
        for t in range(self.longest):
            p = table[:, t].exp().gather(1, last.unsqueeze(-1).expand(s, b, v + 1))
            # A uniform number against the cumulative sum.
            x = torch.rand(s, b, 1, generator=generator)
            chosen = (p.cumsum(-1) < x).sum(-1).clamp(max=v)
            contexts.append(t * (v + 1) + last)
            words.append(chosen)
            masks.append(alive)
            alive = alive * (chosen < v)
            last = torch.where(chosen < v, chosen, last)
        actions, context, mask = torch.stack(words, 2), torch.stack(contexts, 2), torch.stack(masks, 2)
        index = context * (v + 1) + actions
        old = table.flatten(1).gather(1, index.flatten(1)).view(s, b, -1) * mask
        rewards = torch.zeros(s, b, self.longest, self.objectives)
        final = mask.sum(-1).long() - 1
        at = final[..., None, None].expand(s, b, 1, self.objectives)
        rewards.scatter_(2, at, (self.score(actions, mask) * self.scales).unsqueeze(2))
        n = self.objectives
        row = context.flatten(1).unsqueeze(-1).expand(s, b * self.longest, n)
        values = self.values.gather(1, row).view(rewards.shape)
        flat = [x.flatten(0, 1) for x in (rewards, values, mask)]
        advantages, returns = pk.multi_objective_gae(*flat, gamma=1.0, lam=0.95)
        advantages = advantages.view(rewards.shape)
        self._returns, self._row = returns.view(s, -1, n), row
        if self.white:
            advantages = whiten(advantages, mask)
        return Batch(index, old, advantages, mask)

    def fit_values(self, batch: Batch) -> None:
        """Moves every visited table entry half way to the mean of its returns."""
        m = batch.mask.flatten(1).unsqueeze(-1)
        total = torch.zeros_like(self.values).scatter_add_(1, self._row, self._returns * m)
        count = torch.zeros_like(self.values).scatter_add_(1, self._row, m.expand_as(self._returns))
        self.values += torch.where(count > 0, 0.5 * (total / count.clamp(min=1) - self.values), 0.0)

    def exact(self) -> Tensor:
        """Expected rewards (S, N) of the policy, differentiable: by passing probabilities forward.

        The chance that a word is never used is that of ending in the same process without it.
        """
        s, v = self.runs, self.words
        policy = self.log_policy().exp()
        start = torch.zeros(v + 1)
        start[v] = 1
        alive = start.expand(s, v + 1)
        without = start.expand(s, v, v + 1)  # (S, word left out, last word)
        allowed = 1 - torch.eye(v)
        never: Tensor = torch.zeros(s, v)
        length, tone = torch.zeros(s), torch.zeros(s)
        for t in range(self.longest):
            step = torch.einsum("sp,spk->sk", alive, policy[:, t])
            steps = torch.einsum("swp,spk->swk", without, policy[:, t])
            never = never + steps[..., v]
            length = length + step[:, :v].sum(-1)
            tone = tone + (step[:, :v] * self.tone).sum(-1)
            alive = torch.cat([step[:, :v], torch.zeros(s, 1)], 1)
            without = torch.cat([steps[..., :v] * allowed, torch.zeros(s, v, 1)], 2)
        never = never + without.sum(-1)
        rewards = (
            ((1 - never) * self.worth).sum(-1),
            1 - length / self.longest,
            (1 + tone / self.longest) / 2,
        )
        return torch.stack(rewards[: self.objectives], -1)

    def vertices(self, run: int = 0) -> Array:
        """The same for all runs."""
        if self._front is None:
            self._front = nondominated(self._best())
        return self._front

    def _best(self) -> list[tuple[float, ...]]:
        """Best rewards of every set of words at every length: all further copies are of the best tone."""
        points = []
        for size in range(self.words + 1):
            for chosen in itertools.combinations(range(self.words), size):
                some = torch.tensor(chosen, dtype=torch.long)
                worth, tone = float(self.worth[some].sum()), float(self.tone[some].sum())
                best = float(self.tone[some].max()) if size else 0.0
                for length in range(size, self.longest + 1 if size else 1):
                    total = tone + (length - size) * best
                    point = (worth, 1 - length / self.longest, (1 + total / self.longest) / 2)
                    points.append(point[: self.objectives])
        return points


Problem = Bandit | Sequences


class Spec(NamedTuple):
    """A problem by its name: what it is made of."""

    kind: str
    objectives: int
    options: Mapping[str, object] = MappingProxyType({})
    grids: bool = False  # preferences on a grid, too


SPECS = {
    "three-arms": Spec("three-arms", 2),
    "bandit-2": Spec("sphere", 2, grids=True),
    "bandit-3": Spec("sphere", 3),
    "bandit-4": Spec("sphere", 4),
    "bandit-8": Spec("sphere", 8),
    "bandit-16": Spec("sphere", 16),
    "bandit-2-noisy": Spec("sphere", 2, {"noise": "normal"}),
    "bandit-2-raw": Spec("sphere", 2, {"white": False}),
    "bandit-2-raw-10": Spec("sphere", 2, {"white": False, "scales": (10.0, 1.0)}),
    "bandit-2-raw-100": Spec("sphere", 2, {"white": False, "scales": (100.0, 1.0)}),
    "bandit-dead": Spec("dead", 3),
    "bandit-solved": Spec("solved", 3, {"noise": "bernoulli"}),
    "words-2": Spec("words", 2, grids=True),
    "words-3": Spec("words", 3),
    "words-2-raw": Spec("words", 2, {"white": False}),
    "words-2-raw-10": Spec("words", 2, {"white": False, "scales": (10.0, 1.0)}),
    "words-2-raw-100": Spec("words", 2, {"white": False, "scales": (100.0, 1.0)}),
}


def build(name: str, runs: int, seed: int = 0) -> Problem:
    """S runs of a problem; `seed` draws its arms or its first parameters."""
    kind, n, options = SPECS[name][:3]
    if kind == "words":
        return Sequences(runs, n, seed=seed, **options)  # type: ignore[arg-type]
    if kind == "three-arms":
        means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).expand(runs, 3, 2)
    elif kind == "dead":  # the third objective pays the same everywhere
        means = torch.cat([sphere(runs, 2, seed=seed), torch.full((runs, 32, 1), 0.5)], 2)
    elif kind == "solved":  # nearly every arm succeeds in the third
        generator = torch.Generator().manual_seed(seed)
        third = 0.95 + 0.05 * torch.rand(runs, 32, 1, generator=generator)
        means = torch.cat([sphere(runs, 2, seed=seed), third], 2)
    else:
        means = sphere(runs, n, seed=seed)
    return Bandit(means.contiguous(), **options)  # type: ignore[arg-type]
