"""The tensors of a call as arguments of the kernels that load tokens: pointers, strides and sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pama_kernels._call import Tokens

from .launch import ALIGNMENT, INTERPRETED, check_address, number, power_of_two
from .trace import strides

# Sizes and strides change from step to step, so kernels that take the arguments of `Problem` are not
# specialised on them.
ANY_SIZE = [
    *("a_row", "a_token", "a_objective", "o_row", "o_token", "o_objective", "m_row", "m_token", "l_row"),
    *("l_token", "b_row", "b_token", "w_row", "w_token", "r_row", "r_token", "cu_step", "rows", "width"),
]

# Parts of `Problem.arguments`.
MASK, BEFORE_REF, OFFSETS, FROM_OFFSETS = slice(8, 11), slice(8, 20), slice(23, 27), slice(23, None)


class Constants(NamedTuple):
    """Constants of the kernels that load tokens."""

    n: int
    N: int
    LAYOUT: int
    NARROW: bool
    UNIT: bool
    DENSE: bool
    NOON: bool
    WIDE: bool

    def tile(self, area: int, n: int | None = None) -> int:
        """The tokens of a tile of `area` tokens times objectives (N, or n)."""
        most = 128 if INTERPRETED else 1024
        return max(1, min(most, area // (2 if self.WIDE else 1) // (n or self.N)))


class Problem(NamedTuple):
    """The tensors of a call as kernel arguments."""

    arguments: tuple[Any, ...]  # from `advantages` to `dual_at`
    constants: Constants
    rows: int
    total: int  # tokens, or an estimate if only the offsets have the number
    device: torch.device


def objective_strides(x: Tensor | None, per_sequence: bool) -> tuple[int, ...]:
    """(B, T, N), (B, N) or (M, N)."""
    if x is None:
        return 0, 0, 0
    steps = strides(x)
    if len(steps) == 3:
        return tuple(steps)
    first, last = steps
    return (first, 0, last) if per_sequence else (0, first, last)


_TENSORS = Tokens._fields[: Tokens._fields.index("rows")]
_ABSENT = None, 0, 0
_UNCLIPPED = float("inf"), None


def check_tokens_memory(given: Tokens) -> None:
    tensors: Any = zip(_TENSORS, given, strict=False)
    for name, x in tensors:
        if x is not None:
            check_address(name, x)


def problem(given: Tokens, by_row: bool, without_objectives: bool = False) -> Problem:
    """by_row: whether the kernel depends on the row of a token. If not, contiguous sequences are processed as
    one."""
    (
        own, mask, presence, logprobs, old, ref, importance, cu, rows, width, by_sequence,
        mask_by_sequence, _, noon, low, high, dual,
    ) = given  # fmt: skip
    n, device = own.shape[-1], own.device
    if without_objectives:
        own = presence = None
    else:
        by_row = by_row or by_sequence or (presence is not None and mask_by_sequence)
    a, o = objective_strides(own, by_sequence), objective_strides(presence, mask_by_sequence)
    total = rows * width if cu is None else width if width >= 0 else 256 * rows
    unit, addresses = True, 0
    places = [a, o] if presence is not None else [a]
    arrays: list[Any] = []
    for x in (mask, logprobs, old, importance, ref):
        if x is None:
            arrays += _ABSENT
            continue
        steps = strides(x)
        row, token = steps if len(steps) == 2 else (0, *steps)
        arrays += x, row, token
        unit = unit and token == 1
        places.append((row, token))
        addresses |= x.data_ptr()
    flat = not by_row
    if flat and cu is None:
        for x in (own, presence):
            if x is not None:
                addresses |= x.data_ptr()
        flat = addresses % ALIGNMENT == 0 and (
            rows == 1 or all(row == width * token for row, token, *_ in places)
        )
    if flat and cu is None:  # rows are then not multiplied by their strides
        rows, width = 1, total
    arguments = (
        own, *a, presence, *o, *arrays, cu, 0 if cu is None else strides(cu)[0], rows, width, *number(low),
        *(_UNCLIPPED if high is None else number(high)), *(_UNCLIPPED if dual is None else number(dual)),
    )  # fmt: skip
    constants = Constants(
        n, power_of_two(n), 0 if flat else 1 if cu is None else 2, total < 2**31, unit,
        a[1] == n and a[2] == 1, noon, given.wide,
    )  # fmt: skip
    return Problem(arguments, constants, rows, total, device)
