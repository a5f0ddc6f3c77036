"""The training parts of the GPU benchmark: a policy step, and the wait for compilation."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk

from . import models, peers
from .gpu_timing import Bench, Inputs, Work, available
from .harness import Row
from .timing import summary


def policy_step(bench: Bench) -> None:
    """PAMA's share of one step: the time of the step minus that with a trivial loss."""
    shape = models.CPU_SHAPES[0] if bench.quick else models.GPU_SHAPES[0]
    rows, width, n = (2, 16, 4) if bench.quick else (8, 1024, 4)
    torch.manual_seed(0)
    with bench.device:
        policy = models.Policy(shape, width).to(torch.bfloat16 if bench.on_gpu else torch.float32)
    tokens = torch.randint(shape.vocabulary, (rows, width + 1), device=bench.device)
    advantages = torch.randn(rows, width, n, device=bench.device)
    mask = torch.ones(rows, width, dtype=torch.bool, device=bench.device)
    with torch.no_grad():
        old = policy(tokens).detach()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Any]:
        def call(_: Inputs) -> None:
            optimiser.zero_grad()
            loss(policy(tokens)).backward()
            optimiser.step()

        return call

    def pama(logprobs: Tensor) -> Tensor:
        return pk.pama_loss(logprobs, old, advantages, mask, clip_range=peers.CLIP).loss

    alone = {"logprobs": old.float(), "old_logprobs": old.float(), "advantages": advantages, "mask": mask}

    def loss_alone(x: Inputs) -> Any:
        leaf = x["logprobs"].detach().requires_grad_()
        loss = pk.pama_loss(leaf, x["old_logprobs"], x["advantages"], x["mask"]).loss
        return torch.autograd.grad(loss, leaf)

    works = [Work(f"step with pama_loss: {b}", step(pama), None, b) for b in available(bench.device)]
    works.append(Work("step with the mean of the log-probabilities", step(lambda logprobs: logprobs.mean())))
    if not bench.timed:
        shares = [Work(b, loss_alone, None, b) for b in available(bench.device)]
        bench.call_once(works, {})
        bench.call_once(shares, alone)
        return
    times = bench.eager_times(works, [{}])
    rows_out = []
    for work, own in zip(works, times, strict=True):
        middle, spread = summary(own)
        ratio = statistics.median(t / o for t, o in zip(own, times[-1], strict=True))
        size = policy.size
        rows_out.append(
            Row("policy step", shape.name, n, work.name, 1, middle, spread, ratio, None, "", size)
        )
    whole = rows_out[0].microseconds or 1.0
    for backend in available(bench.device):
        (own,) = bench.device_times([Work(backend, loss_alone, None, backend)], [alone])
        middle, spread = summary(own)
        note = "device time over the step with pama_loss"
        share = f"share of pama_loss with its gradient: {backend}"
        rows_out.append(
            Row(
                "policy step",
                shape.name,
                n,
                share,
                1,
                middle,
                spread,
                middle / whole,
                None,
                note,
                policy.size,
            )
        )
    bench.session.add(rows_out)


LENGTHS = """
import json, sys, time, torch
import pama_kernels as pk
device, steps, rows, longest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
ahead = pk.compile_kernels(4, slices=False, device=device) if "ahead" in sys.argv else (0, 0.0)
g = torch.Generator().manual_seed(0)
settle = torch.cuda.synchronize if device == "cuda" else lambda: None
times = []
for step in range(steps):
    width = int(torch.randint(longest // 4, longest, (), generator=g))
    logprobs = -torch.rand(rows, width, device=device)
    advantages = torch.randn(rows, 4, device=device)
    mask = torch.rand(rows, width, device=device) < 0.9
    settle()
    start = time.perf_counter()
    combined = pk.combine_advantages(advantages, mask)
    leaf = logprobs.clone().requires_grad_()
    pk.pama_loss(leaf, logprobs, advantages, mask).loss.backward()
    settle()
    times.append(time.perf_counter() - start)
print(json.dumps([ahead[1], *times]))
"""


def changing_lengths(bench: Bench) -> None:
    """The time that a run with changing lengths waits for compilation, with an empty cache of kernels."""
    if not bench.timed:
        return
    rows_out = []
    steps, rows, longest = (6, 2, 40) if bench.quick else (40, 32, 2048)
    case = f"{steps} steps of {rows} rows, lengths up to {longest}"
    for backend, ahead in ((b, a) for b in available(bench.device) for a in ("", "ahead")):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "PAMA_BACKEND": backend, "TRITON_CACHE_DIR": cache}
            command = [
                sys.executable,
                "-c",
                LENGTHS,
                bench.device.type,
                *map(str, (steps, rows, longest)),
                ahead,
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        before, *times = json.loads(done.stdout.splitlines()[-1])
        usual = statistics.median(times[3:])
        parts = [("first 3 steps", times[:3]), ("steps after them", times[3:])]
        if ahead:
            parts.insert(0, ("compile_kernels", [before]))
        for name, part in parts:
            waited = sum(max(t - usual, 0.0) for t in part) * 1e6
            worst = f"longest {max(part) * 1e3:.1f} ms"
            name += " after compile_kernels" * bool(ahead and part is not parts[0][1])
            rows_out.append(
                Row(
                    "compilation waited for",
                    case,
                    4,
                    f"{name}: {backend}",
                    1,
                    waited,
                    None,
                    None,
                    None,
                    worst,
                )
            )
    bench.session.add(rows_out)
