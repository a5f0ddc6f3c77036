"""Marks tests that run the Triton kernels in their interpreter."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: no kernels to interpret"
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of Triton 3.6 needs a NumPy older than 2.4"
    return ""


needs_interpreter = pytest.mark.skipif(bool(_missing()), reason=_missing() or "the interpreter is here")
