"""Arithmetic on sizes and settings, recorded as the source of a function.

The sizes that kernels take, the number of programs and the memory of a call follow from the shapes and
strides of its tensors. While a call is recorded (`repeat.py`), each of these is a `Traced` number: what is
computed from it becomes a line of the function, and each comparison a guard, at which the function returns
False for numbers for which the call would take another branch. Other uses raise TypeError.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_tracing: ContextVar[Trace | None] = ContextVar("the call that is recorded", default=None)


class Trace:
    """The lines of the function, and what belongs to the recorded call."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.noted: dict[str, Traced] = {}  # by expression
        # Shape (of the first one) and strides of the arguments, by id.
        self.sizes: dict[int, tuple[Sequence[Any] | None, Sequence[Any]]] = {}
        self.storages: set[int] = set()  # of the arguments
        self.scratch: list[tuple[Tensor, Any]] = []  # memory, and its bytes
        self.views: dict[int, tuple[Tensor, Tensor, int]] = {}  # by id: the view, of what, offset in bytes

    def note(self, expression: str, value: Any) -> Traced:
        if expression not in self.noted:
            name = f"v{len(self.noted)}"
            self.lines.append(f"{name} = {expression}")
            self.noted[expression] = Traced(self, name, value)
        return self.noted[expression]

    def guard(self, condition: str, outcome: bool) -> None:
        line = f"if {'not ' if outcome else ''}({condition}): return False"
        if line not in self.lines:
            self.lines.append(line)

    def sizes_of(self, x: Tensor) -> tuple[Sequence[Any] | None, Sequence[Any]]:
        known = self.sizes.get(id(x))
        if known is None and x.untyped_storage().data_ptr() in self.storages:
            raise TypeError("sizes of a view of an argument")
        return (None, x.stride()) if known is None else known


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    token = _tracing.set(trace)
    try:
        yield
    finally:
        _tracing.reset(token)


class Traced:
    """A number, and the name of the variable that has it. Not an int: where a number itself is needed, an
    error is raised."""

    __slots__ = ("name", "trace", "value")
    __hash__ = None

    def __init__(self, trace: Trace, name: str, value: Any) -> None:
        self.trace, self.name, self.value = trace, name, value

    def __bool__(self) -> bool:
        self.trace.guard(self.name, bool(self.value))
        return bool(self.value)

    def __neg__(self) -> Traced:
        return self.trace.note(f"-{self.name}", -self.value)


def plain(x: Any) -> Any:
    return x.value if type(x) is Traced else x


def source(x: Any) -> str:
    return x.name if type(x) is Traced else repr(x)


def _add_operators() -> None:
    def arithmetic(sign: str, compute: Callable[..., Any], swapped: bool) -> Callable[..., Traced]:
        def method(self: Traced, other: Any) -> Traced:
            a, b = (other, self) if swapped else (self, other)
            return self.trace.note(f"{source(a)} {sign} {source(b)}", compute(plain(a), plain(b)))

        return method

    def comparison(sign: str, compute: Callable[..., bool]) -> Callable[..., bool]:
        def method(self: Traced, other: Any) -> bool:
            outcome = compute(self.value, plain(other))
            self.trace.guard(f"{self.name} {sign} {source(other)}", outcome)
            return outcome

        return method

    for sign, name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv")):
        compute = getattr(operator, name)
        setattr(Traced, f"__{name}__", arithmetic(sign, compute, False))
        setattr(Traced, f"__r{name}__", arithmetic(sign, compute, True))
    for sign, name in (("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge"), ("==", "eq"), ("!=", "ne")):
        setattr(Traced, f"__{name}__", comparison(sign, getattr(operator, name)))


_add_operators()


def _of_two(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    for x in (a, b):
        if type(x) is Traced:
            note: Trace = x.trace
            return note.note(f"{function.__name__}({source(a)}, {source(b)})", function(plain(a), plain(b)))
    return function(a, b)


def larger(a: Any, b: Any) -> Any:
    """max, without a guard."""
    return _of_two(max, a, b)


def smaller(a: Any, b: Any) -> Any:
    """min, without a guard."""
    return _of_two(min, a, b)


def shape(x: Tensor) -> Sequence[Any]:
    """Of the first tensor of a call."""
    trace = _tracing.get()
    if trace is None:
        return x.shape
    sizes, _ = trace.sizes_of(x)
    if sizes is None:
        raise TypeError("only the shape of the first tensor is recorded")
    return sizes


def strides(x: Tensor) -> Sequence[Any]:
    trace = _tracing.get()
    return x.stride() if trace is None else trace.sizes_of(x)[1]


def element(x: Tensor, place: int) -> Tensor:
    """A number in a contiguous tensor (K,)."""
    made = x[place]
    trace = _tracing.get()
    if trace is not None:
        trace.views[id(made)] = made, x, place * x.element_size()
    return made


def memory(device: torch.device, count: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scratch memory of a call (count,)."""
    made = torch.empty(plain(count), dtype=dtype, device=device)
    trace = _tracing.get()
    if trace is not None:
        trace.scratch.append((made, count * dtype.itemsize))
    return made
