"""Wrong values of every kind of argument."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pama_kernels as pk

B, T, N, M = 4, 5, 3, 20
INF, NAN = math.inf, math.nan
Shapes = tuple[tuple[int, ...], ...]


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


class Kind(NamedTuple):
    """Wrong values: those of a wrong range, shape or device, and those of a wrong type or dtype."""

    values: tuple[Any, ...] = ()
    types: tuple[Any, ...] = ()

    def __add__(self, other: Kind) -> Kind:  # type: ignore[override]
        return Kind(self.values + other.values, self.types + other.types)


def near_misses(shape: tuple[int, ...]) -> Shapes:
    wider = (tuple(size + (i == axis) for i, size in enumerate(shape)) for axis in range(len(shape)))
    return ((), (*shape, 1), shape[:-1], *wider)


def floats(
    shape: tuple[int, ...],
    wrong: Shapes | None = None,
    first: bool = False,
    bad: tuple[torch.dtype, ...] = (torch.int64, torch.bool, torch.complex64),
) -> Kind:
    """A floating-point tensor; `wrong`: shapes that do not fit; `first`: its device is that of the call."""
    good = next(dtype for dtype in (torch.float32, torch.int64) if dtype not in bad)
    shapes = near_misses(shape) if wrong is None else wrong
    values = [ones(*size, dtype=good) for size in shapes if size != shape]
    values += [] if first else [ones(*shape, dtype=good, device="meta")]
    types = [ones(*shape, dtype=dtype) for dtype in bad]
    return Kind(
        tuple(values), (*types, ones(*shape, dtype=good).to_sparse(), [[1.0]], 1.5, np.ones(shape), "x")
    )


def mask(shape: tuple[int, ...], wrong: Shapes | None = None) -> Kind:
    return floats(shape, wrong, bad=(torch.complex64,))


def number(*wrong: float, tensors: bool = True, none: bool = False) -> Kind:
    """`wrong` are beyond the range; `tensors`: it may be a 0-d tensor."""
    values, types = [*wrong, NAN], [True, "0.1", [], *([] if none else [None])]
    if tensors:
        values += [*map(torch.tensor, wrong), ones(1)]
        types += [ones(dtype=torch.bool), ones(dtype=torch.complex64)]
    return Kind(tuple(values), tuple(types))


SPARSE, COMPLEX = torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)
FLAG = Kind((), ("no", "false", 0, None))
CHOICE = Kind(("wrong", None, 3))
CLIP = Kind(
    (
        -0.1,
        1.5,
        NAN,
        INF,
        (-0.1, 0.2),
        (1.1, 0.2),
        (0.2, -0.1),
        (0.2, NAN),
        (0.2,),
        (0.1, 0.2, 0.3),
        torch.ones(2),
    ),
    (True, "0.2"),
) + Kind((torch.tensor(-0.1),))
PREFERENCE_TYPES = ("abc", {0: 1.0, 1: 1.0, 2: 1.0}, {1.0, 2.0, 3.0}, 0.5)
PREFERENCE = Kind(
    (
        *([1.0, -0.5, 1.0], [1.0, 1.0], [], [0.0] * 3, [0.5, NAN, 0.5], [0.5, INF, 0.5], torch.ones(4)),
        *(torch.ones(1, 3), torch.ones(3, device="meta"), torch.ones(())),
    ),
    (*PREFERENCE_TYPES, COMPLEX, torch.ones(3, dtype=torch.bool), SPARSE),
)
RULE = Kind(("wrong",), (pk.Pama, 3))
CALLABLES = Kind((lambda s: s.scores[:2],), (lambda s: [1.0, 2.0, 3.0], lambda s: s.scores.long()))
GROUP = Kind((), (True, "gloo"))
OFFSETS = torch.tensor([0, 5, 12, 20])
CU_SEQLENS = Kind(
    (OFFSETS.reshape(2, 2), OFFSETS[0], OFFSETS[:0], OFFSETS.to("meta")),
    (OFFSETS.float(), OFFSETS.to(torch.int16), OFFSETS.tolist()),
)


def solution(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> pk.WeightSolution:
    return pk.WeightSolution(torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=dtype))


TAKEN = ones(2, N)
OUT = Kind(
    (
        *(solution((3, N)), solution((2, N), torch.float64), pk.WeightSolution(TAKEN, TAKEN[:, 0])),
        *(pk.WeightSolution(x, ones(2)) for x in (ones(N, 2).T, ones(2, N).requires_grad_())),
        pk.WeightSolution(ones(2, N), ones(2, 1)),
    ),
    (ones(2, N), (ones(2, N), ones(2)), pk.WeightSolution(None, ones(2))),  # type: ignore[arg-type]
)
