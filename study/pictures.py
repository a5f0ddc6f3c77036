"""The study's two pictures: balance against the learning rate, and gains against KL."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .figures import Figures
from .measures import interval
from .store import Row
from .tables import label

INK, GREY = "#222222", "#8a8a8a"
SHOWN: dict[str, tuple[str, str]] = {  # rule: (colour, marker); the same in both pictures
    "fixed": ("#e07b00", "*"),
    "fixed-raw": ("#6f6f6f", "X"),
    "cosines-r0.1": ("#0a6ebd", "o"),
    "upgrad": ("#4b3fa7", "D"),
    "paper-token": ("#3c8d5a", "s"),
    "paper-batch": ("#c9a227", "p"),
    "mgda": ("#c2456b", "^"),
}
CURVES = (
    "bandit-3",
    "bandit-8",
    "words-2",
    "words-3",
    "grpo-conflict",
    "grpo-solved",
    "grpo-rare",
    "grpo-redundant",
)
PLANES = ("bandit-8", "words-3", "grpo-rare", "grpo-redundant")


def style() -> None:
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
            "axes.grid": True,
            "axes.axisbelow": True,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": "#e8e8e8",
            "legend.frameon": False,
            "legend.fontsize": 10,
        }
    )


def draw(f: Figures, folder: Path) -> None:
    style()
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("rates", rates(f)), ("kl", against_kl(f))):
        path = folder / f"study-{name}.png"
        picture.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(picture)
        print(f"wrote {path}")


def look(rule: str) -> dict[str, Any]:
    """Fixed is wide and pale, so that it is visible under rules that equal it."""
    colour, marker = SHOWN[rule]
    wide = {"lw": 4.5, "ms": 13, "alpha": 0.6} if rule == "fixed" else {"lw": 1.6, "ms": 6, "alpha": 0.95}
    return {"color": colour, "marker": marker, "label": label(rule), "mec": "white", "mew": 0.6} | wide


def rates(f: Figures) -> Any:
    """Final balance over the learning rate: means over seeds and their 95% intervals."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for axis, problem in zip(axes.flat, CURVES, strict=True):
        for rule, (colour, _) in SHOWN.items():
            points = []
            for rate in f.rates(problem):
                values = [row["balance"] for row in f.finals(problem, rule) if row["rate"] == rate]
                if values:
                    points.append((rate, *interval(values)))
            if points:
                x, mean, half = np.array(points).T
                axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.09, lw=0)
                axis.plot(x, mean, **look(rule))
        axis.set(title=problem, xscale="log")
    for axis in axes[:, 0]:
        axis.set_ylabel("final balance")
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def against_kl(f: Figures) -> Any:
    """The gain of the reward that gains least, against KL: for simulated problems a point per learning rate,
    for a language model a point per logged step."""
    models = f.problems("pretrained")[:2]
    columns = len(PLANES) + len(models)
    figure, axes = plt.subplots(1, columns, figsize=(3.9 * columns, 4.4), layout="constrained", squeeze=False)
    for axis, problem in zip(axes[0], (*PLANES, *models), strict=True):
        for rule in SHOWN:
            points = _by_step(f, problem, rule) if problem in models else _by_rate(f, problem, rule)
            if points:
                axis.plot(*np.array(points).T, **look(rule))
        axis.axhline(0, color=INK, lw=1)
        axis.set(title=problem, xlabel="KL to the initial policy, nats")
    axes[0, 0].set_ylabel("gain of the reward that gains least")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    return figure


def _by_rate(f: Figures, problem: str, rule: str) -> list[tuple[float, float]]:
    return _means(f.finals(problem, rule), "rate")


def _by_step(f: Figures, problem: str, rule: str) -> list[tuple[float, float]]:
    return _means([row for row in f.curves[problem] if row["rule"] == rule], "step")


def _means(rows: list[Row], by: str) -> list[tuple[float, float]]:
    """(mean KL, mean worst gain) for each value of `by`."""
    found: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[by]].append(row)
    return [
        (float(np.mean([r["kl"] for r in some])), float(np.mean([r["worst_gain"] for r in some])))
        for _, some in sorted(found.items())
    ]
