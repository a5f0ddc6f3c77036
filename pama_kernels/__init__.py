"""Pareto multi-objective alignment (PAMA) inside any RL trainer: statistics, weights, loss."""

from importlib.metadata import version as _version

from . import reference
from .advantages import (
    CombinedAdvantages,
    combine_advantages,
    group_normalize,
    multi_objective_gae,
)
from .loss import PamaLoss, PamaLossOutput, pama_loss
from .statistics import ObjectiveStatistics, objective_statistics
from .weights import WeightSolution, min_norm_weights, pama_weights, pareto_gap

__version__ = _version("pama-kernels")

__all__ = [
    "combine_advantages",
    "CombinedAdvantages",
    "pama_loss",
    "PamaLoss",
    "PamaLossOutput",
    "pama_weights",
    "min_norm_weights",
    "WeightSolution",
    "pareto_gap",
    "objective_statistics",
    "ObjectiveStatistics",
    "multi_objective_gae",
    "group_normalize",
    "reference",
]
