"""Repeats the launches of an earlier call with the same signature: dtypes, dimensions and alignment of the
tensors, the number of objectives, and flags. Shapes, strides and settings may change.

Most of the host time of a call goes into the arguments of its launches: strides and sizes, the number of
programs, the compiled kernel. The second call with a signature is therefore recorded as a function
(`trace.py`). Later ones allocate their results, and call it with their sizes, settings and addresses. Where
it returns False, since another branch is taken for these sizes, the call is recorded too. No tensor and no
value of a tensor is kept. A call that does more than allocate memory and launch kernels is never repeated.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pama_kernels import _stream
from pama_kernels._call import Tokens
from pama_kernels.backends._counter import counter
from pama_kernels.backends.arguments import OTHERS, TENSORS

from . import ahead, launch
from .launch import ALIGNMENT, INTERPRETED, Options
from .trace import Trace, Traced, plain, source, tracing

_MOST = 512  # signatures; the oldest is dropped
_MOST_FUNCTIONS = 16  # of a signature
_MOST_SCRATCH = 1 << 26  # bytes: larger calls do not wait for the host
_APART = 512  # bytes: the alignment of torch's CUDA allocator
_PLAIN = (Tensor, torch.nn.Parameter)
_SIZES = 2  # `rows` and `width`, the first of the other fields of `Tokens`

_Signature = tuple[tuple[Any, ...], list[Any], list[int], torch.device]


class _Known:
    """What repeats the calls with one signature: a function for each combination of branches."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., bool]] = []
        self.refused = False

    def repeat(self, numbers: list[Any], addresses: list[int], results: list[int]) -> bool:
        return any(function(numbers, addresses, results) for function in self.functions)

    @property
    def complete(self) -> bool:
        """Whether no further call is to be recorded."""
        return self.refused or len(self.functions) >= _MOST_FUNCTIONS


_known: dict[tuple[Any, ...], _Known] = {}
_lock = threading.Lock()


def _new(key: tuple[Any, ...]) -> None:
    with _lock:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[key] = _Known()


def _signature(function: Any, arguments: tuple[Any, ...]) -> _Signature | None:
    """The key of a call, its sizes and settings, the addresses of its tensors and their device; None if one
    is not plain. `_Recording` reads the sizes and settings in the same order."""
    key: list[Any] = [function]
    numbers: list[Any] = []
    addresses: list[int] = []
    device = None
    for record in arguments:
        kind = type(record)
        if kind in TENSORS:
            others = OTHERS[kind](record)
            if kind is Tokens:
                numbers += others[:_SIZES]
                others = others[_SIZES:]
            key.append(others)
            fields = TENSORS[kind](record)
        else:
            fields = record if isinstance(record, tuple) else (record,)
        for x in fields:
            if x is None:
                key.append(None)
            elif type(x) is float:
                key.append(float)
                numbers.append(x)
            elif type(x) in _PLAIN:
                try:
                    address = x.data_ptr()
                except RuntimeError:  # a functorch wrapper
                    return None
                if address == 0 and x.numel() != 0:
                    return None
                if device is None:
                    device, shape = x.device, x.shape
                    numbers += shape
                    key += device, shape[-1]  # objectives
                steps = x.stride()
                numbers += steps
                addresses.append(address)
                key += x.dtype, len(steps), address % ALIGNMENT == 0 if address else None
            elif isinstance(x, Tensor):
                return None
            else:
                key.append(x)
    if device is None:
        return None
    if len({*addresses}) < len(addresses):  # a tensor given twice
        key.append(tuple(map(addresses.index, addresses)))
    return tuple(key), numbers, addresses, device


def repeatable(allocate: Callable[..., Any], run: Callable[..., None]) -> Callable[..., Any]:
    """A function of a backend. It returns what `allocate` returns: a tensor, a tuple of them, or None; `run`,
    whose last argument this is, writes into it, by launches that are repeated. The other arguments are
    records, tensors and settings."""

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        result = allocate(*arguments)
        made = None if INTERPRETED or launch.watched() else _signature(run, arguments)
        if made is None or not launch.is_current(made[3]):
            run(*arguments, result)
            return result
        key, numbers, addresses, device = made
        known = _known.get(key)
        if known is None:
            ahead.compile_launches(lambda: run(*arguments, result))
            run(*arguments, result)
            _new(key)
        elif not known.repeat(numbers, addresses, [x.data_ptr() for x in _tensors(result)]):
            if known.complete or _stream.capturing(device):
                run(*arguments, result)
            else:
                _Recording(numbers, arguments, result).of(run, known)
        return result

    return call


def _tensors(result: Any) -> Sequence[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    return () if result is None else result


# --- recording ---------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_HARMLESS = {
    *(_aten.empty.memory_format, _aten.alias.default, _aten.detach.default, _aten.select.int),
    *(_aten.slice.Tensor, _aten.view.default),
}


class _Others(TorchDispatchMode):
    """Whether anything but allocations and views was run."""

    found = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or function not in _HARMLESS
        return function(*args, **(kwargs or {}))


def _names(device: torch.device) -> dict[str, Any]:
    """What the lines of a function refer to; it keeps no tensor."""
    memory = functools.partial(torch.empty, dtype=torch.uint8, device=device)

    def count() -> int:
        return counter(device).data_ptr()

    return {"inf": math.inf, "nan": math.nan, "memory": memory, "count": count}


class _Recording:
    """A call with `Traced` numbers in the place of its sizes and settings."""

    def __init__(self, numbers: list[Any], arguments: tuple[Any, ...], result: Any) -> None:
        self.trace, self.result, self.results = Trace(), result, _tensors(result)
        self.original, self.given = arguments, list[Tensor]()
        inputs = iter([Traced(self.trace, f"n{k}", value) for k, value in enumerate(numbers)])
        self.arguments = [self._record(record, inputs) for record in arguments]
        self.device = self.given[0].device
        self.inputs = ", ".join(f"n{k}" for k in range(len(numbers)))
        self.names = _names(self.device)

    def _record(self, record: Any, inputs: Iterator[Traced]) -> Any:
        kind = type(record)
        if kind not in TENSORS:
            if not isinstance(record, tuple):
                return self._field(record, inputs)
            return cast(Any, kind)._make(self._field(x, inputs) for x in record)
        sizes = {"rows": next(inputs), "width": next(inputs)} if kind is Tokens else {}
        fields = TENSORS[kind](kind(*record._fields))  # their names
        values = TENSORS[kind](record)
        changed = {name: self._field(x, inputs) for name, x in zip(fields, values, strict=True)}
        return record._replace(**sizes, **changed)

    def _field(self, x: Any, inputs: Iterator[Traced]) -> Any:
        if type(x) is float:
            return next(inputs)
        if isinstance(x, Tensor):
            if id(x) in self.trace.sizes:  # a tensor given twice
                x = x.detach()
            shape = None if self.given else [next(inputs) for _ in x.shape]
            self.given.append(x)
            self.trace.sizes[id(x)] = shape, [next(inputs) for _ in x.stride()]
            self.trace.storages.add(x.untyped_storage().data_ptr())
        return x

    def of(self, run: Callable[..., Any], known: _Known) -> None:
        """Makes the call, and adds to `known` what repeats it."""
        counted = counter(self.device)
        launches: list[tuple[Any, Any, tuple[Any, ...], Options]] = []

        def noted(kernel: Any, programs: Any, arguments: tuple[Any, ...], options: Options) -> None:
            launches.append((kernel, programs, arguments, options))
            launch.start(kernel, plain(programs), tuple(map(plain, arguments)), options)

        others = _Others()
        try:
            with launch.watching(noted), tracing(self.trace), others:
                run(*self.arguments, self.result)
            if others.found:
                raise TypeError("more than launches")
            known.functions.append(self._function(launches, counted))
        except TypeError:  # something cannot be recorded
            known.refused = True
            run(*self.original, self.result)

    def _function(self, launches: list[Any], counted: Tensor) -> Callable[..., bool]:
        trace = self.trace
        offsets, total = [], 0
        for _, size in trace.scratch:
            offsets.append(total)
            total = total + (size + (_APART - 1)) // _APART * _APART
        calls = []
        if offsets:
            trace.lines.append(f"if {source(total)} > {_MOST_SCRATCH}: return False")
            calls = [f"scratch = memory({source(total)})", "m = scratch.data_ptr()"]
        for k, (kernel, programs, arguments, options) in enumerate(launches):
            values = (self._value(x, counted, offsets) for x in arguments)
            calls.append(f"launch{k}({source(programs)}, [{', '.join(values)}])")
            self.names[f"launch{k}"], _ = launch.variant_of(kernel, tuple(map(plain, arguments)), options)
        lines = [f"{self.inputs}, = n", *trace.lines, *calls, "return True"]
        text = "def repeat(n, a, r):\n " + "\n ".join(lines)
        exec(text, self.names)
        return cast(Callable[..., bool], self.names["repeat"])

    def _value(self, x: Any, counted: Tensor, offsets: list[Any]) -> str:
        """The source of an argument of a kernel."""
        if not isinstance(x, Tensor):
            return source(x)
        if x is counted:
            return "count()"
        view = self.trace.views.get(id(x))
        if view is not None:
            return f"{self._value(view[1], counted, offsets)} + {view[2]}"
        for name, tensors in (("a", self.given), ("r", self.results)):
            for k, own in enumerate(tensors):
                if x is own:
                    return f"{name}[{k}]"
        for (own, _), offset in zip(self.trace.scratch, offsets, strict=True):
            if x is own:
                return f"m + {source(offset)}"
        raise TypeError("an argument of unknown memory")
