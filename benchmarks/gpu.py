"""What PAMA costs on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`. Less than eight minutes.

Three times for each piece of work, as medians over rounds in which the contestants take turns:

- device: one call captured in a CUDA graph, for each set of inputs of a pool that the cache cannot hold; the
  replays in turn, between two events. What the GPU does, without Python.
- eager: calls one after the other as a program makes them, until the device has finished.
- step: within a policy step of a GPT-2 124M with random weights.

GB/s are the bytes that a call has to read and write, counted from the shapes, over the device time. Beside
them, in the same run: a copy of device memory, and an empty kernel. Results are compared before any timing.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels._solve import solve_batch
from pama_kernels.backends import registry

from . import models, peers
from .harness import Row, Session

CACHE_BYTES = 200e6  # more than the second-level cache of any GPU here
ROUNDS = 9
BACKENDS = ("cuda", "triton")

Inputs = dict[str, Tensor]


@dataclass
class Work:
    """One way to compute something from a set of inputs."""

    name: str
    call: Callable[[Inputs], Any]
    moved: float | None = None  # bytes
    backend: str | None = None
    waits: bool = False  # for the device, so that no graph can hold it


class Bench:
    """The session, the device, and how long things may take."""

    def __init__(self, session: Session, device: torch.device) -> None:
        self.session, self.device = session, device
        self.on_gpu = device.type == "cuda"
        self.quick = session.quick

    def settle(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop)) * 1e-3 if self.on_gpu else float(stop - start)

    def now(self) -> Any:
        if not self.on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def captured(self, work: Work, x: Inputs) -> Callable[[], Any]:
        """The call on these inputs as a graph; on a CPU the call itself."""
        with chosen(work.backend):
            for _ in range(3):
                work.call(x)
            if not self.on_gpu:
                return lambda: work.call(x)
            self.settle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work.call(x)
        return graph.replay

    def device_times(self, works: Sequence[Work], pool: Sequence[Inputs]) -> list[list[float]]:
        """Microseconds of one call by each, one figure for each round."""
        replays = [[self.captured(work, x) for x in pool] for work in works]
        repeats = []
        for each in replays:  # so that one turn lasts about 20 ms
            begin = self.now()
            for replay in each:
                replay()
            end = self.now()
            self.settle()
            once = self.seconds(begin, end) / len(each)
            repeats.append(max(1, min(2000, int((0.002 if self.quick else 0.02) / max(once, 1e-6)))))
        times: list[list[float]] = [[] for _ in works]
        for _ in range(3 if self.quick else ROUNDS):
            for k, each in enumerate(replays):
                begin = self.now()
                for i in range(repeats[k]):
                    each[i % len(each)]()
                end = self.now()
                self.settle()
                times[k].append(self.seconds(begin, end) / repeats[k] * 1e6)
        return times

    def eager_times(self, works: Sequence[Work], pool: Sequence[Inputs]) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in works]
        for _ in range(3 if self.quick else ROUNDS):
            for k, work in enumerate(works):
                with chosen(work.backend):
                    if not times[k]:
                        work.call(pool[0])  # compiles
                    self.settle()
                    begin = perf_counter()
                    work.call(pool[0])
                    self.settle()
                    once = perf_counter() - begin
                    calls = 5 if self.quick else max(3, min(100, int(0.1 / once)))
                    begin = perf_counter()
                    for i in range(calls):
                        work.call(pool[i % len(pool)])
                    self.settle()
                    times[k].append((perf_counter() - begin) / calls * 1e6)
        return times

    def measure(
        self, what: str, case: str, n: int, tokens: int, works: Sequence[Work], pool: Sequence[Inputs]
    ) -> None:
        """Rows of device and of eager time; the first of `works` is ours, and what ratios are to."""
        graphed = [work for work in works if not work.waits]
        for kind, measured, times in (
            ("device", graphed, self.device_times(graphed, pool)),
            ("eager", works, self.eager_times(works, pool)),
        ):
            rows = []
            for work, own in zip(measured, times, strict=True):
                middle, spread = summary(own)
                ratio = statistics.median(t / o for t, o in zip(own, times[0], strict=True))
                speed = None
                if kind == "device" and work.moved is not None:
                    speed = work.moved / middle * 1e-3
                name = f"{work.name}, {kind} time"
                rows.append(Row(what, case, n, name, 1, middle, spread, ratio, None, "", tokens, speed))
            self.session.add(rows)


@contextmanager
def chosen(backend: str | None) -> Any:
    """Calls are served by this backend."""
    if backend is None:
        yield
        return
    before = os.environ.get("PAMA_BACKEND")
    os.environ["PAMA_BACKEND"] = backend
    registry.find.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PAMA_BACKEND"]
        else:
            os.environ["PAMA_BACKEND"] = before
        registry.find.cache_clear()


def summary(times: Sequence[float]) -> tuple[float, float]:
    """Median and relative interquartile range."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle


def available(device: torch.device) -> list[str]:
    """The backends that serve the device, by what they say themselves."""
    if device.type != "cuda":
        return ["cpu"]
    return [name for name in BACKENDS if not isinstance(registry.load(name, "cuda"), str)]


def inputs(tokens: int, n: int, device: torch.device, seed: int) -> Inputs:
    g = torch.Generator(device=device).manual_seed(seed)
    width = min(1024, tokens)
    shape = (tokens // width, width)
    logprobs = -torch.rand(shape, generator=g, device=device)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.2 * torch.randn(shape, generator=g, device=device),
        "advantages": torch.randn(*shape, n, generator=g, device=device),
        "mask": torch.rand(shape, generator=g, device=device) < 0.9,
    }


def pool_of(make: Callable[[int], Inputs], quick: bool) -> list[Inputs]:
    """So many different inputs that they do not fit the cache."""
    first = make(0)
    size = sum(x.numel() * x.element_size() for x in first.values())
    count = 2 if quick else max(2, min(64, int(CACHE_BYTES / size) + 1))
    return [first, *(make(seed) for seed in range(1, count))]


def agree(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    difference = float((found.double() - wanted.double()).abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{what}: results differ by {difference:.2e}, more than {tolerance:g}")


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
    def nothing(x: Any) -> None:
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


def whole_loss(bench: Bench, tokens: int, n: int, weights_per: str) -> None:
    """pama_loss, forward and backward, against the same rule in PyTorch and against one objective."""
    pool = pool_of(lambda seed: inputs(tokens, n, bench.device, seed), bench.quick)
    one = sum(x.numel() * x.element_size() for x in pool[0].values())
    passes = 2 if weights_per == "batch" else 1
    moved = passes * one + 4.0 * tokens  # the gradient

    def ours(x: Inputs) -> Tensor:
        leaf = x["logprobs"].detach().requires_grad_()
        rule = pk.Pama.paper(weights_per)  # the eager one
        loss = pk.pama_loss(**{**x, "logprobs": leaf}, rule=rule, clip_range=peers.CLIP).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    def theirs(loss: peers.Loss, n: int | None) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            leaf = x["logprobs"].detach().requires_grad_()
            advantages = x["advantages"] if n is None else x["advantages"][..., 0]
            value = loss(leaf, x["old_logprobs"], advantages, x["mask"])
            (gradient,) = torch.autograd.grad(value, leaf)
            return gradient

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
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU; --device cpu shows that the benchmark runs")
        device = torch.device("cuda", torch.cuda.current_device())
    quick = device.type == "cpu"
    out = arguments.out or Path(__file__).parent / ("local" if quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    part = "gpu-dry-run" if quick else "gpu"
    command = "python -m benchmarks.gpu" + " --device cpu" * quick
    session = Session(part, out, quick, command, 0.0)
    session.notes += machine(device)
    session.notes.append(
        f"backends: {', '.join(available(device))}; input pools of {CACHE_BYTES / 1e6:.0f} MB"
    )
    bench = Bench(session, device)
    if not available(device):
        parser.error("no backend serves this GPU: see python -m pama_kernels info")
    start, failed = perf_counter(), []
    with torch.cuda.device(device) if bench.on_gpu else nullcontext():
        ceilings(bench)
        for part in parts(bench):
            what = " ".join(str(x) for x in (part.func.__name__, *part.args[1:]))
            if perf_counter() - start > arguments.seconds:
                failed.append(f"{what}: not run, out of time")
                continue
            try:
                part()
            except Exception:
                traceback.print_exc()
                failed.append(f"{what}: failed")
            session.write()  # what there is, should the rest fail
    plot(session)
    for line in failed:
        print(line)
    return int(bool(failed))


def parts(bench: Bench) -> list[functools.partial[None]]:
    """What matters most first."""
    part, quick = functools.partial, bench.quick
    sizes = (1024, 256) if quick else (1 << 20, 1 << 26, 1 << 14, 1 << 23)
    found = [part(first_pass, bench, tokens, 4) for tokens in sizes]
    found.append(part(policy_step, bench))
    found.append(part(combine, bench, *((16, 32) if quick else (512, 4096)), 8))
    found += [
        part(whole_loss, bench, 512 if quick else 1 << 20, 4, p) for p in ("batch", "sequence", "token")
    ]
    found.append(part(whole_loss, bench, 256 if quick else 1 << 18, 8, "batch"))
    problems = ((1, 4), (8, 3)) if quick else ((1, 2), (1, 4), (1, 8), (10_000, 8), (1_000_000, 4))
    found += [part(solvers, bench, rows, n) for rows, n in problems]
    return found + [part(first_pass, bench, 1 << 20, n) for n in (() if quick else (1, 2, 8))]


if __name__ == "__main__":
    sys.exit(main())
