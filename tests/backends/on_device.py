"""pytest plugin (`-p on_device`): every public call of the test-suite runs on the device `PAMA_TEST_DEVICE`.

The tests stay as they are; what only the CPU promises is marked `cpu` and left out by `-m`. Around each
public function the tensors it is given are copied to the device with their strides, storage offsets and
shared memory; the call runs with synchronisation made an error; results, gradients and `out=` come back to
the CPU. Device `cpu` copies too: it proves the plugin where no GPU is.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

FUNCTIONS = (
    "combine_advantages",
    "pama_loss",
    "pama_weights",
    "min_norm_weights",
    "upgrad_weights",
    "pareto_gap",
    "objective_statistics",
    "multi_objective_gae",
    "group_normalize",
    "masked_whiten",
)


class _Move(torch.autograd.Function):
    """A differentiable copy from device to device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moved: Tensor) -> Tensor:
        ctx.device = x.device
        ctx.set_materialize_grads(False)
        return moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return None if gradient is None else gradient.to(ctx.device), None


class Mover:
    """Copies tensors to a device; those that share memory share it there too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storages: dict[int, Tensor] = {}

    def tensor(self, x: Tensor) -> Tensor:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
            return x
        if x.is_neg():
            return torch._neg_view(self.tensor(torch._neg_view(x)))
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self.storages or key == 0:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            copy = torch.empty(len(whole), dtype=torch.uint8, device=self.device)
            self.storages[key] = copy.copy_(whole)
        empty = torch.empty(0, dtype=x.dtype, device=self.device)
        moved = empty.set_(  # type: ignore[call-overload]
            self.storages[key].untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )
        return _Move.apply(x, moved) if x.requires_grad else moved

    def tree(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, tuple) and hasattr(value, "_replace"):
            return type(value)(*map(self.tree, value))
        return value


def back(value: Any) -> Any:
    """Results on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, pk.ObjectiveStatistics):
        return pk.ObjectiveStatistics(value.buffer.cpu(), value.objectives, value.has_pairs)
    if isinstance(value, tuple):
        parts = [back(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_replace") else tuple(parts)
    return value


@contextmanager
def synchronisation(device: torch.device, mode: str) -> Iterator[None]:
    """`mode`: whether a synchronisation of the device is an "error" or the "default"."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class RuleOnTheCPU:
    """A callable as rule, as the tests write them: for statistics on the CPU."""

    def __init__(self, rule: Callable[..., Tensor], device: torch.device) -> None:
        self._rule, self._device = rule, device

    def __getattr__(self, name: str) -> Any:  # `noon`, `pairs`
        return getattr(self._rule, name)

    def __call__(self, statistics: pk.ObjectiveStatistics) -> Tensor:
        with synchronisation(self._device, "default"):
            return self._rule(back(statistics)).to(self._device)


def on_device(function: Callable[..., Any], device: torch.device, method: bool = False) -> Callable[..., Any]:
    """The same call with its tensors on the device."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        mover = Mover(device)
        owner, given = arguments[:1] if method else (), arguments[1:] if method else arguments
        if method:
            owner[0].to(device)
        given = [mover.tree(x) for x in given]
        moved = {name: mover.tree(x) for name, x in options.items()}
        rule = owner[0].rule if method else options.get("rule")
        if callable(rule):
            own = RuleOnTheCPU(rule, device)
            if method:
                owner[0].rule = own
            else:
                moved["rule"] = own
        with synchronisation(device, "error"):
            result = function(*owner, *given, **moved)
        if method:
            owner[0].rule = rule
            owner[0].cpu()
        out = options.get("out")
        if out is not None:
            for x, y in zip(out, moved["out"], strict=True):
                x.copy_(y)
            return out
        return back(result)

    return call


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(os.environ.get("PAMA_TEST_DEVICE", "cuda"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("PAMA_TEST_DEVICE=cuda: torch finds no GPU")
        for count in (1, 2):  # what is made once for a process may wait for the device
            pk.objective_statistics(None, None, torch.ones(2, 2, count, device=device), pairs=True)
    for name in FUNCTIONS:
        setattr(pk, name, on_device(getattr(pk, name), device))
    pk.PamaLoss.forward = on_device(pk.PamaLoss.forward, device, method=True)  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The share `PAMA_TEST_SHARE` (the i-th of k) of each test's parameters; all of a test that has few."""
    i, k = map(int, os.environ.get("PAMA_TEST_SHARE", "1/1").split("/"))
    names = [item.nodeid.split("[")[0] for item in items]
    parameters, seen = Counter(names), Counter[str]()
    left_out = []
    for item, name in zip(list(items), names, strict=True):
        seen[name] += 1
        if parameters[name] >= k and seen[name] % k != i % k:
            left_out.append(item)
            items.remove(item)
    config.hook.pytest_deselected(items=left_out)
