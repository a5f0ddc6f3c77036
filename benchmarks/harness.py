"""Interleaved timing of one piece of work by several contestants, ours first, and the records of it."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import importlib.metadata
import itertools
import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from tqdm import tqdm

from pama_kernels.tools import info

SLICE = 2e-3  # seconds of one contestant's turn
SLOW_SLICE = 0.1  # the same where up to 20 calls take longer
PACKAGES = (
    *("torch", "numpy", "daqp", "quadprog", "piqp", "proxsuite", "qpsolvers", "torchjd", "cvxpy"),
    *("transformers", "trl", "verl"),
)
ROUNDS = 11  # at least, unless single calls take longer than a share of the time: then LEAST_ROUNDS
LEAST_ROUNDS = 3


@dataclass
class Contestant:
    """`call` does the work on one of `inputs` (the pool, in the form that this contestant takes).

    `check` gives how far its results on the pool are from ours; above `tolerance` the benchmark stops, unless
    the contestant is known to be inexact (`tolerance` None): its distance is reported.
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


@dataclass
class Row:
    work: str
    case: str
    n: int
    contestant: str
    threads: int
    microseconds: float | None  # median over rounds
    spread: float | None  # interquartile range over median
    ratio: float | None  # median over rounds of theirs / ours
    difference: float | None  # from ours, as the contestant's check has it
    note: str
    size: int | None = None  # tokens, rows or parameters
    gigabytes_per_second: float | None = None  # counted bytes over the median
    peak_megabytes: float | None = None  # the most that was resident during a call, beyond what was before it
    input_megabytes: float | None = None  # of one call


@dataclass
class Session:
    """One part: its rows, printed as they come, and its CSV."""

    part: str
    out: Path
    quick: bool
    command: str
    seconds: float  # for ours and one peer together
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def works(self, cases: Iterable[Any], total: int) -> Iterator[Any]:
        """The cases, with a progress bar."""
        return iter(tqdm(cases, total=total, desc=self.part, unit="case", disable=None))

    def measure(
        self,
        work: str,
        case: str,
        n: int,
        contestants: Sequence[Contestant | Missing],
        *,
        size: int | None = None,
        input_bytes: int | None = None,
    ) -> list[Row]:
        """Checks that the contestants agree, times them, and keeps and prints their rows.

        Ours takes turns with one peer at a time: some slow down what runs after them in the same process.
        Our own row is from the first pair. With `input_bytes`, those of one call, peak memory
        is measured too.
        """
        ours, *others = contestants
        assert isinstance(ours, Contestant)
        where = f"{work}, {case}, N={n}"
        rows: list[Row] = []

        def row(c: Contestant, times: list[float], ratio: float, difference: float | None) -> Row:
            middle, spread = _summary(times)
            speed = None if c.moved is None else c.moved / middle * 1e-3
            peak = None if input_bytes is None else peak_memory(c)
            return Row(
                *(work, case, n, c.name, c.threads, middle, spread, ratio, difference, c.note, size, speed),
                *(None if x is None else x * 1e-6 for x in (peak, input_bytes)),
            )

        own_difference = _agreement(ours, where)
        for c in others:
            if isinstance(c, Missing):
                reason = f"missing: {c.reason}"
                rows.append(Row(work, case, n, c.name, 1, None, None, None, None, reason, size))
                continue
            difference = _agreement(c, where)
            own, theirs = interleaved((ours, c), self.seconds)
            if not any(r.contestant == ours.name for r in rows):
                rows.insert(0, row(ours, own, 1.0, own_difference))
            ratio = statistics.median(t / o for t, o in zip(theirs, own, strict=True))
            rows.append(row(c, theirs, ratio, difference))
        self.add(rows)
        return rows

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps and prints the rows of one case."""
        self.rows += rows
        self._print(rows)

    def _print(self, rows: Sequence[Row]) -> None:
        first = rows[0]
        lines = [f"{first.work}: {first.case}, N={first.n}"]
        for r in rows:
            if r.microseconds is None:
                lines.append(f"  {'':>9}  {'':>14}  {'':>11}  {r.contestant}  {r.note}")
                continue
            off = "" if r.difference is None else f"  off by {r.difference:.0e}"
            ratio = f"{'':>9}" if r.ratio is None else f"{r.ratio:>8.2f}x"
            lines.append(
                f"  {ratio}  {r.microseconds:>11.3f} us  spread {100 * (r.spread or 0):>3.0f}%  "
                f"{r.contestant}{off}{_extra(r)}  {r.note}".rstrip()
            )
        tqdm.write("\n".join(lines))

    @property
    def csv(self) -> Path:
        return self.out / f"{self.part}.csv"

    def write(self) -> None:
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            for key, value in self.provenance().items():
                file.write(f"# {key}: {value}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(f.name for f in fields(Row))
            for row in self.rows:
                writer.writerow("" if x is None else _short(x) for x in asdict(row).values())
        print(f"wrote {self.csv}")

    def provenance(self) -> dict[str, str]:
        machine = info.collect()
        cpu = next(b for b in machine["backends"] if b["name"] == "cpu")
        return {
            "command": self.command,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "commit": _commit(),
            "processor": f"{machine['processor']}, {machine['cores']} cores",
            "kernels": cpu["detail"],
            "versions": ", ".join(
                f"{name} {version}"
                for name, version in [
                    ("python", machine["versions"]["python"]),
                    ("pama-kernels", machine["versions"]["pama-kernels"]),
                    *((name, _version(name)) for name in PACKAGES),
                ]
            ),
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that a part has written."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _extra(row: Row) -> str:
    speed, peak = row.gigabytes_per_second, row.peak_megabytes
    return f"  {speed or 0:.1f} GB/s" * (speed is not None) + f"  +{peak or 0:.0f} MB" * (peak is not None)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    """The commit, and whether files that are part of it have been changed. Without git: `PAMA_COMMIT`."""
    try:
        root = Path(__file__).parent
        head, changed = (
            subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "../pama_kernels", "../csrc"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PAMA_COMMIT", "unknown")
    return head + (" with changes" if changed else "")


def _agreement(c: Contestant, where: str) -> float | None:
    if c.check is None:
        return None
    difference = c.check(c)
    if c.tolerance is not None and not difference <= c.tolerance:
        raise RuntimeError(
            f"{where}: {c.name} differs from ours by {difference:.2e}, more than {c.tolerance:g}"
        )
    return difference


def _summary(times: list[float]) -> tuple[float, float]:
    """Median and relative interquartile range."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle


def interleaved(contestants: Sequence[Contestant], seconds: float) -> list[list[float]]:
    """Microseconds per call of each contestant, one figure for each round, for about that long.

    In each round everyone has one slice of `SLICE` seconds, or of up to 20 calls where these take longer:
    short and many, so that the median passes over slices in which another process had the core. Each comes
    after a tenth of it untimed, since the others have left their data in the caches. The order turns from
    round to round, and slices go on through the pool where the last one stopped.
    """
    slices: list[Iterator[Sequence[Any]]] = []
    round_seconds = 0.0
    turn = min(SLOW_SLICE, seconds / (ROUNDS * len(contestants)))
    for c in contestants:
        with _threads(c.threads):
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
                with _threads(c.threads):
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


class _threads:
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
        with _threads(c.threads):
            c.call(c.inputs[0])
        return float(max(resident("VmHWM:") - before, 0))
    except (OSError, AttributeError, StopIteration):
        return None


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
