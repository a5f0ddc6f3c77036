"""Compilation of the kernels of a call before its first launch, in parallel."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

from . import launch
from .launch import INTERPRETED, Options, knobs, watching

Launch = tuple[Any, tuple[Any, ...], Options]  # kernel, arguments, options

# Up to Triton 3.6 every signature has a launcher of its own, compiled by the C compiler.
_LAUNCHERS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def compile_launches(calls: Callable[[], object]) -> int:
    """Compiles and loads the kernels that these calls would launch, in parallel on all cores. Returns how
    many were not loaded before.

    No kernel is launched, so the results of the calls are uninitialised.
    """
    if INTERPRETED:
        return 0
    launches: list[Launch] = []
    with watching(lambda kernel, programs, *rest: launches.append((kernel, *rest))):
        calls()
    missing = {key: one for one in launches if (key := launch.key_of(*one)[0]) not in launch._variants}
    if missing:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        with _without_collection(), ThreadPoolExecutor(os.cpu_count()) as executor:
            # In this mode Triton returns kernels that are still being compiled. The executor starts its tasks
            # in order, so the compilation that a task of `_loaded` waits for has begun.
            with triton.AsyncCompileMode(executor), _launchers_by(executor, device):
                kernels = [_compiled(*one) for one in missing.values()]
                tasks = [executor.submit(_loaded, kernel, device) for kernel in kernels]
            for task in tasks:
                task.result()
    for key, one in missing.items():
        launch.make_variant(key, *one)
    return len(missing)


def _compiled(kernel: Any, arguments: tuple[Any, ...], options: Options) -> Any:
    return launch.compiled(kernel, arguments, launch.is_even(arguments, options), options)


def _loaded(kernel: Any, device: int | None) -> Any:
    """What runs a kernel, once that is compiled."""
    with _on(device):  # each thread has a current GPU of its own
        return (kernel.result() if hasattr(kernel, "result") else kernel).run


def _on(device: int | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


@contextlib.contextmanager
def _launchers_by(executor: Executor, device: int | None) -> Iterator[None]:
    """Begins the compilation of launchers beside that of their kernels, which take them from the cache on
    disk."""
    earlier = knobs.jit_cache_hook

    def begin(**given: Any) -> Any:
        executor.submit(_build_launcher, given["compile"]["signature"], device)
        return None if earlier is None else earlier(**given)

    if _LAUNCHERS:
        knobs.jit_cache_hook = begin
    try:
        yield
    finally:
        if _LAUNCHERS:
            knobs.jit_cache_hook = earlier


def _build_launcher(signature: dict[str, str], device: int | None) -> None:
    # It is built first, then reads the metadata, which a kernel does not have yet.
    with _on(device), contextlib.suppress(AttributeError):
        driver.active.launcher_cls(SimpleNamespace(signature=signature), SimpleNamespace())


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Before Python 3.13, `ast.parse` fails in a thread if a garbage collection lets another thread parse."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
