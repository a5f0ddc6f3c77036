"""The rules that the study compares, and their weights for a batch of independent runs at once.

A run is one seed. Everything here has the runs as its first axis: log-probabilities and masks are (S, B, T),
advantages (S, B, T, N), and no number of one run ever meets one of another. One run alone is `pk.pama_loss`
(`tests/test_study.py` checks that the two agree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import pama_kernels as pk

TINY = 1e-30


@dataclass(frozen=True)
class Rule:
    """One way to turn N advantages into one policy loss.

    `kind`: "pama"; "fixed" weights (MORLHF, uniform where `prior` is None); "mgda", the min-norm weights of
    the N full gradients; "mgda-ub", of the gradients by the shared representation; "literal", one scalar s*
    as the advantage of every token.
    """

    name: str
    kind: str = "pama"
    per: str = "batch"
    bound: str = "scores"
    noon: bool = True
    regularization: float = 0.0
    prior: tuple[float, ...] | None = None
    momentum: float = 0.0
    tuned_as: str = ""  # the rule whose learning rate this one takes; its own name if empty


def clipped_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The surrogate terms g and the bound terms I, both (S, B, T, N); g is differentiable in `logprobs`."""
    ratio = (logprobs - old_logprobs).exp().unsqueeze(-1)
    g = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    u = ratio.detach()
    stopped = ((advantages > 0) & (u > 1 + clip)) | ((advantages < 0) & (u < 1 - clip))
    return g, torch.where(stopped, 0.0, advantages)


@dataclass
class Moments:
    """Means over the valid tokens of each run, as a rule's running mean holds them."""

    scores: Tensor  # (S, N)
    squares: Tensor  # (S, N)
    gram: Tensor  # (S, N, N)


class Weigher:
    """Weights of one rule over the steps of S runs."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.running, self.batches = rule, None, 0

    def __call__(self, bound_terms: Tensor, mask: Tensor) -> Tensor:
        """Weights that broadcast over (S, B, T, N)."""
        rule = self.rule
        runs, _, _, n = bound_terms.shape
        if rule.kind == "fixed":
            c = (
                bound_terms.new_full((n,), 1 / n)
                if rule.prior is None
                else bound_terms.new_tensor(rule.prior)
            )
            return c.expand(runs, 1, 1, n)
        terms = bound_terms * mask.unsqueeze(-1)
        if rule.per == "token":
            return self._scalar(terms, None)
        if rule.per == "sequence":
            counts = mask.sum(2, keepdim=True).clamp(min=1)  # (S, B, 1)
            means, squares = terms.sum(2) / counts, terms.square().sum(2) / counts
            return self._scalar(means, squares.amax(-1)).unsqueeze(2)
        moments = self._average(terms, mask.sum((1, 2)))
        if rule.bound == "gram":
            gram = moments.gram.double()
            c = pk.min_norm_weights(gram, prior=rule.prior, regularization=rule.regularization).weights
            c = c.to(terms.dtype)
        else:
            c = self._scalar(moments.scores, moments.squares.amax(-1))
        return c[:, None, None]

    def _scalar(self, scores: Tensor, scale: Tensor | None) -> Tensor:
        """Theorem 1 for every row; `scale` as `pk.pama_loss` takes it, max_i a_i^2 where None."""
        if scale is not None:
            scale = scale.clamp(min=TINY)
        rule = self.rule
        return pk.pama_weights(
            scores, prior=rule.prior, regularization=rule.regularization, scale=scale
        ).weights

    def _average(self, terms: Tensor, counts: Tensor) -> Moments:
        counts = counts.clamp(min=1).unsqueeze(-1)
        now = Moments(
            terms.sum((1, 2)) / counts,
            terms.square().sum((1, 2)) / counts,
            torch.einsum("sbti,sbtj->sij", terms, terms) / counts.unsqueeze(-1),
        )
        momentum = self.rule.momentum
        if not momentum:
            return now
        self.batches += 1
        before = self.running or Moments(*(torch.zeros_like(x) for x in vars(now).values()))
        pairs = zip(vars(before).values(), vars(now).values(), strict=True)
        self.running = Moments(*(momentum * b + (1 - momentum) * x for b, x in pairs))
        return Moments(*(x / (1 - momentum**self.batches) for x in vars(self.running).values()))


def gradient_weights(per_objective: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """MGDA: min-norm weights (S, 1, 1, N) of the gradients of (S, N) losses by `inputs` (S, ...)."""
    n = per_objective.shape[1]
    rows = []
    for i in range(n):
        grads = torch.autograd.grad(per_objective[:, i].sum(), inputs, retain_graph=True)
        rows.append(torch.cat([g.flatten(1) for g in grads], 1))
    gradients = torch.stack(rows, 1).double()  # (S, N, P)
    weights = pk.min_norm_weights(gradients @ gradients.mT).weights
    return weights.to(per_objective.dtype)[:, None, None]


def policy_loss(
    weigher: Weigher,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    parameters: Sequence[Tensor],
    representation: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum of the runs' losses (every run a mean over its own tokens), and the weights used (S, N)."""
    rule = weigher.rule
    counts = mask.sum((1, 2)).clamp(min=1)
    a = advantages.clamp(min=0) if rule.noon else advantages
    g, bound = clipped_terms(logprobs, old_logprobs, a, clip)
    if rule.kind in ("mgda", "mgda-ub"):
        each = -(g * mask.unsqueeze(-1)).sum((1, 2)) / counts.unsqueeze(-1)
        inputs = parameters if rule.kind == "mgda" or representation is None else [representation]
        c = gradient_weights(each, inputs)
    else:
        c = weigher(bound, mask)
    if rule.kind == "literal":
        scores = (bound * mask.unsqueeze(-1)).sum((1, 2)) / counts.unsqueeze(-1)
        optimum = (c[:, 0, 0] * scores).sum(-1)[:, None, None, None]
        term = clipped_terms(logprobs, old_logprobs, optimum.expand_as(g[..., :1]), clip)[0].squeeze(-1)
    else:
        term = (c * g).sum(-1)
    loss = -((term * mask).sum((1, 2)) / counts).sum()
    shown = (c.expand_as(g) * mask.unsqueeze(-1)).sum((1, 2)) / counts.unsqueeze(-1)
    return loss, shown.detach()


# --- the catalogue -------------------------------------------------------------------------------


def _pama(per: str, bound: str, noon: bool, regularization: float) -> Rule:
    name = f"{per}-{bound}" if per == "batch" else per
    name += "" if noon else "-signed"
    return Rule(f"{name}-r{regularization:g}", "pama", per, bound, noon, regularization)


PAMA = [
    _pama(per, bound, noon, regularization)
    for per, bound in (("batch", "scores"), ("batch", "gram"), ("sequence", "scores"), ("token", "scores"))
    for noon in (True, False)
    for regularization in (0.0, 0.1, 1.0)
]
OTHERS = [
    Rule("batch-scores-r0-momentum", momentum=0.9),
    Rule("literal", "literal"),
    Rule("fixed", "fixed", noon=False),
    Rule("fixed-noon", "fixed"),
    Rule("mgda", "mgda", noon=False),
    Rule("mgda-ub", "mgda-ub", noon=False),
]
SHARES = (0.05, 0.2, 0.35, 0.65, 0.8, 0.95)  # of the first of two objectives; 0.5 is the uniform prior


def _grid(base: Rule, shares: Sequence[float] = SHARES) -> list[Rule]:
    values = vars(base)
    return [
        Rule(
            **(
                values
                | {"name": f"{base.name}-p{share:g}", "prior": (share, 1 - share), "tuned_as": base.name}
            )
        )
        for share in shares
    ]


_BY_NAME = {rule.name: rule for rule in PAMA + OTHERS}
GRID_OF = (
    "fixed",
    "fixed-noon",
    "batch-scores-r0.1",
    "batch-scores-r1",
    "batch-gram-r0.1",
    "batch-gram-signed-r0.1",
)
GRIDS = {name: _grid(_BY_NAME[name]) for name in GRID_OF}  # for two objectives


def rules(objectives: int, sequences: bool, grids: bool = False, short: bool = False) -> list[Rule]:
    """Those that make sense: one action per sequence has no rule per sequence and no representation."""
    chosen = [
        rule for rule in PAMA + OTHERS if sequences or (rule.per != "sequence" and rule.kind != "mgda-ub")
    ]
    if short:
        chosen = [rule for rule in chosen if rule.regularization < 1]
    if grids and objectives == 2:
        chosen += [rule for grid in GRIDS.values() for rule in grid]
    return chosen
