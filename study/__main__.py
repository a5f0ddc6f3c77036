"""python -m study [PART ...] [--quick] [--out FOLDER]   |   python -m study report

Which rule for the weights? Parts: bandits, words, grpo (every rule at the same seeds and learning rates),
theory (the theorems, and what is known of the rules), pretrained (a pretrained language model),
sentiment_length (the paper's experiment at small scale). Each writes its results to FOLDER/<part>.csv.gz, run
by run, and resumes after an interruption. `report` writes the tables and pictures of docs/study*.md from the
committed results.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

SIMULATED = ("bandits", "words", "grpo")
PARTS = (*SIMULATED, "theory", "pretrained", "sentiment_length")
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"  # committed: the documentation shows them
LOCAL = HERE / "local"  # ignored by git


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, all by default; or report"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small, in study/local/quick: to check that it runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=LOCAL,
        help="folder of the results (default: study/local; the committed ones are in study/results)",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {*PARTS, "report"}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)} or report")
    if "report" in arguments.parts:
        from . import report

        report.write(RESULTS)
        return

    import torch

    torch.set_num_threads(1)
    folder = LOCAL / "quick" if arguments.quick and arguments.out == LOCAL else arguments.out
    for part in arguments.parts or PARTS:
        if part in SIMULATED:
            from . import sweep

            sweep.run(part, folder / f"{part}.csv.gz", arguments.quick)
        else:
            importlib.import_module(f"{__package__}.{part}").run(folder, arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
