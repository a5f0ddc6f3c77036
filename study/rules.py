"""The rules that the study compares, and their losses for several independent runs at once.

A run is one seed. Tensors have the runs as their first axis: log-probabilities and masks are (S, B, T),
advantages (S, B, T, N). Every run is one call of the library; only MGDA's gradients are taken for all runs
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import pama_kernels as pk


@dataclass(frozen=True)
class Rule:
    """One way to turn N advantages into one policy loss.

    `gradients`: "mgda" takes the min-norm weights of the N full gradients, "mgda-ub" those of the
    gradients by the shared representation, in place of what `rule` would choose.
    """

    name: str
    label: str
    rule: pk.Pama | pk.UPGrad | pk.Fixed | pk.SoftMin
    gradients: str = ""
    preference: tuple[float, ...] | None = None
    momentum: float = 0.0
    tuned_as: str = ""  # the rule whose learning rate this one takes; its own name if empty

    def module(self, clip: float) -> pk.PamaLoss:
        return pk.PamaLoss(
            rule=self.rule, preference=self.preference, momentum=self.momentum, clip_range=clip
        )


RULES = [
    Rule("fixed", "fixed, equal", pk.Fixed()),
    Rule("cosines-r0", "Pama, cosines, 0", pk.Pama(regularization=0.0)),
    Rule("cosines-r0.1", "Pama, cosines, 0.1", pk.Pama()),
    Rule("cosines-r0.1-momentum", "Pama, cosines, 0.1, momentum", pk.Pama(), momentum=0.9),
    Rule("scores-r0.1", "Pama, scores, 0.1", pk.Pama(bound="scores")),
    Rule("upgrad", "UPGrad", pk.UPGrad()),
    Rule("softmin", "SoftMin per sequence", pk.SoftMin()),
    Rule("paper-batch", "the paper's, batch", pk.Pama.paper("batch")),
    Rule("paper-token", "the paper's, token", pk.Pama.paper("token")),
    Rule("mgda", "MGDA", pk.Fixed(), "mgda"),
    Rule("mgda-ub", "MGDA-UB", pk.Fixed(), "mgda-ub"),
]
BY_NAME = {rule.name: rule for rule in RULES}
SHARES = (0.05, 0.2, 0.35, 0.65, 0.8, 0.95)  # of the first of two objectives; 0.5 is the uniform preference
GRIDS = {
    name: [
        replace(
            BY_NAME[name],
            name=f"{name}-p{share:g}",
            label=f"{BY_NAME[name].label}, {share:g}",
            preference=(share, 1 - share),
            tuned_as=name,
        )
        for share in SHARES
    ]
    for name in ("fixed", "cosines-r0.1", "upgrad")
}


def rules(objectives: int, sequences: bool, grids: bool = False) -> list[Rule]:
    """Those that make sense: a bandit has no shared representation."""
    chosen = [rule for rule in RULES if sequences or rule.gradients != "mgda-ub"]
    if grids and objectives == 2:
        chosen += [rule for grid in GRIDS.values() for rule in grid]
    return chosen


class Losses:
    """The losses of one rule over the steps of S runs."""

    def __init__(self, rule: Rule, runs: int, clip: float) -> None:
        self.rule, self.clip = rule, clip
        self.modules = [rule.module(clip) for _ in range(runs)]

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        parameters: Sequence[Tensor] = (),
        representation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of the runs' losses (every run a mean over its own tokens), and the weights used (S, N)."""
        given: Sequence[Tensor | None] = [None] * len(self.modules)
        if self.rule.gradients:
            each = objective_losses(logprobs, old_logprobs, advantages, mask, self.clip)
            by_representation = self.rule.gradients == "mgda-ub" and representation is not None
            given = list(gradient_weights(each, [representation] if by_representation else parameters))
        tensors = zip(self.modules, given, logprobs, old_logprobs, advantages, mask, strict=True)
        outputs = [module(*rest, weights=weights) for module, weights, *rest in tensors]
        loss = torch.stack([out.loss for out in outputs]).sum()
        return loss, torch.stack([mean_weights(out) for out in outputs])


def mean_weights(out: pk.PamaLossOutput) -> Tensor:
    """(N,)"""
    return out.weights if out.weights.dim() == 1 else out.weights.mean(0)


def objective_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """The clipped loss of every objective of every run (S, N)."""
    ratio = (logprobs - old_logprobs).exp().unsqueeze(-1)
    g = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(g * mask.unsqueeze(-1)).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1).unsqueeze(-1)


def gradient_weights(losses: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """MGDA: min-norm weights (S, N) of the gradients of (S, N) losses by `inputs` (S, ...)."""
    rows = []
    for i in range(losses.shape[1]):
        grads = torch.autograd.grad(losses[:, i].sum(), inputs, retain_graph=True)
        rows.append(torch.cat([g.flatten(1) for g in grads], 1))
    gradients = torch.stack(rows, 1).double()  # (S, N, P)
    return pk.min_norm_weights(gradients @ gradients.mT).weights.to(losses.dtype)
