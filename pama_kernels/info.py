"""What is installed, which backends work on this machine, and why the others do not.

``python -m pama_kernels.info`` prints it for a person, with ``--json`` for a program;
:func:`collect` returns it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_DISTRIBUTIONS = ("pama-kernels", "torch", "triton", "numpy")

# The processor features that decide which kernels run, as Linux names them (x86-64, then aarch64).
_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16"),
)


@dataclass(frozen=True)
class BackendStatus:
    """One backend: `built` is part of this installation, `usable` runs on this machine."""

    name: str
    built: bool
    usable: bool
    detail: str


@dataclass(frozen=True)
class _Backend:
    name: str
    module: str
    # Given the imported module: (usable, detail).
    probe: Callable[[ModuleType], tuple[bool, str]]


def _probe_cpu(module: ModuleType) -> tuple[bool, str]:
    build: dict[str, Any] = module.build_info()
    isas = ", ".join(build["isas"])
    openmp = "OpenMP" if build["openmp"] else "no OpenMP: one thread"
    return True, f"{build['isa']} (built: {isas}), {openmp}, {build['compiler']}"


def _probe_triton(module: ModuleType) -> tuple[bool, str]:
    importlib.import_module("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "interpreter on the CPU (TRITON_INTERPRET=1)"
    usable, detail = _gpus()
    return usable, detail if usable else f"{detail}; TRITON_INTERPRET=1 runs it on CPU tensors, slowly"


def _probe_cuda(module: ModuleType) -> tuple[bool, str]:
    build: dict[str, Any] = module.build_info()
    built = f"CUDA {build['cuda']}, architectures {build['architectures']}"
    usable, detail = _gpus()
    if usable:
        why = importlib.import_module("pama_kernels.backends.cuda").unusable("cuda")
        usable, detail = why is None, why or f"{detail}; first choice for the statistics and both solvers"
    return usable, f"{detail} ({built})"


def _gpus() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, "torch finds no GPU"
    count = torch.cuda.device_count()
    return True, ", ".join(torch.cuda.get_device_name(i) for i in range(count))


_BACKENDS = (
    _Backend("cpu", "pama_kernels._cpu", _probe_cpu),
    _Backend("triton", "pama_kernels.backends.triton", _probe_triton),
    _Backend("cuda", "pama_kernels._cuda", _probe_cuda),
)


def backends() -> list[BackendStatus]:
    """The state of every backend. Never raises: an error becomes the reason for `usable=False`."""
    return [_status(backend) for backend in _BACKENDS]


def _status(backend: _Backend) -> BackendStatus:
    try:
        built = importlib.util.find_spec(backend.module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        built = False
    if not built:
        return BackendStatus(backend.name, False, False, "not built")
    try:
        # Whatever goes wrong here is the answer that was asked for.
        usable, detail = backend.probe(importlib.import_module(backend.module))
    except Exception as error:
        usable, detail = False, f"{type(error).__name__}: {error}"
    return BackendStatus(backend.name, True, usable, detail)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """The processor's name and those of `_FEATURES` that it has, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    return name, [feature for feature in _FEATURES if feature in present]


def collect() -> dict[str, Any]:
    """Versions, processor, threads and backends, as plain values that JSON can hold."""
    import torch

    name, features = _processor()
    return {
        "versions": {
            **{distribution: _version(distribution) for distribution in _DISTRIBUTIONS},
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "processor": name,
        "features": features,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "PAMA_BACKEND": os.environ.get("PAMA_BACKEND"),
        "backends": [asdict(status) for status in backends()],
    }


def _format(info: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = [
        *((name, version or "not installed") for name, version in info["versions"].items()),
        ("platform", info["platform"]),
        ("processor", f"{info['processor']}, {info['cores']} cores"),
        ("features", " ".join(info["features"]) or "unknown"),
        ("threads", f"{info['threads']} (torch.get_num_threads)"),
        ("PAMA_BACKEND", info["PAMA_BACKEND"] or "not set"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    lines += ["", f"{'backend':<14}{'built':<7}{'usable':<8}detail"]
    for status in info["backends"]:
        built, usable = ("yes" if status[key] else "no" for key in ("built", "usable"))
        lines.append(f"{status['name']:<14}{built:<7}{usable:<8}{status['detail']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pama_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args()
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else _format(info))


if __name__ == "__main__":
    main()
