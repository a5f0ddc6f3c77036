"""Fronts that are known, and how far a point or a set of points is from them (two objectives, maximised)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mo_gymnasium
import torch
from torch import Tensor


@cache
def deep_sea_treasure(gamma: float) -> Tensor:
    """The environment's own list of discounted returns, (10, 2)."""
    env = mo_gymnasium.make("deep-sea-treasure-v0")
    return torch.tensor([point.tolist() for point in env.unwrapped.pareto_front(gamma)], dtype=torch.float64)


@cache
def water_reservoir(gamma: float, steps: int = 100) -> Tensor:
    """Returns of the best stationary policies for 41 weightings of the objectives, (<= 41, 2).

    Dynamic programming over levels 0, 1 .. 200 and what may stay behind the dam, 0 .. 100: policy iteration
    for each weighting without end, then `steps` steps of its answer from the environment's starting levels.
    """
    dam = type(mo_gymnasium.make("water-reservoir-v0").unwrapped)
    level = torch.arange(201, dtype=torch.float64)
    kept = level[: int(dam.S_MIN_REL) + 1]
    # P(next level | kept): the inflow is normal, rounded to the grid, and the ends take the tails.
    edges = (level[:-1] + 0.5 - kept[:, None] - dam.DAM_INFLOW_MEAN) / dam.DAM_INFLOW_STD
    below = torch.special.ndtr(edges)
    ends = torch.zeros(len(kept), 1, dtype=torch.float64), torch.ones(len(kept), 1, dtype=torch.float64)
    chance = torch.cat([ends[0], below, ends[1]], 1).diff(dim=1)

    flooding = -(chance @ (level / dam.S - dam.H_FLO_U).clamp(min=0))
    supply = -(dam.W_IRR - (level[:, None] - kept)).clamp(min=0)
    reward = torch.stack([flooding.expand_as(supply), supply], -1)  # (level, kept, 2)
    impossible = kept > level[:, None]
    rows, one = torch.arange(len(level)), torch.eye(len(level), dtype=torch.float64)
    choice = torch.zeros(len(level), dtype=torch.long)
    start = torch.as_tensor(dam.s_init).double().round().long()
    points = []
    for share in torch.linspace(0, 1, 41, dtype=torch.float64):
        weights = torch.stack([share, 1 - share])
        while True:
            value = torch.linalg.solve(one - gamma * chance[choice], reward[rows, choice])
            action_value = ((reward + gamma * chance @ value) @ weights).masked_fill(impossible, -torch.inf)
            better = action_value.argmax(1)
            if (action_value[rows, better] - action_value[rows, choice]).max() < 1e-9:
                break
            choice = better
        value = torch.zeros_like(value)
        for _ in range(steps):
            value = reward[rows, choice] + gamma * chance[choice] @ value
        points.append(value[start].mean(0))
    return nondominated(torch.stack(points))


FRONTS = {"deep-sea-treasure-v0": deep_sea_treasure, "water-reservoir-v0": water_reservoir}


def nondominated(points: Tensor) -> Tensor:
    """Those of (P, 2) that no other dominates, in the order of the first objective, each once."""
    points = torch.unique(points, dim=0)
    best_after = points[:, 1].flip(0).cummax(0).values.flip(0)
    keep = torch.ones(len(points), dtype=torch.bool)
    keep[:-1] = points[:-1, 1] > best_after[1:]
    return points[keep]


def in_units_of(front: Tensor, points: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """(P, 2), with the front's worst and best value of each objective at 0 and 1."""
    low, high = front.min(0).values, front.max(0).values
    return (torch.as_tensor(points, dtype=torch.float64) - low) / (high - low)


def distance(front: Tensor, points: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """(P,): from each point to the line through the front's points, in units of the front.

    Both fronts are concave, and a policy that mixes two neighbours lies on the line between them.
    """
    line, x = in_units_of(front, nondominated(front)), in_units_of(front, points)[:, None]
    start, step = line[:-1], line.diff(dim=0)
    along = (((x - start) * step).sum(-1) / step.square().sum(-1)).clamp(0, 1)
    return (x - start - along[..., None] * step).norm(dim=-1).min(1).values


def hypervolume(front: Tensor, points: Sequence[Sequence[float]] | Tensor) -> float:
    """Area that the points dominate, as a share of what the front does; from -0.1, -0.1 in its units."""

    def area(x: Tensor) -> float:
        x = nondominated((in_units_of(front, x) + 0.1).clamp(min=0))
        widths = torch.diff(x[:, 0], prepend=torch.zeros(1, dtype=x.dtype))
        return float((widths * x[:, 1]).sum())

    return area(torch.as_tensor(points, dtype=torch.float64)) / area(front)
