"""`make test-gpu`: everything that needs a GPU, in one command of less than eight minutes.

Uses the Python that runs it, the packages that are there (torch, triton, pytest, hypothesis, pybind11,
scikit-build-core, cmake, ninja; nvcc for the CUDA backend) and no network. The package is built into a folder
of its own; the environment is not changed. `--device cpu` runs the stages without a GPU, on small problems.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SUITE = (
    "test_statistics.py",
    "test_combine_advantages.py",
    "test_loss.py",
    "test_module.py",
    "test_advantages.py",
    "test_weights.py",
    "test_min_norm.py",
)
# Transformations of functions see through the copies to the device, which is the plugin's doing.
LEFT_OUT = "not vmap and not func_grad and not by_func and not forward_mode"
# Their bits and refusals are the CPU's.
NOT_A_DEVICE = " and not threads and not instruction_set and not clearly_no_gram"
NEEDED = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "hypothesis",
    "pybind11",
    "scikit_build_core",
    "pytest_timeout",
)
LIMIT = 460  # seconds, all together


class Stages:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.start = time.monotonic()
        self.done: list[tuple[str, str, float]] = []

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> bool:
        """Runs one stage; a failure is told at the end and does not stop the next."""
        left = LIMIT - (time.monotonic() - self.start)
        print(f"\n=== {name}", flush=True)
        begin = time.monotonic()
        if left < 10:
            outcome = "NOT RUN: out of time"
        else:
            try:
                code = subprocess.run(
                    command,
                    cwd=TESTS,
                    env={**self.environment, **environment},
                    timeout=min(seconds, left),
                    check=False,
                ).returncode
                outcome = "passed" if code == 0 else f"FAILED ({code})"
            except subprocess.TimeoutExpired:
                outcome = f"FAILED: more than {min(seconds, left):.0f} s"
        self.done.append((name, outcome, time.monotonic() - begin))
        return outcome == "passed"

    def skip(self, name: str, reason: str) -> None:
        self.done.append((name, f"SKIPPED: {reason}", 0.0))

    def report(self) -> int:
        print("\n=== summary")
        for name, outcome, seconds in self.done:
            print(f"{seconds:7.1f} s  {name}: {outcome}")
        print(f"{time.monotonic() - self.start:7.1f} s  all together")
        return int(any(not o.startswith(("passed", "SKIPPED")) for _, o, _ in self.done))


def install(folder: Path, cuda: bool) -> dict[str, str]:
    """Builds the package into a folder; the environment in which Python finds it."""
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
    command += [f"--config-settings=cmake.define.PAMA_CUDA={'ON' if cuda else 'OFF'}"]
    subprocess.run([*command, "--target", str(folder), str(ROOT)], check=True)
    path = os.pathsep.join([str(folder), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "HYPOTHESIS_PROFILE": "quick"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--installed", action="store_true", help="use the package as it is installed")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"missing packages: {', '.join(missing)}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu shows that the stages run")
    cuda = arguments.device == "cuda" and shutil.which("nvcc") is not None
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        if arguments.installed:
            environment = {**os.environ, "PYTHONPATH": str(TESTS), "HYPOTHESIS_PROFILE": "quick"}
        else:
            environment = install(Path(folder), cuda)
        environment["PAMA_TEST_DEVICE"] = arguments.device
        stages = Stages(environment)
        stages.start = begin
        stages.done.append(("build", "passed", time.monotonic() - begin))
        run_stages(stages, arguments.device, cuda, arguments.workers)
    return stages.report()


def run_stages(stages: Stages, device: str, cuda: bool, workers: int) -> None:
    python = [sys.executable, "-m"]
    stages.run("what is here", [*python, "pama_kernels.info"], 60)
    pytest = [*python, "pytest", "-q", "-c", "gpu.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    parallel = []
    if workers > 1 and importlib.util.find_spec("xdist"):
        parallel = ["-n", str(workers)]
    backends = ["cuda", "triton"] if device == "cuda" else ["cpu"]
    for backend in backends:
        if backend == "cuda" and not cuda:
            stages.skip("everything with the CUDA backend", "no nvcc, so pama_kernels._cuda is not built")
            continue
        chosen = {"PAMA_BACKEND": backend}
        stages.run(
            f"graphs, streams, sizes, bits: {backend}",
            [*pytest, "test_gpu.py", *(["-k", "bits or tokens"] if device == "cpu" else [])],
            120,
            **chosen,
        )
        which = LEFT_OUT + (NOT_A_DEVICE if device == "cuda" else "")
        suite = SUITE if device == "cuda" else ("test_combine_advantages.py",)
        if device == "cpu":
            which += " and (layout or strides or out)"
        stages.run(
            f"test-suite on the device: {backend}",
            [*pytest, "-p", "on_device", "-m", "not slow", "-k", which, *parallel, *suite],
            180,
            **chosen,
        )
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer is None:
        stages.skip("compute-sanitizer", "the tool is not here")
        return
    backend = "cuda" if cuda else ("triton" if device == "cuda" else "cpu")
    for tool in ("memcheck", "racecheck"):
        checked = (
            [sanitizer, "--tool", tool, "--error-exitcode", "3"] if sanitizer and device == "cuda" else []
        )
        stages.run(
            f"compute-sanitizer {tool}: {backend}",
            [*checked, sys.executable, "sanitized.py"],
            90,
            PAMA_BACKEND=backend,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )


if __name__ == "__main__":
    sys.exit(main())
