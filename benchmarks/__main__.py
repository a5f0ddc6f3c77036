"""python -m benchmarks [PART ...] [--quick] [--out DIR]

Every part times our call beside its peers in one process, in interleaved rounds, after it has
checked that they agree, and writes PART.csv and PART.png.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path

# One thread each: what NumPy and SciPy load reads these once, before the first import.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# To add a part, write a module with `run(session)` and name it here.
PARTS = ("solvers",)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: to see that it works")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="for results",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    import torch

    from .harness import Session

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or PARTS:
        command = ["python", "-m", "benchmarks", part] + ["--quick"] * arguments.quick
        session = Session(part, arguments.out, arguments.quick, shlex.join(command))
        importlib.import_module(f"{__package__}.{part}").run(session)


if __name__ == "__main__":
    sys.exit(main())
