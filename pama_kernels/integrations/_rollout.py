"""Functions shared by the adapters: build a rule from settings, and combine the rewards of a rollout into
one advantage per completion.

A reward belongs to a completion. NaN means that the objective does not apply to it (a reward function
returned None or NaN): it is ignored in all means, and the objective is absent for this completion. An
infinite reward is an error. All computations are in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pama_kernels._solve import AveragedRule, solve_batch
from pama_kernels._validate import check_choice
from pama_kernels.advantages import combine_advantages, group_normalize
from pama_kernels.rules import (
    DEFAULT,
    NAMES,
    Pama,
    Rule,
    RuleLike,
    SoftMin,
    UPGrad,
    noon_of,
    resolve_rule,
)
from pama_kernels.statistics import ObjectiveStatistics
from pama_kernels.whiten import without_rounding

# The rules by name, and the settings of each.
SETTINGS: dict[str, tuple[str, ...]] = {
    "pama": ("weights_per", "bound", "noon", "regularization"),
    "upgrad": (),
    "fixed": (),
    "softmin": ("weights_per", "temperature"),
    "paper": ("weights_per",),
}
_NAMES = "|".join(("rule", "preference", "momentum", "normalize", *dict.fromkeys(sum(SETTINGS.values(), ()))))
PAIRS_LOGGED_UP_TO = 8  # objectives; with more, only the pair with the strongest conflict is logged


# --- settings ---------------------------------------------------------------------------------------------


def make_rule(rule: RuleLike, settings: Mapping[str, object]) -> Rule:
    """`rule`: a name, a rule, a function of `ObjectiveStatistics`, or None for the library's default.

    Settings that are None keep the rule's default. Settings of "pama" without a rule imply "pama". A setting
    that the rule does not have is an error.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    name = rule if isinstance(rule, str) else None
    if name is not None:
        check_choice("rule", name, tuple(SETTINGS))
    elif rule is None:
        implied = "pama" if given.keys() & set(SETTINGS["pama"]) else None
        name = implied or next(name for name, known in NAMES.items() if isinstance(DEFAULT, type(known)))
    for key, value in given.items():
        if key not in SETTINGS.get(name or "", ()):
            raise ValueError(
                f"{key}: expected None with rule={rule!r}, which has no such setting, got {value!r}"
            )
    if name is None:
        made = resolve_rule(rule)
    elif name == "paper":
        if "weights_per" not in given:
            raise ValueError(
                "weights_per: expected 'batch', 'sequence' or 'token' with rule='paper', which leaves it "
                "open, got None"
            )
        made = Pama.paper(str(given["weights_per"]))
    else:
        kind: Callable[..., Rule] = type(NAMES[name])
        made = kind(**given)
    if isinstance(made, (Pama, SoftMin)) and made.weights_per == "token":
        made = replace(made, weights_per="sequence")  # all tokens of a completion have the same advantages
    return made


def only_lengths(rule: Rule) -> bool:
    """Whether the weights would only reflect the lengths of completions: group advantages add up to 0."""
    return isinstance(rule, Pama) and rule.weights_per == "batch" and rule.bound == "scores" and not rule.noon


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Adds the adapter's prefix to the names of settings in error messages, since users set them under that
    name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(re.sub(rf"(?<![\w.])({_NAMES})(?=[:=])", rf"{prefix}\1", str(error))) from None


def unique_names(names: Sequence[str]) -> list[str]:
    """Adds a suffix to repeated names: reward, reward_2, ..."""
    result: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in result or (number > 1 and unique in names):
            number += 1
            unique = f"{name}_{number}"
        result.append(unique)
    return result


# --- rewards to advantages ----------------------------------------------------------------------------------


def check_finite(rewards: Tensor, names: Sequence[str]) -> None:
    infinite = [name for name, bad in zip(names, rewards.isinf().any(0).tolist(), strict=True) if bad]
    if infinite:
        raise ValueError(f"rewards: expected finite numbers or None, got inf from {', '.join(infinite)}")


def reward_advantages(
    rewards: Tensor,
    names: Sequence[str],
    *,
    eps: float,
    scale: str = "group",
    group_size: int | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Advantages (B, N), separately for each objective: the reward minus the mean of its group, divided by
    the standard deviation within the "group" or the "batch", or not divided ("none")."""
    check_finite(rewards, names)
    size = group_size or max(len(rewards), 1)
    groups = torch.arange(len(rewards)) // size if group_ids is None else group_ids
    rewards = without_rounding(rewards, groups)
    advantages = group_normalize(
        rewards, group_size=group_size, group_ids=group_ids, scale=scale == "group", eps=eps
    )
    if scale == "batch":
        squares = (rewards - rewards.nanmean(0)).square().nansum(0)
        degrees = (~rewards.isnan()).sum(0) - 1
        advantages = advantages / ((squares / degrees.clamp(min=1)).sqrt() + eps)
    return advantages


class Advantages(NamedTuple):
    """Advantages per objective (B, N), 0 where the objective is absent."""

    of_rewards: Tensor  # the weights are solved from these
    applied: Tensor  # the weights multiply these: the same, or with a penalty subtracted from every objective


def leave_one_out(
    rewards: Tensor,
    names: Sequence[str],
    *,
    group_size: int,
    eps: float,
    penalty: Tensor | None = None,
    whiten: bool = False,
) -> Advantages:
    """RLOO's advantages, separately for each objective: the reward minus the mean of the other rewards in its
    group; with `whiten`, divided by the standard deviation within the batch.

    `penalty` (B,) is subtracted from every reward, but not from those that the weights are solved from:
    otherwise a constant reward minus a penalty would look like an objective that varies.
    """
    check_finite(rewards, names)
    rewards = without_rounding(rewards, torch.arange(len(rewards)) // group_size)
    here = ~rewards.isnan()
    number = here.view(-1, group_size, rewards.shape[1]).sum(1).repeat_interleave(group_size, 0)
    factor = number / (number - 1).clamp(min=1)
    of_rewards = applied = factor * group_normalize(rewards, group_size=group_size, scale=False)
    if penalty is not None:
        penalised = rewards - penalty[:, None]
        applied = factor * group_normalize(penalised, group_size=group_size, scale=False)
    if whiten:  # advantages of a group sum to 0, so there is no mean to subtract
        degrees = (here & (number > 1)).sum(0) - 1
        deviation = (applied.square().sum(0) / degrees.clamp(min=1)).sqrt() + eps
        of_rewards, applied = of_rewards / deviation, applied / deviation
    return Advantages(of_rewards, applied)


class Combination(NamedTuple):
    """The combined advantages of a rollout, one row for each completion of all processes.

    `positive` and `negative` are the inputs of a loss that clips each objective according to its own sign,
    for any number of objectives: sum_i c_i L(A_i) = L(positive) + L(-negative) - L(0).
    """

    advantages: Tensor  # (B,), positive - negative
    positive: Tensor  # (B,), sum_i c_i max(A_i, 0)
    negative: Tensor  # (B,), sum_i c_i max(-A_i, 0); 0 under Noon
    weights: Tensor  # (N,), or (B, N) with weights per sequence
    optimum: Tensor  # 0-d, or (B,)
    covariance: Tensor  # (N,), of each objective's advantages with the combined ones
    statistics: ObjectiveStatistics


def combine(
    advantages: Tensor,
    present: Tensor,
    token_weights: Tensor,
    statistics: ObjectiveStatistics,
    rule: Rule,
    preference: Tensor | None,
    *,
    applied: Tensor | None = None,
    average: Callable[[ObjectiveStatistics], ObjectiveStatistics] | None = None,
    normalize: bool = False,
) -> Combination:
    """
    Args:
        advantages, present: (B, N) float64 and bool, of all processes.
        token_weights: (B,) float64, the token weights of each completion's valid tokens, summed.
        statistics: of all processes, with pairs.
        rule: from `make_rule`.
        preference: (N,) float64 on the simplex, or None.
        applied: (B, N), multiplied by the weights in place of `advantages`.
        average: maps `statistics` to those that the weights are solved from, for example a running mean.
        normalize: divide by the root mean square over tokens.
    """
    if getattr(rule, "weights_per", "batch") == "batch":
        asked = rule if average is None else AveragedRule(rule, average)
        weights, optimum, effective = solve_batch(statistics, asked, preference)
        here = present.to(torch.float64)
        shares = torch.nan_to_num(here / (here @ effective)[:, None], nan=0.0, posinf=0.0) * weights
    else:
        solved = combine_advantages(advantages, rule=rule, preference=preference, objective_mask=present)
        weights, optimum, shares = solved.weights, solved.optimum, solved.weights * present
    applied = advantages if applied is None else applied
    positive = (shares * applied.clamp(min=0)).sum(1)
    negative = (shares * applied.clamp(max=0)).sum(1).neg()
    if noon_of(rule):
        negative = torch.zeros_like(negative)
    if normalize:
        square = (token_weights * (positive - negative).square()).sum() / token_weights.sum()
        root = torch.where(square > 0, square, 1.0).sqrt()
        positive, negative = positive / root, negative / root
    combined = positive - negative
    share = token_weights[:, None] * present
    share = share / share.sum(0)  # NaN where the objective is absent
    centred = advantages - (share * advantages).sum(0)
    covariance = (share * centred * combined[:, None]).sum(0)
    return Combination(combined, positive, negative, weights, optimum, covariance, statistics)


# --- metrics ------------------------------------------------------------------------------------------------


def rollout_metrics(combination: Combination, names: Mapping[int, str], rule: Rule) -> dict[str, float]:
    """Metrics for a logger, for the objectives in `names`; NaN where a metric is undefined.

    By objective: ``pama/weight``; ``pama/signal``, 2 where the advantages vary, 1 where the reward is
    constant in every group, 0 where it is absent; ``pama/covariance`` with the combined advantage, negative
    where the step makes the objective worse to first order; and the statistics that the rule solves from. By
    pair: ``pama/conflict``.
    """
    statistics, weights = combination.statistics, combination.weights
    absent = statistics.count == 0
    mean = weights.mean(0) if weights.dim() == 2 else weights
    columns = {"weight": mean, "covariance": combination.covariance}
    if isinstance(rule, UPGrad):
        columns["second_moment"] = statistics.second_moments
    elif isinstance(rule, Pama) and rule.bound == "scores":
        columns["score"] = statistics.scores
    elif isinstance(rule, Pama):
        assert statistics.cosines is not None
        columns["cosine"] = statistics.cosines @ mean
    metrics = {}
    for what, values in columns.items():
        listed = torch.where(absent, math.nan, values).tolist()
        metrics.update({f"pama/{what}/{name}": listed[i] for i, name in names.items()})
    live = statistics.signal
    signal = (1 + live.long()).masked_fill(absent, 0).tolist()
    metrics.update({f"pama/signal/{name}": float(signal[i]) for i, name in names.items()})
    metrics["pama/optimum"] = combination.optimum.mean().item()
    metrics.update(_conflicts(statistics, live, names))
    return metrics


def _conflicts(statistics: ObjectiveStatistics, live: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    """Correlations of two objectives' advantages; NaN where one is constant or no completion has both."""
    matrix, together = statistics.conflict, statistics._pair("pair_count")
    assert matrix is not None
    assert together is not None
    known = (together > 0) & live & live[:, None]
    values = torch.where(known, matrix, math.nan).tolist()
    pairs = {(i, j): values[i][j] for i in names for j in names if i < j}
    if len(names) <= PAIRS_LOGGED_UP_TO:
        return {f"pama/conflict/{names[i]}~{names[j]}": value for (i, j), value in pairs.items()}
    met = [value for value in pairs.values() if not math.isnan(value)]
    return {"pama/conflict/worst": min(met, default=math.nan)}
