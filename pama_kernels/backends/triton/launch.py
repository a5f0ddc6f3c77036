"""What every Triton launch shares."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


_COUNTERS = 4096  # to a device
_pools: dict[torch.device, Tensor] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, int] = {}


def counter(device: torch.device) -> Tensor:
    """An int32 zero by which the programs of one launch find the last of them, who sets it back to zero.

    Launches that may overlap have different ones: there is one for each stream, and one for each launch that
    is captured in a graph, which may be replayed beside any other.
    """
    if device.type != "cuda":
        return torch.zeros(1, device=device, dtype=torch.int32)
    captured = torch.cuda.is_current_stream_capturing()
    if not captured:
        key = device, torch.cuda.current_stream(device).cuda_stream
        if key not in _of_stream:
            if device not in _pools:
                _pools[device] = torch.zeros(_COUNTERS, device=device, dtype=torch.int32)
                torch.cuda.synchronize(device)  # other streams use it too
            _of_stream[key] = torch.zeros(1, device=device, dtype=torch.int32)
        return _of_stream[key]
    taken = _captured.get(device, 0)
    if device not in _pools or taken == _COUNTERS:
        return torch.zeros(1, device=device, dtype=torch.int32)  # one more node in the graph
    _captured[device] = taken + 1
    return _pools[device][taken : taken + 1]


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs so many programs of a kernel on the device and its current stream. All launches go through here.

    A float argument must be annotated `tl.float64` in the kernel, where Triton would take it as float32, and
    read by `tl.full([], x, tl.float64)`, which does the same in the interpreter.
    """
    around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if INTERPRETED:
        around = numpy.errstate(all="ignore")  # its arithmetic is NumPy's, which warns of infinities
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        around = torch.cuda.device(device)
    with around:
        run(kernel, programs, arguments, options)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What `launch` comes down to; ahead-of-time compilation puts something else in its place."""
    kernel[(programs,)](*arguments, **options)
