"""Hand-tuned weights of reward terms against weights from rules: `PamaPPO` on three tasks of MO-Gymnasium.

    mo-hopper-v5            a MuJoCo robot with 3 reward terms: speed, height, energy
    resource-gathering-v0   3 objectives, with a known front
    deep-sea-treasure-v0    2 objectives, with a known front

Hand-tuned: fixed weights of whitened advantages ("fixed"), and on the robot Gymnasium's own weighted reward
with one critic ("reward"), which is SB3's PPO. Rules: "pama" and "upgrad" with the uniform preference. All
methods of a seed have the same settings and learning rate; differences are paired over seeds.

    python examples/mo_gymnasium_compare.py            # minutes on two cores; resumes after an interruption
    python examples/mo_gymnasium_compare.py --quick    # a minute, to check that it runs
    python examples/mo_gymnasium_compare.py --draw     # picture and table from an existing file
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _control import TASKS, Run, measure
from _control_report import draw, table
from tqdm import tqdm

LOCAL = Path(__file__).resolve().parent / "local"  # ignored by git
GYMNASIUM = (1.0, 0.0, 1e-3)  # the scalar reward of Gymnasium's Hopper, up to the bonus for being upright
EQUAL = Run("", "fixed")
METHODS = {
    "mo-hopper-v5": [
        Run("", steps=0),
        Run("", reward=GYMNASIUM),
        Run("", "fixed", (0.6, 0.2, 0.2)),
        Run("", "fixed", (0.2, 0.2, 0.6)),
        EQUAL,
        Run("", "pama"),
        Run("", "upgrad"),
    ],
    "resource-gathering-v0": [
        Run("", "fixed", (0.6, 0.2, 0.2)),
        Run("", "fixed", (0.2, 0.4, 0.4)),
        EQUAL,
        Run("", "pama"),
        Run("", "upgrad"),
    ],
    "deep-sea-treasure-v0": [
        Run("", "fixed", (0.3, 0.7)),
        Run("", "fixed", (0.7, 0.3)),
        EQUAL,
        Run("", "pama"),
    ],
}


def study(quick: bool, seeds: int) -> list[Run]:
    """Seed by seed, so that an interrupted study compares all methods on the seeds it has."""
    runs = [
        replace(method, env=env, seed=seed)
        for seed in range(seeds)
        for env, methods in METHODS.items()
        for method in methods
    ]
    if quick:
        short = ("untrained", "fixed", "pama")
        runs = [run for run in runs if run.method in short]
        runs = [run if run.steps == 0 else replace(run, steps=4_000) for run in runs]
    return runs


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row["env"], row["method"], int(row["seed"])))
    columns = ["env", "method", "seed", "steps", *(f"return_{i}" for i in (1, 2, 3))]
    columns += [*(f"weight_{i}" for i in (1, 2, 3)), "cpu_s"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    kinds: dict[str, Any] = {"env": str, "method": str, "seed": int, "steps": int}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: kinds.get(k, float)(x) for k, x in row.items() if x != ""} for row in rows]


def train_all(runs: list[Run], path: Path, jobs: int) -> None:
    """Writes `path` at the end, and until then a file from which an interrupted study resumes."""
    unfinished = path.with_suffix(".csv.unfinished")
    rows = read(unfinished) if unfinished.is_file() else []
    there = {(row["env"], row["method"], row["seed"]) for row in rows}
    missing = [run for run in runs if (run.env, run.method, run.seed) not in there]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = as_completed([pool.submit(measure, run) for run in missing])
        for done in tqdm(pending, total=len(missing), unit="run", desc="train"):
            rows.append(done.result())
            write(unfinished, rows)
    unfinished.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--quick", action="store_true", help="short runs of one seed and few methods")
    parser.add_argument("--draw", action="store_true", help="no training: picture and table from the file")
    parser.add_argument(
        "--out",
        type=Path,
        default=LOCAL,
        help="folder of mo_gymnasium.csv and mo_gymnasium.png (default: examples/local; the committed files "
        "are in examples/results)",
    )
    options = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: expected a positive number, got {getattr(options, name)}")
    return options


def main() -> None:
    options = arguments()
    folder = LOCAL / "quick" if options.quick and options.out == LOCAL else options.out
    table_path, picture_path = folder / "mo_gymnasium.csv", folder / "mo_gymnasium.png"
    began = time.perf_counter()
    if not options.draw:
        train_all(study(options.quick, 1 if options.quick else options.seeds), table_path, options.jobs)
    elif not table_path.is_file():
        sys.exit(f"--draw: expected {table_path}, which does not exist; a run without --draw writes it")
    rows = read(table_path)
    draw(picture_path, rows, TASKS)
    print(table(rows, TASKS))
    cpu = sum(row["cpu_s"] for row in rows)
    print(f"\npicture: {picture_path}; figures: {table_path}")
    print(f"{len(rows)} runs, {cpu:.0f} s of CPU time; this command took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
