"""The current stream of a device, and whether it is being captured in a graph."""

from __future__ import annotations

import functools

import torch


def stream_of(device: torch.device) -> int | None:
    """The current stream of a device; None for a device without streams."""
    if not _on_gpu(device):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def capturing(device: torch.device) -> bool:
    """Whether kernels are being recorded in a graph instead of run. Memory allocated during a capture belongs
    to the graph: it is uninitialised before the first replay and overwritten by later ones, so it must not be
    cached."""
    return _on_gpu(device) and torch.cuda.is_current_stream_capturing()


def wait_for(device: torch.device) -> None:
    """Waits until all work on the device is done. Called once for memory that other streams read as well."""
    if _on_gpu(device):
        torch.cuda.synchronize(device)


@functools.lru_cache(maxsize=64)
def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
