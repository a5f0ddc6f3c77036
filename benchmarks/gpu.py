"""What PAMA costs on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`. Less than eight minutes.

`gpu_timing` times a call on the device (a replayed CUDA graph) and as a program makes it (eager); the
last parts are a policy step of a GPT-2 124M with random weights, and what a user waits for while kernels
compile in a run of changing lengths. GB/s are the bytes that a call has to read and write, counted from the
shapes, over the device time. Beside them, in the same run: a copy of device memory, and an empty kernel.
Results are compared before any timing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels._solve import solve_batch

from . import models, peers
from .gpu_timing import CACHE_BYTES, Bench, Inputs, Work, agree, available, chosen, inputs, pool_of, summary
from .harness import Row, Session


def ceilings(bench: Bench) -> None:
    """Rows of a copy of device memory and of an empty kernel."""
    size = 1 << 20 if bench.quick else 1 << 30
    pool = [
        {"x": torch.ones(size // 4, device=bench.device), "y": torch.empty(size // 4, device=bench.device)}
    ]
    copy = Work("copy of device memory", lambda x: x["y"].copy_(x["x"]), 2.0 * size)
    bench.measure("ceiling", f"{size >> 20} MiB", 0, size // 4, [copy], pool)
    empty = Work("empty kernel", empty_kernel(bench))
    bench.measure("ceiling", "nothing", 0, 0, [empty], [{"x": torch.ones(1, device=bench.device)}])


def empty_kernel(bench: Bench) -> Callable[[Inputs], Any]:
    if not bench.on_gpu:
        return lambda x: None
    import triton

    @triton.jit
    def nothing(x):  # type: ignore[no-untyped-def]
        pass

    return lambda x: nothing[(1,)](x["x"])


def eager_statistics(x: Inputs) -> Tensor:
    """Scores of the batch with Noon and their weights without regularization, in PyTorch."""
    inside = (x["logprobs"] - x["old_logprobs"]).exp() <= 1 + peers.CLIP
    kept = (inside & x["mask"]).float()
    scores = (kept.unsqueeze(-1) * x["advantages"].clamp(min=0)).sum((0, 1)) / x["mask"].sum()
    return peers.smallest(scores)


PAPER = pk.Pama.paper("batch")  # the rule of the eager functions


def weights_of(x: Inputs, rule: pk.Pama | pk.UPGrad = PAPER) -> Tensor:
    """What `pama_loss` does before its second pass."""
    pairs = isinstance(rule, pk.UPGrad) or rule.bound == "gram"
    noon = isinstance(rule, pk.Pama) and rule.noon
    sums = pk.objective_statistics(**x, clip_range=peers.CLIP, noon=noon, pairs=pairs)
    return solve_batch(sums, rule, None).weights


def first_pass(bench: Bench, tokens: int, n: int) -> None:
    """Statistics and weights of the batch."""
    pool = pool_of(lambda seed: inputs(tokens, n, bench.device, seed), bench.quick)
    moved = float(sum(x.numel() * x.element_size() for x in pool[0].values()))
    works = []
    for name in available(bench.device):
        works += [
            Work(f"statistics and weights: {name}", weights_of, moved, name),
            Work(f"objective_statistics: {name}", lambda x: pk.objective_statistics(**x), moved, name),
        ]
        for title, rule in (("default rule", pk.Pama()), ("UPGrad", pk.UPGrad())):
            call = functools.partial(weights_of, rule=rule)
            works.append(Work(f"statistics and weights, {title}: {name}", call, moved, name))
    works.append(Work("eager PyTorch, scores and weights alone", eager_statistics, moved))
    for work in works:
        if work.call is weights_of:
            with chosen(work.backend):
                agree(work.call(pool[0]), eager_statistics(pool[0]), 1e-5, work.name)
    bench.measure("statistics and weights", f"{tokens} tokens", n, tokens, works, pool)


def combine(bench: Bench, rows: int, width: int, n: int) -> None:
    """`combine_advantages` of one advantage per sequence and objective, without log-probabilities."""

    def made(seed: int) -> Inputs:
        g = torch.Generator(device=bench.device).manual_seed(seed)
        return {
            "advantages": torch.randn(rows, n, generator=g, device=bench.device),
            "mask": torch.rand(rows, width, generator=g, device=bench.device) < 0.9,
        }

    pool = pool_of(made, bench.quick)
    moved = float(rows * width)

    def ours(x: Inputs) -> Tensor:
        return pk.combine_advantages(**x).advantages

    exact = pk.reference.combine_advantages(**{name: x.cpu() for name, x in pool[0].items()}).advantages
    works = [Work(f"combine_advantages: {b}", ours, moved, b) for b in available(bench.device)]
    for work in works:
        with chosen(work.backend):
            agree(ours(pool[0]).cpu(), exact, 1e-4, work.name)
    bench.measure("combine_advantages per sequence", f"mask {rows} x {width}", n, rows * width, works, pool)


def with_gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward and backward, down to the gradient of the log-probabilities."""

    def call(logprobs: Tensor) -> Tensor:
        leaf = logprobs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient

    return call


def per_sequence_loss(bench: Bench, rows: int, width: int, n: int) -> None:
    """The default rule with one advantage per sequence and objective, beside eager PPO with one objective."""

    def made(seed: int) -> Inputs:
        x = inputs(rows * width, 1, bench.device, seed)
        return {
            **{name: x[name].reshape(rows, width) for name in ("logprobs", "old_logprobs", "mask")},
            "advantages": torch.randn(rows, n, device=bench.device),
        }

    pool = pool_of(made, bench.quick)
    moved = 2.0 * 9 * rows * width + 4.0 * rows * width  # two passes over log-probs and mask, the gradient

    def ours(x: Inputs) -> Tensor:
        given = {name: x[name] for name in ("old_logprobs", "advantages", "mask")}
        return with_gradient(lambda leaf: pk.pama_loss(leaf, **given).loss)(x["logprobs"])

    def theirs(x: Inputs) -> Tensor:
        one = x["advantages"][:, :1].expand(rows, width)
        return with_gradient(lambda leaf: peers.ppo_loss(leaf, x["old_logprobs"], one, x["mask"]))(
            x["logprobs"]
        )

    works = [Work(f"pama_loss: {b}", ours, moved, b) for b in available(bench.device)]
    bench.measure(
        "pama_loss, advantages per sequence",
        f"{rows} x {width}",
        n,
        rows * width,
        [*works, Work("eager PyTorch, one objective", theirs)],
        pool,
    )


def whole_loss(bench: Bench, tokens: int, n: int, weights_per: str) -> None:
    """pama_loss, forward and backward, against the same rule in PyTorch and against one objective."""
    pool = pool_of(lambda seed: inputs(tokens, n, bench.device, seed), bench.quick)
    one = sum(x.numel() * x.element_size() for x in pool[0].values())
    passes = 2 if weights_per == "batch" else 1
    moved = passes * one + 4.0 * tokens  # the gradient

    rule = pk.Pama.paper(weights_per)  # the eager one

    def ours(x: Inputs) -> Tensor:
        given = {name: x[name] for name in ("old_logprobs", "advantages", "mask")}
        options = {"rule": rule, "clip_range": peers.CLIP}
        return with_gradient(lambda leaf: pk.pama_loss(leaf, **given, **options).loss)(x["logprobs"])

    def theirs(loss: peers.Loss, n: int | None) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            advantages = x["advantages"] if n is None else x["advantages"][..., 0]
            return with_gradient(lambda leaf: loss(leaf, x["old_logprobs"], advantages, x["mask"]))(
                x["logprobs"]
            )

        return call

    works = [Work(f"pama_loss: {b}", ours, moved, b) for b in available(bench.device)]
    same_rule = theirs(peers.eager_loss(weights_per), None)
    works.append(Work("eager PyTorch, the same rule", same_rule))
    works.append(Work("eager PyTorch, one objective", theirs(peers.ppo_loss, 1)))
    scale = float(same_rule(pool[0]).abs().max())
    for work in works[:-2]:
        with chosen(work.backend):
            agree(ours(pool[0]) / scale, same_rule(pool[0]) / scale, 1e-4, work.name)
    bench.measure(f"pama_loss per {weights_per}", f"{tokens} tokens", n, tokens, works, pool)


def solvers(bench: Bench, rows: int, n: int) -> None:
    """Rows of both weight problems; min-norm against TorchJD's MGDA where it is there (one matrix)."""
    g = torch.Generator(device=bench.device).manual_seed(0)
    scores = [{"x": torch.randn(rows, n, generator=g, device=bench.device)} for _ in range(4)]
    moved = 4.0 * rows * (2 * n + 1)
    works = [
        Work(f"pama_weights: {b}", lambda x: pk.pama_weights(x["x"]), moved, b)
        for b in available(bench.device)
    ]
    bench.measure("pama_weights", f"{rows} rows", n, rows, works, scores)
    grams = []
    for _ in range(2):
        factor = torch.randn(rows, n, n, generator=g, device=bench.device, dtype=torch.float64)
        grams.append({"x": factor @ factor.mT})
    works = [
        Work(f"min_norm_weights: {b}", lambda x: pk.min_norm_weights(x["x"]), None, b)
        for b in available(bench.device)
    ]
    if rows == 1:
        works += torchjd(grams)
    bench.measure("min_norm_weights", f"{rows} rows", n, rows, works, grams)
    works = [
        Work(f"upgrad_weights: {b}", lambda x: pk.upgrad_weights(x["x"]), None, b)
        for b in available(bench.device)
    ]
    bench.measure("upgrad_weights", f"{rows} rows", n, rows, works, grams)


def torchjd(grams: Sequence[Inputs]) -> list[Work]:
    """Its loop branches on tensors, so that it waits for the device and has an eager time alone."""
    try:
        from torchjd.aggregation import MGDA
    except ImportError:
        print("TorchJD is not installed: its row is missing")
        return []
    solver = MGDA()
    factors = {id(x): torch.linalg.cholesky(x["x"][0]) for x in grams}
    return [Work("TorchJD MGDA", lambda x: solver(factors[id(x)]), waits=True)]


def policy_step(bench: Bench) -> None:
    """PAMA's whole share of one step: what the step takes with it, less what it takes with a trivial loss."""
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
    """What a user waits for in a run of changing lengths, with an empty cache of compiled kernels."""
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


def plot(session: Session) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    series: dict[str, list[tuple[int, float]]] = {}
    for row in session.rows:
        if (
            row.work == "statistics and weights"
            and row.microseconds
            and row.contestant.endswith("device time")
        ):
            series.setdefault(f"{row.contestant}, N={row.n}", []).append((row.size or 0, row.microseconds))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in series.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="tokens", ylabel="microseconds on the device", title="statistics and weights")
    axes.legend(fontsize="x-small")
    figure.savefig(session.out / "gpu.png", dpi=150)


def machine(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return ["a dry run on the CPU: no figure here is one of a GPU"]
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    versions = f"CUDA {torch.version.cuda}, torch {torch.__version__}, triton {version('triton')}"
    return [f"{name}, {memory}, {versions}"]


def goals(bench: Bench) -> list[functools.partial[None]]:
    """The figures that have a goal: `docs/gpu.md`."""
    part, quick = functools.partial, bench.quick
    rows, width = (16, 32) if quick else (512, 4096)
    return [
        part(ceilings, bench),
        part(first_pass, bench, 1024 if quick else 1 << 20, 4),
        part(first_pass, bench, 2048 if quick else 1 << 26, 4),
        part(combine, bench, rows, width, 8),
        part(per_sequence_loss, bench, rows, width, 8),
        part(whole_loss, bench, 512 if quick else 1 << 20, 4, "batch"),
        part(policy_step, bench),
        part(changing_lengths, bench),
    ]


def others(bench: Bench) -> list[functools.partial[None]]:
    """What matters most first."""
    part, quick = functools.partial, bench.quick
    found = [part(first_pass, bench, tokens, 4) for tokens in ((256,) if quick else (1 << 14, 1 << 23))]
    found += [part(whole_loss, bench, 512 if quick else 1 << 20, 4, per) for per in ("sequence", "token")]
    problems = ((1, 4), (8, 3)) if quick else ((1, 2), (1, 4), (1, 8), (10_000, 8), (1_000_000, 4))
    found += [part(solvers, bench, rows, n) for rows, n in problems]
    found.append(part(whole_loss, bench, 256 if quick else 1 << 18, 8, "batch"))
    return found + [part(first_pass, bench, 1 << 20, n) for n in (() if quick else (1, 2, 8))]


def name_of(part: functools.partial[None]) -> str:
    return " ".join(str(x) for x in (part.func.__name__, *part.args[1:]))


def run(bench: Bench, parts: Sequence[functools.partial[None]], seconds: float) -> int:
    """Each part; what fails or finds no time left is named, and the others run."""
    start, failed = perf_counter(), []
    for part in parts:
        if perf_counter() - start > seconds:
            failed.append(f"{name_of(part)}: not run, out of time")
            continue
        try:
            part()
        except Exception:
            traceback.print_exc()
            failed.append(f"{name_of(part)}: failed")
        if bench.timed:
            bench.session.write()  # what there is, should the rest fail
    for line in failed:
        print(line)
    return int(bool(failed))


def compile_parts(count: int, arguments: Sequence[str], workers: int) -> None:
    """Every call of the parts once, in processes side by side: the kernels are then in Triton's cache."""
    left = list(range(count))
    running: list[subprocess.Popen[bytes]] = []
    start = perf_counter()
    while left or running:
        running = [process for process in running if process.poll() is None]
        while left and len(running) < workers:
            command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--only", str(left.pop(0))]
            running.append(subprocess.Popen(command))
        sleep(0.05)
    print(f"kernels compiled in {perf_counter() - start:.1f} s, {workers} processes")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny sizes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results, of a dry run benchmarks/local"
    )
    parser.add_argument("--seconds", type=float, default=380, help="after them no part is begun")
    parser.add_argument("--goals", action="store_true", help="only the figures that have a goal")
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile; 0: none"
    )
    parser.add_argument("--only", type=int, metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU; --device cpu shows that the benchmark runs")
        device = torch.device("cuda", torch.cuda.current_device())
    if not available(device):
        parser.error("no backend serves this GPU: see python -m pama_kernels info")
    quick = device.type == "cpu"
    out = arguments.out or Path(__file__).parent / ("local" if quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.gpu" + " --goals" * arguments.goals + " --device cpu" * quick
    session = Session("gpu-dry-run" if quick else "gpu", out, quick, command, 0.0)
    session.notes += machine(device)
    session.notes.append(
        f"backends: {', '.join(available(device))}; input pools of {CACHE_BYTES / 1e6:.0f} MB"
    )
    bench = Bench(session, device, timed=arguments.only is None)
    parts = goals(bench) + ([] if arguments.goals else others(bench))
    if arguments.only is not None:
        return run(bench, parts[arguments.only : arguments.only + 1], arguments.seconds)
    if arguments.workers:
        own = ["--device", arguments.device, *(["--goals"] if arguments.goals else [])]
        compile_parts(len(parts), own, arguments.workers)
    with torch.cuda.device(device) if bench.on_gpu else nullcontext():
        failed = run(bench, parts, arguments.seconds)
    plot(session)
    return failed


if __name__ == "__main__":
    sys.exit(main())
