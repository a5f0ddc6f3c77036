"""The stream that work on a device goes to, and whether it is being captured in a graph."""

from __future__ import annotations

import torch


def stream_of(device: torch.device) -> int | None:
    """The current stream of a device; None where there are none."""
    if device.type != "cuda":
        return None
    stream: int = torch._C._cuda_getCurrentRawStream(_index(device))
    return stream


def capturing(device: torch.device) -> bool:
    """Whether kernels are recorded instead of run. What is then allocated belongs to the graph: it holds
    nothing before the first replay, and is overwritten by later ones, so it must not be kept."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wait_for(device: torch.device) -> None:
    """Until all work on the device is done: once, for memory that other streams read too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
