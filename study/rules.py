"""The rules that the study compares. Every rule turns N advantages into one, by the library's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk

from .problems import Batch, Problem


@dataclass(frozen=True)
class Rule:
    """`rule` makes a library rule (a new one for each run, as some have a state); `given` computes weights
    (R, N) or (R, B, N) outside of it. `raw`: on advantages that are centred but not scaled."""

    label: str
    rule: Callable[[], Any] | None = None
    given: Callable[[Batch, Problem], Tensor] | None = None
    momentum: float = 0.0
    raw: bool = False


class CovarianceTargets:
    """CTWA (Lu & Jiang 2026, arXiv 2602.06869), as in the authors' code: the logarithm of a weight rises by
    `rate` times what the running mean of the objective's correlation with the combined advantage lacks to
    `target`. Theirs: rate 0.05, targets 0.08 to 0.15; weights are normalised here."""

    def __init__(self, target: float = 0.1, rate: float = 0.05, keep: float = 0.9) -> None:
        self.target, self.rate, self.keep = target, rate, keep
        self.logits: Tensor | None = None
        self.mean: Tensor | None = None

    def __call__(self, statistics: pk.ObjectiveStatistics) -> Tensor:
        covariance = statistics.covariance
        if self.logits is None:
            self.logits = torch.zeros(len(covariance), dtype=torch.float64)
        weights = self.logits.softmax(0)
        deviation = covariance.diagonal().sqrt() * (weights @ covariance @ weights).clamp(min=0).sqrt()
        correlation = covariance @ weights / deviation.clamp(min=1e-12)
        self.mean = correlation if self.mean is None else self.mean.lerp(correlation, 1 - self.keep)
        self.logits = self.logits + self.rate * (self.target - self.mean).clamp(min=0)
        return weights


def variance_weights(batch: Batch, problem: Problem) -> Tensor:
    """After DVAO (Jiang et al. 2026, arXiv 2605.25604): within each group, weights in proportion to the
    variances of the rewards, on normalised advantages."""
    total = batch.variances.sum(-1, keepdim=True)
    return torch.where(total > 0, batch.variances / total.clamp(min=1e-12), 1 / problem.objectives)


def min_norm(which: str, batch: Batch, problem: Problem) -> Tensor:
    """MGDA on one of the problem's Gram matrices; an objective without a gradient takes no part."""
    return mgda_weights(getattr(problem, which)())


def mgda_weights(gram: Tensor) -> Tensor:
    """Min-norm weights (R, N); an objective whose gradient is 0 gets none, unless all are."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(-1, keepdim=True)
    dead = torch.where((diagonal <= 1e-12 * largest) & (largest > 0), 1e6 * largest, 0.0)
    return pk.min_norm_weights(gram + torch.diag_embed(dead)).weights


def noon_scores() -> pk.Pama:
    return pk.Pama(bound="scores", noon=True)


def paper(weights_per: str) -> pk.Pama:
    return pk.Pama.paper(weights_per)


RULES: dict[str, Rule] = {
    "fixed": Rule("Fixed (GDPO)", pk.Fixed),
    "fixed-raw": Rule("Fixed, raw rewards (MORLHF)", raw=True),
    "cosines-r0": Rule("Pama, cosines, 0", partial(pk.Pama, regularization=0.0)),
    "cosines-r0.1": Rule("Pama, cosines, 0.1", pk.Pama),
    "cosines-r0.1-momentum": Rule("Pama, cosines, 0.1, momentum", pk.Pama, momentum=0.9),
    "scores-r0.1": Rule("Pama, scores, 0.1", partial(pk.Pama, bound="scores")),
    "noon-scores-r0.1": Rule("Pama, scores, Noon, 0.1", noon_scores),
    "upgrad": Rule("UPGrad", pk.UPGrad),
    "softmin": Rule("SoftMin per sequence", pk.SoftMin),
    "paper-batch": Rule("paper's rule per batch", partial(paper, "batch")),
    "paper-token": Rule("paper's rule per token", partial(paper, "token")),
    "mgda": Rule("MGDA, batch gradients", given=partial(min_norm, "batch_gram")),
    "mgda-exact": Rule("MGDA, exact gradients", given=partial(min_norm, "exact_gram")),
    "mgda-ub": Rule("MGDA-UB", given=partial(min_norm, "block_gram")),
    "dvao": Rule("DVAO", given=variance_weights),
    "ctwa": Rule("CTWA", CovarianceTargets),
    "cosines-r0.1-raw": Rule("Pama, cosines, 0.1, raw rewards", pk.Pama, raw=True),
    "upgrad-raw": Rule("UPGrad, raw rewards", pk.UPGrad, raw=True),
}
RAW_ONLY = ("cosines-r0.1-raw", "upgrad-raw")  # of the problem with rewards of different scales


class Combiner:
    """One rule over the steps of all runs."""

    def __init__(self, name: str, runs: int) -> None:
        self.rule = RULES[name]
        self.states: list[Any] = [None] * runs
        if self.rule.momentum:
            self.states = [
                pk.PamaLoss(rule=self.rule.rule(), momentum=self.rule.momentum) for _ in range(runs)
            ]
        elif self.rule.rule is not None:
            self.states = [self.rule.rule() for _ in range(runs)]

    def __call__(self, batch: Batch, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """Combined advantages (R, B) or (R, B, T), and mean weights (R, N) where there are any."""
        if self.rule.raw and self.rule.rule is None:
            return problem.normalise(batch.raw.mean(-1)), None
        advantages = batch.raw if self.rule.raw else batch.advantages
        given = self.rule.given(batch, problem) if self.rule.given else None
        combined, weights = [], []
        for run, (state, own) in enumerate(zip(self.states, advantages, strict=True)):
            mask = None if batch.mask is None else batch.mask[run]
            options: dict[str, Any] = {"objective_mask": batch.present}
            if given is not None:
                options["weights"] = given[run].to(own.dtype)
            elif self.rule.momentum:
                options["weights"] = self._running(state, own, mask, batch.present)
            else:
                options["rule"] = state
            out = pk.combine_advantages(own, mask, **options)
            combined.append(out.advantages)
            weights.append(out.weights.mean(0) if out.weights.dim() == 2 else out.weights)
        return torch.stack(combined), torch.stack(weights)

    @staticmethod
    def _running(module: pk.PamaLoss, advantages: Tensor, mask: Tensor | None, present: Any) -> Tensor:
        """Weights from the running mean of the statistics, at ratio 1."""
        tokens = torch.ones(len(advantages), 1) if mask is None else mask
        zero = torch.zeros_like(tokens)
        return module(zero, zero, advantages, tokens, objective_mask=present).weights
