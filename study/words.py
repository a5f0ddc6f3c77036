"""Words of a vocabulary of 8, up to 12 of them, written by a network with one hidden layer: PPO, GAE.

The policy sees the position and the last word. Rewards, all at the end: information, the sum of the worths
of the distinct words used (proportional to 1/k for the k-th word); conciseness, 1 - length / 12; tone, the
mean of the words' tones, which are lowest for the most informative words. Value heads are tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import pama_kernels as pk

from .problems import Adam, Batch, gram, scaled

EPOCHS, CLIP = 2, 0.2


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0, deviation 1 over the valid tokens of each run; x is (R, B, T) or (R, B, T, N)."""
    m = mask.view(*mask.shape, *(1,) * (x.dim() - 3)).double()
    count = m.sum((1, 2), keepdim=True)
    centred = (x - (x * m).sum((1, 2), keepdim=True) / count) * m
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    scaled = torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)
    return scaled.to(mask.dtype)


class Words:
    words, longest, hidden, batch = 8, 12, 16, 64

    def __init__(self, objectives: int, seeds: int, rates: Sequence[float]) -> None:
        self.objectives, self.seeds, self.repeats = objectives, seeds, len(rates)
        self.runs = seeds * len(rates)
        self.generator = torch.Generator().manual_seed(0)
        v, length, h = self.words, self.longest, self.hidden
        self.worth = 1 / torch.arange(1.0, v + 1)
        self.worth /= self.worth.sum()
        self.tone = torch.linspace(-1, 1, v)
        shapes = ((v + 1, h), (length, h), (h, v + 1), (v + 1,))
        self.parameters = [
            self._repeat(scale * torch.randn(seeds, *shape, generator=self.generator)).requires_grad_()
            for shape, scale in zip(shapes, (0.5, 0.5, 0.3, 0.0), strict=True)
        ]
        self.adam = Adam(self.parameters, torch.tensor(rates).repeat_interleave(seeds))
        self.values = torch.zeros(self.runs, length * (v + 1), objectives)
        self.start = self._log_policy().detach()

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat(self.repeats, *(1,) * (x.dim() - 1))

    def _log_policy(self) -> Tensor:
        """(R, positions, last word, next word); the last next word ends the sequence."""
        previous, position, out, bias = self.parameters
        hidden = torch.tanh(position.unsqueeze(2) + previous.unsqueeze(1))
        return (hidden @ out.unsqueeze(1) + bias[:, None, None]).log_softmax(-1)

    def score(self, words: Tensor, mask: Tensor) -> Tensor:
        """Rewards (..., N) of words (..., T)."""
        used = (words[..., None] == torch.arange(self.words)) & mask.bool()[..., None]
        length = used.sum((-1, -2))
        tones = (used.sum(-2) * self.tone).sum(-1) / self.longest
        rewards = ((used.any(-2) * self.worth).sum(-1), 1 - length / self.longest, (1 + tones) / 2)
        return torch.stack(rewards[: self.objectives], -1)

    @torch.no_grad()
    def rollout(self) -> Batch:
        r, b, v, n = self.runs, self.batch, self.words, self.objectives
        self.table = self._log_policy()
        cumulative = self.table.exp().cumsum(-1)
        last, alive = torch.full((r, b), v), torch.ones(r, b)
        words, contexts, masks = [], [], []
        for t in range(self.longest):
            row = cumulative[:, t].gather(1, last.unsqueeze(-1).expand(r, b, v + 1))
            x = self._repeat(torch.rand(self.seeds, b, 1, generator=self.generator))
            chosen = (row < x).sum(-1).clamp(max=v)
            contexts.append(t * (v + 1) + last)
            words.append(chosen)
            masks.append(alive)
            alive = alive * (chosen < v)
            last = torch.where(chosen < v, chosen, last)
        self.actions, context, self.mask = (torch.stack(x, 2) for x in (words, contexts, masks))
        self.index = context * (v + 1) + self.actions
        self.old = self._logprobs(self.table)
        final = self.score(self.actions, self.mask)
        rewards = torch.zeros(r, b, self.longest, n)
        at = (self.mask.sum(-1).long() - 1)[..., None, None].expand(r, b, 1, n)
        rewards.scatter_(2, at, final.unsqueeze(2))
        row = context.flatten(1).unsqueeze(-1).expand(r, b * self.longest, n)
        values = self.values.gather(1, row).view(rewards.shape)
        flat = [x.flatten(0, 1) for x in (rewards, values, self.mask)]
        advantages, returns = pk.multi_objective_gae(*flat, gamma=1.0, lam=0.95)
        self._fit_values(row, returns.view(r, -1, n))
        raw = advantages.view(rewards.shape) * self.mask.unsqueeze(-1)
        self.advantages = whiten(raw, self.mask)
        count = self.mask.sum((1, 2)).unsqueeze(-1)
        square = raw.square().sum((1, 2)) / count - (raw.sum((1, 2)) / count).square()
        self.deviation = square.clamp(min=0).sqrt()
        variances = final.var(1, correction=0, keepdim=True).expand(r, b, n)
        return Batch(self.advantages, raw, variances, mask=self.mask)

    def _fit_values(self, row: Tensor, returns: Tensor) -> None:
        """Moves every visited table entry half way to the mean of its returns."""
        m = self.mask.flatten(1).unsqueeze(-1)
        total = torch.zeros_like(self.values).scatter_add_(1, row, returns * m)
        count = torch.zeros_like(self.values).scatter_add_(1, row, m.expand_as(returns))
        self.values += torch.where(count > 0, 0.5 * (total / count.clamp(min=1) - self.values), 0.0)

    def normalise(self, combined: Tensor) -> Tensor:
        return whiten(combined, self.mask)

    def _logprobs(self, table: Tensor) -> Tensor:
        return table.flatten(1).gather(1, self.index.flatten(1)).view(self.mask.shape) * self.mask

    def update(self, combined: Tensor) -> None:
        """PPO's clipped loss on the combined advantages, two epochs: weights are solved once per rollout."""
        count = self.mask.sum((1, 2), keepdim=True)
        for _ in range(EPOCHS):
            ratio = (self._logprobs(self._log_policy()) - self.old).exp()
            surrogate = torch.minimum(ratio * combined, ratio.clamp(1 - CLIP, 1 + CLIP) * combined)
            total = (surrogate * self.mask / count).sum()
            self.adam.ascend(torch.autograd.grad(total, self.parameters))

    def batch_gram(self) -> Tensor:
        logprobs = self._logprobs(self._log_policy()) / self.mask.sum((1, 2), keepdim=True)
        return self._gram([(logprobs * self.advantages[..., i]).sum() for i in range(self.objectives)])

    def _gram(self, objectives: Sequence[Tensor]) -> Tensor:
        rows = []
        for objective in objectives:
            grads = torch.autograd.grad(objective, self.parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten(1) for g in grads], 1))
        return gram(torch.stack(rows, -1))

    def block_gram(self) -> Tensor:
        """The representation is a token's hidden layer: |W' (e_a - pi)|^2."""
        out = self.parameters[2].detach()
        policy = self.table.exp()
        mean = torch.einsum("rtpk,rhk->rtph", policy, out)
        square = (out.mT[:, None, None] - mean.unsqueeze(3)).square().sum(-1)  # (R, T, last, next)
        weight = square.flatten(1).gather(1, self.index.flatten(1)).view(self.mask.shape)
        weighted = (self.advantages * weight.unsqueeze(-1)).flatten(1, 2).double()
        return weighted.mT @ self.advantages.flatten(1, 2).double()

    def exact_gram(self) -> Tensor:
        value, _ = self._exact()
        exact = self._gram([value[:, i].sum() for i in range(self.objectives)])
        return scaled(exact, self.deviation)

    @torch.no_grad()
    def value(self) -> tuple[Tensor, Tensor]:
        return self._exact()

    def _exact(self) -> tuple[Tensor, Tensor]:
        """Expected rewards and KL, by passing probabilities forward.

        The chance that a word is never used is that of ending in the same process without it.
        """
        r, v = self.runs, self.words
        table = self._log_policy()
        policy = table.exp()
        divergence = (policy * (table - self.start)).sum(-1)  # (R, positions, last word)
        start = torch.zeros(v + 1)
        start[v] = 1
        alive = start.expand(r, v + 1)
        without = start.expand(r, v, v + 1)  # (R, word left out, last word)
        allowed = 1 - torch.eye(v)
        never: Tensor = torch.zeros(r, v)
        length, tone, kl = torch.zeros(r), torch.zeros(r), torch.zeros(r)
        for t in range(self.longest):
            kl = kl + (alive * divergence[:, t]).sum(-1)
            step = torch.einsum("sp,spk->sk", alive, policy[:, t])
            steps = torch.einsum("swp,spk->swk", without, policy[:, t])
            never = never + steps[..., v]
            length = length + step[:, :v].sum(-1)
            tone = tone + (step[:, :v] * self.tone).sum(-1)
            alive = torch.cat([step[:, :v], torch.zeros(r, 1)], 1)
            without = torch.cat([steps[..., :v] * allowed, torch.zeros(r, v, 1)], 2)
        never = never + without.sum(-1)
        rewards = (
            ((1 - never) * self.worth).sum(-1),
            1 - length / self.longest,
            (1 + tone / self.longest) / 2,
        )
        return torch.stack(rewards[: self.objectives], -1), kl
