"""One table of the public functions: calls on example tensors, by the names of their tensor arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from problems import make
from torch import Tensor

import pama_kernels as pk

N = 3
Tensors = dict[str, Tensor]
# None is 0 or 1, for which torch.compile makes graphs of their own; (3, 4) has as many rows as objectives.
SHAPES = ((4, 6), (3, 4), (5, 9), (17, 2))


class Call(NamedTuple):
    tensors: Callable[[int, int], Tensors]  # rows, width -> arguments
    run: Callable[..., Any]
    batched: str = ""  # the argument that torch.vmap maps over; "": the call cannot be mapped


def leaves(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, pk.ObjectiveStatistics):
        return [result.buffer]
    if isinstance(result, dict):
        return [result[key] for key in sorted(result)]
    return [leaf for part in result for leaf in leaves(part)]


def assert_same(found: Any, wanted: Any) -> None:
    """The same bits, dtypes and shapes."""
    for x, y in zip(leaves(found), leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        assert x.requires_grad == y.requires_grad
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, width: int, layout: str = "padded") -> Tensors:
    """Everything that a pass over tokens reads."""
    problem = make(
        layout,
        rows=rows,
        width=width,
        objectives=N,
        objective_mask=torch.bool,
        importance_weights=True,
        ref_logprobs=True,
    )
    if layout == "packed":  # the offsets, too, have more than one element
        problem = replace(problem, mask=torch.ones_like(problem.logprobs, dtype=torch.bool))
    return {name: x for name, x in vars(problem).items() if x is not None}


def combine_tensors(rows: int, width: int, layout: str = "padded") -> Tensors:
    names = ("advantages", "mask", "objective_mask", "cu_seqlens")
    return {k: v for k, v in tokens(rows, width, layout).items() if k in names}


def statistics_tensors(rows: int, width: int) -> Tensors:
    return {k: v for k, v in tokens(rows, width).items() if k != "ref_logprobs"}


def _gram(rows: int) -> Tensor:
    factor = _random(rows, N, N + 2)
    return factor @ factor.mT


def _gae(rows: int, width: int) -> Tensors:
    flag = _random(rows, width, seed=3)
    return {
        "rewards": _random(rows, width, N),
        "values": _random(rows, width, N, seed=2),
        "mask": flag > -1,
        "dones": flag > 1,
        "truncated": flag.abs() < 0.3,
        "last_values": _random(rows, N, seed=4),
        "final_values": _random(rows, width, N, seed=5),
    }


def _loss(**x: Any) -> Any:
    result = pk.pama_loss(
        **{"dual_clip": 3.0, "kl_coef": torch.tensor(0.1, device="cpu"), "rule": "upgrad", **x}
    )
    return *result[:3], result.statistics, result.metrics()


def _combine(**x: Any) -> Any:
    result = pk.combine_advantages(**x)
    return *result[:3], result.statistics, result.metrics(["a", "b", "c"])


def _preferred(x: Tensors) -> Tensors:
    return {**x, "preference": torch.tensor([1.0, 2.0, 3.0])}


def _numbers(x: Tensors, **numbers: float) -> Tensors:
    return {**x, **{name: torch.tensor(value) for name, value in numbers.items()}}


CALLS = {
    "combine_advantages": Call(
        lambda b, t: _preferred(combine_tensors(b, t)),
        lambda **x: _combine(**x, normalize=True),
        "advantages",
    ),
    "combine_advantages, packed": Call(
        lambda b, t: combine_tensors(b, t, "packed"), lambda **x: _combine(**x, rule=pk.Pama("sequence"))
    ),
    "combine_advantages, per sequence": Call(
        lambda b, t: {k: v for k, v in tokens(b, t, "per-sequence").items() if k[:3] not in ("imp", "ref")},
        lambda **x: _combine(**x, rule=pk.Pama("token"), clip_range=0.2),
    ),
    "combine_advantages, given": Call(
        lambda b, t: {**combine_tensors(b, t), "weights": _random(b, N, seed=6).abs()}, _combine
    ),
    "combine_advantages, callable": Call(
        combine_tensors, lambda **x: _combine(**x, rule=lambda s: s.second_moments), "advantages"
    ),
    "pama_loss": Call(
        lambda b, t: _numbers(_preferred(tokens(b, t)), kl_coef=0.1, dual_clip=3.0, normalizer=7.0),
        _loss,
        "logprobs",
    ),
    "pama_loss, packed": Call(
        lambda b, t: tokens(b, t, "packed"),
        lambda **x: _loss(**x, rule=pk.SoftMin(2.0), aggregation="seq-mean-token-mean"),
    ),
    "pama_loss, given": Call(lambda b, t: {**tokens(b, t, "flat"), "weights": _random(N)}, _loss),
    "objective_statistics": Call(
        statistics_tensors,
        lambda **x: (lambda s: (s, (s + s).metrics()))(pk.objective_statistics(**x, pairs=True)),
        "advantages",
    ),
    "pama_weights": Call(
        lambda b, t: _numbers(
            _preferred({"scores": _random(b, N), "scale": _random(b).abs()}), regularization=0.1
        ),
        pk.pama_weights,
        "scores",
    ),
    "min_norm_weights": Call(
        lambda b, t: _numbers(_preferred({"gram": _gram(b)}), regularization=0.1), pk.min_norm_weights, "gram"
    ),
    "upgrad_weights": Call(lambda b, t: _preferred({"gram": _gram(b)}), pk.upgrad_weights, "gram"),
    "pareto_gap": Call(
        lambda b, t: {"gram": _gram(b), "weights": torch.full((b, N), 1 / N)}, pk.pareto_gap, "weights"
    ),
    "multi_objective_gae": Call(
        lambda b, t: _numbers(_gae(b, t), gamma=0.9, lam=0.8), pk.multi_objective_gae, "values"
    ),
    "group_normalize": Call(
        lambda b, t: {"rewards": _random(2 * b, N), "group_ids": torch.arange(2 * b) // 2},
        pk.group_normalize,
        "rewards",
    ),
    "masked_whiten": Call(combine_tensors, pk.masked_whiten, "advantages"),
}
# The default options, for which solvers have a faster path.
QUICK = {
    "pama_weights, quick": Call(lambda b, t: {"scores": _random(b, N)}, pk.pama_weights, "scores"),
    "min_norm_weights, quick": Call(lambda b, t: {"gram": _gram(b)}, pk.min_norm_weights, "gram"),
    "upgrad_weights, quick": Call(lambda b, t: {"gram": _gram(b)}, pk.upgrad_weights, "gram"),
    "combine_advantages, bare": Call(
        lambda b, t: {"advantages": _random(b, t, N)}, lambda **x: _combine(**x), "advantages"
    ),
    "pama_loss, bare": Call(
        lambda b, t: {"logprobs": _random(b, t), "advantages": _random(b, t, N)},
        lambda **x: _loss(**x, old_logprobs=None, kl_coef=0.0),
        "logprobs",
    ),
    "group_normalize, by size": Call(
        lambda b, t: {"rewards": _random(2 * b, N)}, lambda **x: pk.group_normalize(**x, group_size=2)
    ),
}
EVERY = {**CALLS, **QUICK}
