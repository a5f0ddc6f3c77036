"""The contestants of a measurement, and the interleaved timing and peak memory of their calls."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

SLICE = 2e-3  # seconds of one contestant's turn
SLOW_SLICE = 0.1  # the same where up to 20 calls take longer
ROUNDS = 11  # at least, unless single calls take longer than a share of the time: then LEAST_ROUNDS
LEAST_ROUNDS = 3
FLOOR = "floor"  # the time to read and write the bytes of a call, and nothing else


@dataclass
class Contestant:
    """`call` does the work on one of `inputs` (the pool, in the form that this contestant takes).

    `check` returns the difference of its results on the pool to ours; above `tolerance` it gets no time,
    unless it is known to be inexact (`tolerance` None): then the difference is reported.
    """

    name: str
    call: Callable[[Any], Any]
    inputs: Sequence[Any]
    check: Callable[[Contestant], float] | None = None
    tolerance: float | None = None
    note: str = ""
    threads: int = 1
    moved: float | None = None  # bytes that one call has to read and write


@dataclass
class Missing:
    """A contestant that is not there, and why."""

    name: str
    reason: str


def summary(times: list[float]) -> tuple[float, float]:
    """Median and relative interquartile range."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle


def interleaved(contestants: Sequence[Contestant], seconds: float) -> list[list[float]]:
    """Microseconds per call of each contestant, one number per round, for about that long.

    In each round every contestant has one slice of `SLICE` seconds, or of up to 20 calls if these take
    longer: slices are short and many, so that the median ignores those in which another process had the
    core. An untimed tenth precedes each slice, since the others have left their data in the caches. The order
    rotates from round to round, and a slice continues in the pool where the last one stopped.
    """
    slices: list[Iterator[Sequence[Any]]] = []
    round_seconds = 0.0
    turn = min(SLOW_SLICE, seconds / (ROUNDS * len(contestants)))
    for c in contestants:
        with threads(c.threads):
            start, calls = perf_counter_ns(), 0
            while calls < min(20, len(c.inputs)) and perf_counter_ns() - start < 1e8:
                c.call(c.inputs[calls])
                calls += 1
            once = max((perf_counter_ns() - start) * 1e-9 / calls, 1e-7)
        count = max(int(min(SLICE, turn) / once), min(20, int(turn / once)), 1)
        round_seconds += count * once
        slices.append(_slices(c.inputs, count))
    times: list[list[float]] = [[] for _ in contestants]
    rounds = max(LEAST_ROUNDS, int(seconds / round_seconds))
    enabled = gc.isenabled()
    gc.disable()
    end = perf_counter_ns() + 2e9 * seconds  # where the estimate was wrong
    try:
        for number in range(rounds):
            if number >= LEAST_ROUNDS and perf_counter_ns() > end:
                break
            for k in range(len(contestants)):
                i = (k + number) % len(contestants)
                c, inputs = contestants[i], next(slices[i])
                call = c.call
                with threads(c.threads):
                    for x in inputs[: len(inputs) // 10]:
                        call(x)
                    start = perf_counter_ns()
                    for x in inputs:
                        call(x)
                    times[i].append((perf_counter_ns() - start) * 1e-3 / len(inputs))
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return times


def _slices(pool: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    endless = itertools.cycle(pool)
    while True:
        yield list(itertools.islice(endless, count))


class threads:
    """torch's number of threads within the block."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.count != self.before:
            torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        if self.count != self.before:
            torch.set_num_threads(self.before)


def peak_memory(c: Contestant) -> float | None:
    """Bytes resident at the peak of one call beyond those before it, its result included; None off Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def resident(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept, would hide what the call takes
        reset.write_text("5")
        before = resident("VmRSS:")
        with threads(c.threads):
            c.call(c.inputs[0])
        return float(max(resident("VmHWM:") - before, 0))
    except (OSError, AttributeError, StopIteration):
        return None


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def reader() -> Callable[[Tensor], Any]:
    """The fastest of PyTorch's reductions here: none reads faster, some read much slower."""
    x = torch.ones(1 << 24)

    def nanoseconds(f: Callable[[Tensor], Any]) -> int:
        best = 1 << 62
        for _ in range(5):
            start = perf_counter_ns()
            f(x)
            best = min(best, perf_counter_ns() - start)
        return best

    reductions: list[Callable[[Tensor], Any]] = [torch.sum, torch.amax, lambda x: torch.dot(x, x)]
    return min(reductions, key=nanoseconds)


def floor(read: int, written: int, copies: int, passes: int = 1, threads: int = 1) -> Contestant:
    """Reads that many bytes `passes` times and writes those of the result once, and nothing else."""
    reads = reader()
    pool = [(torch.ones(max(read // 4, 1)), torch.ones(max(written // 4, 1))) for _ in range(copies)]

    def call(x: tuple[Tensor, Tensor]) -> None:
        for _ in range(passes):
            reads(x[0])
        if written:
            x[1].zero_()

    note = f"inputs {passes} times" * (passes > 1)
    return Contestant(FLOOR, call, pool, note=note, threads=threads, moved=float(read * passes + written))
