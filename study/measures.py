"""Intervals, paired differences, fronts and min-norm points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import quadprog
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.stats import t as student

Array = NDArray[np.float64]


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (Student's t); NaN of fewer than two values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(x.mean()) if len(x) else math.nan, math.nan
    return float(x.mean()), float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


mean_interval = interval  # the name that other modules use


def nondominated(points: ArrayLike) -> Array:
    """The points (K, N) that no other one weakly dominates, each once."""
    p = np.unique(np.asarray(points, dtype=float), axis=0)
    at_least = (p[:, None, :] >= p[None, :, :]).all(-1)
    better = (p[:, None, :] > p[None, :, :]).any(-1)
    return p[~(at_least & better).any(0)]


def improvable(value: ArrayLike, vertices: ArrayLike) -> float:
    """The amount by which all N values could increase at once: the distance to the front of conv(vertices).

    max t such that some mixture of the vertices (K, N) is at least value + t in every objective: 0 on the
    (weak) Pareto front, positive inside.
    """
    v, p = np.asarray(value, dtype=float), np.asarray(vertices, dtype=float)
    k, n = p.shape
    solution = linprog(
        np.append(np.zeros(k), -1.0),
        A_ub=np.hstack([-p.T, np.ones((n, 1))]),
        b_ub=-v,
        A_eq=np.append(np.ones(k), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * k + [(None, None)],
        method="highs",
    )
    if not solution.success:
        raise RuntimeError(f"distance to the front: {solution.message}")
    return float(-solution.fun)


def min_norm(gram: ArrayLike) -> tuple[float, Array]:
    """min |sum_i c_i g_i| over the simplex, and c, from the Gram matrix (N, N), by quadprog."""
    g = np.asarray(gram, dtype=float)
    n = len(g)
    top = float(np.trace(g))
    if top <= 0:
        return 0.0, np.full(n, 1 / n)
    g = g / top
    constraints = np.hstack([np.ones((n, 1)), np.eye(n)])
    # quadprog needs a positive definite matrix; the ridge changes the norm by at most 1e-6 of the largest.
    c = quadprog.solve_qp(g + 1e-12 * np.eye(n), np.zeros(n), constraints, np.append(1.0, np.zeros(n)), 1)[0]
    c = np.clip(c, 0, None)
    c /= c.sum()
    return math.sqrt(max(float(c @ g @ c), 0.0) * top), c
