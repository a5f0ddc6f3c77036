"""Compiles the Triton kernels ahead of time, as calls of the public API launch them, for absent GPUs.

``python tests/triton_compile.py sm_90 gfx942`` prints a line of JSON for each kernel and variant: registers,
spills, shared memory, and whether it is hot; ``--all`` takes every kind of variant, else a sample. A process
of its own: kernels made for the interpreter can't be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import problems
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import pama_kernels as pk
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

HOT = 32  # objectives: up to here no kernel may spill
# What is called, with how many objectives, and the call.
Calls = Iterator[tuple[str, int, Callable[[], Any]]]


class _Driver:
    """What the compiler asks of a driver."""

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
    told = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for name, key in _AMD.items()}
        return {**found, **told}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said).groups())
    return {"registers": registers, "spills": stack + local, **told}


def compiled(target: str, calls: Calls) -> Iterator[dict[str, Any]]:
    """Makes the calls on CPU tensors; each kernel that they would launch is compiled instead."""
    driver.set_active(_Driver(TARGETS[target]))
    launch.NVIDIA = TARGETS[target].backend == "cuda"
    found: list[dict[str, Any]] = []
    seen: set[str] = set()

    def compile_instead(kernel: Any, programs: int, arguments: Any, options: dict[str, Any]) -> None:
        result = kernel.warmup(*arguments, grid=(programs,), **options)
        if result.hash not in seen:
            seen.add(result.hash)
            kind = {"kernel": kernel.fn.__name__, "target": target, "call": name, "hot": n <= HOT}
            found.append({**kind, **resources(result)})

    launch.run = compile_instead
    for name, n, call in calls:  # noqa: B007, `compile_instead` reads them
        call()
        yield from found
        found.clear()


def token_calls(layout: str, n: int, dtype: torch.dtype, everything: bool) -> Calls:
    """Statistics, losses and combinations of every rule; `everything`: with all optional tensors."""
    p = problems.make(
        layout, rows=4, width=128, objectives=n, dtype=dtype, ref_logprobs=everything,
        importance_weights=everything, objective_mask=torch.bool if everything else None,
    )  # fmt: skip
    flat = layout == "flat"
    title = f"{layout}, N={n}, {str(dtype).removeprefix('torch.')}, {'all' if everything else 'few'} tensors"
    extra: dict[str, Any] = {}
    if everything:
        extra = {"kl_coef": 0.1, "aggregation": "token-mean" if flat else "seq-mean-token-mean"}
    for pairs in (False, True):
        yield (
            f"statistics, {title}, pairs={pairs}",
            n,
            lambda pairs=pairs: pk.objective_statistics(**p.statistics_arguments(), pairs=pairs),
        )
    rules = [*problems.BATCH_RULES, pk.UPGrad(), *problems.TOKEN_RULES]
    for rule in rules if flat else [*rules, *problems.SEQUENCE_RULES]:
        yield f"loss {rule}, {title}", n, lambda r=rule: pk.pama_loss(**p.loss_arguments(), rule=r, **extra)
        yield (
            f"combine {rule}, {title}",
            n,
            lambda r=rule: pk.combine_advantages(**p.combine_arguments(False), rule=r),
        )


def batch_calls(n: int, dtype: torch.dtype) -> Calls:
    """The solvers in batches, and advantages from rewards."""
    title = f"N={n}, {str(dtype).removeprefix('torch.')}"
    scores = torch.randn(64, n).to(dtype)
    gram = (scores.mT @ scores).expand(3, n, n)
    rewards = torch.randn(4, 128, n).to(dtype)
    mask = torch.ones(4, 128, dtype=torch.bool)
    ends = {"dones": mask, "truncated": mask, "final_values": rewards, "last_values": rewards[:, 0]}
    ids = torch.arange(64) % 8
    yield f"weights, {title}", n, lambda: pk.pama_weights(scores, regularization=0.1)
    yield f"weights with scale, {title}", n, lambda: pk.pama_weights(scores, scale=2.0)
    yield f"min norm, {title}", n, lambda: pk.min_norm_weights(gram)
    yield f"upgrad, {title}", n, lambda: pk.upgrad_weights(gram)
    yield f"gae, {title}", n, lambda: pk.multi_objective_gae(rewards, rewards, mask, **ends)
    yield f"group normalize, {title}", n, lambda: pk.group_normalize(scores, group_size=8)
    yield f"group normalize by ids, {title}", n, lambda: pk.group_normalize(scores, group_ids=ids)


def sample() -> Calls:
    """The default rule and the paper's, both layouts of advantages."""
    for layout in ("padded", "per-sequence"):
        p = problems.make(layout, rows=4, width=128, objectives=4)
        for name, rule in {
            "gram": pk.Pama(),
            "scores": pk.Pama(bound="scores"),
            "paper": pk.Pama.paper("token"),
        }.items():
            yield f"loss {name} {layout}", 4, lambda r=rule, p=p: pk.pama_loss(**p.loss_arguments(), rule=r)
        yield f"combine gram {layout}", 4, lambda p=p: pk.combine_advantages(**p.combine_arguments(False))


def every_kind() -> Calls:
    """Layouts, dtypes and numbers of objectives, each in turn."""
    for layout in problems.LAYOUTS:
        yield from token_calls(layout, 4, torch.float32, False)
    for dtype in problems.FLOATS:
        yield from token_calls("padded", 3, dtype, True)
        yield from token_calls("packed-per-sequence", 2, dtype, True)
    for n in (1, 8, 16, 32, 64):
        for layout in ("padded", "per-sequence"):
            yield from token_calls(layout, n, torch.float32, False)
    for n in (1, 2, 3, 8, 16, 32, 64):
        yield from batch_calls(n, torch.float32)
    for dtype in problems.FLOATS:
        yield from batch_calls(4, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--all", action="store_true", help="every kind of variant")
    arguments = parser.parse_args()
    backend.unusable = lambda device_type: None
    for target in arguments.targets or TARGETS:
        for line in compiled(target, every_kind() if arguments.all else sample()):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
