"""python -m benchmarks [PART ...] [--quick] [--out DIR] | --docs

Every part times our call beside its peers in one process, in interleaved rounds, after it has
checked that they agree, and writes PART.csv and PART.png. At the end the goals are held against
what was measured (goals.csv). --docs writes the tables of the documentation from the CSVs instead.
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
PARTS = {"solvers": 0.8, "tokens": 0.35, "headline": 1.0, "step": 3.0}
QUICK_SECONDS = 0.1


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
    parser.add_argument("--docs", action="store_true", help="tables of the documentation from --out")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    if arguments.docs:
        from . import report

        report.fill(arguments.out)
        return

    import torch

    from . import goals
    from .harness import Session

    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = arguments.parts or list(PARTS)
    for part in parts:
        command = ["python", "-m", "benchmarks", part] + ["--quick"] * arguments.quick
        seconds = QUICK_SECONDS if arguments.quick else PARTS[part]
        session = Session(part, arguments.out, arguments.quick, shlex.join(command), seconds)
        importlib.import_module(f"{__package__}.{part}").run(session)
    judged = goals.verdicts(arguments.out, parts)
    print(f"\n{goals.table(judged)}\nwrote {goals.write(arguments.out, judged)}")


if __name__ == "__main__":
    main()
