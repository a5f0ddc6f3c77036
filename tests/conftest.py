"""Hypothesis profiles and fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from pama_kernels import _cpu

# Fixtures here only set and restore process-wide state, which is the same for every example of a test.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("quick", max_examples=8, derandomize=True, **_COMMON)
settings.register_profile("full", max_examples=1000, **_COMMON)
settings.register_profile("interpreter", max_examples=3, derandomize=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """A fixed seed, one thread, and both as they were afterwards."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    """So many threads; `_reproducible` restores the number."""
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels of one instruction set."""
    if _cpu.use_isa(request.param) != request.param:
        _cpu.use_isa("best")
        pytest.skip(f"this build or processor has no {request.param}")
    yield request.param
    _cpu.use_isa("best")
