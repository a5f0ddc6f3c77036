"""Parametrizations and helpers that the property tests of the solvers share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import EPS32
from solver_table import (
    CASES,
    FAMILIES,
    SOLVERS,
    bits,
)
from torch import Tensor

INF, NAN = math.inf, math.nan
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_family = pytest.mark.parametrize(("name", "family"), FAMILIES)
every_case = pytest.mark.parametrize(
    ("solver", "options"),
    [(SOLVERS[name], SOLVERS[name].options[i]) for name, i in CASES],
    ids=[f"{name}-{i}" for name, i in CASES],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_bits(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(bits(x), bits(y))


def indefiniteness(m: Tensor) -> Any:
    """What a negative eigenvalue is worth that rounding to a narrower type left: twice its size for each of n
    objectives, over max M_ii."""
    if m.dtype == torch.float64:
        return 0.0
    m = m.double()
    size = m.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    m = m / size[:, None, None]
    return (-2 * m.shape[-1] * torch.linalg.eigvalsh(m)[:, 0].clamp(max=0)).numpy() + 4 * EPS32
