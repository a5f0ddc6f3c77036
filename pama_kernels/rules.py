"""The rules that choose the objectives' weights.

A rule is a frozen dataclass, one of the names "pama", "upgrad", "fixed" and "softmin", or any function of
`ObjectiveStatistics` that returns weights (N,).

| rule | weights c on the simplex, p the preference |
|---|---|
| `Pama(bound="gram")` | minimise 1/2 c'Cc + rho/2 ||c - p||^2, C the cosines of the objectives' bound terms |
| `Pama(bound="scores")` | minimise 1/2 (a.c)^2 + rho/2 ||c - p||^2, a the means of the bound terms |
| `UPGrad()` | the mean of p-weighted projections on the Gram matrix of the bound terms |
| `Fixed()` | c = p |
| `SoftMin(temperature)` | c_i proportional to p_i exp(-A_i / temperature) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from . import _call
from ._call import Kind, Number, WeightsPer
from ._validate import check_choice, check_flag, check_number, check_positive

if TYPE_CHECKING:
    from .statistics import ObjectiveStatistics

__all__ = ["Fixed", "Pama", "SoftMin", "UPGrad"]  # what the package exports

_WEIGHTS_PER = ("batch", "sequence", "token")


@dataclass(frozen=True)
class Pama:
    """Minimises PAMA's bound on the norm of the combined policy gradient.

    Args:
        weights_per: one set of weights for the "batch", for each "sequence", or for each "token".
        bound: "gram", the min-norm problem on the cosines of the bound terms (per batch only), or "scores",
            the problem of the paper's Theorem 1 on their means. None: "gram" per batch, "scores" otherwise.
        noon: "no negative", the paper's clamp: advantages below 0 count as 0.
        regularization: penalty on the distance from the preference, rho = regularization * r, with r = 1
            for cosines and max_i mean(I_i^2) for scores; at least 0.

    With weights per batch, `noon=False`, whitened advantages and regularization 0, no objective decreases to
    first order. On cosines, two objectives with the uniform preference have the weights (1/2, 1/2).

    Source: He & Maghsudi 2025 (arXiv 2508.07768): the bound in vector form ("gram"), Theorem 1 ("scores").
    """

    weights_per: str = "batch"
    bound: str | None = None
    noon: bool = False
    regularization: Number = 0.1

    def __post_init__(self) -> None:
        check_choice("weights_per", self.weights_per, _WEIGHTS_PER)
        if self.bound is None:
            object.__setattr__(self, "bound", "gram" if self.weights_per == "batch" else "scores")
        check_choice("bound", self.bound, ("gram", "scores"))
        if self.bound == "gram" and self.weights_per != "batch":
            raise ValueError(f"bound: 'gram' needs weights_per='batch', got weights_per={self.weights_per!r}")
        check_flag("noon", self.noon)
        object.__setattr__(self, "regularization", check_number("regularization", self.regularization, 0.0))

    @classmethod
    def paper(cls, weights_per: str) -> Pama:
        """The paper's rule: Noon, scores, no regularization. The paper does not say whether weights are per
        batch, sequence or token; "token" is the most literal reading, with the effective advantage max(min_i
        A_i, 0)."""
        return cls(weights_per=weights_per, bound="scores", noon=True, regularization=0.0)


@dataclass(frozen=True)
class UPGrad:
    """The sum of the objectives' projections on the dual cone, on the Gram matrix M of the bound terms.

    c = sum_i c^(i), c^(i) the minimiser of c'Mc over c >= p_i e_i, divided by its sum. One set of weights for
    the batch. (Mc)_j >= 0 for every j and any scales of the rewards: to first order no objective decreases.

    Source: Quinton & Rey 2024 (arXiv 2406.16232).
    """


@dataclass(frozen=True)
class Fixed:
    """c = p, one set for the batch: MORLHF; with group-normalised rewards this is GDPO's combination (arXiv
    2601.05242)."""


@dataclass(frozen=True)
class SoftMin:
    """c_i proportional to p_i exp(-A_i / temperature): a soft minimum over the objectives' advantages.

    Args:
        temperature: above 0, in units of the advantages.
        weights_per: "sequence", on the sequence's mean advantages, or "token".

    Source: RVPO (arXiv 2605.05750).
    """

    temperature: Number = 1.0
    weights_per: str = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", check_positive("temperature", self.temperature))
        check_choice("weights_per", self.weights_per, ("sequence", "token"))


CallableRule = Callable[["ObjectiveStatistics"], Tensor]
Rule = Pama | UPGrad | Fixed | SoftMin | CallableRule
RuleLike = Rule | str | None

NAMES: dict[str, Rule] = {"pama": Pama(), "upgrad": UPGrad(), "fixed": Fixed(), "softmin": SoftMin()}
DEFAULT: Rule = UPGrad()  # chosen by the criterion of docs/study.md


def resolve_rule(rule: RuleLike) -> Rule:
    """The rule itself; None is the default."""
    if rule is None:
        return DEFAULT
    if isinstance(rule, str):
        if rule == "paper":
            raise ValueError("rule: expected the paper's rule as Pama.paper(weights_per), got 'paper'")
        check_choice("rule", rule, tuple(NAMES))
        return NAMES[rule]
    if isinstance(rule, (Pama, UPGrad, Fixed, SoftMin)):
        return rule
    if isinstance(rule, type) or not callable(rule):
        expected = (
            "a rule (Pama(), UPGrad(), Fixed(), SoftMin()), its name or a function of ObjectiveStatistics"
        )
        raise TypeError(f"rule: expected {expected}, got {rule!r}")
    return rule


_UPGRAD = _call.Rule(Kind.UPGRAD, WeightsPer.BATCH, 0.0)
_FIXED = _call.Rule(Kind.FIXED, WeightsPer.BATCH, 0.0)
_CALLABLE = _call.Rule(Kind.SOLVED, WeightsPer.BATCH, 0.0)


def record(rule: Rule) -> _call.Rule:
    """The record of the rule that backends read; the weights of a callable are computed before the call."""
    if isinstance(rule, UPGrad):
        return _UPGRAD
    if isinstance(rule, Pama):
        kind = Kind.GRAM if rule.bound == "gram" else Kind.SCORES
        return _call.Rule(kind, WeightsPer[rule.weights_per.upper()], rule.regularization)
    if isinstance(rule, SoftMin):
        return _call.Rule(Kind.SOFTMIN, WeightsPer[rule.weights_per.upper()], rule.temperature)
    return _FIXED if isinstance(rule, Fixed) else _CALLABLE


def noon_of(rule: Rule) -> bool:
    """Whether the rule's statistics and loss keep positive advantages only."""
    return bool(getattr(rule, "noon", False))


def needs_pairs(rule: Rule) -> bool:
    """Whether the rule needs the N x N statistics. A function is assumed to need them unless it has an
    attribute `pairs` that is False."""
    if isinstance(rule, Pama):
        return rule.bound == "gram"
    if isinstance(rule, (Fixed, SoftMin)):
        return False
    return isinstance(rule, UPGrad) or bool(getattr(rule, "pairs", True))
