"""`make bench-gpu`: builds the package into a folder of its own and runs `benchmarks.gpu` with it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import run_gpu  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny sizes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: benchmarks/results, of a dry run benchmarks/local"
    )
    arguments = parser.parse_args()  # before minutes of building
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = arguments.device == "cuda"
        _, outcome = run_gpu.build(Path(folder), on_gpu and run_gpu.tool("nvcc") is not None)
        print(f"build: {outcome}")
        # Started in the folder: from the root Python would find the sources of the package first.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", arguments.device]
        if arguments.out is not None:
            command += ["--out", str(arguments.out.resolve())]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
