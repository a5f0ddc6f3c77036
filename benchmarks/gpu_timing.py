"""Timing on a GPU: the device time of a call, and its time as an eager call.

- device: one call captured in a CUDA graph, for each set of inputs of a pool that exceeds the cache; the
  graphs are replayed in turn, between two events. This is the time of the GPU without Python.
- eager: consecutive eager calls, until the device has finished.

Contestants alternate; times are medians over rounds. On a CPU (a dry run) both are the time of the call.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from pama_kernels.backends import registry

from .harness import Row, Session
from .timing import summary

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
    """The session and the device; where not `timed`, each call is made once, which compiles its kernels."""

    def __init__(self, session: Session, device: torch.device, timed: bool = True) -> None:
        self.session, self.device, self.timed = session, device, timed
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

    def call_once(self, works: Sequence[Work], x: Inputs) -> None:
        for work in works:
            with chosen(work.backend):
                work.call(x)
        self.settle()

    def device_times(self, works: Sequence[Work], pool: Sequence[Inputs]) -> list[list[float]]:
        """Microseconds of one call of each contestant, one number per round."""
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
        """Rows of device and of eager time; the first of `works` is this library's, to which ratios refer."""
        if not self.timed:
            self.call_once(works, pool[0])
            return
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
    """Calls use this backend."""
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


def available(device: torch.device) -> list[str]:
    """The backends that report that they support the device."""
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
    """Enough different inputs to exceed the cache."""
    first = make(0)
    size = sum(x.numel() * x.element_size() for x in first.values())
    count = 2 if quick else max(2, min(64, int(CACHE_BYTES / size) + 1))
    return [first, *(make(seed) for seed in range(1, count))]


def agree(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    difference = float((found.double() - wanted.double()).abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"{what}: results differ by {difference:.2e}, more than {tolerance:g}")
