"""One picture of a training: each reward with its weight and covariance, and the conflict of each pair."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import BLUE, GREY, INK, PALE, RED, STYLE, diverging, matplotlib, save
from .report import percent, short_name, two_digits
from .runs import Run, Series, read_run

SMOOTH_FROM = 40  # points; from there on a moving mean is drawn over the raw line
PAIRS = 12  # rows of the conflict matrix over training, at most: those that disagree most
BINS = 60  # columns of the conflict matrix over training, at most
TITLES = {"reward": "Reward", "weight": "Weight", "covariance": "Covariance with the update"}
NOTES = {
    "reward": "mean of each rollout",
    "weight": "share in the update",
    "covariance": "below 0, red: falls to first order",
}


def draw_run(run: Run, path: Path) -> None:
    package = matplotlib()
    names, pairs = run.names, min(PAIRS, sum(map(_varies, run.conflict.values())))
    kinds = [kind for kind in TITLES if getattr(run, kind)]
    heights = [1.05 if len(names) < 5 else 0.8] * len(names) + ([0.75, 0.3 * pairs + 0.1] if pairs else [])
    with package.rc_context(STYLE):
        height = sum(heights) + 1.3
        figure = package.figure.Figure(figsize=(1.6 + 3.1 * len(kinds), height))
        grid = figure.add_gridspec(
            *(len(heights), len(kinds)),
            height_ratios=heights,
            hspace=0.3,
            wspace=0.4,
            top=1 - 1 / height,
            bottom=0.3 / height,
        )
        highest = max((v for points in run.weight.values() for _, v in points if v > 0), default=1.0)
        first: Any = None
        for column, kind in enumerate(kinds):
            shared: Any = None
            for row, name in enumerate(names):
                own = kind == "reward"
                axes = figure.add_subplot(grid[row, column], sharex=first, sharey=None if own else shared)
                first, shared = first or axes, shared or axes
                _panel(axes, kind, getattr(run, kind).get(name, []))
                if kind == "weight":
                    axes.set_ylim(0, 1.08 * highest)
                if row == 0:
                    axes.set_title(TITLES[kind], pad=24)
                    _note(axes, NOTES[kind])
                if row < len(names) - 1:
                    axes.tick_params(labelbottom=False)
                elif not pairs:
                    axes.set_xlabel(run.unit, color=GREY)
                if column == 0:
                    _name(axes, name, run.signal.get(name, []))
        if pairs:
            _conflicts(figure.add_subplot(grid[len(names) + 1, :]), run)
        figure.suptitle(run.source, x=0.125, y=1 - 0.1 / height, ha="left", fontsize=14)
        save(figure, path)


def _note(axes: Any, text: str) -> None:
    """Writes a note between the title and the panel."""
    axes.annotate(
        *(text, (0, 1)),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        color=GREY,
        fontsize=10,
    )


def _name(axes: Any, name: str, signal: Series) -> None:
    """Writes the name to the left of its row, with the state of its signal."""
    known = [value for _, value in signal if not math.isnan(value)]
    axes.text(-0.32, 0.62, short_name(name), transform=axes.transAxes, ha="right", weight="bold")
    notes = [
        f"{word} in {percent(share)}"
        for word, low, high in (("saturated", 0.5, 1.5), ("absent", -0.5, 0.5))
        if known and (share := sum(low < value < high for value in known) / len(known)) >= 0.05
    ]
    axes.text(
        *(-0.32, 0.5, "\n".join(notes)),
        transform=axes.transAxes,
        ha="right",
        va="top",
        color=GREY,
        fontsize=9,
    )


def _panel(axes: Any, kind: str, points: Series) -> None:
    axes.locator_params(axis="y", nbins=3)
    axes.locator_params(axis="x", nbins=4)
    x = np.array([step for step, _ in points])
    y = np.array([value for _, value in points])
    known = ~np.isnan(y)
    if not known.any():
        axes.text(0.5, 0.5, "no value", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.tick_params(labelleft=False, left=False)
        return
    many = known.sum() >= SMOOTH_FROM
    if kind == "covariance":
        axes.axhline(0, color=GREY, linewidth=0.8)
        layers = [(x, y, 0.85)]
        if many:
            layers = [(x, y, 0.3), (x[known], _moving_mean(y[known]), 0.95)]
        for steps, values, alpha in layers:
            for color, side in ((BLUE, np.fmax(values, 0)), (RED, np.fmin(values, 0))):
                axes.fill_between(steps, 0, side, color=color, alpha=alpha, linewidth=0)
        below = float((y[known] < -0.005).mean())
        if below:
            axes.text(
                *(0.99, 0.98, f"below 0 in {percent(below)}"),
                transform=axes.transAxes,
                ha="right",
                va="top",
                color=RED,
                fontsize=9,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
            )
        return
    single = "o" if known.sum() == 1 else None
    axes.plot(
        x[known],
        y[known],
        color=GREY if many else INK,
        alpha=0.45 if many else 1,
        linewidth=1.3,
        marker=single,
    )
    last = y[known][-1]
    if many:
        smooth = _moving_mean(y[known])
        axes.plot(x[known], smooth, color=INK, linewidth=1.8)
        last = smooth[-1]
    axes.annotate(
        f"{last:.3g}" if kind == "reward" else two_digits(float(last)),
        (x[known][-1], last),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        annotation_clip=False,
    )
    if kind == "weight":
        axes.fill_between(x, 0, y, color=PALE, linewidth=0, zorder=0)


def _moving_mean(values: Any) -> Any:
    """Centred moving mean over a twentieth of the points, over fewer at the ends."""
    half = max(2, len(values) // 40)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _conflicts(axes: Any, run: Run) -> None:
    """Draws the conflict of the pairs over training: one row per pair, from the first step to the last."""
    steps = sorted({step for points in run.conflict.values() for step, _ in points})
    bins = min(BINS, len(steps))
    edges = np.linspace(0, len(steps), bins + 1).astype(int)
    index = {step: i for i, step in enumerate(steps)}
    varying = [(pair, points) for pair, points in run.conflict.items() if _varies(points)]
    shown = dict(sorted(varying, key=lambda item: _mean(np.array(item[1])[:, 1]))[:PAIRS])
    image = np.full((len(shown), bins), math.nan)
    means = []
    for row, points in enumerate(shown.values()):
        values = np.full(len(steps), math.nan)
        for step, value in points:
            values[index[step]] = value
        means.append(_mean(values))
        image[row] = [_mean(values[low:high]) for low, high in pairwise(edges)]
    boundaries = [steps[low] for low in edges[:-1]] + [
        steps[-1] + (steps[-1] - steps[0]) / max(1, len(steps) - 1)
    ]
    if boundaries[-1] == boundaries[-2]:
        boundaries[-1] += 1
    axes.pcolormesh(boundaries, np.arange(len(image) + 1), image, cmap=diverging(), vmin=-1, vmax=1)
    axes.invert_yaxis()
    labels = ["worst pair" if pair == "worst" else pair.replace("~", " ~ ") for pair in shown]
    axes.set_yticks(np.arange(len(image)) + 0.5, labels, color=INK)
    axes.tick_params(axis="y", length=0)
    for row, mean in enumerate(means):
        axes.text(
            *(1.01, row + 0.5, two_digits(mean)),
            transform=axes.get_yaxis_transform(),
            va="center",
            color=RED if mean < -0.005 else INK,
        )
    axes.set_title("Conflict of each pair", pad=24)
    few = f"; {len(shown)} of {len(varying)} pairs" if len(shown) < len(varying) else ""
    _note(axes, f"correlation of their advantages, red: they disagree; at the end, the mean{few}")
    axes.set_xlabel(run.unit, color=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _varies(points: Series) -> bool:
    """Whether both rewards varied in the same rollout at least once."""
    return not all(math.isnan(value) for _, value in points)


def _mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def watch(source: Path, path: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Draws again whenever the run has grown, until interrupted; waits where nothing is logged yet."""
    drawn: Run | None = None
    while True:
        try:
            run = read_run(source)
        except (FileNotFoundError, ValueError) as error:  # nothing yet, or half written
            say(f"waiting: {error}")
        else:
            if run != drawn:
                draw_run(run, path)
                say(f"wrote {path}")
                drawn = run
        time.sleep(seconds)
