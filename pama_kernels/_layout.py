"""The layout of the tokens of a call, and the checks of the tensors that have it.

The layout is determined by the number of dimensions of the tensors, never by sizes that may coincide. Values
of tensors on a device are never read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import Number, Tokens
from ._validate import (
    AGGREGATIONS,
    FLOATS,
    MASKS,
    ClipRange,
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_mask,
    check_shape,
    check_tensor,
    clip_bounds,
    shape_of,
)


class Layout(NamedTuple):
    """How tokens are arranged: padded (B, T), flat (M,), packed (M,) with offsets, or one per row (B,)."""

    rows: int
    width: int  # tokens of a padded row; of all rows where flat or packed; -1 where only cu_seqlens has it
    objectives: int
    sequences: bool  # rows are sequences (not so where flat)
    packed: bool
    per_sequence: bool  # advantages (B, N)
    mask_per_sequence: bool  # objective_mask (B, N)


_NEVER = 1.0, None, None  # the clip range (1, infinity)


def check_tokens(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective_mask: Tensor | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_range: ClipRange | None = None,
    dual_clip: Number | None = None,
    aggregation: str = "token-mean",
    noon: bool = False,
) -> tuple[Tokens, Layout]:
    """Checks all inputs of a pass over tokens. `clip_range` None: (1, infinity), which never clips."""
    layout = resolve_layout(
        advantages, mask, objective_mask, logprobs, old_logprobs, ref_logprobs, importance_weights, cu_seqlens
    )
    if old_logprobs is not None:
        if logprobs is None:
            raise ValueError("old_logprobs: expected None without logprobs, got a tensor")
        if clip_range is None:
            raise ValueError("clip_range: expected a number or (low, high) with old_logprobs, got None")
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if aggregation != "token-mean" and not layout.sequences:
        raise ValueError(f"aggregation: {aggregation!r} needs cu_seqlens where tensors are flat, got none")
    clip = (
        _NEVER
        if clip_range is None and dual_clip is None
        else clip_bounds((1.0, math.inf) if clip_range is None else clip_range, dual_clip)
    )
    tokens = Tokens(
        advantages, mask, objective_mask, logprobs, old_logprobs, ref_logprobs, importance_weights,
        cu_seqlens, layout.rows, layout.width, layout.per_sequence, layout.mask_per_sequence,
        AGGREGATIONS.index(aggregation), check_flag("noon", noon), *clip,
    )  # fmt: skip
    return tokens, layout


def resolve_layout(
    advantages: Any,
    mask: Any = None,
    objective_mask: Any = None,
    logprobs: Any = None,
    old_logprobs: Any = None,
    ref_logprobs: Any = None,
    importance_weights: Any = None,
    cu_seqlens: Any = None,
) -> Layout:
    """Checks types, dtypes, shapes and devices of all tensors, and returns the layout."""
    like_name, like = ("advantages", advantages) if logprobs is None else ("logprobs", logprobs)
    check_float(like_name, like)
    device = like.device
    if like is not advantages:
        check_float("advantages", advantages)
        if advantages.device != device:
            check_device("advantages", advantages, like_name, like)
    tokens_name, tokens = "logprobs", logprobs
    shape = None if logprobs is None else _shape_of_tokens("logprobs", logprobs)
    for name, x in (
        ("mask", mask), ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs),
        ("importance_weights", importance_weights),
    ):  # fmt: skip
        if x is None:
            continue
        dtypes = MASKS if name == "mask" else FLOATS
        if type(x) is not Tensor or x.dtype not in dtypes or x.layout is not torch.strided or x.is_nested:
            (check_mask if dtypes is MASKS else check_float)(name, x)
        if x.device != device:
            check_device(name, x, like_name, like)
        if shape is None:
            tokens_name, tokens, shape = name, x, _shape_of_tokens(name, x)
        elif x.shape != shape:
            check_shape(name, x, shape, f" as {tokens_name}")
    if advantages.dim() not in (2, 3):
        raise ValueError(
            "advantages: expected shape (B, T, N), (B, N) or (M, N), objectives last, "
            f"got {shape_of(advantages)}"
        )
    if advantages.shape[-1] < 1:
        raise ValueError(f"advantages: expected at least one objective, got {shape_of(advantages)}")
    layout = (
        _packed_layout(advantages, tokens_name, tokens, cu_seqlens)
        if cu_seqlens is not None
        else _layout(advantages, tokens_name, tokens)
    )
    if objective_mask is None:
        return layout
    check_mask("objective_mask", objective_mask)
    check_device("objective_mask", objective_mask, like_name, like)
    return layout._replace(mask_per_sequence=_mask_per_sequence(objective_mask, layout))


def _shape_of_tokens(name: str, x: Tensor) -> torch.Size:
    shape = x.shape
    if len(shape) not in (1, 2):
        raise ValueError(f"{name}: expected shape (B, T) or (M,), got {shape_of(x)}")
    return shape


def _mask_per_sequence(objective_mask: Tensor, layout: Layout) -> bool:
    """Whether the objective mask is (B, N); else it is (M, N)."""
    n = layout.objectives
    if layout.sequences and objective_mask.shape == (layout.rows, n):
        return True
    if (layout.packed or not layout.sequences) and objective_mask.shape == (layout.width, n):
        return False
    expected = f"({layout.rows}, {n})" if layout.sequences else f"({layout.width}, {n})"
    if layout.packed and layout.width >= 0:
        expected += f" or ({layout.width}, {n})"
    raise ValueError(f"objective_mask: expected shape {expected}, got {shape_of(objective_mask)}")


def _layout(advantages: Tensor, tokens_name: str, tokens: Tensor | None) -> Layout:
    n = advantages.shape[-1]
    if tokens is None:
        if advantages.dim() == 3:
            return Layout(advantages.shape[0], advantages.shape[1], n, True, False, False, False)
        return Layout(advantages.shape[0], 1, n, True, False, True, False)
    if tokens.dim() == 1:
        if advantages.dim() != 2 or advantages.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"advantages: expected shape ({tokens.shape[0]}, N) for flat {tokens_name}, "
                f"got {shape_of(advantages)}"
            )
        return Layout(1, tokens.shape[0], n, False, False, False, False)
    rows, width = tokens.shape
    per_sequence = advantages.dim() == 2
    if advantages.shape[0] != rows or (not per_sequence and advantages.shape[1] != width):
        raise ValueError(
            f"advantages: expected shape ({rows}, {width}, N) or ({rows}, N) for {tokens_name} "
            f"{shape_of(tokens)}, got {shape_of(advantages)}"
        )
    return Layout(rows, width, n, True, False, per_sequence, False)


def _packed_layout(advantages: Tensor, tokens_name: str, tokens: Tensor | None, cu_seqlens: Any) -> Layout:
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "one-dimensional int32 or int64")
    check_device("cu_seqlens", cu_seqlens, "advantages", advantages)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected shape (B + 1,), offsets of B sequences, got {shape_of(cu_seqlens)}"
        )
    rows, n = cu_seqlens.shape[0] - 1, advantages.shape[-1]
    if tokens is not None and tokens.dim() != 1:
        raise ValueError(f"{tokens_name}: expected shape (M,) with cu_seqlens, got {shape_of(tokens)}")
    if advantages.dim() != 2:
        raise ValueError(
            f"advantages: expected shape (M, N) or (B, N) with cu_seqlens, got {shape_of(advantages)}"
        )
    first = advantages.shape[0]
    if tokens is None:
        per_sequence = first == rows
        return Layout(rows, -1 if per_sequence else first, n, True, True, per_sequence, False)
    width = tokens.shape[0]
    if first not in (width, rows):
        raise ValueError(
            f"advantages: expected shape ({width}, N) or ({rows}, N) with cu_seqlens, "
            f"got {shape_of(advantages)}"
        )
    return Layout(rows, width, n, True, True, first == rows, False)


def check_weights(weights: object, layout: Layout, device: torch.device) -> None:
    check_float("weights", weights)
    assert isinstance(weights, Tensor)
    n = layout.objectives
    fits = weights.dim() == 1 and weights.shape[0] == n
    if layout.sequences and weights.dim() == 2:
        fits = weights.shape[0] == layout.rows and weights.shape[1] == n
    if not fits:
        rows = f" or ({layout.rows}, {n})" if layout.sequences else ""
        raise ValueError(f"weights: expected shape ({n},){rows}, got {shape_of(weights)}")
    if weights.device != device:
        raise ValueError(f"weights: expected device {device}, got {weights.device}")
