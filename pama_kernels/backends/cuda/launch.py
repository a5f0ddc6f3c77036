"""What every CUDA launch shares."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Stream = tuple[int, int]  # device, address


def stream_of(x: Tensor) -> Stream:
    """The current stream of the tensor's device."""
    device: int = x.get_device()
    address: int = torch._C._cuda_getCurrentRawStream(device)
    return device, address


@functools.lru_cache(maxsize=64)
def processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def doubles(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)
