"""Hypothesis profiles, markers and fixtures that the tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Fixtures here only set and restore process-wide state, which is the same for every example of a test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("quick", max_examples=8, derandomize=True, **_COMMON)
settings.register_profile("full", max_examples=1000, **_COMMON)
settings.register_profile("interpreter", max_examples=3, derandomize=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests whose marker names something that is not available."""
    missing = {}
    if importlib.util.find_spec("pama_kernels.backends._cpu") is None:
        missing["cpu"] = "the native CPU backend is not built"
    if not torch.cuda.is_available():
        missing["gpu"] = "torch finds no GPU"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """A fixed seed and one thread; the number of threads is restored afterwards."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    """Sets a number of threads; `_reproducible` restores it."""
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels of one instruction set. Tests that use it are marked `cpu`."""
    from pama_kernels.backends import _cpu

    if _cpu.use_isa(request.param) != request.param:
        _cpu.use_isa("best")
        pytest.skip(f"this build or processor has no {request.param}")
    yield request.param
    _cpu.use_isa("best")
