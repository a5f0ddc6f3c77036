"""python -m benchmarks [PART ...] [--quick] [--out DIR] | --docs

Every part times our call beside its peers in one process, in interleaved rounds, after it has
checked that they agree, and writes PART.csv and PART.png. --docs writes the tables of the
documentation instead, from the results that are part of the repository:
`python -m benchmarks --out benchmarks/results` makes those.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from pathlib import Path

# One thread each: what NumPy and SciPy load reads these once, before the first import.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# To add a part, write a module with `run(session)` and name it here, with the seconds that ours and one peer
# have together for one case; all parts together stay within ten minutes.
PARTS = {"solvers": 0.5, "tokens": 0.35, "headline": 1.0, "step": 3.0}
QUICK_SECONDS = 0.1

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"  # the documentation's, committed
LOCAL = HERE / "local"  # one's own, ignored by git


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: to see that it works")
    parser.add_argument(
        "--out", type=Path, default=LOCAL, metavar="DIR", help="for results (benchmarks/local)"
    )
    parser.add_argument("--docs", action="store_true", help="write the documentation's tables")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    if arguments.docs:
        from . import report

        try:
            report.fill(RESULTS)
        except FileNotFoundError as error:
            parser.error(f"{error.filename} is missing: python -m benchmarks --out benchmarks/results")
        return

    import torch

    from .harness import Session

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or PARTS:
        command = ["python", "-m", "benchmarks", part] + ["--quick"] * arguments.quick
        seconds = QUICK_SECONDS if arguments.quick else PARTS[part]
        session = Session(part, arguments.out, arguments.quick, shlex.join(command), seconds)
        try:
            importlib.import_module(f"{__package__}.{part}").run(session)
        except ImportError as error:
            print(f"{part}: missing: {error}")


if __name__ == "__main__":
    main()
