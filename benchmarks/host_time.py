"""python -m benchmarks.host_time [--backend cpu] [--calls 2000]: the host time of an eager call.

With a GPU: the time until the call returns, while kernels still run. Without one, calls go through Triton's
launcher to a CUDA driver that does nothing (`tests/backends/null_driver.py`, on CPU tensors), which omits the
time of torch's allocator and of a real driver. `--backend cuda`, without a GPU: CUDA C++ compiled for the
host, with launches that do nothing, and Triton for the passes that it does not implement. `--backend cpu`:
complete calls of the native CPU backend on few tokens. Times are the lower quartile of single calls, since
other processes can only increase them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "backends"))

WARM_UP = 30
LENGTHS = 1000
EMPTIED_EVERY = 50  # calls: a queue of launches that is full would make the next one wait


def quartile(call: Callable[[], object], calls: int, empty: Callable[[], object]) -> float:
    """Microseconds."""
    times = []
    for k in range(WARM_UP + calls):
        if k % EMPTIED_EVERY == 0:
            empty()
        start = perf_counter_ns()
        call()
        times.append(perf_counter_ns() - start)
    times = sorted(times[WARM_UP:])
    return times[len(times) // 4] / 1e3


def calls_of(device: Any, rows: int, width: int, n: int) -> dict[str, Callable[[], object]]:
    import torch

    import pama_kernels as pk

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    logprobs = new(rows, width).requires_grad_()
    old, advantages, mask = logprobs.detach() + 0.1, new(rows, width, n), new(rows, width) > -1
    per_sequence, rewards = new(rows, n), new(rows, n)

    def loss(x: torch.Tensor, rule: Any = None) -> Callable[[], object]:
        return lambda: pk.pama_loss(logprobs, old, x, mask, rule=rule).loss

    def trained(x: torch.Tensor, rule: Any = None) -> Callable[[], object]:
        forward = loss(x, rule)
        return lambda: torch.autograd.grad(forward(), logprobs)

    lengths = [
        (logprobs.detach()[:, :1].expand(rows, length).clone().requires_grad_(), new(rows, length))
        for length in range(width, width + LENGTHS)
    ]
    others = itertools.cycle([(x, x.detach() + 0.1, y > -1) for x, y in lengths])

    def another_length() -> object:
        x, old, mask = next(others)
        return torch.autograd.grad(pk.pama_loss(x, old, per_sequence, mask).loss, x)

    return {
        "combine_advantages (B, N)": lambda: pk.combine_advantages(per_sequence, mask),
        "combine_advantages (B, T, N)": lambda: pk.combine_advantages(advantages, mask),
        "pama_loss (B, N), forward": loss(per_sequence),
        "pama_loss (B, N), forward + backward": trained(per_sequence),
        "the same, another length at every call": another_length,
        "pama_loss (B, T, N), forward": loss(advantages),
        "pama_loss (B, T, N), forward + backward": trained(advantages),
        "pama_loss (B, T, N) per token, forward + backward": trained(advantages, pk.Pama.paper("token")),
        "objective_statistics (B, T, N)": lambda: pk.objective_statistics(logprobs, old, advantages, mask),
        "multi_objective_gae": lambda: pk.multi_objective_gae(advantages, advantages, mask),
        "group_normalize": lambda: pk.group_normalize(rewards, group_size=4),
        "x.square().sum(), forward + backward": lambda: torch.autograd.grad(
            logprobs.square().sum(), logprobs
        ),
    }


def serve_idle_cuda() -> None:
    import cuda_emulation

    with tempfile.TemporaryDirectory() as folder:
        module = cuda_emulation.build(Path(folder), "-O2", "-DPAMA_CUDA_IDLE")
        os.environ |= {"PAMA_CUDA_EMULATED": str(module), "PAMA_BACKEND": "cuda"}
        cuda_emulation.serve(second_pass="triton")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--backend", choices=("triton", "cuda", "cpu"), default="triton")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--objectives", type=int, default=4)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    device, names, empty = "cpu", None, lambda: None
    rows, width = (8, 8) if options.backend == "cpu" else (8, 128)
    where = "the CPU backend"
    if options.backend != "cpu" and torch.cuda.is_available():
        device, empty, where = "cuda", torch.cuda.synchronize, torch.cuda.get_device_name()
    elif options.backend != "cpu":
        from null_driver import NullDriver

        names = NullDriver().launched
        empty, where = names, "Triton, a CUDA driver that does nothing"
        if options.backend == "cuda":
            serve_idle_cuda()
            where = f"CUDA C++, launches that do nothing; {where}"
    print(f"{where}; torch {torch.__version__}; B = {rows}, T = {width}, N = {options.objectives}")
    for name, call in calls_of(device, rows, width, options.objectives).items():
        call()
        empty()
        call()
        launched = "" if names is None else f"  {len(names())} launches of Triton"
        print(f"{name:52}{quartile(call, options.calls, empty):8.1f} us{launched}", flush=True)


if __name__ == "__main__":
    main()
