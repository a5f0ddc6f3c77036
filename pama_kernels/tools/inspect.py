"""Analyses several rewards before a training run: which ones vary, which ones conflict, and the effect of
each rule."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pama_kernels.advantages import combine_advantages, group_normalize
from pama_kernels.rules import Fixed, Pama, Rule, SoftMin, UPGrad
from pama_kernels.statistics import objective_statistics
from pama_kernels.whiten import without_rounding

from .read import GROUP_COLUMNS, STEP_COLUMNS, Table, find_column, reward_columns, reward_matrix

RULES: dict[str, Rule] = {
    "fixed": Fixed(),
    "upgrad": UPGrad(),
    "pama": Pama(),
    "softmin": SoftMin(),
    "paper": Pama.paper("sequence"),
}
SUM = "sum"  # no rule: rewards added up, then normalised in groups


@dataclass(frozen=True)
class Effect:
    """The effect of one rule in every step (steps, N): NaN where a reward is absent."""

    weights: Tensor | None  # None: a sum of rewards has none
    covariance: Tensor

    @property
    def mean_weights(self) -> Tensor | None:
        return None if self.weights is None else self.weights.nanmean(0)

    @property
    def mean_covariance(self) -> Tensor:
        return self.covariance.nanmean(0)

    def sacrificed(self, small: float) -> Tensor:
        """Share of the steps with a covariance below -small (N,)."""
        return (self.covariance < -small).sum(0) / (~self.covariance.isnan()).sum(0)


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_rewards`. Tensors are float64; NaN where a value is undefined."""

    source: str
    names: list[str]
    left_out: list[str]
    rows: int
    groups: int
    group_sizes: tuple[int, int]  # smallest, largest
    steps: int  # 1 where there is no step column
    step_column: str | None
    mean: Tensor  # (N,)
    deviation: Tensor
    applies: Tensor  # share of the completions
    varies: Tensor  # share of the groups in which the reward applies and is not constant
    together: Tensor  # completions to which both apply (N, N)
    correlation: Tensor  # of the group-normalised rewards (N, N)
    effects: dict[str, Effect]


def inspect_rewards(
    table: Table,
    *,
    rewards: Sequence[str] | None = None,
    group_size: int | None = None,
    group_column: str | None = None,
    step_column: str | None = None,
    preference: Sequence[float] | None = None,
) -> Inspection:
    """
    Args:
        table: one row for each completion.
        rewards: the columns that are rewards; by default every numeric one that is no counter or identifier.
        group_size: number of completions per prompt; those of a prompt are adjacent rows.
        group_column: instead, the column with the prompt or its number; by default one with a usual name.
        step_column: the column with the training step; by default one with a usual name. The rules are solved
            separately for each step; without such a column the table is one batch.
        preference: one number for each reward, as for `combine_advantages`.

    Raises:
        ValueError: a column is missing or not numeric, there are fewer than two rewards, or the groups do not
            match the arguments.
    """
    names = reward_columns(table, rewards, (group_column, step_column))
    values = reward_matrix(table, names)
    if preference is not None and len(preference) != len(names):
        raise ValueError(
            f"preference: expected {len(names)} numbers, one for each of {', '.join(names)}, "
            f"got {len(preference)}"
        )
    step_column = find_column(table, step_column, STEP_COLUMNS, "step_column")
    steps = table.columns[step_column] if step_column else [None] * table.rows
    group_ids = _groups(table, steps, group_size, group_column)
    sizes = torch.bincount(group_ids)

    values = without_rounding(values, group_ids)
    advantages = group_normalize(values, group_ids=group_ids)
    present = ~values.isnan()
    together = present.double().T @ present.double()
    return Inspection(
        source=table.source,
        names=names,
        left_out=[name for name in table.columns if name not in names],
        rows=table.rows,
        groups=len(sizes),
        group_sizes=(int(sizes.min()), int(sizes.max())),
        steps=len(set(map(_key, steps))),
        step_column=step_column,
        mean=torch.tensor([_mean(column) for column in values.T], dtype=torch.float64),
        deviation=torch.tensor([_deviation(column) for column in values.T], dtype=torch.float64),
        applies=present.double().mean(0),
        varies=_share_of_groups(advantages != 0, group_ids) / _share_of_groups(present, group_ids),
        together=together,
        correlation=_correlation(advantages, present, together),
        effects=_effects(values, advantages, present, group_ids, _numbered(steps), preference),
    )


def _mean(column: Tensor) -> float:
    known = column[~column.isnan()]
    unit = _unit(known)
    return float((known / unit).mean() * unit)


def _deviation(column: Tensor) -> float:
    known = column[~column.isnan()]
    unit = _unit(known)
    return float((known / unit).std(correction=0) * unit) if len(known) else math.nan


def _unit(known: Tensor) -> Tensor:
    """A unit in which neither sums nor squares of the values leave the range of float64."""
    largest = known.abs().max() if len(known) else known.new_ones(())
    return torch.where(largest > 0, largest, 1.0)


# --- groups -------------------------------------------------------------------------------------------------


def _key(cell: Any) -> Hashable:
    return cell if isinstance(cell, Hashable) else repr(cell)


def _numbered(cells: Sequence[Any]) -> Tensor:
    """0, 1, ... in the order in which the cells' values first appear."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(_key(cell), len(numbers)) for cell in cells])


def _groups(table: Table, steps: Sequence[Any], size: int | None, column: str | None) -> Tensor:
    """The number of each row's group."""
    if size is not None:
        if column is not None:
            raise ValueError(f"group_column: expected None with group_size, got {column}")
        if size < 2 or table.rows % size:
            raise ValueError(
                f"group_size: expected a divisor of the {table.rows} rows, at least 2, got {size}"
            )
        for start in range(0, table.rows, size):
            within = {_key(step) for step in steps[start : start + size]}
            if len(within) > 1:
                raise ValueError(
                    f"group_size: expected the rows of a group in one step, got rows {start + 1} to "
                    f"{start + size} with steps {', '.join(sorted(map(str, within)))}"
                )
        known = find_column(table, None, GROUP_COLUMNS, "group_column")
        cells = table.columns[known] if known is not None else []
        for start in range(0, len(cells), size):
            if len({_key(cell) for cell in cells[start : start + size]}) > 1:
                raise ValueError(
                    f"group_size: expected the rows of a group to have the same {known}, got different ones "
                    f"in rows {start + 1} to {start + size}; without --group-size {known} defines the groups"
                )
        return torch.arange(table.rows) // size
    column = find_column(table, column, GROUP_COLUMNS, "group_column")
    if column is None:
        raise ValueError(
            "group_size: expected the number of completions of a prompt (--group-size), or a column that "
            f"identifies the prompt (--group-column); {table.source} has {table.listed()}"
        )
    cells = table.columns[column]
    groups = _numbered([(_key(step), _key(cell)) for step, cell in zip(steps, cells, strict=True)])
    if int(groups.max()) + 1 == table.rows:
        raise ValueError(
            f"group_column: expected several completions with the same {column} in a step, got "
            f"{table.rows} rows that all differ; give --group-size"
        )
    return groups


def _share_of_groups(where: Tensor, group_ids: Tensor) -> Tensor:
    """Number of the groups with a True among their rows (N,)."""
    groups = torch.zeros(int(group_ids.max()) + 1, where.shape[1], dtype=torch.float64)
    return (groups.index_add_(0, group_ids, where.double()) > 0).double().sum(0)


# --- rules --------------------------------------------------------------------------------------------------


def _correlation(advantages: Tensor, present: Tensor, together: Tensor) -> Tensor:
    statistics = objective_statistics(None, None, advantages, objective_mask=present, pairs=True)
    assert statistics.conflict is not None
    known = statistics.signal & statistics.signal[:, None] & (together > 0)
    return torch.where(known, statistics.conflict, math.nan)


def _effects(
    rewards: Tensor,
    advantages: Tensor,
    present: Tensor,
    group_ids: Tensor,
    steps: Tensor,
    preference: Sequence[float] | None,
) -> dict[str, Effect]:
    scale = rewards.new_ones(rewards.shape[1]) if preference is None else rewards.new_tensor(preference)
    added = group_normalize((rewards * scale).nansum(1, keepdim=True), group_ids=group_ids)[:, 0]
    batches = [torch.nonzero(steps == step)[:, 0] for step in range(int(steps.max()) + 1)]
    covariance = [_covariance(advantages[rows], present[rows], added[rows]) for rows in batches]
    effects = {SUM: Effect(None, torch.stack(covariance))}
    for name, rule in RULES.items():
        weights, covariance = [], []
        for rows in batches:
            here = present[rows]
            result = combine_advantages(
                advantages[rows], rule=rule, preference=preference, objective_mask=here
            )
            mean = result.weights.mean(0) if result.weights.dim() == 2 else result.weights
            weights.append(torch.where(here.any(0), mean.double(), math.nan))
            covariance.append(_covariance(advantages[rows], here, result.advantages))
        effects[name] = Effect(torch.stack(weights), torch.stack(covariance))
    return effects


def _covariance(advantages: Tensor, present: Tensor, combined: Tensor) -> Tensor:
    """The covariance of each reward's advantages with the combined advantage, over the completions to which
    the reward applies."""
    statistics = objective_statistics(
        None,
        None,
        torch.cat([advantages, combined[:, None]], 1),
        objective_mask=torch.cat([present, torch.ones_like(present[:, :1])], 1),
        pairs=True,
    )
    assert statistics.covariance is not None
    return torch.where(present.any(0), statistics.covariance[:-1, -1], math.nan)
