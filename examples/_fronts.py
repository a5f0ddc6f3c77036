"""Scales on which returns of several objectives can be compared: the known front's, or that of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mo_gymnasium
import numpy as np

Points = Sequence[Sequence[float]] | np.ndarray


def front(env: str, gamma: float) -> np.ndarray | None:
    """The environment's own list of discounted returns (P, N), or None where it has none."""
    made: Any = mo_gymnasium.make(env).unwrapped
    if not hasattr(made, "pareto_front"):
        return None
    return np.array(sorted(point.tolist() for point in made.pareto_front(gamma)))


def scaled(points: Points, low: Points, high: Points) -> np.ndarray:
    """(P, N) with `low` at 0 and `high` at 1."""
    low, high = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    return (np.asarray(points, dtype=float) - low) / (high - low)


def distance(points: Points, of_front: np.ndarray, low: Points, high: Points) -> np.ndarray:
    """(P,): to the nearest point of the front, on the scale."""
    difference = scaled(points, low, high)[:, None] - scaled(of_front, low, high)
    return np.linalg.norm(difference, axis=-1).min(1)


# Half a 95% interval is t times the standard error, by degrees of freedom (Student).
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half its 95% interval; NaN of a single value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    t = T_95[count - 2] if count - 2 < len(T_95) else 1.96 * (1 + 1.25 / (count - 1))
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(count))
