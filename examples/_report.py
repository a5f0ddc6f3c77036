"""The demo's table, files and picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor

INK, GREY = "#222222", "#8a8a8a"
METHOD_COLOURS = {"PAMA": "#0a6ebd", "MORLHF": "#e07b00"}
OBJECTIVE_COLOURS = ("#c2456b", "#3c8d5a", "#6a5acd")


def mean_and_error(scores: Tensor) -> list[list[float]]:
    """Mean and its standard error of every objective, from (B, N)."""
    errors = scores.std(0) / len(scores) ** 0.5
    return [[round(x, 4) for x in pair] for pair in torch.stack([scores.mean(0), errors], 1).tolist()]


def reward_table(objectives: tuple[str, ...], columns: dict[str, dict[str, Any]]) -> str:
    """One row per objective and one for the KL; one column for the start and each method."""
    lines = ["held-out mean ".ljust(16) + "".join(name.rjust(18) for name in columns)]
    for i, objective in enumerate(objectives):
        cells = ("{:.3f} ± {:.3f}".format(*column["rewards"][i]) for column in columns.values())
        lines.append(objective.ljust(16) + "".join(cell.rjust(18) for cell in cells))
    cells = (f"{column['kl']:.3f}" for column in columns.values())
    lines.append("KL per token".ljust(16) + "".join(cell.rjust(18) for cell in cells))
    return "\n".join(lines)


def write_files(folder: Path, result: dict[str, Any], curves: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / "demo.json").write_text(text + "\n", encoding="utf-8")
    with open(folder / "demo.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(curves[0]), lineterminator="\n")
        writer.writeheader()
        for row in curves:
            writer.writerow({k: round(x, 5) if isinstance(x, float) else x for k, x in row.items()})


def draw(path: Path, objectives: tuple[str, ...], curves: list[dict[str, Any]], title: str) -> None:
    """Reward curves, the plane of two rewards with both paths, and PAMA's weights over time."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.color": GREY,
            "ytick.color": GREY,
            "grid.color": "#e8e8e8",
        }
    )
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    for axis in axes.flat:
        axis.grid(True, linewidth=0.8)
        axis.set_axisbelow(True)
    for axis, objective in zip(axes[0], objectives, strict=True):
        _reward_curve(axis, objective, curves)
    axes[0, 0].legend(frameon=False, loc="upper left")
    _plane(axes[1, 0], objectives[1], objectives[0], curves)
    _plane(axes[1, 1], objectives[1], objectives[2], curves)
    _weights(axes[1, 2], objectives, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _held_out(curves: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [
        row for row in curves if row["method"] == method and any(key.startswith("held_out") for key in row)
    ]


def _reward_curve(axis: Axes, objective: str, curves: list[dict[str, Any]]) -> None:
    for method, colour in METHOD_COLOURS.items():
        rows = _held_out(curves, method)
        steps = [row["step"] for row in rows]
        axis.plot(steps, [row[f"held_out_{objective}"] for row in rows], color=colour, lw=2.2)
        axis.plot([], [], color=colour, lw=2.2, label=method)
    axis.set(title=f"{objective}, held-out prompts", xlabel="policy step")


def _plane(axis: Axes, x: str, y: str, curves: list[dict[str, Any]]) -> None:
    label: dict[str, Any] = {
        "textcoords": "offset points",
        "path_effects": [withStroke(linewidth=3, foreground="white")],
        "zorder": 4,
    }
    left = {"xytext": (-9, -4), "ha": "right"}
    right = {"xytext": (9, -4), "ha": "left"}
    for (method, colour), place in zip(METHOD_COLOURS.items(), (left, right), strict=True):
        rows = _held_out(curves, method)
        xs = [row[f"held_out_{x}"] for row in rows]
        ys = [row[f"held_out_{y}"] for row in rows]
        axis.plot(xs, ys, color=colour, lw=1.6, marker="o", ms=3.5)
        axis.plot(xs[-1:], ys[-1:], color=colour, marker="o", ms=10)
        axis.annotate(method, (xs[-1], ys[-1]), color=colour, **place, **label)
        start = (xs[0], ys[0])
    axis.plot(*start, "o", ms=9, mfc="white", mec=INK, mew=1.6, zorder=3)
    axis.annotate("start", start, color=INK, **left, **label)
    axis.margins(x=0.36, y=0.14)
    axis.set(title=f"{y} against {x}", xlabel=x, ylabel=y)


def _weights(axis: Axes, objectives: tuple[str, ...], curves: list[dict[str, Any]]) -> None:
    rows = [row for row in curves if row["method"] == "PAMA" and "kl" in row]
    steps = [row["step"] for row in rows]
    for objective, colour in zip(objectives, OBJECTIVE_COLOURS, strict=True):
        weights = [row[f"weight_{objective}"] for row in rows]
        axis.plot(steps, weights, color=colour, lw=1.6, label=objective)
    axis.axhline(1 / len(objectives), color=METHOD_COLOURS["MORLHF"], lw=1.2, ls="--")
    axis.legend(frameon=False, ncols=3, loc="upper center", fontsize=9, columnspacing=1.0)
    axis.set(title="PAMA's weights (dashed: MORLHF's)", xlabel="policy step", ylim=(0, 1))
