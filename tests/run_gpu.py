"""`make test-gpu`: everything that needs a GPU, in one command of less than eight minutes.

Uses the Python that runs it, the packages that are there (torch, triton, pytest, hypothesis, pybind11,
scikit-build-core, cmake, ninja; nvcc for the CUDA backend) and no network. The package is built into a folder
of its own; the environment is not changed. `--device cpu` runs the stages without a GPU, on small problems.

The tests are chosen by their markers: `gpu` needs one; all others run with their tensors on the device, but
for `cpu` and `slow`. All of them would compile thousands of variants of the Triton kernels, a second or two
of one core each. So a run takes a share of the parameters of tests that have many; `--share 2/5` takes the
next, and five runs take all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BACKENDS = TESTS / "backends"
SUITE = ("properties", "solvers", "operators/test_autograd.py")
NEEDED = (
    *("torch", "triton", "numpy", "pytest", "hypothesis", "pytest_timeout"),
    *("pybind11", "scikit_build_core"),
)
LIMIT = 460  # seconds, all together
SHARES = 5  # no multiple of the number of choices that tests are made of, so that each share has them all


class Stages:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.start = time.monotonic()
        self.done: list[tuple[str, str, float]] = []

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> bool:
        """Runs one stage; a failure is reported at the end and does not stop the next."""
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


def install(folder: Path, cuda: bool) -> None:
    """Builds the package into a folder; with CUDA C++ for the GPU that is here."""
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
    environment = {**os.environ, "CUDACXX": tool("nvcc") or ""} if cuda else None
    subprocess.run([*command, "--target", str(folder), str(ROOT)], env=environment, check=True)


def tool(name: str) -> str | None:
    """Of CUDA, on the PATH or in its usual place."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def architecture() -> str:
    """That of the GPU, which is quicker to build than all; sm_90 where there is none."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}"


def build(folder: Path, cuda: bool) -> tuple[bool, str]:
    """Installs; without CUDA C++ where that fails. Whether it is there, and what to report."""
    if cuda:
        try:
            install(folder, True)
        except subprocess.CalledProcessError as error:
            install(folder, False)
            return False, f"FAILED with CUDA C++ ({error.returncode}); built without it"
        return True, "passed"
    install(folder, False)
    return False, "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--installed", action="store_true", help="use the package as it is installed")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--share", default=f"1/{SHARES}", metavar="I/K", help="of the test-suite; 1/1: all")
    arguments = parser.parse_args()
    if not re.fullmatch("[1-9][0-9]*/[1-9][0-9]*", arguments.share):
        parser.error(f"--share: expected two numbers like 1/{SHARES}, got {arguments.share}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"missing packages: {', '.join(missing)}")
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu shows that the stages run")
    cuda = arguments.device == "cuda" and tool("nvcc") is not None
    environment = {
        **os.environ,
        "HYPOTHESIS_PROFILE": "quick",
        "PAMA_TEST_DEVICE": arguments.device,
        "PAMA_TEST_SHARE": arguments.share,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the properties ask for deterministic algorithms
    }
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(environment)
        paths = [str(BACKENDS), str(TESTS)]
        if arguments.installed:
            found = importlib.util.find_spec("pama_kernels.backends._cuda") is not None
            cuda = arguments.device == "cuda" and found
        else:
            cuda, outcome = build(Path(folder), cuda)
            stages.done.append(("build", outcome, time.monotonic() - stages.start))
            paths.insert(0, folder)
        stages.environment["PYTHONPATH"] = os.pathsep.join(paths)
        run_stages(stages, arguments.device, cuda, arguments.workers)
    return stages.report()


def run_stages(stages: Stages, device: str, cuda: bool, workers: int) -> None:
    python = [sys.executable, "-m"]
    stages.run("what is here", [*python, "pama_kernels", "info"], 60)
    pytest = [
        *python,
        "pytest",
        "-q",
        "-c",
        "gpu.ini",
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
    ]
    if workers > 1 and importlib.util.find_spec("xdist"):
        pytest += ["-n", str(workers), "--dist", "worksteal"]
    backends = ["cuda", "triton"] if device == "cuda" else ["cpu"]
    if device == "cuda" and not cuda:
        stages.skip("everything with the CUDA backend", "the CUDA module is not built: it needs nvcc")
        backends.remove("cuda")
    for backend in backends:
        own = [*pytest, str(BACKENDS / "test_gpu.py")]
        stages.run(f"graphs, streams, sizes, bits: {backend}", own, 150, PAMA_BACKEND=backend)
    for backend in backends:  # Triton answers itself for what it does with shared memory
        for checker in ("memcheck", "racecheck") if backend != "triton" else ("memcheck",):
            sanitize(stages, device, backend, checker)
    which = "not cpu and not gpu and not slow" if device == "cuda" else "portable"
    suite = [str(TESTS / name) for name in SUITE if (TESTS / name).exists()]
    for backend in backends:
        command = [*pytest, "-p", "on_device", "-m", which, *suite]
        stages.run(f"test-suite on the device: {backend}", command, 300, PAMA_BACKEND=backend)


def sanitize(stages: Stages, device: str, backend: str, checker: str) -> None:
    name = f"compute-sanitizer {checker}: {backend}"
    command = [sys.executable, str(BACKENDS / "sanitized.py")]
    if device == "cuda":
        sanitizer = tool("compute-sanitizer")
        if sanitizer is None:
            stages.skip(name, "the tool is not here")
            return
        command = [sanitizer, "--tool", checker, "--error-exitcode", "3", *command]
    stages.run(name, command, 90, PAMA_BACKEND=backend, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


if __name__ == "__main__":
    sys.exit(main())
