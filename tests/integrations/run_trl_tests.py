"""TRL's own tests of its trainers, with PAMA's in their place: what passes with TRL's has to pass with ours.

    python tests/integrations/run_trl_tests.py                          # clones the tag of the installed TRL
    python tests/integrations/run_trl_tests.py ../trl                   # takes the tests of a checkout
    python tests/integrations/run_trl_tests.py ../trl --trainers rloo -k peft

Nothing is loaded from the hub: stand-ins are made on the spot (trl_standins.py). Tests that these don't suit
fail or are skipped with either trainer, and are only counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import trl_standins

HERE = Path(__file__).resolve().parent
TRAINERS = ("grpo", "rloo")
SHARED = ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py")
# Tests that pass with TRL and are an error here, by a part of the test's name, and the reason
REFUSED = {"normalize_then_sum": "means pama_rule='fixed' with pama_normalize=True, and needs both"}


def tests_of(checkout: Path | None, work: Path) -> Path:
    """The folder of TRL's tests."""
    if checkout is None:
        checkout = work / "checkout"
        tag = f"v{version('trl')}"
        line = ["git", "clone", "-q", "--depth", "1", "--branch", tag, "https://github.com/huggingface/trl"]
        subprocess.run([*line, str(checkout)], check=True)
    for folder in (checkout / "tests", checkout):
        if (folder / "test_grpo_trainer.py").is_file():
            return folder
    raise SystemExit(f"expected a checkout of TRL, found no tests/test_grpo_trainer.py in {checkout}")


Outcomes = dict[str, tuple[str, str]]  # pytest's name of a test -> (passed, failed or skipped, message)


def outcomes(work: Path, trainer: str, mode: str, arguments: list[str], only: Sequence[str] = ()) -> Outcomes:
    file = f"tests/test_{trainer}_trainer.py"
    report = work / f"{trainer}-{mode}.xml"
    environment = {
        **os.environ,
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "TRL_TESTS_WITH": mode,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    line = [sys.executable, "-m", "pytest", "-q", "-p", "trl_standins", "-p", "no:cacheprovider"]
    line += [f"--junitxml={report}", *(only or [file]), *arguments]
    with open(work / f"{trainer}-{mode}.log", "w", encoding="utf-8") as log:
        subprocess.run(line, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        raise SystemExit((work / f"{trainer}-{mode}.log").read_text(encoding="utf-8")[-3000:])
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = child.get("message", "").partition("\n")[0]
        within = case.get("classname", "").split(".")[2:]  # tests.test_grpo_trainer.TestGRPOTrainer
        found["::".join([file, *within, case.get("name", "")])] = (outcome, message)
    return found


def passed(found: Outcomes) -> list[str]:
    return [name for name, (outcome, _) in found.items() if outcome == "passed"]


def refusal(name: str) -> str | None:
    return next((reason for part, reason in REFUSED.items() if part in name.split("::")[-1]), None)


def compare(trainer: str, plain: Outcomes, pama: Outcomes) -> bool:
    """Prints what differs; whether nothing is lost."""
    there = passed(plain)
    lost = [name for name in there if pama.get(name, ("missing", ""))[0] != "passed"]
    refused = [name for name in lost if refusal(name)]
    counts = {kind: sum(outcome == kind for outcome, _ in plain.values()) for kind in ("failed", "skipped")}
    print(
        f"{trainer}: {len(there)} pass with TRL's trainer, {len(there) - len(lost)} of these with PAMA's, "
        f"{len(refused)} refused by design; with TRL's {counts['failed']} fail, {counts['skipped']} skipped"
    )
    for name in lost:
        reason = refusal(name)
        print(f"  {'refused' if reason else 'LOST'} {name}: {reason or pama.get(name, ('', 'not run'))[1]}")
    return bool(there) and len(lost) == len(refused)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", nargs="?", type=Path, help="a checkout of TRL, or its folder of tests")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--keep", action="store_true", help="leave the reports where they are, and say where")
    chosen, arguments = parser.parse_known_args()  # the others are pytest's
    work = Path(tempfile.mkdtemp(prefix="trl-tests-"))
    try:
        tests = tests_of(chosen.checkout, work)
        (work / "tests").mkdir()
        for name in (*SHARED, *(f"test_{trainer}_trainer.py" for trainer in TRAINERS)):
            if (tests / name).is_file():
                shutil.copy(tests / name, work / "tests" / name)
        (work / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n    slow\n    low_priority\naddopts = -m 'not slow'\n"
        )
        trl_standins.make_hub(work / "home")
        good = True
        for trainer in chosen.trainers:
            plain = outcomes(work, trainer, "trl", arguments)
            names = passed(plain)
            pama = outcomes(work, trainer, "pama", arguments, names) if names else {}
            good = compare(trainer, plain, pama) and good
    finally:
        if chosen.keep:
            print(f"reports: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
