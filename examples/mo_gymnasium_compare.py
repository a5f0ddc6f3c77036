"""PAMA and fixed weights on two control tasks, against fronts that are known.

Runs `mo_gymnasium_ppo.py` for several weightings and seeds, writes what they reached to a CSV file, and draws
the picture and prints the table from that file.

    deep-sea-treasure-v0    discrete; the environment lists its front
    water-reservoir-v0      continuous; its front comes from dynamic programming (`_fronts.py`)

Each run ends at one point. PAMA looks for one that is Pareto-stationary, not for a front: where it lies, the
rewards and the preference decide. Several fixed weightings together cover what no single run can.

examples/results/mo_gymnasium.csv holds runs of the library's first edition, whose default kept positive
advantages only; docs/examples.md says what they showed.

    python examples/mo_gymnasium_compare.py            # minutes on two cores
    python examples/mo_gymnasium_compare.py --quick    # half a minute, to see that it runs
    python examples/mo_gymnasium_compare.py --draw     # picture and table from the file that is there
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _fronts import FRONTS, distance, hypervolume, nondominated
from matplotlib.axes import Axes
from mo_gymnasium_ppo import TASKS, Settings, evaluate, settings_for, train
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
INK, GREY = "#222222", "#8a8a8a"
FIXED = ((0.1, 0.9), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1))
PREFERENCES = ((0.5, 0.5), (0.25, 0.75), (0.75, 0.25))


def study(quick: bool, seeds: int) -> list[Settings]:
    runs: list[dict[str, Any]] = [{"rule": "fixed", "preference": weights} for weights in FIXED]
    runs += [{"rule": "pama", "preference": preference} for preference in PREFERENCES]
    if quick:
        runs = [run | {"steps": 6_000, "eval_episodes": 32} for run in (runs[2], runs[5])]
    return [settings_for(env, seed=seed, **run) for env in FRONTS for seed in range(seeds) for run in runs]


def run(s: Settings) -> dict[str, Any]:
    """One row of the file."""
    torch.set_num_threads(1)
    began = time.process_time()
    agent, history = train(s)
    late = torch.tensor(history)[-max(1, len(history) // 4) :].mean(0).tolist()
    returns = {"mode": evaluate(agent, s), "sampled": evaluate(agent, s, sampled=True)}
    row: dict[str, Any] = {"env": s.env, "method": s.rule}
    row["given"] = " ".join(f"{x:g}" for x in s.preference or ())
    row |= {"seed": s.seed, "steps": s.steps, "gamma": s.gamma}
    for how, values in returns.items():
        row |= {f"{how}_{i + 1}": round(x, 4) for i, x in enumerate(values)}
    row |= {f"weight_{i + 1}": round(w, 4) for i, w in enumerate(late)}
    return row | {"cpu_s": round(time.process_time() - began, 1)}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row["env"], row["method"], row["given"], row["seed"]))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    words = ("env", "method", "given")
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: x if k in words else float(x) for k, x in row.items()} for row in csv.DictReader(file)]


def points(rows: list[dict[str, Any]], how: str = "mode") -> list[list[float]]:
    return [[row[f"{how}_1"], row[f"{how}_2"]] for row in rows]


def groups(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


# --- table ---------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds; distances and areas are in units of the front."""
    lines = []
    for (env,), here in groups(rows, "env").items():
        front = FRONTS[env](here[0]["gamma"])
        names = TASKS[env].objectives
        lines.append(f"\n{env}, {int(here[0]['steps'])} steps, discounted returns, mean of the seeds")
        head = [f"{name:>9}" for name in names] + [" distance", "  sampled", "     area", "  weights"]
        lines.append(" " * 22 + " ".join(head))
        for (method, given), some in groups(here, "method", "given").items():
            cells = [statistics.mean(column) for column in zip(*points(some), strict=True)]
            cells.append(float(distance(front, points(some)).mean()))
            cells.append(float(distance(front, points(some, "sampled")).mean()))
            cells.append(statistics.mean(hypervolume(front, [point]) for point in points(some)))
            late = "/".join(f"{statistics.mean(row[f'weight_{i}'] for row in some):.2f}" for i in (1, 2))
            text = " ".join(f"{x:9.{2 if i < 2 else 3}f}" for i, x in enumerate(cells))
            lines.append(f"{method:<8}{given:<14}{text} {late:>9}")
        for (method,), some in groups(here, "method").items():
            seeds = groups(some, "seed").values()
            area = statistics.mean(hypervolume(front, points(of_seed)) for of_seed in seeds)
            lines.append(
                f"{method}: all {len(some) // len(seeds)} points of a seed together, area {area:.3f}"
            )
    lines.append(
        "\ndistance from the front: of the policy's most likely actions, and of actions sampled from it;"
        "\narea: hypervolume as a share of the front's; weights: mean of the last quarter of the updates"
    )
    return "\n".join(lines)


# --- picture -------------------------------------------------------------------------------------


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.color": GREY,
            "ytick.color": GREY,
            "grid.color": "#e8e8e8",
        }
    )
    by_env = groups(rows, "env")
    figure, axes = plt.subplots(1, len(by_env), figsize=(12, 5.2), layout="constrained", squeeze=False)
    for axis, ((env,), here) in zip(axes[0], by_env.items(), strict=True):
        plane(axis, env, here)
    figure.suptitle(
        "Where runs end: actions sampled from the policy, and (dots) its most likely actions",
        x=0.01,
        ha="left",
        color=INK,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plane(axis: Axes, env: str, rows: list[dict[str, Any]]) -> None:
    """The front, and every run's point: its policy's actions sampled, and as a dot its most likely ones."""
    front = nondominated(FRONTS[env](rows[0]["gamma"]))
    axis.plot(*front.T, color=INK, lw=1.2, marker="o", ms=4, mfc="white", zorder=2, label="known front")
    colours = plt.get_cmap("YlOrBr")
    for (method, given), some in groups(rows, "method", "given").items():
        first = float(given.split()[0])
        drawn, mode = points(some, "sampled"), points(some)
        if method == "fixed":
            style: dict[str, Any] = {"color": colours(0.35 + 0.6 * first), "marker": "s", "s": 42}
        else:
            marker = {0.5: "*", 0.25: "v", 0.75: "^"}[first]
            style = {"color": "#0a6ebd", "marker": marker, "s": 150 if marker == "*" else 60}
        label = ("PAMA, " if method == "pama" else "fixed ") + given.replace(" ", " : ")
        order = 3 + 2 * (method == "pama")
        for pair in zip(drawn, mode, strict=True):
            axis.plot(*zip(*pair, strict=True), color=style["color"], lw=1, zorder=order)
        axis.scatter(*zip(*mode, strict=True), color=style["color"], s=14, zorder=order)
        style |= {"edgecolors": "white", "linewidths": 0.7}
        axis.scatter(*zip(*drawn, strict=True), label=label, zorder=order + 1, **style)
    first, second = TASKS[env].objectives
    axis.grid(True, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set(title=env, xlabel=f"{first} (discounted return)", ylabel=second)


# --- main job ------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--quick", action="store_true", help="two short runs of each environment")
    parser.add_argument("--draw", action="store_true", help="no runs: picture and table from the file")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for mo_gymnasium.csv and mo_gymnasium.png "
        "(default: examples/results and docs/images; with --quick a temporary folder)",
    )
    options = parser.parse_args()
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: expected a positive number, got {getattr(options, name)}")
    return options


def main() -> None:
    options = arguments()
    folder = options.out or (Path(tempfile.gettempdir()) / "pama-mo-gym" if options.quick else None)
    table_path = (folder or ROOT / "examples" / "results") / "mo_gymnasium.csv"
    picture_path = (folder or ROOT / "docs" / "images") / "mo_gymnasium.png"
    began = time.perf_counter()
    torch.set_num_threads(1)  # all of it is small
    if not options.draw:
        runs = study(options.quick, 1 if options.quick else options.seeds)
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            pending = as_completed([pool.submit(run, s) for s in runs])
            finished = tqdm(pending, total=len(runs), unit="run", desc="train")
            write(table_path, [done.result() for done in finished])
    elif not table_path.is_file():
        sys.exit(f"--draw: expected {table_path}, which is not there; a run without --draw writes it")
    rows = read(table_path)
    draw(picture_path, rows)
    print(table(rows))
    cpu = sum(row["cpu_s"] for row in rows)
    print(f"\npicture: {picture_path}; figures: {table_path}")
    print(f"{len(rows)} runs, {cpu:.0f} s of processor time, {time.perf_counter() - began:.0f} s now")


if __name__ == "__main__":
    main()
