"""Benchmarks on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`. Less than eight minutes.

`gpu_timing` times a call on the device (a replayed CUDA graph) and as an eager call; the last parts are a
policy step of a GPT-2 124M with random weights, and the time that a run with changing lengths waits for the
compilation of kernels. GB/s are the bytes that a call has to read and write, counted from the shapes, divided
by the device time. The same run measures a copy of device memory and an empty kernel for comparison. Results
are compared before any timing.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, sleep

import torch

from .gpu_kernels import ceilings, combine, first_pass, per_sequence_loss, solvers, whole_loss
from .gpu_timing import CACHE_BYTES, Bench, available
from .gpu_training import changing_lengths, policy_step
from .harness import Session


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
        part(combine, bench, rows, 16 if quick else 128, 32),
        part(per_sequence_loss, bench, rows, width, 8),
        part(whole_loss, bench, 512 if quick else 1 << 20, 4, "batch"),
        part(policy_step, bench),
        part(changing_lengths, bench),
    ]


def others(bench: Bench) -> list[functools.partial[None]]:
    """The most important parts first."""
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
    """Runs each part; parts that fail or have no time left are reported, and the others run."""
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
    """Every call of the parts once, in parallel processes, so that the kernels are in Triton's cache."""
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
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(__file__).resolve().parent / "local",
        help="of the CSV (default: benchmarks/local; the committed files are in benchmarks/results)",
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
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.gpu" + " --goals" * arguments.goals + " --device cpu" * quick
    session = Session("gpu-dry-run" if quick else "gpu", arguments.out, quick, command, 0.0)
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
        return run(bench, parts, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
