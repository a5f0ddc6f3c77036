"""`make test-gpu`: everything that needs a GPU, in stages, in one command of less than ten minutes.

Uses the Python that runs it, the packages that are there (torch, triton, pytest, hypothesis, pybind11,
scikit-build-core, cmake, ninja; nvcc for the CUDA backend) and no network. The package is built into a folder
of its own (`--site`), or taken from there (`--installed`); the environment is not changed. Each stage writes
its own log and junit file under `--out` as it goes and prints the end of it. `--device cpu` runs the stages
without a GPU, on small problems.

- build: the package, with CUDA C++ where nvcc is.
- graphs: CUDA graphs, streams, sizes, bits, launches (tests/backends/test_gpu.py).
- goals: the figures that have a goal (`benchmarks.gpu --goals`); benchmark: all figures.
- profile: Nsight Compute on the statistics and loss kernels.
- suite: the tests whose marker is not `gpu`, `cpu` or `slow`, with their tensors on the device. They
  compile thousands of variants of the Triton kernels, a second or two of one core each. So a run takes a
  share of the parameters of tests that have many; `--share 2/5` takes the next, and five runs take all.
- sanitizers: a short run of every kernel, then compute-sanitizer memcheck (both backends) and racecheck (CUDA
  C++) on the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BACKENDS = TESTS / "backends"
SUITE = ("properties", "solvers", "operators/test_autograd.py", "operators/test_backward.py")
STAGES = ("build", "graphs", "goals", "benchmark", "profile", "suite", "sanitizers")
DEFAULT = ("build", "graphs", "suite", "sanitizers")
NEEDED = (
    *("torch", "triton", "numpy", "pytest", "hypothesis", "pytest_timeout"),
    *("pybind11", "scikit_build_core"),
)
SHARES = 5  # no multiple of the number of choices that tests are made of, so that each share has them all
SHOWN = 15  # lines of each log


@dataclass
class Job:
    """One process of a stage: its name, which is that of its log, and its command."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class Runner:
    def __init__(self, environment: dict[str, str], out: Path, seconds: float) -> None:
        self.environment, self.out = environment, out
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.done: list[tuple[str, str, float]] = []

    def run(self, seconds: float, *jobs: Job) -> bool:
        """Runs jobs side by side; a failure is reported at the end and does not stop the next stage."""
        seconds = min(seconds, self.end - time.monotonic())
        begin = time.monotonic()
        if seconds < 5:
            self.done += [(job.name, "NOT RUN: out of time", 0.0) for job in jobs]
            return False
        running = []
        for job in jobs:
            log = (self.out / f"{job.name}.log").open("w", encoding="utf-8")
            process = subprocess.Popen(
                job.command,
                cwd=TESTS,
                env={**self.environment, **job.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.append((job, process))
        good = True
        for job, process in running:
            outcome = self.outcome(process, begin + seconds, seconds)
            self.done.append((job.name, outcome, time.monotonic() - begin))
            good = good and outcome == "passed"
            lines = (self.out / f"{job.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"\n=== {job.name}: {outcome}", *lines[-SHOWN:], sep="\n", flush=True)
        return good

    @staticmethod
    def outcome(process: subprocess.Popen[bytes], end: float, seconds: float) -> str:
        """Past its time a process is interrupted (pytest then writes its summary) and killed 10 s later."""
        try:
            code = process.wait(max(end - time.monotonic(), 0.1))
            return "passed" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"FAILED: more than {seconds:.0f} s"

    def skip(self, name: str, reason: str) -> None:
        self.done.append((name, f"SKIPPED: {reason}", 0.0))

    def report(self) -> int:
        lines = [f"{seconds:7.1f} s  {name}: {outcome}" for name, outcome, seconds in self.done]
        lines.append(f"{time.monotonic() - self.start:7.1f} s  all together")
        (self.out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n=== summary", *lines, sep="\n")
        return int(any(not o.startswith(("passed", "SKIPPED")) for _, o, _ in self.done))


def tool(name: str) -> str | None:
    """Of CUDA, on the PATH or in its usual place."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def architecture() -> str:
    """The GPU's architecture, since building for one is faster than for all; sm_90 without a GPU."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}"


def installation(folder: Path, cuda: bool) -> Job:
    """Installs the package into a folder, with CUDA C++ for the GPU of this machine."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    settings = {"PAMA_CUDA": "ON" if cuda else "OFF"}
    if cuda:
        settings["CMAKE_CUDA_ARCHITECTURES"] = architecture()
    command += [f"--config-settings=cmake.define.{name}={value}" for name, value in settings.items()]
    command += ["--upgrade", "--target", str(folder), str(ROOT)]
    return Job("build" if cuda else "build without CUDA C++", command, {"CUDACXX": tool("nvcc") or ""})


def build(runner: Runner, folder: Path, cuda: bool) -> bool:
    """Whether CUDA C++ was built: if it does not compile, the rest runs without it."""
    if cuda and runner.run(300, installation(folder, True)):
        return True
    runner.run(200, installation(folder, False))
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--stages",
        default=",".join(DEFAULT),
        help=f"in this order, of {','.join(STAGES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--site", type=Path, metavar="DIR", help="where the package is built (default: OUT/site)"
    )
    parser.add_argument("--installed", action="store_true", help="use the package in --site, or as installed")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", metavar="DIR")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--share", default=f"1/{SHARES}", metavar="I/K", help="of the test-suite; 1/1: all")
    parser.add_argument("--seconds", type=float, default=560, help="all together")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if not set(stages) <= set(STAGES):
        parser.error(f"--stages: expected some of {','.join(STAGES)}, got {arguments.stages}")
    if not re.fullmatch("[1-9][0-9]*/[1-9][0-9]*", arguments.share):
        parser.error(f"--share: expected two numbers like 1/{SHARES}, got {arguments.share}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"missing packages: {', '.join(missing)}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu shows that the stages run")
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site: Path | None = arguments.site.resolve() if arguments.site else None
    environment = {
        **os.environ,
        "HYPOTHESIS_PROFILE": "quick",
        "PAMA_TEST_DEVICE": arguments.device,
        "PAMA_TEST_SHARE": arguments.share,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the properties use deterministic algorithms
    }
    runner = Runner(environment, out, arguments.seconds)
    cuda = arguments.device == "cuda" and tool("nvcc") is not None
    if not arguments.installed:
        site = site or out / "site"
        if "build" in stages:
            cuda = build(runner, site, cuda)
    # Not the root: there Python would find the sources of the package, without its native modules.
    paths = [str(site)] if site else []
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(BACKENDS), str(TESTS)])
    if arguments.device == "cuda":
        cuda = any((site / "pama_kernels" / "backends").glob("_cuda.*.so")) if site else cuda
    plan = Plan(runner, arguments.device, cuda, arguments.workers)
    runner.run(60, Job("installation", [sys.executable, "-m", "pama_kernels", "info"]))
    for stage in stages:
        if stage != "build":
            getattr(plan, stage)()
    return runner.report()


class Plan:
    """The stages that run the package."""

    def __init__(self, runner: Runner, device: str, cuda: bool, workers: int) -> None:
        self.runner, self.device, self.workers = runner, device, workers
        self.backends = ["cuda", "triton"] if device == "cuda" else ["cpu"]
        if device == "cuda" and not cuda:
            runner.skip("everything with the CUDA backend", "the CUDA module is not built: it needs nvcc")
            self.backends.remove("cuda")

    def pytest(self, name: str, backend: str, workers: int, *arguments: str) -> Job:
        command = [sys.executable, "-m", "pytest", "-q", "-c", "gpu.ini", "--rootdir", "."]
        command += ["-p", "no:cacheprovider", f"--junit-xml={self.runner.out / name}.xml"]
        if workers > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers), "--dist", "worksteal"]
        return Job(name, [*command, *arguments], {"PAMA_BACKEND": backend})

    def graphs(self) -> None:
        each = max(self.workers // len(self.backends), 1)
        own = (str(BACKENDS / "test_gpu.py"), "--timeout", "150")
        self.runner.run(200, *(self.pytest(f"graphs-{b}", b, each, *own) for b in self.backends))

    def goals(self) -> None:
        self.benchmark("goals", "--goals")

    def benchmark(self, name: str = "benchmark", *options: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", *options, "--device", self.device]
        command += ["--out", str(self.runner.out), "--workers", str(self.workers)]
        paths = os.pathsep.join([self.runner.environment["PYTHONPATH"], str(ROOT)])
        self.runner.run(400, Job(name, command, {"PYTHONPATH": paths}))

    def profile(self) -> None:
        command = [sys.executable, str(BACKENDS / "profiled.py")]
        if self.device == "cuda":
            profiler = tool("ncu")
            if profiler is None:
                self.runner.skip("profile", "the tool ncu is not here")
                return
            sections = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "LaunchStats", "Occupancy")
            chosen = [word for section in sections for word in ("--section", section)]
            only = ["--kernel-name", "regex:flat|statistics|tokens|rows|counts|sums|solve|combine"]
            command = [profiler, "--clock-control", "none", *chosen, *only, *command]
        for backend in self.backends:  # not side by side: the counters belong to one process
            self.runner.run(60, Job(f"profile-{backend}", command, {"PAMA_BACKEND": backend}))

    def suite(self) -> None:
        which = "not cpu and not gpu and not slow" if self.device == "cuda" else "portable"
        paths = [str(TESTS / name) for name in SUITE if (TESTS / name).exists()]
        each = max(self.workers // len(self.backends), 1)
        tests = ("-p", "on_device", "-m", which, *paths)
        self.runner.run(300, *(self.pytest(f"suite-{b}", b, each, *tests) for b in self.backends))

    def sanitizers(self) -> None:
        script = str(BACKENDS / "sanitized.py")
        cases = [(backend, case) for backend in self.backends for case in "012"]
        # Without a sanitizer first, so that no kernel has to be compiled under it.
        self.runner.run(
            80,
            *(
                Job(f"kernels-{backend}-{case}", [sys.executable, script, case], {"PAMA_BACKEND": backend})
                for backend, case in cases
            ),
        )
        jobs = []
        for backend in self.backends:  # Triton answers itself for what it does with shared memory
            for checker in ("memcheck", "racecheck") if backend == "cuda" else ("memcheck",):
                command: list[str] = []
                if self.device == "cuda":
                    sanitizer = tool("compute-sanitizer")
                    if sanitizer is None:
                        self.runner.skip(f"{checker}-{backend}", "the tool compute-sanitizer is not here")
                        continue
                    command = [sanitizer, "--tool", checker, "--error-exitcode", "3"]
                    if checker == "racecheck":
                        command += ["--kernel-name", "kns=pama"]  # not Triton's
                command += [sys.executable, script]
                own = {"PAMA_BACKEND": backend, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                jobs += [Job(f"{checker}-{backend}-{case}", [*command, case], own) for case in "012"]
        self.runner.run(120, *jobs)


if __name__ == "__main__":
    sys.exit(main())
