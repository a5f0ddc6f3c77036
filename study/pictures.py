"""The study's pictures, drawn from the logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke

from . import language
from .measures import front_of_two, mean_interval
from .problems import build
from .rules import BY_NAME, GRIDS

if TYPE_CHECKING:
    from .report import Language, Sweep, Theory

INK, GREY = "#222222", "#8a8a8a"
# The same colour for a rule in every picture.
SHOWN: dict[str, tuple[str, str]] = {  # rule: (colour, marker)
    "cosines-r0": ("#7fb8e6", "v"),
    "cosines-r0.1": ("#0a6ebd", "o"),
    "scores-r0.1": ("#9ac46b", "X"),
    "upgrad": ("#4b3fa7", "D"),
    "softmin": ("#17877c", "P"),
    "paper-batch": ("#f2bd6b", "p"),
    "paper-token": ("#3c8d5a", "s"),
    "mgda": ("#c2456b", "^"),
    "mgda-ub": ("#e59ab1", "<"),
    "fixed": ("#e07b00", "*"),
}


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
            "xtick.color": GREY,
            "ytick.color": GREY,
            "grid.color": "#e8e8e8",
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def draw(sweep: Sweep, theorems: Theory, lm: Language, folder: Path) -> None:
    style()
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("objectives", objectives), ("fronts", fronts)):
        _save(picture(sweep), folder / f"study-{name}.png")
    _save(convergence(theorems), folder / "study-theorems.png")
    _save(planes(lm), folder / "study-language.png")
    _save(weights(lm), folder / "study-weights.png")


def _save(figure: Any, path: Path) -> None:
    if figure is not None:
        figure.savefig(path, dpi=120)
        plt.close(figure)
        print(f"wrote {path}")


def objectives(sweep: Sweep) -> Any:
    """What is left of the way to the front, and the gain of the objective served worst, over N."""
    numbers = (2, 3, 4, 8, 16)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for rule, (colour, marker) in SHOWN.items():
        found = [(n, sweep.finals.get((f"bandit-{n}", rule))) for n in numbers]
        found = [(n, f) for n, f in found if f]
        if not found:
            continue
        for axis, measure in zip(axes, ("distance", "worst_gain"), strict=True):
            pairs = [mean_interval(getattr(f, measure)) for _, f in found]
            means, halves = (np.array(x) for x in zip(*pairs, strict=True))
            x = [n for n, _ in found]
            axis.fill_between(x, means - halves, means + halves, color=colour, alpha=0.12, lw=0)
            axis.plot(x, means, color=colour, marker=marker, ms=6, lw=1.8, label=BY_NAME[rule].label)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, [str(n) for n in numbers])
        axis.set_xlabel("objectives N")
    axes[0].set(title="Left of the way to the Pareto front (0 is on it)", ylabel="%")
    axes[0].set_yscale("symlog", linthresh=1, linscale=0.5)
    axes[0].set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    axes[0].set_ylim(-0.2, 110)
    axes[1].set(title="Gain of the objective served worst", ylabel="reward")
    axes[1].axhline(0, color=INK, lw=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def fronts(sweep: Sweep) -> Any:
    """The exact front of the word problem, and what each rule reaches with one or seven preferences."""
    names = [(name, f"{BY_NAME[name].label.partition(',')[0]}, seven preferences") for name in GRIDS]
    figure, axes = plt.subplots(1, 4, figsize=(16, 5), layout="constrained", sharex=True, sharey=True)
    corners = front_of_two(build("words-2", 1).vertices(0))
    for axis in axes:
        axis.plot(*corners.T, color=INK, lw=1.4, marker="o", ms=3, zorder=1)
        axis.set(xlabel="information", xlim=(-0.03, 1.06), ylim=(0, 1.06))
    axes[0].set(title="Every rule, no preference", ylabel="conciseness")
    for rule, (colour, marker) in SHOWN.items():
        found = sweep.finals.get(("words-2", rule))
        if found:
            axes[0].scatter(
                *found.rewards.T,
                color=colour,
                marker=marker,
                s=26,
                alpha=0.75,
                label=BY_NAME[rule].label,
                zorder=2,
            )
            start = found.start.mean(0)
    if axes[0].collections:
        axes[0].plot(*start, "o", ms=8, mfc="white", mec=INK, mew=1.5, zorder=3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=11, columnspacing=1)
    for axis, (base, title) in zip(axes[1:], names, strict=True):
        axis.set_title(title)
        colour = SHOWN[base][0]
        for rule in (base, *(r.name for r in GRIDS[base])):
            found = sweep.finals.get(("words-2", rule))
            if found:
                axis.scatter(*found.rewards.T, color=colour, s=16, alpha=0.35, lw=0)
                mean = found.rewards.mean(0)
                share = rule.rpartition("-p")[2] if "-p" in rule else "0.5"
                axis.plot(*mean, "o", color=colour, ms=8, mec="white")
                # The labels of neighbours on either side of the front.
                left = share in ("0.2", "0.65")
                axis.annotate(
                    share,
                    mean,
                    xytext=(-7, -10) if left else (7, 3),
                    ha="right" if left else "left",
                    textcoords="offset points",
                    fontsize=8,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )
    return figure


THEORY_COLOURS = {
    "scores-r0": ("scores, 0", "#7fb8e6"),
    "scores-r0.1": ("scores, 0.1", "#0a6ebd"),
    "cosines-r0": ("cosines, 0", "#4b3fa7"),
    "token-r0": ("per token, 0", "#3c8d5a"),
    "mgda": ("MGDA", "#c2456b"),
    "fixed": ("fixed, equal", "#e07b00"),
}


def convergence(theorems: Theory) -> Any:
    """Theorem 2: the combined gradient over steps; and the true min-norm at the same policies."""
    problems = {
        "two-arms": "Two arms",
        "three-arms": "Three arms",
        "bandit-2": "Random arms, N = 2",
        "bandit-3": "N = 3",
    }
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), layout="constrained", sharex=True)
    for column, (problem, title) in enumerate(problems.items()):
        for i, (rule, (name, colour)) in enumerate(THEORY_COLOURS.items()):
            rows = theorems.rows(problem, rule)
            if not rows:
                continue
            steps = sorted({row["step"] for row in rows if row["step"] > 0})
            for axis, key in zip(axes[:, column], ("combined_norm", "true_min_norm"), strict=True):
                means = [np.mean([r[key] for r in rows if r["step"] == step]) for step in steps]
                axis.plot(steps, np.maximum(means, 1e-6), color=colour, lw=5.5 - 0.9 * i, label=name)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("steps of gradient ascent")
    axes[0, 0].set_ylabel("combined gradient")
    axes[1, 0].set_ylabel("least true gradient")
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log", ylim=(5e-7, 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


PLANES = (
    ("sentiment-length", 1, 0),
    ("information-conciseness", 1, 0),
    ("three", 1, 0),
    ("three", 1, 2),
)


def planes(lm: Language) -> Any:
    """Means and 95% intervals of the final rewards on held-out prompts; fixed weights as a line."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 5.2), layout="constrained")
    for axis, (experiment, x, y) in zip(axes, PLANES, strict=True):
        names = list(language.EXPERIMENTS[experiment])
        axis.set(xlabel=names[x], ylabel=names[y], title=experiment.replace("three", "three rewards"))
        start = lm.finals(experiment, "start")
        if not start:
            continue
        grid = [r for r in language.rules(len(names)) if r.name.startswith("fixed")]
        ends = []
        for rule in grid:
            rows = lm.finals(experiment, rule.name)
            if rows:
                ends.append([mean_interval([row[f"reward_{i}"] for row in rows])[0] for i in (x, y)])
                if rule.preference:
                    axis.plot(*ends[-1], marker="*", color=SHOWN["fixed"][0], ms=7, alpha=0.6, zorder=2)
        if len(names) == 2:
            axis.plot(*np.array(sorted(ends)).T, color=SHOWN["fixed"][0], lw=1.2, ls="--", zorder=1)
        for rule_name, (colour, marker) in SHOWN.items():
            rows = lm.finals(experiment, rule_name)
            if rows:
                (mx, hx), (my, hy) = (mean_interval([row[f"reward_{i}"] for row in rows]) for i in (x, y))
                axis.errorbar(
                    mx, my, np.nan_to_num(hy), np.nan_to_num(hx), color=colour, lw=1, fmt="none", alpha=0.6
                )
                size = 15 if marker == "*" else 8
                look = {"marker": marker, "color": colour, "ms": size, "mec": "white", "ls": "none"}
                axis.plot(mx, my, label=BY_NAME[rule_name].label, zorder=3, **look)
        middle = [np.mean([row[f"reward_{i}"] for row in start]) for i in (x, y)]
        axis.plot(*middle, "o", ms=9, mfc="white", mec=INK, mew=1.6, zorder=4, label="start")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def weights(lm: Language) -> Any:
    """The first objective's weight over steps: means over seeds, and every seed thinly."""
    rules = ("cosines-r0.1", "upgrad", "paper-batch", "paper-token", "mgda")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", sharey=True)
    for axis, experiment in zip(axes, language.EXPERIMENTS, strict=True):
        names = list(language.EXPERIMENTS[experiment])
        for rule in rules:
            name, colour = BY_NAME[rule].label, SHOWN[rule][0]
            curves = _curves(lm.curve(experiment, rule))
            for steps, values in curves:
                axis.plot(steps, values, color=colour, lw=0.6, alpha=0.4)
            if curves:
                mean = np.mean([values for _, values in curves], axis=0)
                axis.plot(curves[0][0], mean, color=colour, lw=2.4, label=name)
        axis.axhline(1 / len(names), color=SHOWN["fixed"][0], lw=1.4, ls="--", label="fixed, equal")
        axis.set(title=f"{experiment}: weight of {names[0]}", xlabel="policy step", ylim=(0, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _curves(runs: Sequence[Any]) -> list[tuple[list[float], list[float]]]:
    found = []
    for rows in runs:
        logged = [row for row in rows if row["kind"] == "log" and row["step"] > 0]
        found.append(([row["step"] for row in logged], [row["weight_0"] for row in logged]))
    return found
