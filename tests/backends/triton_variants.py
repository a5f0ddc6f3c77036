"""The Triton kernels as calls of the public API launch them, for GPUs that are absent.

``python triton_variants.py compile sm_90 gfx942`` compiles them ahead of time and prints a line of JSON for
each kernel and variant: registers, spills, shared memory, instructions, barriers, seconds, and whether it is
hot; ``--all`` takes every kind of variant, else a sample. A process of its own: kernels made for the
interpreter can't be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PAMA_BACKEND"] = "triton"

import problems
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad
from pama_kernels.backends import triton as backend
from pama_kernels.backends.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_AMD = {"registers": "vgpr_count", "spills": "vgpr_spill_count"}

HOT = 32  # objectives: up to here no pass over tokens may spill
# What is called, with how many objectives, and the call.
Calls = Iterator[tuple[str, int, Callable[[], Any]]]

BATCH = {"gram": Pama(), "scores": Pama(bound="scores"), "upgrad": UPGrad(), "fixed": Fixed()}
BY_ROW = {"sequence": Pama("sequence"), "softmin": SoftMin()}
BY_TOKEN = {"token": Pama("token"), "softmin token": SoftMin(1.0, "token")}
PAPER = {"gram noon": Pama(noon=True), "paper": Pama.paper("batch"), "paper token": Pama.paper("token")}


# --- the calls -------------------------------------------------------------------------------------------


def token_calls(
    layout: str, n: int, dtype: torch.dtype, rules: dict[str, Any], everything: bool = False
) -> Calls:
    """Statistics, combinations and losses; `everything`: with all optional tensors."""
    p = problems.make(
        layout,
        rows=4,
        width=512,
        objectives=n,
        dtype=dtype,
        ref_logprobs=everything,
        importance_weights=everything,
        objective_mask=torch.bool if everything else None,
    )
    title = f"{layout}, N={n}, {str(dtype).removeprefix('torch.')}, {'all' if everything else 'few'} tensors"
    extra: dict[str, Any] = {"kl_coef": 0.1} if everything else {}
    if everything and layout != "flat":
        extra["aggregation"] = "seq-mean-token-mean"
    for pairs in (False, True):
        yield (
            f"statistics, {title}, pairs={pairs}",
            n,
            lambda pairs=pairs: pk.objective_statistics(**p.statistics_arguments(), pairs=pairs),
        )
    for name, rule in rules.items():
        if layout == "flat" and name in BY_ROW:
            continue
        yield (
            f"loss {name}, {title}",
            n,
            lambda rule=rule: pk.pama_loss(**p.loss_arguments(), rule=rule, **extra),
        )
        yield (
            f"combine {name}, {title}",
            n,
            lambda rule=rule: pk.combine_advantages(**p.combine_arguments(False), rule=rule),
        )


def batch_calls(n: int, dtype: torch.dtype) -> Calls:
    """The solvers in batches, and advantages from rewards."""
    title = f"N={n}, {str(dtype).removeprefix('torch.')}"
    scores = torch.randn(64, n).to(dtype)
    gram = (scores.mT @ scores).expand(3, n, n)
    rewards = torch.randn(4, 128, n).to(dtype)
    mask = torch.ones(4, 128, dtype=torch.bool)
    ids = torch.arange(64) % 8
    episodes = {"dones": mask, "truncated": mask, "final_values": rewards}
    yield f"weights, {title}", n, lambda: pk.pama_weights(scores, regularization=0.1)
    yield f"weights with scale, {title}", n, lambda: pk.pama_weights(scores, scale=2.0)
    yield f"min norm, {title}", n, lambda: pk.min_norm_weights(gram)
    yield f"upgrad, {title}", n, lambda: pk.upgrad_weights(gram)
    yield f"gae, {title}", n, lambda: pk.multi_objective_gae(rewards, rewards, mask, **episodes)
    yield f"group normalize, {title}", n, lambda: pk.group_normalize(scores, group_size=8)
    yield f"group normalize by ids, {title}", n, lambda: pk.group_normalize(scores, group_ids=ids)


def sample() -> Calls:
    rules = {name: BATCH[name] for name in ("gram", "fixed")}
    yield from token_calls("padded", 4, torch.float32, {**rules, "token": BY_TOKEN["token"]})
    yield from token_calls("per-sequence", 4, torch.float32, rules)


def every_kind() -> Calls:
    """Layouts, rules, dtypes and numbers of objectives, each in turn."""
    for layout in problems.LAYOUTS:
        yield from token_calls(layout, 4, torch.float32, {**BATCH, **BY_ROW, **BY_TOKEN})
    for dtype in problems.FLOATS:
        yield from token_calls("padded", 3, dtype, {"gram": Pama(), **PAPER}, True)
        yield from token_calls("packed-per-sequence", 2, dtype, {**BATCH, **BY_ROW}, True)
    for n in (1, 8, 16, 32, 64):
        yield from token_calls("padded", n, torch.float32, {"gram": Pama(), **BY_ROW, **PAPER, **BY_TOKEN})
        yield from token_calls("per-sequence", n, torch.float32, BATCH)
    for n in (1, 2, 3, 8, 16, 32, 64):
        yield from batch_calls(n, torch.float32)
    for dtype in problems.FLOATS:
        yield from batch_calls(4, dtype)


# --- compilation -----------------------------------------------------------------------------------------


class _Driver:
    """The methods of a driver that the compiler calls."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes (NVIDIA) or registers (AMD) that it spills, shared bytes, warps."""
    given = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for name, key in _AMD.items()}
        return {**found, **given}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [_CUOBJDUMP, "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    given["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE))
    given["barriers"] = code.count("BAR.SYNC")
    given["fused"] = compiled.asm["ptx"].count("fma.rn.f64")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage).groups())
    return {"registers": registers, "spills": stack + local, **given}


def compiled(target: str, calls: Calls) -> Iterator[dict[str, Any]]:
    """Makes the calls on CPU tensors; each kernel that they would launch is compiled instead."""
    driver.set_active(_Driver(TARGETS[target]))
    launch.NVIDIA = TARGETS[target].backend == "cuda"
    found: list[dict[str, Any]] = []
    seen: set[str] = set()

    def compile_instead(kernel: Any, programs: int, arguments: Any, options: dict[str, Any]) -> None:
        start = time.perf_counter()
        result = launch.compiled(kernel, arguments, True, options)
        seconds = round(time.perf_counter() - start, 2)
        if result.hash not in seen:
            seen.add(result.hash)
            kind = {"kernel": kernel.fn.__name__, "target": target, "call": name, "hot": n <= HOT}
            found.append({**kind, "seconds": seconds, **resources(result)})

    for name, n, call in calls:  # noqa: B007, `compile_instead` reads them
        with launch.watching(compile_instead):
            call()
        yield from found
        found.clear()


def main() -> None:
    backend.unusable = lambda device_type: None
    what, *names = sys.argv[1:]
    assert what == "compile", f"expected compile, got {what!r}"
    every = "--all" in names
    for target in [name for name in names if name != "--all"] or TARGETS:
        for line in compiled(target, every_kind() if every else sample()):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
