"""Helpers shared by the native backends."""

from __future__ import annotations

import torch
from torch import Tensor


class NoMemory(ValueError):
    """A tensor has elements and no memory of its own: a wrapper, freed storage, or a tensor of zeros."""


def computed(x: Tensor) -> Tensor:
    """The tensor converted to a dtype that the solvers read: float32 or float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def scale_of_rows(scale: Tensor | None, scores: Tensor) -> Tensor | None:
    """One float64 number for each row of scores."""
    return None if scale is None else scale.double().expand(scores.shape[:-1]).reshape(-1)
