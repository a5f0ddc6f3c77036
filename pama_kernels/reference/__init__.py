"""The specification of the library: float64, plain PyTorch, obvious rather than fast.

Every backend is tested against this package. The functions have the names and arguments of the public ones
(except `out`, `pairs` and `process_group`), accept any layout of the public API, and follow the formulas of
He & Maghsudi 2025 (arXiv 2508.07768) line by line. Nothing here avoids a host synchronisation, an allocation
or a loop.

In the order of a call: `advantages` (from rewards), `tokens` (the terms of every token), `statistics` (their
sums), `solvers` (small convex problems), `loss` (the weights of a rule, combined advantages, the loss).
"""

from .advantages import group_normalize, multi_objective_gae
from .loss import Combined, Loss, batch_weights, combine_advantages, pama_loss
from .solvers import (
    Solution,
    min_norm_weights,
    pama_weights,
    pareto_gap,
    project_on_simplex,
    softmin_weights,
    upgrad_weights,
)
from .statistics import Statistics, objective_statistics

__all__ = [
    "Combined",
    "Loss",
    "Solution",
    "Statistics",
    "batch_weights",
    "combine_advantages",
    "group_normalize",
    "min_norm_weights",
    "multi_objective_gae",
    "objective_statistics",
    "pama_loss",
    "pama_weights",
    "pareto_gap",
    "project_on_simplex",
    "softmin_weights",
    "upgrad_weights",
]
