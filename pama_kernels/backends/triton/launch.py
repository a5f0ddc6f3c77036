"""Launching of Triton kernels."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from pama_kernels._call import Number
from pama_kernels.backends.native import NoMemory

from .trace import Traced, larger, smaller

INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = torch.version.hip is None and not INTERPRETED
ALIGNMENT = 16  # bytes: Triton specialises a kernel on whether a pointer is a multiple of this
knobs = triton.knobs.runtime


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def check_address(name: str, x: Tensor) -> None:
    """Raises an error for a tensor without memory, which a kernel would read through a null pointer."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # a functorch wrapper
        address = 0
    if address == 0 and x.numel() != 0:
        what = "a tensor with memory of its own, got one without (freed storage or a wrapper)"
        raise NoMemory(f"{name}: expected {what}")


def check_memory(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            check_address(name, x)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every address is aligned, so that the variant for aligned pointers can be used."""
    addresses = 0
    for x in tensors:
        if x is not None:
            addresses |= x.data_ptr()
    return addresses % ALIGNMENT == 0


def number(x: Number | Traced | None, without: float = 0.0) -> tuple[float | Traced, Tensor | None]:
    """A setting as two arguments of a kernel, which `number_of` joins: a value, and the tensor that replaces
    it."""
    if isinstance(x, (float, Traced)):
        return x, None
    if isinstance(x, Tensor):
        check_memory(setting=x)
        return 0.0, x
    return without if x is None else float(x), None


@triton.jit
def number_of(value, at):
    """The setting as float64. `value` must be annotated tl.float64 in the kernel, since Triton would pass it
    as float32."""
    x = tl.full([], value, tl.float64)
    if at is not None:
        x = tl.load(at)
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
        x = x.to(tl.float64)
    return x


# --- launches ----------------------------------------------------------------------------------------------
#
# Triton's own launcher inspects every argument at every call, and compiles a variant for each combination of
# aligned pointers. Here a kernel has two variants: for pointers that are all multiples of 16 bytes, and for
# pointers without assumed alignment. With a row stride (LAYOUT) only the second is used, since rows after the
# first need not be aligned. Integers are never compiled in. A variant is therefore determined by dtypes and
# constants, and is looked up in a dictionary from the second call on.


class _Place(NamedTuple):
    """Properties of a device that every launch needs."""

    index: int | None  # None: not a GPU
    processors: int  # SMs


@functools.lru_cache(maxsize=64)
def _place_of(device: torch.device) -> _Place:
    if device.type != "cuda":
        return _Place(None, 0)
    return _Place(device.index, torch.cuda.get_device_properties(device).multi_processor_count)


class Options(dict[str, Any]):
    """The constants of a kernel and Triton's options. Equal ones are one object, see `options_of`.

    each: number of programs that share the registers of an SM.
    """

    def __init__(self, each: int, constants: dict[str, Any]) -> None:
        super().__init__(constants)
        self.each, self.key = each, next(_keys)
        self.by_row = bool(constants.get("LAYOUT"))  # with a stride between rows

    def compile_options(self) -> dict[str, Any]:
        # Threads that hold copies of a sum of products add the terms in different orders. The copies are
        # equal only if products are rounded before they are added: with fused multiply-adds a number may
        # differ from its copies, and threads take different branches.
        given = {**self, "enable_fp_fusion": False}
        if not NVIDIA:
            return given
        # Without a limit, ptxas spills registers to make room for more programs than are launched.
        threads = 32 * self.get("num_warps", 4)
        return {**given, "maxnreg": min(255, 2**16 // (threads * self.each) // 8 * 8)}


_keys = itertools.count()


@functools.lru_cache(maxsize=None, typed=True)
def options_of(each: int = 1, **constants: Any) -> Options:
    return Options(each, constants)


def launch(kernel: Any, device: torch.device, programs: int, options: Options, *arguments: Any) -> None:
    """Runs the given number of programs of a kernel on the current stream of the device. All launches go
    through this function."""
    around: contextlib.AbstractContextManager[Any] | None = None
    index = _place_of(device).index
    if INTERPRETED:
        around = numpy.errstate(all="ignore")  # the interpreter uses NumPy, which warns about infinities
    elif index is not None and index != torch.cuda.current_device():
        around = torch.cuda.device(device)
    if around is None:
        run(kernel, programs, arguments, options)
        return
    with around:
        run(kernel, programs, arguments, options)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Options) -> None:
    """Called by `launch`; ahead-of-time compilation and tests replace it."""
    if INTERPRETED:
        kernel[(programs,)](*arguments, **options)
        return
    watch = _watch.get()
    (start if watch is None else watch)(kernel, programs, arguments, options)


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Options) -> None:
    variant, values = variant_of(kernel, arguments, options)
    variant(programs, values)


Watch = Callable[[Any, int, tuple[Any, ...], Options], None]
_watch: ContextVar[Watch | None] = ContextVar("what is called instead of `start`", default=None)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Within it, `watch` is called instead of each launch."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def watched() -> bool:
    return _watch.get() is not None


def is_current(device: torch.device) -> bool:
    """Whether a launch on this device needs no change of the current one."""
    index = _place_of(device).index
    return index is None or index == torch.cuda.current_device()


class _Pointer:
    """Represents a tensor argument when a kernel is compiled: aligned or not, of any size."""

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


_variants: dict[Any, Variant] = {}
_places: dict[int, tuple[int, ...]] = {}  # positions of the pointers among a kernel's arguments


def _pointers_of(kernel: Any, count: int) -> tuple[int, ...]:
    """Positions of the arguments that are tensors or None: those without a type annotation."""
    annotated = (p.annotation_type or p.do_not_specialize for p in kernel.params[:count])
    return tuple(place for place, known in enumerate(annotated) if not known)


def variant_of(kernel: Any, arguments: tuple[Any, ...], options: Options) -> tuple[Variant, list[Any]]:
    """The compiled kernel for a call, and the arguments with addresses in the place of tensors."""
    key, values = key_of(kernel, arguments, options)
    return _variants.get(key) or make_variant(key, kernel, arguments, options), values


def key_of(kernel: Any, arguments: tuple[Any, ...], options: Options) -> tuple[tuple[Any, ...], list[Any]]:
    """What determines the variant, and the arguments with addresses."""
    places = _places.get(id(kernel))
    if places is None:
        _places[id(kernel)] = places = _pointers_of(kernel, len(arguments))
    values, addresses = list(arguments), 0
    dtypes: list[Any] = []  # None where there is no tensor
    for place in places:
        x = values[place]
        if x is None:
            dtypes.append(None)
        else:
            dtypes.append(x.dtype)
            values[place] = address = x.data_ptr()
            addresses |= address
    even = addresses % ALIGNMENT == 0 and not options.by_row
    return (id(kernel), options.key, driver.active.get_current_device(), even, *dtypes), values


def make_variant(key: Any, kernel: Any, arguments: tuple[Any, ...], options: Options) -> Variant:
    _, _, device, even, *_ = key
    constants = tuple(options[p.name] for p in kernel.params[len(arguments) :])
    _variants[key] = made = Variant(compiled(kernel, arguments, even, options), device, constants)
    return made


def is_even(arguments: tuple[Any, ...], options: Options) -> bool:
    return aligned(*(x for x in arguments if isinstance(x, Tensor))) and not options.by_row


def compiled(kernel: Any, arguments: tuple[Any, ...], even: bool, options: Options) -> Any:
    """Triton's compiled kernel for arguments like these, on the current device."""
    like = (_Pointer(x.dtype, even) if isinstance(x, Tensor) else x for x in arguments)
    return kernel.warmup(*like, grid=(1,), **options.compile_options())


def programs(device: torch.device, units: int, each: int = 2) -> int:
    """The number of programs for `units` tiles or rows: at most `each` per SM of the GPU; a few in the
    interpreter."""
    most = each * _place_of(device).processors or 3
    programs: int = smaller(larger(units, 1), most)
    return programs
