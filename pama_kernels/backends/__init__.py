"""Which implementation serves a tensor. Each backend module has the functions of `operators.SCHEMAS`.

To add a backend, write such a module and name it in `BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

# device type -> modules in this package that can serve it, best first
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpu",)}


@functools.lru_cache(maxsize=16)
def backend(device_type: str) -> ModuleType:
    """The module that computes on this type of device."""
    candidates = BACKENDS.get(device_type, ())
    forced = os.environ.get("PAMA_BACKEND")
    if forced:
        known = sorted({name for names in BACKENDS.values() for name in names})
        if forced not in known:
            raise ValueError(f"PAMA_BACKEND: expected one of {', '.join(known)}, got {forced!r}")
        candidates = (forced,) if forced in candidates else ()
    if not candidates:
        raise RuntimeError(
            f"no backend serves device type {device_type!r}"
            + (f" with PAMA_BACKEND={forced}" if forced else "")
            + "; `python -m pama_kernels.info` lists what is built and why not"
        )
    return importlib.import_module(f"{__name__}.{candidates[0]}")


def backend_for(x: torch.Tensor) -> ModuleType:
    return backend(x.device.type)
