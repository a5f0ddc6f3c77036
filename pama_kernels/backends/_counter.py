"""Counters with which the blocks of a launch detect the last one to finish."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_kernels import _stream

_COUNTERS = 4096  # counters per device
_APART = 4  # int32 stride of 16 bytes: unaligned addresses need a second Triton variant
_pools: dict[torch.device, Tensor] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, int] = {}


def counter(device: torch.device) -> Tensor:
    """An int32 counter, initially 0, with which the programs of a launch detect the last one to finish; that
    program resets it to 0.

    Launches that may overlap use different counters: there is one per stream, and one per launch captured in
    a graph, since a graph may be replayed concurrently with any other work.
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
    """The counter with the given index, at an address with the alignment of the pool."""
    return pool[_APART * index : _APART * index + 1]
