"""What every Triton launch shares."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import Number
from pama_kernels.backends.native import NoMemory

INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = torch.version.hip is None and not INTERPRETED


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def check_memory(**tensors: Tensor | None) -> None:
    """Refuses what a kernel would read through a null pointer."""
    for name, x in tensors.items():
        if x is None or x.numel() == 0:
            continue
        try:
            address = x.data_ptr()
        except RuntimeError:  # a functorch wrapper
            address = 0
        if address == 0:
            what = "a tensor with memory of its own, got one without (freed storage or a wrapper)"
            raise NoMemory(f"{name}: expected {what}")


def number(x: Number | None, without: float = 0.0) -> tuple[float, Tensor | None]:
    """A setting as two arguments of a kernel, which `number_of` joins: a value, and the tensor that replaces
    it."""
    if isinstance(x, Tensor):
        check_memory(setting=x)
        return 0.0, x.detach()
    return without if x is None else float(x), None


@triton.jit
def number_of(value, at):
    """float64. `value` must be annotated tl.float64 in the kernel, where Triton would take it as float32."""
    x = tl.full([], value, tl.float64)
    if at is not None:
        x = tl.load(at)
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
        x = x.to(tl.float64)
    return x


def launch(
    kernel: Any, device: torch.device, programs: int, *arguments: Any, each: int = 1, **options: Any
) -> None:
    """Runs so many programs of a kernel on the device and its current stream. All launches go through here.

    each: programs that share the registers of a processor; more run at a time where they need fewer.
    """
    if NVIDIA:
        # Left to itself, ptxas spills to make room for more programs than there are.
        threads = 32 * options.get("num_warps", 4)
        options["maxnreg"] = min(255, 2**16 // (threads * each) // 8 * 8)
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


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def programs(device: torch.device, units: int, each: int = 2) -> int:
    """Programs for so many tiles or rows: `each` to a processor; a few where there is none."""
    most = each * _processors(device) if device.type == "cuda" else 3
    return max(1, min(units, most))
