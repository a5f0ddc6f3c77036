"""The tensors of a call as the kernels take them, and the shapes of their launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pama_kernels._codes import FIELDS, PAIRS, TOTALS
from pama_kernels.backends.inputs import TokenInputs

from .launch import INTERPRETED, power_of_two

Array = tuple[Any, ...]  # as `tile.py` has them

# N x N sums ride along in the statistics pass up to so many objectives (their tile is TOKENS x N x N).
PAIRS_IN_REGISTERS = 8
COUNTED = 64 if INTERPRETED else 1024  # tokens at a time, where nothing but the mask is read


def tokens_array(x: Tensor | None) -> Array:
    """(B, T) or (M,)."""
    if x is None:
        return None, 0, 0
    strides = x.stride()
    return x, strides[0] if len(strides) == 2 else 0, strides[-1]


def objectives_array(x: Tensor | None, per_sequence: bool) -> Array:
    """(B, T, N), (B, N) or (M, N)."""
    if x is None:
        return None, 0, 0, 0
    strides = x.stride()
    if len(strides) == 3:
        return x, *strides
    return (x, strides[0], 0, strides[1]) if per_sequence else (x, 0, *strides)


class Shape(NamedTuple):
    """How the tokens are laid out and cut into tiles: constants of the kernels by their names there."""

    n: int
    N: int
    TOKENS: int
    LAYOUT: int
    NARROW: bool
    NOON: bool
    WIDE: bool
    PAIRS: bool
    PRESENT: bool


class Problem(NamedTuple):
    arrays: tuple[Array, ...]
    ref: Array
    cu: Array
    rows: int
    width: int
    clip: tuple[float, ...]
    n: int
    noon: bool
    wide: bool
    device: torch.device
    by_row: bool  # something is given per sequence

    def shape(self, pairs: bool, by_row: bool = False, area: int = 1024) -> Shape:
        """Of a launch over all tokens, in tiles of `area` tokens times objectives; `by_row`: rows matter."""
        n = power_of_two(self.n)
        most = 128 if INTERPRETED else 1024
        tokens = max(1, min(most, area // (2 if self.wide else 1) // (n * n if pairs else n)))
        if self.cu[0] is not None:
            layout = 2 if self.by_row or by_row else 0
        else:
            layout = 0 if self.rows == 1 else 1
        return Shape(
            n=self.n,
            N=n,
            TOKENS=tokens,
            LAYOUT=layout,
            NARROW=self.rows * self.width < 2**31,
            NOON=self.noon,
            WIDE=self.wide,
            PAIRS=pairs,
            PRESENT=self.arrays[1][0] is not None,
        )

    def tokens(self) -> int:
        """Tokens of the launch, or a guess where only the offsets tell."""
        if self.cu[0] is None:
            return self.rows * self.width
        return self.width if self.width >= 0 else 256 * self.rows


def slot_size(n: int, statistics: bool, pairs: bool, present: bool) -> int:
    """Numbers in a program's slot, as `sums.py` lays them out."""
    if not statistics:
        return 2 + n
    blocks = (len(PAIRS) if present else 2) if pairs else 0
    return 2 + n + len(FIELDS) * n + len(TOTALS) + blocks * n * n


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def programs(device: torch.device, units: int, slot: int = 1) -> int:
    """Programs for so many tiles or rows: two to a processor, fewer where slots are large."""
    most = 2 * _processors(device) if device.type == "cuda" else 3
    return max(1, min(units, most, max(8, 2**19 // slot)))


def clip_numbers(clip: Sequence[float]) -> tuple[float, ...]:
    """(1 - eps_low, 1 + eps_high, dual_clip), then their logarithms."""
    low, high, dual = clip
    log_low = math.log1p(-low) if low < 1 else -math.inf
    return 1 - low, 1 + high, dual, log_low, math.log1p(high), math.log(dual)


def problem(given: TokenInputs) -> Problem:
    rows, width, per_sequence, mask_per_sequence = given.layout
    raw = objectives_array(given.advantages, bool(per_sequence))
    dense = raw[2:] == (given.objectives, 1)  # strides that the compiler then knows
    arrays: tuple[Array, ...] = (
        (*raw, 1 if dense else None),
        objectives_array(given.objective_mask, bool(mask_per_sequence)),
        tokens_array(given.mask),
        tokens_array(given.logprobs),
        tokens_array(given.old_logprobs),
        tokens_array(given.importance_weights),
    )
    cu = given.cu_seqlens
    return Problem(
        arrays,
        tokens_array(given.ref_logprobs),
        (None, 0) if cu is None else (cu, cu.stride(0)),
        rows,
        width,
        clip_numbers(given.clip),
        given.objectives,
        given.noon,
        given.wide,
        given.advantages.device,
        bool(per_sequence) or (given.objective_mask is not None and bool(mask_per_sequence)),
    )


def flattened(given: Problem) -> Problem:
    """Padded sequences without a gap between them are one long sequence."""
    if given.cu[0] is not None or given.rows == 1:
        return given
    for array in (*given.arrays, given.ref):
        if array[0] is not None and array[1] != given.width * array[2]:
            return given
    return given._replace(rows=1, width=given.rows * given.width)
