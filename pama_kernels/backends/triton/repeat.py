"""Repeats the launches of an earlier call with the same signature: shapes, strides, dtypes, alignment of the
tensors, and settings.

Most of the host time of a call goes into what its signature determines: the strides and sizes that a kernel
takes, the number of programs, the compiled kernel. The fourth call with a signature is therefore recorded.
Later ones allocate their results, put the addresses of their tensors into the recorded launches, and launch.
No tensor and no value of a tensor is kept. A call that does more than allocate memory and launch kernels is
never repeated.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pama_kernels import _stream
from pama_kernels.backends._counter import counter
from pama_kernels.backends.arguments import OTHERS, TENSORS
from pama_kernels.backends.operators import NOTHING

from . import launch
from .launch import ALIGNMENT, INTERPRETED, Options, Variant

RECORDED = 4  # which call with a signature is recorded: it takes as long as four repeated ones save
_MOST = 512  # recorded signatures of a function; the oldest is dropped
_MOST_SEEN = 4096
_MOST_SCRATCH = 1 << 26  # bytes: larger calls do not wait for the host
_APART = 512  # bytes: the alignment of torch's CUDA allocator
_PLAIN = (Tensor, torch.nn.Parameter)

_Signature = tuple[tuple[Any, ...], list[int], torch.device]
_F = TypeVar("_F", bound=Callable[..., Any])


class _Launch(NamedTuple):
    variant: Variant
    programs: int
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]  # the place among the values, which tensor, offset in bytes
    counter: int  # the place of the counter, or -1


class _Recorded(NamedTuple):
    device: torch.device
    results: tuple[tuple[torch.Size, torch.dtype] | None, ...]  # None: not requested
    form: Callable[[list[Tensor]], Any]
    scratch: int  # bytes
    launches: tuple[_Launch, ...]

    def repeat(self, addresses: list[int]) -> Any:
        """`addresses`: of the tensors among the arguments."""
        device = self.device
        results = []
        for made in self.results:
            x = NOTHING if made is None else _empty(made[0], made[1], device)
            addresses.append(x.data_ptr())
            results.append(x)
        scratch = None
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
            addresses.append(scratch.data_ptr())
        for variant, programs, values, places, counted in self.launches:
            values = values.copy()
            for place, which, offset in places:
                values[place] = addresses[which] + offset
            if counted >= 0:
                values[counted] = counter(device).data_ptr()
            variant(programs, values)
        return self.form(results)


_GETTERS = {record: (tensors, OTHERS[record]) for record, tensors in TENSORS.items()}


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty in half the time: it reads sizes faster from a list of arguments."""
    if shape:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.empty_strided((), (), dtype=dtype, device=device)


def _signature(arguments: tuple[Any, ...]) -> _Signature | None:
    """The key of a call, the addresses of its tensors and their device; None if one is not plain."""
    key: list[Any] = []
    addresses: list[int] = []
    device = None
    for record in arguments:
        getters = _GETTERS.get(type(record))
        if getters is not None:
            fields = getters[0](record)
            key.append(getters[1](record))
        else:
            fields = record if isinstance(record, tuple) else (record,)
        for x in fields:
            if x is None or type(x) is float:
                key.append(x)
            elif type(x) in _PLAIN:
                try:
                    address = x.data_ptr()
                except RuntimeError:  # a functorch wrapper
                    return None
                if address == 0 and x.numel() != 0:
                    return None
                if device is None:
                    device = x.device
                addresses.append(address)
                key += x.dtype, x.shape, x.stride(), address % ALIGNMENT == 0
            elif isinstance(x, Tensor):
                return None
            else:
                key.append(x)
    if device is None:
        return None
    if len({*addresses}) < len(addresses):  # a tensor given twice
        key.append(tuple(map(addresses.index, addresses)))
    return (device, *key), addresses, device


class _Refused:
    """In the place of a `_Recorded`: not to be repeated."""


_REFUSED = _Refused()


def repeatable(function: _F) -> _F:
    """A function of a backend whose launches are repeated. Its arguments are records, tensors and settings;
    it returns a tensor, a tuple of tensors or None."""
    known: dict[tuple[Any, ...], _Recorded | _Refused] = {}
    seen: dict[int, int] = {}  # by hash of the signature: collisions only record a call earlier
    lock = threading.Lock()

    def is_due(key: tuple[Any, ...]) -> bool:
        """Whether a call that is not known is to be recorded."""
        code = hash(key)
        times = seen.get(code, 0) + 1
        if times < RECORDED:
            if len(seen) >= _MOST_SEEN:
                seen.clear()
            seen[code] = times
        return times >= RECORDED

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if INTERPRETED or launch.watched():
            return function(*arguments)
        made = _signature(arguments)
        if made is None or not launch.is_current(made[2]):
            return function(*arguments)
        key, addresses, device = made
        found = known.get(key)
        if type(found) is _Recorded:
            return found.repeat(addresses)
        if found is _REFUSED or not is_due(key) or _stream.capturing(device):
            return function(*arguments)
        result, recorded = _record(function, arguments, addresses, device)
        with lock:
            while len(known) >= _MOST:
                del known[next(iter(known))]
            known[key] = recorded
        return result

    call.known = known  # type: ignore[attr-defined]  # read by the tests
    return cast(_F, call)


# --- recording ---------------------------------------------------------------------------------------------

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
}
_VIEWS = {_aten.alias.default, _aten.detach.default, _aten.select.int, _aten.slice.Tensor, _aten.view.default}
_HARMLESS = {*_VIEWS, _aten.promote_types.default}


class _Allocations(TorchDispatchMode):
    """Keeps all that is allocated, so that no two allocations share memory. `other`: something else was
    run."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.other = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.made.append(result)
        elif function not in _HARMLESS:
            self.other = True
        return result


def _record(
    function: Callable[..., Any], arguments: tuple[Any, ...], addresses: list[int], device: torch.device
) -> tuple[Any, _Recorded | _Refused]:
    """Calls the function. Returns its result, and what repeats the call."""
    own_counter = counter(device)
    launches: list[tuple[Any, int, tuple[Any, ...], Options]] = []

    def noted(*given: Any) -> None:
        launches.append(given)
        launch.start(*given)

    allocations = _Allocations()
    with launch.watching(noted), allocations:
        result = function(*arguments)
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    fresh = {x.untyped_storage().data_ptr() for x in allocations.made}
    if allocations.other or not all(x is NOTHING or _is_whole(x, fresh) for x in results):
        return result, _REFUSED
    memory = _Memory(arguments, addresses, results, allocations.made)
    steps = [memory.step(*given, own_counter) for given in launches]
    complete = tuple(step for step in steps if step is not None)
    if len(complete) < len(steps) or memory.scratch > _MOST_SCRATCH:
        return result, _REFUSED
    shapes = tuple(None if x is NOTHING else (x.shape, x.dtype) for x in results)
    return result, _Recorded(device, shapes, _form_of(result), memory.scratch, complete)


def _is_whole(x: Tensor, fresh: set[int]) -> bool:
    """Whether a new tensor of its shape can take its place."""
    storage = x.untyped_storage()
    whole = x.is_contiguous() and storage.nbytes() == x.numel() * x.element_size()
    return whole and storage.data_ptr() in fresh


def _form_of(result: Any) -> Callable[[list[Tensor]], Any]:
    if result is None:
        return lambda results: None
    if isinstance(result, Tensor):
        return lambda results: results[0]
    return type(result)._make if hasattr(result, "_make") else tuple


def _is_equal(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


class _Memory:
    """To which tensor of a call an address belongs: an argument, a result, or the scratch memory of all
    launches."""

    def __init__(
        self, arguments: tuple[Any, ...], addresses: list[int], results: list[Tensor], made: list[Tensor]
    ) -> None:
        self.addresses = addresses
        self.given = [
            x
            for record in arguments
            for x in (record if isinstance(record, tuple) else (record,))
            if isinstance(x, Tensor)
        ]
        self.storages = [x.untyped_storage().data_ptr() for x in self.given]
        first = len(addresses)
        self.places = {x.untyped_storage().data_ptr(): (first + k, 0) for k, x in enumerate(results)}
        self.scratch = 0
        for x in made:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.places:
                self.places[storage.data_ptr()] = first + len(results), self.scratch
                self.scratch += -(-storage.nbytes() // _APART) * _APART

    def find(self, x: Tensor) -> tuple[int, int] | None:
        """Which tensor, and the offset in bytes; None if that depends on more than the signature."""
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        if storage in self.places:
            which, offset = self.places[storage]
            return which, offset + address - storage
        same = [k for k, own in enumerate(self.storages) if own == storage]
        if len(same) > 1:  # a view may begin where another argument happens to
            same = [k for k in same if _is_equal(x, self.given[k])]
        return (same[0], address - self.addresses[same[0]]) if same else None

    def step(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Options, own_counter: Tensor
    ) -> _Launch | None:
        variant, values = launch.variant_of(kernel, arguments, options)
        places: list[tuple[int, int, int]] = []
        counted = -1
        for place, x in enumerate(arguments):
            if not isinstance(x, Tensor) or x.data_ptr() == 0:
                continue
            if x is own_counter:
                counted = place
                continue
            found = self.find(x)
            if found is None:
                return None
            places.append((place, *found))
        return _Launch(variant, programs, values, tuple(places), counted)
