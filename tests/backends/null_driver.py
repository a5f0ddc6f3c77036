"""Calls of the public API through Triton's launcher, down to a CUDA driver that does nothing: `no_driver.c`.

Tensors stay on the CPU. Each line of JSON is a call: ``python null_driver.py launches`` prints the kernels of
a sample; ``lengths`` the variants of each launch while lengths and batches change, and while a capture is
pretended; ``warmed`` how many `compile_kernels` has compiled, and how many the calls then miss. A process of
its own: kernels made for the interpreter can't be compiled.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import problems
import torch
import triton_variants
from torch import Tensor
from triton.runtime.driver import driver

import pama_kernels as pk
from pama_kernels import _stream
from pama_kernels.backends import triton as backend
from pama_kernels.backends.triton import ahead, launch


class NullDriver:
    """Triton's driver from here on."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        folder = tempfile.mkdtemp(prefix="no_driver")
        build(Path(folder))
        self.library = ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        self.library.taken.restype = ctypes.c_char_p
        os.environ["TRITON_LIBCUDA_PATH"] = folder

        class Driver(CudaDriver):
            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0

            def get_current_target(self) -> Any:
                return triton_variants.TARGETS["sm_90"]

        driver.set_active(Driver())
        _stream.stream_of = lambda device: 0  # cheaper than a query of a GPU
        backend.unusable = lambda device_type: None

    def launched(self) -> list[str]:
        """The kernels since the last call."""
        return self.library.taken().decode().split()


def build(folder: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None, "Triton needs a C compiler to launch anything"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    library = ["-o", str(folder / "libcuda.so.1"), str(Path(__file__).with_name("no_driver.c"))]
    subprocess.run([compiler, *options, *library], check=True)


# --- which variants calls take ------------------------------------------------------------------------------

Calls = dict[str, Callable[[int, int], Any]]  # by rows and width


RULES = {"gram": pk.Pama(), "paper token": pk.Pama.paper("token"), "sequence": pk.Pama("sequence")}


def part(x: Tensor, rows: int, width: int, sliced: bool) -> Tensor:
    """(rows, width, ...) tensors; `sliced`: as micro-batches or a shift by one token leave them, anywhere in
    memory."""
    return x[:rows, :width].contiguous() if not sliced else x[1 : rows + 1, 1 : width + 1]


def calls(sliced: bool) -> Calls:
    p = problems.make("padded", rows=12, width=402, objectives=4)
    per_sequence = problems.make("per-sequence", rows=12, width=402, objectives=5).advantages

    def by_sequence(b: int) -> Tensor:
        """(b, 4); `sliced`: all but the first column of a table."""
        return per_sequence[1 : b + 1, 1:] if sliced else per_sequence[:b, :4].clone()

    def loss(b: int, t: int, rule: Any, by_row: bool = False, gradient: bool = True) -> Any:
        own = part(p.advantages, b, t, sliced)
        if by_row:
            own = by_sequence(b)
        logprobs = part(p.logprobs, b, t, sliced).requires_grad_(gradient)
        mask = part(p.mask, b, t, sliced)
        return pk.pama_loss(logprobs, part(p.old_logprobs, b, t, sliced), own, mask, rule=rule)

    def combine(b: int, t: int, rule: Any, by_row: bool = False) -> Any:
        own = by_sequence(b) if by_row else part(p.advantages, b, t, sliced)
        return pk.combine_advantages(own, part(p.mask, b, t, sliced), rule=rule)

    found: Calls = {}
    for name, rule in RULES.items():
        found[f"loss (B, T, N) {name}"] = lambda b, t, rule=rule: loss(b, t, rule)
        found[f"combine (B, T, N) {name}"] = lambda b, t, rule=rule: combine(b, t, rule)
    found["loss (B, N) gram"] = lambda b, t: loss(b, t, RULES["gram"], True)
    found["combine (B, N) gram"] = lambda b, t: combine(b, t, RULES["gram"], True)
    found["combine (B, N) sequence"] = lambda b, t: combine(b, t, RULES["sequence"], True)
    found["statistics (B, T, N)"] = lambda b, t: pk.objective_statistics(
        part(p.logprobs, b, t, sliced),
        part(p.old_logprobs, b, t, sliced),
        part(p.advantages, b, t, sliced),
        part(p.mask, b, t, sliced),
        pairs=True,
    )
    found["statistics (B, N)"] = lambda b, t: pk.objective_statistics(
        part(p.logprobs, b, t, sliced),
        part(p.old_logprobs, b, t, sliced),
        by_sequence(b),
        part(p.mask, b, t, sliced),
        pairs=True,
    )
    everything = problems.make(
        "padded", rows=12, width=402, objectives=4, ref_logprobs=True, importance_weights=True,
        objective_mask=torch.bool,
    )  # fmt: skip
    averaged = pk.PamaLoss(momentum=0.5, aggregation="seq-mean-token-mean", kl_coef=0.1)

    def whole_loss(b: int, t: int) -> Any:
        x = {name: part(x, b, t, sliced) for name, x in everything.loss_arguments().items() if x is not None}
        present = everything.objective_mask
        x["objective_mask"] = present[1 : b + 1] if sliced else present[:b].clone()
        return averaged(**{**x, "logprobs": x["logprobs"].requires_grad_()})

    found["loss (B, T, N) everything"] = whole_loss
    values = torch.randn(12, 402, 4)
    found["gae"] = lambda b, t: pk.multi_objective_gae(
        part(values, b, t, sliced), part(values, b, t, sliced), part(p.logprobs, b, t, sliced)
    )
    rewards = torch.randn(1600, 4)
    found["normalize"] = lambda b, t: pk.group_normalize(rewards[: 4 * t].clone(), group_size=4)
    found["normalize by ids"] = lambda b, t: pk.group_normalize(
        rewards[:t].clone(), group_ids=torch.arange(t) // b
    )
    return found


class Variants:
    """The compiled kernels of each launch of a call, in order."""

    def __init__(self) -> None:
        self.of_launch: list[tuple[str, set[str]]] = []

    def call(self, function: Callable[[], Any]) -> None:
        found: list[tuple[str, str]] = []

        def noted(kernel: Any, programs: int, arguments: Any, options: Any) -> None:
            variant, _ = launch.variant_of(kernel, arguments, options)
            found.append((kernel.fn.__name__, variant.compiled.hash))
            launch.start(kernel, programs, arguments, options)

        with launch.watching(noted):
            function()
        if not self.of_launch:
            self.of_launch = [(name, set()) for name, _ in found]
        for (name, hashes), (own, found_hash) in zip(self.of_launch, found, strict=True):
            assert name == own
            hashes.add(found_hash)

    def counts(self) -> dict[str, int]:
        return {f"{place} {name}": len(hashes) for place, (name, hashes) in enumerate(self.of_launch)}


@contextmanager
def captured() -> Iterator[None]:
    """Pretends that tensors are on a device whose current stream is captured."""
    kept = _stream.stream_of, _stream.capturing
    _stream.stream_of, _stream.capturing = (lambda device: 7), (lambda device: True)
    try:
        yield
    finally:
        _stream.stream_of, _stream.capturing = kept


def lengths() -> Iterator[dict[str, Any]]:
    """Of each call: the variants while lengths run from 100 to 399 and batches from 1 to 9, with whole
    tensors; with slices too; and with a capture in the end."""
    whole, slices = calls(False), calls(True)
    for name in whole:
        variants = Variants()
        line: dict[str, Any] = {"call": name}
        for width in range(100, 400):
            variants.call(lambda f=whole[name], t=width: f(1 + t % 9, t))
        line["whole"] = variants.counts()
        for width in range(100, 400):
            variants.call(lambda f=slices[name], t=width: f(1 + t % 9, t))
        line["sliced"] = variants.counts()
        with captured():
            for width in (128, 131):
                variants.call(lambda f=whole[name], t=width: f(4, t))
        line["captured"] = variants.counts()
        yield line
    yield beyond_32_bits()


def beyond_32_bits() -> dict[str, Any]:
    """Tensors that are never read: 2^31 tokens and a few more."""
    advantages, variants = torch.randn(8, 4), Variants()
    for width in (100, 2**28 + 16):
        logprobs = torch.empty(8, width, dtype=torch.bfloat16)
        variants.call(lambda x=logprobs: pk.pama_loss(x, None, advantages))
    return {"call": "beyond 2^31 tokens", "whole": variants.counts()}


FUNCTIONS = {
    "loss": "pama_loss",
    "combine": "combine_advantages",
    "statistics": "objective_statistics",
    "gae": "multi_objective_gae",
    "normalize": "group_normalize",
}


def warmed() -> Iterator[dict[str, Any]]:
    """What `compile_kernels` has compiled for each call, and what calls of any length still miss; whether the
    launchers that it begins to build, as with Triton 3.6, are those of its kernels."""
    whole, slices = calls(False), calls(True)
    begun: list[dict[str, str]] = []
    ahead._LAUNCHERS = True
    ahead._build_launcher = lambda signature, device: begun.append(signature)
    for name in whole:
        own: dict[str, Any] = {
            "layout": "per-sequence" if "(B, N)" in name else "padded",
            "functions": next(full for short, full in FUNCTIONS.items() if short in name),
            "rule": next((rule for title, rule in RULES.items() if title in name), None),
            "group_size": None if "ids" in name else 4,
        }
        if name == "gae":
            own["mask_dtype"] = torch.float32
        if "everything" in name:
            given = ["old_logprobs", "ref_logprobs", "objective_mask", "importance_weights"]
            own |= {"given": given, "merged": True, "aggregation": "seq-mean-token-mean"}
        launch._variants.clear()
        found = pk.compile_kernels(4, **own, device="cpu")
        known = set(launch._variants)
        launchers = all(x.compiled.src.signature in begun for x in launch._variants.values())
        with launch.watching(launch.start):  # no call repeats the launches of an earlier one
            for width, rows in itertools.product((100, 128, 131, 399), (1, 2, 9)):
                whole[name](rows, width)
                slices[name](rows, width)
        missing = len(set(launch._variants) - known)
        yield {"call": name, "kernels": found.kernels, "missing": missing, "launchers": launchers}


def launches(null: NullDriver) -> Iterator[dict[str, Any]]:
    for name, _, call in triton_variants.sample():
        call()
        yield {"call": name, "kernels": null.launched()}


def main() -> None:
    null = NullDriver()
    what = {"launches": lambda: launches(null), "lengths": lengths, "warmed": warmed}
    for line in what[sys.argv[1]]():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
