"""One set of weights for the batch from its statistics: of all ranks, a running mean, or a callable rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _call
from ._call import Kind, WeightsPer
from ._validate import check_float, check_memory, check_shape
from .backends import operators
from .rules import Fixed, Rule, needs_pairs, noon_of, record
from .statistics import ObjectiveStatistics


class Solved(NamedTuple):
    """In float64; `preference` is the one over the objectives with a signal, by which presence divides."""

    weights: Tensor
    optimum: Tensor
    preference: Tensor


@dataclass(frozen=True)
class AveragedRule:
    """A rule on other statistics than the batch's, which `average` gives: a running mean's."""

    rule: Rule
    average: Callable[[ObjectiveStatistics], ObjectiveStatistics]

    @property
    def noon(self) -> bool:
        return noon_of(self.rule)

    @property
    def pairs(self) -> bool:
        return needs_pairs(self.rule)

    def __call__(self, statistics: ObjectiveStatistics) -> Tensor:
        return solve_batch(statistics, self, None).weights


SOLVED = _call.Rule(Kind.SOLVED, WeightsPer.BATCH, 0.0)


def solve_batch(statistics: ObjectiveStatistics, rule: Rule, preference: Tensor | None) -> Solved:
    """The rule's weights; a callable's are taken as they come."""
    if isinstance(rule, AveragedRule):
        return solve_batch(rule.average(statistics), rule.rule, preference)
    asked = record(rule)
    function = rule if asked.kind == Kind.SOLVED and callable(rule) else None
    if function is not None:
        asked = record(Fixed())  # for the preference over the objectives with a signal
    problem = operators.Solve(statistics.buffer, preference, statistics.objectives)
    solved = Solved(*operators.solve(problem, asked))
    if function is None:
        return solved
    weights = function(statistics)
    check_float("weights of the rule", weights)
    check_memory("weights of the rule", weights)
    check_shape("weights of the rule", weights, (statistics.objectives,))
    weights = weights.detach().to(torch.float64)
    if weights.device != statistics.buffer.device:
        raise ValueError(
            f"weights of the rule: expected device {statistics.buffer.device}, got {weights.device}"
        )
    return Solved(weights, (statistics.scores * weights).sum(), solved.preference)
