"""What every Triton launch shares."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from pama_kernels._call import Number
from pama_kernels.backends.native import NoMemory

INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = torch.version.hip is None and not INTERPRETED
ALIGNMENT = 16  # bytes: what Triton takes a pointer to be a multiple of, or not
knobs = triton.knobs.runtime


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def check_memory(**tensors: Tensor | None) -> None:
    """Refuses what a kernel would read through a null pointer."""
    for name, x in tensors.items():
        if x is None:
            continue
        try:
            address = x.data_ptr()
        except RuntimeError:  # a functorch wrapper
            address = 0
        if address == 0 and x.numel() != 0:
            what = "a tensor with memory of its own, got one without (freed storage or a wrapper)"
            raise NoMemory(f"{name}: expected {what}")


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every address is one that a variant for aligned pointers serves."""
    addresses = 0
    for x in tensors:
        if x is not None:
            addresses |= x.data_ptr()
    return addresses % ALIGNMENT == 0


def number(x: Number | None, without: float = 0.0) -> tuple[float, Tensor | None]:
    """A setting as two arguments of a kernel, which `number_of` joins: a value, and the tensor that replaces
    it."""
    if type(x) is float:
        return x, None
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


# --- launches ----------------------------------------------------------------------------------------------
#
# Triton's own launcher looks at every argument at every call, and compiles a variant for each combination of
# aligned pointers. Here a kernel has two: every pointer is a multiple of 16 bytes, or none is taken to
# be one; and only the second where rows have strides of their own (LAYOUT): alignment ends with the first
# row. Integers are never compiled in. So a variant follows from types, dtypes and constants, and is found in
# a dictionary from the second call on.


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs so many programs of a kernel on the device and its current stream. All launches go through
    here."""
    if INTERPRETED:
        with numpy.errstate(all="ignore"):  # its arithmetic is NumPy's, which warns of infinities
            run(kernel, programs, arguments, options)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, programs, arguments, options)
    else:
        run(kernel, programs, arguments, options)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What `launch` comes down to; ahead-of-time compilation and tests put something else in its place."""
    if INTERPRETED:
        kernel[(programs,)](*arguments, **options)
        return
    variant, values = variant_of(kernel, arguments, options)
    variant(programs, values)


class _Form(NamedTuple):
    """What the types of a call's arguments tell."""

    tensors: tuple[int, ...]  # their places
    kernel: Any


class _Pointer:
    """Stands for a tensor where a kernel is compiled: aligned or not, of any size."""

    def __init__(self, dtype: torch.dtype, even: bool) -> None:
        self.dtype, self.address = dtype, 0 if even else 8

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 1 << 62  # bytes: for AMD


class Variant:
    """A kernel compiled for a device."""

    def __init__(self, compiled: Any, device: int, constants: tuple[Any, ...]) -> None:
        self.compiled, self.device, self.constants = compiled, device, constants
        self.start = compiled.run  # loads it
        self.function, self.packed = compiled.function, compiled.packed_metadata
        self.stream = driver.active.get_current_stream

    def __call__(self, programs: int, values: list[Any]) -> None:
        stream = self.stream(self.device)
        enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
        metadata = None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
            metadata = self.compiled.launch_metadata((programs, 1, 1), stream, *values, *self.constants)
        else:
            enter = leave = None
        self.start(
            programs, 1, 1, stream, self.function, self.packed, metadata, enter, leave,
            *values, *self.constants,
        )  # fmt: skip


_forms: dict[Any, _Form] = {}
_variants: dict[Any, Variant] = {}


def variant_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Variant, list[Any]]:
    """The compiled kernel for a call, and the arguments with addresses in the place of tensors."""
    types = tuple(map(type, arguments))
    form = _forms.get((id(kernel), types))
    if form is None:
        places = tuple(place for place, x in enumerate(arguments) if isinstance(x, Tensor))
        _forms[id(kernel), types] = form = _Form(places, kernel)
    values = list(arguments)
    dtypes = []
    addresses = 0
    for place in form.tensors:
        x = values[place]
        dtypes.append(x.dtype)
        values[place] = address = x.data_ptr()
        addresses |= address
    even = addresses % ALIGNMENT == 0 and not options.get("LAYOUT")
    device = driver.active.get_current_device()
    key = id(kernel), device, even, types, *dtypes, *options, *options.values()
    variant = _variants.get(key)
    if variant is None:
        constants = tuple(options[p.name] for p in kernel.params[len(arguments) :])
        variant = Variant(compiled(kernel, arguments, even, options), device, constants)
        _variants[key] = variant
    return variant, values


def compiled(kernel: Any, arguments: tuple[Any, ...], even: bool, options: dict[str, Any]) -> Any:
    """Triton's compiled kernel for arguments like these, on the current device."""
    if NVIDIA:
        # All a thread can have: left to itself, ptxas spills to make room for more programs than there are.
        threads = 32 * options.get("num_warps", 4)
        options = {**options, "maxnreg": min(255, 2**16 // threads)}
    like = (_Pointer(x.dtype, even) if isinstance(x, Tensor) else x for x in arguments)
    return kernel.warmup(*like, grid=(1,), **options)


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def programs(device: torch.device, units: int, each: int = 2) -> int:
    """Programs for so many tiles or rows: `each` to a processor; a few where there is none."""
    most = each * _processors(device) if device.type == "cuda" else 3
    return max(1, min(units, most))
