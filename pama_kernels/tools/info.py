"""Reports what is installed, which backends work on this machine, and why the others do not.

``python -m pama_kernels info`` prints it for a person, with ``--json`` for a program;
:func:`collect` returns it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pama_kernels.backends import registry

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


def backends() -> list[BackendStatus]:
    """The state of every backend. Never raises: an error becomes the reason for `usable=False`."""
    return [_status(backend) for backend in registry.BACKENDS]


def _status(backend: registry.Backend) -> BackendStatus:
    if not registry.built(backend):
        return BackendStatus(backend.name, False, False, "not built")
    states = [_probe(backend, device_type) for device_type in backend.devices]
    usable, detail = next((state for state in states if state[0]), states[0])
    return BackendStatus(backend.name, True, usable, detail)


def _probe(backend: registry.Backend, device_type: str) -> tuple[bool, str]:
    try:
        module = importlib.import_module(f"pama_kernels.backends.{backend.name}")
        return True, backend.probe(module, device_type)
    except RuntimeError as error:
        return False, str(error)
    except Exception as error:  # reported as the reason
        return False, f"{type(error).__name__}: {error}"


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


def text(*, as_json: bool = False) -> str:
    info = collect()
    return json.dumps(info, indent=2) if as_json else _format(info)
