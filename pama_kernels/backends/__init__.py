"""Which implementation serves a tensor.

A backend is a module of this package with some or all of the functions of `operators.SCHEMAS` (those over
tokens take their inputs as one `inputs.TokenInputs`), and optionally `weights_out` and `min_norm_out`
(results written into given tensors), `quick_weights` and `quick_min_norm` (whole calls for plain tensors, or
None where they do not serve). Each function of a device type is served by the first backend of its row in
`BACKENDS` that

- can be imported: what is not built or not installed raises ImportError and is passed over;
- serves the device type: `unusable(device_type)`, where a backend has it, returns None or the reason;
- has the function.

So a backend may hold a few fast functions and leave the rest to the next. `PAMA_BACKEND` starts the row at
the backend it names (PAMA_BACKEND=cuda leaves to triton what cuda lacks); this one must then be usable.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# device type -> modules in this package that can serve it, best first
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "triton"), "cuda": ("cuda", "triton")}


def candidates(device_type: str) -> tuple[str, ...]:
    """Names of the backends to try, best first."""
    names = BACKENDS.get(device_type, ())
    forced = os.environ.get("PAMA_BACKEND")
    if not forced:
        return names
    known = sorted({name for row in BACKENDS.values() for name in row})
    if forced not in known:
        raise ValueError(f"PAMA_BACKEND: expected one of {', '.join(known)}, got {forced!r}")
    return names[names.index(forced) :] if forced in names else ()


def load(name: str, device_type: str) -> ModuleType | str:
    """The backend, or why it cannot serve this type of device."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return str(error)
    reason: str | None = module.unusable(device_type) if hasattr(module, "unusable") else None
    return module if reason is None else reason


@functools.lru_cache(maxsize=256)
def find(device_type: str, function: str) -> Callable[..., Any] | None:
    """What computes this function on this type of device; None where no backend has it."""
    forced = os.environ.get("PAMA_BACKEND")
    usable, reasons = False, ""
    for name in candidates(device_type):
        backend = load(name, device_type)
        if isinstance(backend, str):
            reasons += f"; {name}: {backend}"
            if name == forced:
                break
        elif hasattr(backend, function):
            found: Callable[..., Any] = getattr(backend, function)
            return found
        else:
            usable = True
    if usable:
        return None
    raise RuntimeError(
        f"no backend serves device type {device_type!r}"
        + (f" with PAMA_BACKEND={forced}" if forced else "")
        + reasons
        + "; `python -m pama_kernels.info` lists what is built and why not"
    )


def implementation(x: torch.Tensor, function: str) -> Callable[..., Any]:
    """What computes this function on the device of x."""
    found = find(x.device.type, function)
    if found is None:
        raise NotImplementedError(f"no backend has {function!r} for device type {x.device.type!r}")
    return found
