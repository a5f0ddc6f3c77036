"""Functions shared by the pictures, and the picture of an `Inspection`. Needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .inspect import Inspection
from .report import short_name, two_digits

INK, GREY, PALE = "#222222", "#7a7a7a", "#f1f1f1"
BLUE, RED, DARK_RED = "#2b6cb0", "#c53030", "#8a1515"
FORMATS = (".png", ".svg", ".pdf")
STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}


def matplotlib() -> Any:
    try:
        import matplotlib as package
        import matplotlib.figure
    except ImportError:
        raise ImportError(
            "a picture needs matplotlib: pip install 'pama-kernels[plot]' (or matplotlib by itself)"
        ) from None
    return package


def check_picture(path: Path) -> None:
    """Checks that the picture can be written, before anything is computed."""
    matplotlib()
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"picture: expected a name that ends in {', '.join(FORMATS)}, got {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"picture: expected a folder that exists, found no {path.parent}")


def save(figure: Any, path: Path) -> None:
    """Replaces `path` atomically, so that a viewer never reads an incomplete picture."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:].lower(), dpi=140, bbox_inches="tight", facecolor="white")
    os.replace(partial, path)


def diverging() -> Any:
    """Red below 0, blue above, nearly white between; grey where the value is undefined."""
    return _colors(RED, "#fbfbfb", BLUE)


def _colors(*names: str) -> Any:
    return matplotlib().colors.LinearSegmentedColormap.from_list("pama", names).with_extremes(bad=PALE)


def _grid(axes: Any, values: Tensor, columns: Sequence[str], colors: Any, low: float, high: float) -> None:
    """A number in every cell, on its colour."""
    shown = values.numpy()
    axes.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(shown.tolist()):
        for j, value in enumerate(row):
            text = two_digits(value)
            color = GREY if math.isnan(value) else DARK_RED if text.startswith("-") else INK
            color = "white" if abs(value) > 0.6 * high else color
            axes.text(j, i, text, ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns)), columns, color=INK)
    axes.set_yticks([])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([j - 0.5 for j in range(1, len(columns))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(shown))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)


def draw_inspection(found: Inspection, path: Path) -> None:
    """Three grids over the same rewards: their correlations, their weights, and their covariances with the
    update."""
    package = matplotlib()
    import torch

    n = len(found.names)
    effects = found.effects
    weights = {rule: e.mean_weights for rule, e in effects.items() if e.mean_weights is not None}
    covariance = torch.stack([effect.mean_covariance for effect in effects.values()], 1)
    own = torch.eye(n, dtype=torch.bool)
    with package.rc_context(STYLE):
        figure = package.figure.Figure(figsize=(2.2 + 0.62 * (n + 11), 1.1 + 0.46 * n), layout="constrained")
        ratios = [n, len(weights) + 0.6, len(effects) + 0.6]
        first, second, third = figure.subplots(1, 3, width_ratios=ratios)
        figure.get_layout_engine().set(w_pad=0.1)
        numbers = [f"({i + 1})" for i in range(n)]
        _grid(first, found.correlation.masked_fill(own, math.nan), numbers, diverging(), -1, 1)
        for i, text in enumerate(first.texts):
            text.set_visible(i % (n + 1) > 0)  # the diagonal is empty
        first.set_yticks(range(n), [f"{short_name(name)} ({i + 1})" for i, name in enumerate(found.names)])
        first.tick_params(axis="y", labelcolor=INK, labelsize=11)
        _grid(
            second, torch.stack(list(weights.values()), 1), list(weights), _colors("#fbfbfb", "#8a8a8a"), 0, 1
        )
        _grid(third, covariance, list(effects), diverging(), -1, 1)
        titles = ("Do they agree?", "Weight", "Covariance with the update")
        notes = ("correlation within groups", "of each rule", "below 0, red: falls to first order")
        for axes, title, note in zip((first, second, third), titles, notes, strict=True):
            axes.set_title(title, pad=10)
            axes.text(0, -0.03, note, transform=axes.transAxes, color=GREY, va="top", fontsize=10)
        save(figure, path)
