"""Compilation of the GPU kernels before a training run's first step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import WeightsPer
from ._solve import AveragedRule
from ._validate import (
    AGGREGATIONS,
    FLOATS,
    MASKS,
    Preference,
    check_choice,
    check_flag,
    check_group_size,
    preference_tensor,
)
from .advantages import combine_advantages, group_normalize, multi_objective_gae
from .backends.registry import load
from .loss import pama_loss
from .rules import Rule, RuleLike, needs_pairs, noon_of, record, resolve_rule
from .statistics import objective_statistics

LAYOUTS = ("per-sequence", "padded", "flat", "packed", "packed-per-sequence")
FUNCTIONS = (
    "combine_advantages",
    "pama_loss",
    "objective_statistics",
    "multi_objective_gae",
    "group_normalize",
)
OPTIONAL = ("old_logprobs", "ref_logprobs", "objective_mask", "importance_weights", "normalizer")


class CompiledKernels(NamedTuple):
    """The result of `compile_kernels`.

    Attributes:
        kernels: the number of kernels that were compiled, or loaded from the cache on disk.
        seconds: the time that it took.
    """

    kernels: int
    seconds: float


def compile_kernels(
    objectives: int,
    *,
    functions: Sequence[str] = ("combine_advantages", "pama_loss"),
    layout: str = "per-sequence",
    rule: RuleLike | Sequence[RuleLike] = None,
    preference: Preference = None,
    logprobs_dtype: torch.dtype = torch.float32,
    advantages_dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype | None = torch.bool,
    given: Sequence[str] = ("old_logprobs",),
    aggregation: str = "token-mean",
    group_size: int | None = None,
    merged: bool = False,
    slices: bool = True,
    device: torch.device | str = "cuda",
) -> CompiledKernels:
    """Compiles the Triton kernels that a training run will launch, in parallel, so that no step waits for the
    compiler.

    Call it once, before the first step and before any CUDA graph is captured. The kernels depend on the
    number of objectives, dtypes, layout, rule and on which tensors are given; not on the number of sequences
    or tokens, nor on the values of settings. Triton keeps them on disk (`TRITON_CACHE_DIR`), so that later
    runs load them.

    Args:
        objectives: N.
        functions: names of the functions that the run will call. "pama_loss" is compiled with its gradient,
            "combine_advantages" without log-probabilities.
        layout: "per-sequence" for advantages (B, N), "padded" for (B, T, N), "flat" for (M, N); "packed" or
            "packed-per-sequence" with `cu_seqlens` (int32).
        rule: one rule, or several.
        preference: as in the calls.
        logprobs_dtype: of all log-probabilities and importance weights.
        advantages_dtype: of advantages, rewards and values.
        mask_dtype: of the mask; None where there is no mask.
        given: which optional arguments the calls will have: "old_logprobs" (leave it out if on-policy),
            "ref_logprobs" (with a `kl_coef`), "objective_mask" (bool), "importance_weights",
            "normalizer".
        aggregation: as in `pama_loss`.
        group_size: as in `group_normalize`; None if it is called with `group_ids`.
        merged: whether weights are solved from merged statistics: with a `process_group`, or in a `PamaLoss`
            with momentum.
        slices: also compile for tensors that are slices of larger ones, for example micro-batches. If tokens,
            or the objectives of a token, are not adjacent in memory, kernels are compiled at their first
            call.
        device: the GPU. On "cpu" the arguments are checked; there is nothing to compile.

    Returns:
        A `CompiledKernels`.

    Raises:
        RuntimeError: Triton cannot serve the device.
        TypeError, ValueError: an argument has the wrong type, or is not one of the names.
    """
    if isinstance(objectives, bool) or not isinstance(objectives, Integral):
        raise TypeError(f"objectives: expected an integer, got {type(objectives).__name__}")
    if objectives < 1:
        raise ValueError(f"objectives: expected at least 1, got {objectives}")
    check_choice("layout", layout, LAYOUTS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    functions = _names("functions", functions, FUNCTIONS)
    given = _names("given", given, OPTIONAL)
    _check_dtype("logprobs_dtype", logprobs_dtype, FLOATS)
    _check_dtype("advantages_dtype", advantages_dtype, FLOATS)
    if mask_dtype is not None:
        _check_dtype("mask_dtype", mask_dtype, MASKS)
    if group_size is not None:
        check_group_size(group_size)
    rules = [resolve_rule(one) for one in (rule if isinstance(rule, (list, tuple)) else [rule])]
    merged, slices = check_flag("merged", merged), check_flag("slices", slices)
    on = preference.device if isinstance(preference, Tensor) else torch.device("cpu")
    preference_tensor(preference, int(objectives), on)
    if layout == "flat" and aggregation != "token-mean" and not set(functions).isdisjoint(FUNCTIONS[:3]):
        raise ValueError(f"aggregation: {aggregation!r} needs cu_seqlens, expected 'token-mean' where flat")
    for one in rules if not set(functions).isdisjoint(FUNCTIONS[:2]) else ():
        per = record(one).weights_per
        if layout == "flat" and per == WeightsPer.SEQUENCE:
            raise ValueError(f"rule: weights per sequence need cu_seqlens, got {one!r} with layout 'flat'")
        if merged and per != WeightsPer.BATCH:
            raise ValueError(f"merged: needs rules with one set of weights for the batch, got {one!r}")
    place = _device(device)
    triton = load("triton", place.type)
    if isinstance(triton, str):
        if place.type == "cpu":
            return CompiledKernels(0, 0.0)
        raise RuntimeError(f"device: expected a GPU that Triton supports, got {str(device)!r}: {triton}")
    start = time.perf_counter()
    calls: list[Callable[[], object]] = []
    for sliced in (False, True) if slices else (False,):
        batch = _Batch(int(objectives), layout, sliced, place)
        tensors = batch.tensors(given, mask_dtype, logprobs_dtype, advantages_dtype)
        for function in functions:
            if function in FUNCTIONS[:3]:
                settings = {"aggregation": aggregation}
                calls += [_token_call(function, tensors, one, preference, settings, merged) for one in rules]
            else:
                calls.append(_reward_call(function, batch, advantages_dtype, mask_dtype, group_size))
    with torch.enable_grad(), torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        compiled: int = triton.compile_launches(lambda: [call() for call in calls])
    return CompiledKernels(compiled, time.perf_counter() - start)


def _names(argument: str, names: object, known: tuple[str, ...]) -> tuple[str, ...]:
    """One name, or several."""
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a name or a list of names, got {type(names).__name__}")
    listed = tuple(names)
    for name in listed:
        check_choice(argument, name, known)
    return listed


def _device(device: object) -> torch.device:
    if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
        raise TypeError(f"device: expected a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device of torch, got {device!r}") from None


def _check_dtype(name: str, dtype: object, known: tuple[torch.dtype, ...]) -> None:
    if dtype not in known:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, known))}, got {dtype!r}")


@dataclass(frozen=True)
class _Batch:
    """Small tensors in a given layout, which begin at an aligned address or, like most slices, at another."""

    objectives: int
    layout: str
    sliced: bool
    device: torch.device
    rows: int = 4
    width: int = 8

    def new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if not self.sliced:
            return torch.ones(shape, dtype=dtype, device=self.device)
        # Unaligned whatever the size of a row: a slice of rows of 16 bytes would be aligned.
        return torch.ones(math.prod(shape) + 1, dtype=dtype, device=self.device)[1:].view(shape)

    def tensors(
        self,
        given: Sequence[str],
        mask: torch.dtype | None,
        logprobs: torch.dtype,
        advantages: torch.dtype,
    ) -> dict[str, Any]:
        padded = self.layout in ("per-sequence", "padded")
        tokens = (self.rows, self.width) if padded else (self.rows * self.width,)
        by_row = self.layout in ("per-sequence", "packed-per-sequence")
        of_advantages = (self.rows,) if by_row else tokens
        found: dict[str, Any] = {
            "advantages": self.new(advantages, *of_advantages, self.objectives),
            "logprobs": self.new(logprobs, *tokens),
            "old_logprobs": None,
            "mask": None if mask is None else self.new(mask, *tokens),
        }
        if not padded and self.layout != "flat":
            offsets = torch.arange(self.rows + 1, device=self.device, dtype=torch.int32)
            found["cu_seqlens"] = offsets * self.width
        for name in ("old_logprobs", "ref_logprobs", "importance_weights"):
            if name in given:
                found[name] = self.new(logprobs, *tokens)
        if "objective_mask" in given:
            rows = tokens[0] if self.layout == "flat" else self.rows
            found["objective_mask"] = self.new(torch.bool, rows, self.objectives)
        if "normalizer" in given:
            found["normalizer"] = 1.0
        return found


def _token_call(
    function: str,
    tensors: dict[str, Any],
    rule: Rule,
    preference: Preference,
    settings: dict[str, Any],
    merged: bool,
) -> Callable[[], object]:
    """A call of a function that takes tokens, with the optional tensors that the function accepts."""
    x = {**tensors, **settings}
    asked = AveragedRule(rule, lambda statistics: statistics) if merged else rule
    if function == "pama_loss":
        x["logprobs"] = x["logprobs"].detach().requires_grad_()
        x["kl_coef"] = 0.1 if "ref_logprobs" in x else 0.0
        return lambda: pama_loss(**x, rule=asked, preference=preference)
    for name in ("ref_logprobs", "normalizer"):
        x.pop(name, None)
    if function == "objective_statistics":
        return lambda: objective_statistics(**x, noon=noon_of(rule), pairs=needs_pairs(rule))
    for name in ("logprobs", "old_logprobs", "importance_weights"):
        x.pop(name, None)
    return lambda: combine_advantages(**x, rule=asked, preference=preference)


def _reward_call(
    function: str, batch: _Batch, dtype: torch.dtype, mask: torch.dtype | None, group_size: int | None
) -> Callable[[], object]:
    n, rows, width = batch.objectives, batch.rows, batch.width
    if function == "multi_objective_gae":
        x = batch.new(dtype, rows, width, n)
        valid = None if mask is None else batch.new(mask, rows, width)
        return lambda: multi_objective_gae(x, x, valid)
    size = rows if group_size is None else group_size
    rewards = batch.new(dtype, size, n)
    ids = torch.zeros(size, dtype=torch.int64, device=batch.device) if group_size is None else None
    return lambda: group_normalize(rewards, group_size=group_size, group_ids=ids)
