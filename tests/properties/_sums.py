"""The sums over tokens of the library and of the reference, and how far they may differ."""

from __future__ import annotations

from typing import Any

import torch
from problems import EPS64, SUM_ERROR, Problem
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels._call import FIELDS, TOTALS

ROUNDED = ("surrogate_sum", "kl_sum")  # they hold exponentials; on the grid the other sums are exact


def sums(statistics: Any) -> dict[str, Tensor]:
    """Every sum by its name, of the library or of the reference."""
    names = (*FIELDS, *TOTALS)
    if isinstance(statistics, reference.Statistics):
        return {name: getattr(statistics, name) for name in names}
    n = statistics.objectives
    parts = statistics.buffer[: len(FIELDS) * n + len(TOTALS)].split([n] * len(FIELDS) + [1] * len(TOTALS))
    return {
        name: part if name in FIELDS else part.squeeze(0) for name, part in zip(names, parts, strict=True)
    }


def sizes(problem: Problem, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The same sums without any cancellation, and the sizes of the pairs' bound products."""
    options["noon"] = False
    arguments = problem.statistics_arguments()
    size = arguments["advantages"].double().abs().nan_to_num(0.0, 0.0)
    plus, minus = (
        reference.objective_statistics(**{**arguments, "advantages": sign * size}, **options)
        for sign in (1, -1)
    )
    total = {name: sums(plus)[name].abs() + sums(minus)[name].abs() for name in sums(plus)}
    return total, plus.gram.abs() + minus.gram.abs()


def exact_on_the_grid(options: dict[str, Any]) -> bool:
    """Whether sums of the grid's values are exact in float32: not under the weights 1 / T_s."""
    return options.get("aggregation") != "seq-mean-token-mean"


def assert_statistics(
    got: pk.ObjectiveStatistics, problem: Problem, grid: bool = True, **options: Any
) -> None:
    """`grid`: inputs on the grid of `problems`; else every sum may be rounded."""
    wanted = reference.objective_statistics(**problem.statistics_arguments(), **options)
    size, pair_size = sizes(problem, **options)
    # float32 over at most 256 tokens: 256 roundings of the sum, 16 of a term
    rounding, exact = SUM_ERROR * problem.eps(), grid and exact_on_the_grid(options)
    for name, value in sums(wanted).items():
        found = sums(got)[name]
        tolerance = rounding * size[name]
        if exact and name not in ROUNDED:  # but for the order of float64 sums
            tolerance = 4 * EPS64 * size[name]
        elif name in ("positive_count", "clipped_count") and exact_on_the_grid(options):
            tolerance = 0 * size[name]
        assert ((found - value).abs() <= tolerance).all(), (name, found, value)
    assert torch.equal(got.signal, wanted.signal)
    if got.gram is not None:
        part = 8 * EPS64 if exact else rounding
        assert ((got.gram - wanted.gram).abs() <= part * pair_size).all()
        scale = wanted.advantage_gram.diagonal().sqrt()
        outer = torch.outer(scale, scale)
        assert ((got.advantage_gram - wanted.advantage_gram).abs() <= part * outer + 1e-300).all()
