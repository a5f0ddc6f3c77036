"""Checks an installed pama_kernels and prints as JSON what it is: version, OpenMP runtime, and for each
instruction set a digest of what the kernels compute, which is the same for builds from the same sources.

It runs in the environment that it checks and needs only the package and what that requires.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import pama_kernels as pk
from pama_kernels.backends import _cpu

RUNTIMES = ("libgomp", "libomp", "libiomp")


def numbers(source: np.random.RandomState, *shape: int) -> torch.Tensor:
    """Multiples of 2^-18 in [-2, 2): the same on every machine and for every version of NumPy and PyTorch."""
    return torch.from_numpy(source.randint(-(1 << 19), 1 << 19, shape) / float(1 << 18)).float()


def results() -> Iterator[torch.Tensor]:
    """What each kernel computes from fixed inputs; enough tokens for several threads."""
    source = np.random.RandomState(16)
    for objectives, rows, width in ((2, 64, 512), (3, 257, 129), (8, 64, 300)):
        old = numbers(source, rows, width)
        advantages = numbers(source, rows, width, objectives)
        mask = numbers(source, rows, width) < 1.5
        for rule in (pk.Pama(), pk.UPGrad(), pk.Pama("sequence"), pk.Pama("token"), pk.Fixed()):
            logprobs = (old + numbers(source, rows, width) / 8).requires_grad_()
            output = pk.pama_loss(logprobs, old, advantages, mask, rule=rule)
            output.loss.backward()
            yield from (output.loss.detach(), output.weights, output.statistics.buffer)
            assert logprobs.grad is not None
            yield logprobs.grad
        scores = advantages.flatten(0, 1)[:999]
        gram = scores[:, :, None] * scores[:, None, :] + torch.eye(objectives)
        yield from (*pk.min_norm_weights(gram), *pk.upgrad_weights(gram), *pk.pama_weights(scores))
        yield pk.group_normalize(advantages[: rows // 8 * 8, 0], group_size=8)
        yield from pk.multi_objective_gae(advantages, numbers(source, rows, width, objectives), mask)


def digest() -> str:
    sha = hashlib.sha256()
    for tensor in results():
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def openmp() -> list[str]:
    """The OpenMP runtimes that this process has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in maps if "/" in line}
    return sorted(file for file in files if Path(file).name.startswith(RUNTIMES))


def main() -> None:
    bits = {}
    for isa in _cpu.build_info()["isas"]:
        if _cpu.use_isa(isa) == isa:  # the processor has it
            digests = set()
            for threads in (1, 2):
                torch.set_num_threads(threads)
                digests.add(digest())
            assert len(digests) == 1, f"{isa}: the bits depend on the number of threads"
            (bits[isa],) = digests
    torch.randn(1 << 20).exp_().sum()  # PyTorch's own threads
    runtimes = openmp()
    assert len(runtimes) == 1, f"expected one OpenMP runtime in the process, got {runtimes}"
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "package": pk.__version__,
        "module": _cpu.__file__,
        "compiler": _cpu.build_info()["compiler"],
        "openmp": runtimes[0],
        "bits": bits,
    }
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
