"""python -m benchmarks [PART ...] [--quick] [--resume] [--out DIR] | --docs

Each part compares the results of a call of this library and of other implementations ("peers"), times them
in interleaved rounds in one process, and writes PART.csv and PART.png. A peer that fails or disagrees gets no
time; the other measurements go on, and the command ends with a list of failures and exit status 1. --docs
instead writes the tables of the documentation from the results in the repository, which
`python -m benchmarks --out benchmarks/results` creates.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
from pathlib import Path
from time import perf_counter

# One thread each: what NumPy and SciPy load reads these once, before the first import.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# To add a part, write a module with `run(session)` and name it here, with the seconds that ours and one peer
# have together for one case; all parts together stay within ten minutes.
PARTS = {"sequence": 0.3, "tokens": 0.25, "solvers": 0.08, "headline": 0.3, "step": 0.8}
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
        "--out", type=Path, metavar="DIR", default=LOCAL, help="of results (default: benchmarks/local)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out parts whose CSV is of this commit and command"
    )
    parser.add_argument("--docs", action="store_true", help="write the documentation's tables")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    if arguments.docs:
        from . import report

        report.fill(RESULTS)
        return

    import torch

    from .harness import Session

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    failures = []
    for part in arguments.parts or PARTS:
        command = ["python", "-m", "benchmarks", part] + ["--quick"] * arguments.quick
        seconds = QUICK_SECONDS if arguments.quick else PARTS[part]
        session = Session(part, arguments.out, arguments.quick, shlex.join(command), seconds)
        if arguments.resume and session.measured():
            print(f"{session.csv} is there")
            continue
        start = perf_counter()
        try:
            importlib.import_module(f"{__package__}.{part}").run(session)
        except Exception as error:  # a package that is not there, a plot without points: the other parts run
            session.failures.append(f"{part}: {type(error).__name__}: {error}")
        print(f"{part}: {perf_counter() - start:.0f} s", flush=True)
        failures += session.failures
    for failure in failures:
        print(f"failed: {failure}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
