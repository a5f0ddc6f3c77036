"""Tensors as the native modules take them: tuples of pointers, dtype codes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import TokenInputs

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}

Array = tuple[int, int, int, int, int]


def array(x: Tensor, row: int, token: int, objective: int) -> Array:
    return x.data_ptr(), DTYPES[x.dtype], row, token, objective


def tokens(x: Tensor | None) -> Array | None:
    """(B, T) or (M,)."""
    if x is None:
        return None
    strides = x.stride()
    return array(x, strides[0] if len(strides) == 2 else 0, strides[-1], 0)


def objectives(x: Tensor | None, per_sequence: bool) -> Array | None:
    """(B, T, N), (B, N) or (M, N)."""
    if x is None:
        return None
    strides = x.stride()
    if len(strides) == 3:
        return array(x, *strides)
    if per_sequence:
        return array(x, strides[0], 0, strides[1])
    return array(x, 0, strides[0], strides[1])


def token_problem(given: TokenInputs) -> tuple[object, ...]:
    rows, width, per_sequence, mask_per_sequence = given.layout
    offsets = None
    if given.cu_seqlens is not None:
        wide_offsets = given.cu_seqlens.dtype == torch.int64
        offsets = (given.cu_seqlens.data_ptr(), wide_offsets, rows + 1, given.cu_seqlens.stride(0))
    return (
        rows,
        width,
        offsets,
        given.objectives,
        given.noon,
        given.wide,
        *given.clip,
        objectives(given.advantages, bool(per_sequence)),
        tokens(given.mask),
        objectives(given.objective_mask, bool(mask_per_sequence)),
        tokens(given.logprobs),
        tokens(given.old_logprobs),
        tokens(given.ref_logprobs),
        tokens(given.importance_weights),
    )
