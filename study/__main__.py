"""python -m study [PART ...] [--quick] [--report] [--out DIR] [--docs]

Does PAMA align, and whose weights should it use? Every run leaves a CSV under DIR and is not repeated
while it is there: stop at any time, start again, and it goes on. Parts: sweep (problems with a known
front), theory (Theorems 1 and 2), language (a small language model); then the report: tables and pictures
in DIR, with --docs also in docs/study.md and docs/images.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

PARTS = ("sweep", "theory", "language")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="small: to see that it runs, in a folder of its own"
    )
    parser.add_argument("--report", action="store_true", help="only draw and write what the logs say")
    parser.add_argument(
        "--docs", action="store_true", help="only fill the documentation's tables and pictures"
    )
    parser.add_argument("--out", type=Path, help="folder of the logs (default: study/local)")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")

    import torch

    torch.set_num_threads(1)
    quick = arguments.quick
    out = arguments.out or (
        Path(tempfile.gettempdir()) / "pama-study" if quick else Path(__file__).parent / "local"
    )
    report_only = arguments.report or arguments.docs
    if not report_only:
        for part in arguments.parts or PARTS:
            module = importlib.import_module(f"{__package__}.{part}")
            module.run(out / part, module.QUICK if quick else module.Budget())
    if report_only or not arguments.parts:
        from . import report

        report.write(out, in_docs=arguments.docs)


if __name__ == "__main__":
    sys.exit(main())
