"""Random inputs, off the grid of `problems`."""

from __future__ import annotations

import torch
from torch import Tensor

import pama_kernels as pk


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whitened(*shape: int, seed: int = 0) -> Tensor:
    return pk.masked_whiten(randn(*shape, seed=seed, dtype=torch.float64))
