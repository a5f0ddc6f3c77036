"""The stream that work on a device goes to, and whether it is being captured in a graph."""

from __future__ import annotations

import functools

import torch


def stream_of(device: torch.device) -> int | None:
    """The current stream of a device; None where there are none."""
    if not _on_gpu(device):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def capturing(device: torch.device) -> bool:
    """Whether kernels are recorded instead of run. What is then allocated belongs to the graph: it holds
    nothing before the first replay, and is overwritten by later ones, so it must not be kept."""
    return _on_gpu(device) and torch.cuda.is_current_stream_capturing()


def wait_for(device: torch.device) -> None:
    """Until all work on the device is done: once, for memory that other streams read too."""
    if _on_gpu(device):
        torch.cuda.synchronize(device)


@functools.lru_cache(maxsize=64)
def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
