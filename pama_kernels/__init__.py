"""Pareto multi-objective alignment (PAMA) inside any RL trainer: statistics, weights, loss."""

from importlib import metadata as _metadata

from . import reference, rules
from ._warmup import CompiledKernels, compile_kernels
from .advantages import (
    CombinedAdvantages,
    combine_advantages,
    group_normalize,
    multi_objective_gae,
)
from .loss import PamaLossOutput, pama_loss
from .module import PamaLoss
from .rules import *  # noqa: F403, what its __all__ lists
from .statistics import ObjectiveStatistics, objective_statistics
from .weights import WeightSolution, min_norm_weights, pama_weights, pareto_gap, upgrad_weights
from .whiten import masked_whiten

try:
    __version__ = _metadata.version("pama-kernels")
except _metadata.PackageNotFoundError:  # a copied folder, a frozen application
    __version__ = "unknown"

__all__ = [
    "combine_advantages",
    "CombinedAdvantages",
    "pama_loss",
    "PamaLoss",
    "PamaLossOutput",
    "pama_weights",
    "min_norm_weights",
    "upgrad_weights",
    "WeightSolution",
    "pareto_gap",
    "objective_statistics",
    "ObjectiveStatistics",
    "multi_objective_gae",
    "group_normalize",
    "masked_whiten",
    "compile_kernels",
    "CompiledKernels",
    "reference",
]
__all__ += rules.__all__
