"""Solves one set of weights for the batch from statistics that are merged over ranks or averaged over
batches, or with a callable rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _call
from ._call import Kind, WeightsPer
from ._validate import check_float, check_memory, check_shape
from .backends import arguments, operators
from .rules import Fixed, Rule, needs_pairs, noon_of, record
from .statistics import ObjectiveStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Solved(NamedTuple):
    """The solution in float64. `preference` is normalised over the objectives with a signal; with an
    objective mask, weights are divided by its sum over the objectives present."""

    weights: Tensor
    optimum: Tensor
    preference: Tensor


@dataclass(frozen=True)
class AveragedRule:
    """A rule that solves on `average(statistics)`, for example a running mean, instead of the batch's
    statistics."""

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
    """Solves for the weights of a rule. The weights returned by a callable are used unchanged."""
    if isinstance(rule, AveragedRule):
        return solve_batch(rule.average(statistics), rule.rule, preference)
    asked = record(rule)
    function = rule if asked.kind == Kind.SOLVED and callable(rule) else None
    if function is not None:
        asked = record(Fixed())  # for the preference over the objectives with a signal
    problem = arguments.Solve(statistics.buffer, preference, statistics.objectives)
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


class BeforeThePass(NamedTuple):
    """The arguments of `apply`, and the statistics and the solution if these were computed before it."""

    rule: _call.Rule
    weights: Tensor | None
    preference: Tensor | None
    merged: ObjectiveStatistics | None
    solved: Solved | None


def before_the_pass(
    tokens: _call.Tokens,
    rule: Rule,
    asked: _call.Rule,
    preference: Tensor | None,
    weights: Tensor | None,
    process_group: ProcessGroup | None,
    pairs: bool,
) -> BeforeThePass:
    """Solves for weights that `apply` cannot compute in its own pass: those over all ranks of a process
    group, and those of a callable rule. `asked`: the record of the rule."""
    if weights is not None:
        asked = asked._replace(kind=Kind.GIVEN.value)
    if process_group is None and asked.kind != Kind.SOLVED:
        return BeforeThePass(asked, weights, preference, None, None)
    sums = operators.statistics(tokens, arguments.Statistics(pairs))
    merged = ObjectiveStatistics(sums, tokens.objectives, pairs)
    if process_group is not None:
        merged = merged.all_reduce(process_group)
    if weights is not None:
        return BeforeThePass(asked, weights, preference, merged, None)
    solved = solve_batch(merged, rule, preference)
    return BeforeThePass(SOLVED, solved.weights, solved.preference, merged, solved)
