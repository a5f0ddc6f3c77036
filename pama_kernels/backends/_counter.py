"""Zeros by which the blocks of one launch find the last of them."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_kernels import _stream

_COUNTERS = 4096  # to a device
_APART = 4  # numbers of 4 bytes: Triton compiles a second variant for an address that is no multiple of 16
_pools: dict[torch.device, Tensor] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, int] = {}


def counter(device: torch.device) -> Tensor:
    """An int32 zero by which the programs of one launch find the last of them, who sets it back to zero.

    Launches that may overlap have different ones: there is one for each stream, and one for each launch that
    is captured in a graph, which may be replayed beside any other.
    """
    stream = _stream.stream_of(device)
    if stream is None:
        return torch.zeros(1, device=device, dtype=torch.int32)
    if not _stream.capturing(device):
        known = _of_stream.get((device, stream))
        return _first_of(device, stream) if known is None else known
    taken = _captured.get(device, 0)
    if device not in _pools or taken == _COUNTERS:
        return torch.zeros(1, device=device, dtype=torch.int32)  # one more node in the graph
    _captured[device] = taken + 1
    return slot(_pools[device], taken)


def _first_of(device: torch.device, stream: int) -> Tensor:
    if device not in _pools:
        _pools[device] = torch.zeros(_COUNTERS * _APART, device=device, dtype=torch.int32)
        _stream.wait_for(device)  # other streams use it too
    _of_stream[device, stream] = made = torch.zeros(1, device=device, dtype=torch.int32)
    return made


def slot(pool: Tensor, index: int) -> Tensor:
    """The counter of an index, at an address as aligned as the pool's."""
    return pool[_APART * index : _APART * index + 1]
