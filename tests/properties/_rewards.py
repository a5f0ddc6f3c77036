"""Helpers for the tests of rewards and advantages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def episodes(rows: int, width: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "rewards": normal(rows, width, n),
        "values": normal(rows, width, n),
        "mask": torch.rand(rows, width, generator=g) < 0.7,
        "dones": torch.rand(rows, width, generator=g) < 0.2,
        "truncated": torch.rand(rows, width, generator=g) < 0.2,
        "final_values": normal(rows, width, n),
        "last_values": normal(rows, n),
    }


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """Computed in float64 and rounded to float32 and to the result's dtype: half an ulp each."""
    info = torch.finfo(dtype)
    narrow = 0.0 if dtype == torch.float64 else 2**-24
    # float64 itself: sums of up to 130 terms of either sign
    return {"rtol": info.eps / 2 + narrow + 1e-13, "atol": 1e-12 + info.smallest_normal * info.eps}


def equal(found: Any, wanted: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
