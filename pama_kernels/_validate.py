"""Checks of the public functions' arguments: type, dtype, shape, device, range; `_layout.py` has those of
the tokens. Values of tensors on a device are never read."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from . import _stream
from ._call import Number

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
INTEGERS = MASKS[:6]
_STRIDED = torch.strided
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")

Preference = Sequence[float] | Tensor | None
ClipRange = Number | tuple[Number, Number]


def shape_of(x: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in x.shape) + ("," if x.dim() == 1 else "") + ")"


# --- tensors -----------------------------------------------------------------------------------------------


def is_dense(x: object, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether it is a tensor, not a subclass, that `check_tensor` accepts."""
    return type(x) is Tensor and x.layout is _STRIDED and not x.is_nested and x.dtype in dtypes


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    if is_dense(x, dtypes):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a {kind} tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        what = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {what}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected a {kind} tensor, got dtype {x.dtype}")
    if type(x) is not Tensor and _is_dtensor(x):
        raise TypeError(
            f"{name}: expected a local tensor, got a DTensor; pass {name}.full_tensor() or .to_local()"
        )


def _is_dtensor(x: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(x, distributed.DTensor)


def check_memory(name: str, x: Tensor) -> None:
    """Checks a tensor that torch's own kernels will read, since these dereference the null pointer of freed
    storage.

    A backend checks the pointers of its own arguments.
    """
    if not traced() and without_memory(x):
        raise ValueError(f"{name}: expected a tensor with memory of its own, got one whose storage was freed")


def without_memory(x: Tensor) -> bool:
    """Whether the storage was freed. False for wrapper tensors, which have their own storage, and for tensors
    of zeros."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.numel() == 0 or x._is_zerotensor():
        return False
    try:
        return x.untyped_storage().nbytes() == 0
    except (NotImplementedError, RuntimeError):  # functorch's wrappers
        return False


def check_float(name: str, x: object) -> None:
    check_tensor(name, x, FLOATS, "floating-point")


def check_mask(name: str, x: object) -> None:
    check_tensor(name, x, MASKS, "bool, integer or floating-point")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {like_name}, got {x.device}")


def check_shape(name: str, x: Tensor, shape: Sequence[int], as_name: str = "") -> None:
    if x.shape != torch.Size(shape):
        expected = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {expected}{as_name}, got {shape_of(x)}")


def check_float_like(name: str, x: object, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    """Checks a floating-point tensor that must have the given shape and the device of `like`."""
    check_float(name, x)
    assert isinstance(x, Tensor)
    check_device(name, x, like_name, like)
    check_shape(name, x, shape)


def check_mask_like(name: str, x: object, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    check_mask(name, x)
    assert isinstance(x, Tensor)
    check_device(name, x, like_name, like)
    check_shape(name, x, shape)


# --- settings ----------------------------------------------------------------------------------------------


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def check_flag(name: str, value: object) -> bool:
    """Accepts True or False only, not values that Python would convert to bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    exclusive: bool = False,
    infinite: bool = False,
) -> Number:
    """A real number in [low, high] (or above low): a float, or a 0-d tensor. A tensor on a device, or while a
    graph is recorded, stays a tensor, and its range is not checked."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {shape_of(value)}")
        if value.dtype not in MASKS[1:]:
            raise TypeError(f"{name}: expected a real number, got dtype {value.dtype}")
        if traced() or value.device.type != "cpu":
            return value.detach()
        check_memory(name, value)
        value = float(value.detach().item())
    elif type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)
    number: float = value
    inside = low < number <= high if exclusive else low <= number <= high
    if not inside or (number == math.inf and not infinite):
        bracket, end = "(" if exclusive else "[", "]" if high < math.inf or infinite else ")"
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}{end}, got {number!r}")
    return number


def check_positive(name: str, value: object) -> Number:
    return check_number(name, value, 0.0, exclusive=True)


def clip_bounds(clip_range: object, dual_clip: object = None) -> tuple[Number, Number | None, Number | None]:
    """(eps_low, eps_high, dual_clip); None for no upper limit and no dual clip."""
    if type(clip_range) is float and 0.0 <= clip_range <= 1.0 and dual_clip is None:
        return clip_range, clip_range, None
    low: object = clip_range
    high: object = clip_range
    if isinstance(clip_range, (tuple, list)):
        if len(clip_range) != 2:
            raise ValueError(f"clip_range: expected one number or (low, high), got {len(clip_range)} values")
        low, high = clip_range
    eps_low = check_number("clip_range", low, 0.0, 1.0)
    eps_high: Number | None = check_number("clip_range", high, 0.0, infinite=True)
    if not isinstance(eps_high, Tensor) and eps_high == math.inf:
        eps_high = None
    if dual_clip is None:
        return eps_low, eps_high, None
    if eps_high is None:
        raise ValueError(f"dual_clip: expected None where clip_range has no upper end, got {dual_clip!r}")
    least = 1.0 if isinstance(eps_high, Tensor) else 1.0 + eps_high
    return eps_low, eps_high, check_number("dual_clip", dual_clip, least, exclusive=True)


def check_group_size(group_size: object) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, (Integral, torch.SymInt)):
        raise TypeError(f"group_size: expected an integer, got {type(group_size).__name__}")
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")


def check_process_group(process_group: object, *, batch: bool, setting: str = "process_group") -> None:
    if process_group is None:
        return
    if not batch:
        raise ValueError(
            f"{setting}: needs a rule with one set of weights for the batch, got one with several"
        )
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}"
        )


def traced() -> bool:
    """Whether operators are recorded or transformed (torch.compile, FakeTensorMode, make_fx, torch.jit.trace,
    torch.func)."""
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _tracing_state() is not None
        or functorch_is_active()
    )


_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
functorch_is_active = torch._C._are_functorch_transforms_active


# --- preference and weights --------------------------------------------------------------------------------


def check_preference_type(preference: object) -> None:
    """Checks that the preference is a sequence of numbers: a set has no order, and iterating a dictionary
    gives its keys."""
    if isinstance(preference, (str, bytes, dict, set, frozenset)) or not hasattr(preference, "__len__"):
        raise TypeError(
            "preference: expected a list of numbers, one for each objective, or a tensor, "
            f"got {preference!r} ({type(preference).__name__})"
        )


def preference_tensor(preference: Preference, n: int, device: torch.device) -> Tensor | None:
    """The preference on the simplex, (N,) float64 on the device; None is uniform."""
    if preference is None:
        return None
    if isinstance(preference, Tensor):
        check_tensor("preference", preference, MASKS[1:], "real")
        check_shape("preference", preference, (n,))
        if preference.device != device:
            raise ValueError(f"preference: expected device {device}, got {preference.device}")
        check_memory("preference", preference)
        values = preference.detach().double()
        if device.type != "cpu" or type(preference) is not Tensor or traced():
            return values / values.sum()
        return _on_simplex(tuple(values.tolist()), device)
    check_preference_type(preference)
    if len(preference) != n:
        raise ValueError(f"preference: expected {n} numbers, got {len(preference)}")
    try:
        numbers = tuple(float(value) for value in preference)
    except (TypeError, ValueError):
        raise TypeError(f"preference: expected {n} numbers, got {preference!r}") from None
    return _on_simplex(numbers, device)


def _on_simplex(values: tuple[float, ...], device: torch.device) -> Tensor:
    if any(not 0 <= value < math.inf for value in values) or not 0 < sum(values) < math.inf:
        raise ValueError(
            f"preference: expected non-negative finite numbers with a positive sum, got {list(values)}"
        )
    if torch.compiler.is_compiling():
        # As in `arguments.flat`: numbers that become constants would make the graph valid for them only.
        one = torch.ones((), dtype=torch.float64, device=device)
        numbers = torch.stack([one * value for value in values])
        return numbers / numbers.sum()
    total = math.fsum(values)
    shares = tuple(value / total for value in values)
    if traced() or _stream.capturing(device):
        return _filled(shares, device)  # part of the graph
    return _cached(shares, device)


@functools.lru_cache(maxsize=256)
def _cached(shares: tuple[float, ...], device: torch.device) -> Tensor:
    made = _filled(shares, device)
    _stream.wait_for(device)
    return made


def _filled(shares: tuple[float, ...], device: torch.device) -> Tensor:
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(shares, dtype=torch.float64, device=device)
    result = torch.empty(len(shares), dtype=torch.float64, device=device)
    for place, value in zip(result.unbind(), shares, strict=True):
        place.fill_(value)  # a copy from the host would synchronise with the device
    return result
