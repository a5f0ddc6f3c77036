"""Installation, dispatch, processes, memory, and defaults of torch that a caller has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from operator_table import EVERY, leaves

import pama_kernels as pk
from pama_kernels.backends import registry
from pama_kernels.tools import info


def python(*arguments: str, **environment: str) -> str:
    """The output of a separate process that ended without an error."""
    path = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return done.stdout


# --- info --------------------------------------------------------------------------------------------


def test_info_as_text() -> None:
    lines = python("-m", "pama_kernels", "info", PAMA_BACKEND="wrong").splitlines()
    first = {line.split()[0]: line for line in lines if line.strip()}
    for name in ("triton", "numpy", "python", "platform", "processor", "features", "threads"):
        assert name in first, f"{name} is missing"
    assert pk.__version__ in first["pama-kernels"]
    assert torch.__version__.split("+")[0] in first["torch"]
    assert "wrong" in first["PAMA_BACKEND"]
    for backend in registry.BACKENDS:
        assert set(first[backend.name].split()[1:3]) <= {"yes", "no"}


@pytest.mark.cpu
def test_info_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAMA_BACKEND", "cpu")
    said = json.loads(python("-m", "pama_kernels", "info", "--json"))
    assert said["versions"]["pama-kernels"] == info.collect()["versions"]["pama-kernels"]
    assert said["cores"] >= 1
    assert said["PAMA_BACKEND"] == "cpu"
    torch.set_num_threads(3)
    assert info.collect()["threads"] == 3
    backends = {backend["name"]: backend for backend in said["backends"]}
    assert set(backends) == {backend.name for backend in registry.BACKENDS}
    assert backends["cpu"]["usable"]
    assert any(isa in backends["cpu"]["detail"] for isa in ("portable", "avx2", "avx512", "neon"))
    for backend in backends.values():
        assert backend["detail"], "each backend says what it is, or why it is not usable"
        assert backend["built"] or not backend["usable"]


def test_info_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise OSError("a library is missing")

    backends = tuple(registry.Backend("cpu", b.devices, b.functions, broken) for b in registry.BACKENDS)
    monkeypatch.setattr(registry, "BACKENDS", backends)
    assert all("a library is missing" in status.detail or not status.usable for status in info.backends())


# --- which backend -----------------------------------------------------------------------------------


def test_dispatch_selects_the_first_usable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(name: str, functions: tuple[str, ...], **more: bool) -> registry.Backend:
        return registry.Backend(name, ("cpu", "cuda"), functions, lambda *_: "", **more)

    rows = (
        backend("few", ("weights",), floats_only=True),
        backend("broken", ("gae",)),
        backend("all", registry.ALL),
    )
    few, everything = ModuleType("few"), ModuleType("all")
    found = {"few": few, "broken": "no device", "all": everything}
    monkeypatch.setattr(registry, "BACKENDS", rows)
    monkeypatch.setattr(registry, "load", lambda name, _: found[name])
    monkeypatch.delenv("PAMA_BACKEND", raising=False)
    find = registry.find.__wrapped__
    assert find("cuda", "weights") is few
    assert find("cuda", "weights", True) is everything  # a setting on the device
    assert find("cuda", "gae") is everything
    monkeypatch.setenv("PAMA_BACKEND", "all")
    assert find("cuda", "weights") is everything
    monkeypatch.setenv("PAMA_BACKEND", "broken")
    with pytest.raises(
        RuntimeError, match=r"no backend implements 'gae'.*PAMA_BACKEND=broken.*broken: no device"
    ):
        find("cuda", "gae")
    with pytest.raises(RuntimeError, match=r"no backend implements 'gae' on device type 'mps'"):
        find("mps", "gae")


def test_every_function_obeys_pama_backend() -> None:
    """An unknown name is an error in the first call, not on import."""
    program = """
from operator_table import EVERY
print("imported")
for name, call in EVERY.items():
    try:
        call.run(**call.tensors(3, 4))
        print(name, "ran")
    except ValueError as error:
        print(name, error)
"""
    lines = python("-c", program, PAMA_BACKEND="wrong").splitlines()
    assert lines[0] == "imported"
    for line in lines[1:]:
        plain_torch = line.startswith(("pareto_gap", "masked_whiten"))
        assert ("PAMA_BACKEND: expected one of" in line and "'wrong'" in line) or plain_torch, line


def test_import_without_metadata() -> None:
    """A copied folder, a frozen application."""
    program = """
import importlib.metadata as metadata
find = metadata.Distribution.from_name.__func__
def without(cls, name):
    if name.replace("_", "-").lower() == "pama-kernels":
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)
metadata.Distribution.from_name = classmethod(without)
import pama_kernels
print(pama_kernels.__version__)
"""
    assert python("-c", program).strip() == "unknown"


def test_names() -> None:
    assert all(hasattr(pk, name) for name in pk.__all__)
    assert len(set(pk.__all__)) == len(pk.__all__)


# --- defaults and memory -----------------------------------------------------------------------------


def test_torch_defaults_of_the_caller_have_no_effect() -> None:
    """A result on the wrong device would be written through a wrong pointer."""
    program = """
import torch
from operator_table import EVERY, leaves
made = {name: call.tensors(3, 4) for name, call in EVERY.items()}
wanted = {name: leaves(call.run(**made[name])) for name, call in EVERY.items()}
def same():
    for name, call in EVERY.items():
        for x, y in zip(leaves(call.run(**made[name])), wanted[name], strict=True):
            assert x.device.type == "cpu" and x.dtype == y.dtype and torch.equal(x, y), name
with torch.device("meta"):
    same()
torch.set_default_device("meta")
same()
torch.set_default_dtype(torch.float64)
same()
"""
    python("-c", program)


def test_uninitialized_memory_is_in_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and intermediate tensors are allocated in memory filled with NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(make: object) -> object:
        def call(*arguments: object, **options: object) -> torch.Tensor:
            x = make(*arguments, **options)  # type: ignore[operator]
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    for name, call in EVERY.items():
        x = call.tensors(3, 4)
        wanted = leaves(call.run(**x))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned(empty))
            patch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
            found = leaves(call.run(**x))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.cpu
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_failed_allocation_is_a_memory_error() -> None:
    """A failed allocation of workspace, also in a parallel region, does not end the interpreter."""
    program = """
import resource, torch, pama_kernels as pk
def limited(function):
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + (16 << 20), resource.RLIM_INFINITY))
    try:
        function()
        return "ran"
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
scores, gram = torch.zeros(1, 6_000_000), torch.eye(2500)
out = pk.WeightSolution(torch.empty_like(scores), torch.empty(1))
solved = pk.WeightSolution(torch.empty(2500), torch.empty(()))
for threads in (1, 2):
    torch.set_num_threads(threads)
    pk.pama_weights(torch.randn(9000, 5)), pk.min_norm_weights(torch.eye(4).repeat(64, 1, 1))
    print(limited(lambda: pk.pama_weights(scores, regularization=0.1, out=out)))
    print(limited(lambda: pk.min_norm_weights(gram, out=solved)))
    print(limited(lambda: pk.upgrad_weights(gram, out=solved)))
print(pk.pama_weights(torch.ones(3)).weights.sum().item())
"""
    said = python("-c", program).splitlines()
    assert set(said[:-1]) <= {"MemoryError", "ran"}
    assert "MemoryError" in said
    assert float(said[-1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.cpu
def test_more_objectives_than_int_max_are_an_error() -> None:
    """Expanded tensors of this size take no memory."""
    many = torch.ones(1).expand(2**31 + 1)
    for options in ({}, {"regularization": 0.1}, {"scale": 2.0}):
        with pytest.raises((ValueError, RuntimeError, MemoryError)):
            pk.pama_weights(many, **options)
