"""What every Triton launch shares."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = torch.version.hip is None and not INTERPRETED


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs so many programs of a kernel on the device and its current stream. All launches go through here.

    A float argument must be annotated `tl.float64` in the kernel, where Triton would take it as float32, and
    read by `tl.full([], x, tl.float64)`, which does the same in the interpreter.
    """
    if NVIDIA:
        # All a thread can have: left to itself, ptxas spills to make room for more programs than there are.
        threads = 32 * options.get("num_warps", 4)
        options["maxnreg"] = min(255, 2**16 // threads)
    around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if INTERPRETED:
        around = numpy.errstate(all="ignore")  # its arithmetic is NumPy's, which warns of infinities
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        around = torch.cuda.device(device)
    with around:
        run(kernel, programs, arguments, options)


def more_warps() -> int:
    """For a program that needs all registers: a thread of 8 has as many as one of 4, but not on AMD."""
    return 8 if NVIDIA else 4


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What `launch` comes down to; ahead-of-time compilation puts something else in its place."""
    kernel[(programs,)](*arguments, **options)
