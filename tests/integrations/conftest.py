"""Fixtures of the adapters' tests, which train tiny models in real trainers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_trl"):
            # Transformers' own, while it renames an argument that TRL sets
            item.add_marker(
                pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"), append=False
            )


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """The garbage collection at the end of a training takes longer than the training: exclude old objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def verl() -> Iterator[ModuleType]:
    """Our module, imported after verl and its trainers, whose imports raise warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pama_kernels.integrations import verl

        verl.check()
        yield verl
