"""The table and the picture of `mo_gymnasium_compare.py`, from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from _control import Task
from _fronts import distance, front, mean_and_interval, scaled
from _style import INK, STYLE
from matplotlib.axes import Axes

FOUND = {"pama": "#0a6ebd", "upgrad": "#c2456b"}
EQUAL, UNTRAINED = "fixed", "untrained"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """One task: returns by method and seed, and the scale on which objectives are compared."""

    env: str
    objectives: tuple[str, ...]
    known: np.ndarray | None  # the front (P, N)
    low: np.ndarray
    high: np.ndarray
    rows: dict[str, dict[int, dict[str, Any]]]  # by method, then seed

    def returns(self, method: str) -> np.ndarray:
        """(seeds, N)."""
        n = len(self.objectives)
        some = self.rows[method]
        return np.array([[some[seed][f"return_{i + 1}"] for i in range(n)] for seed in sorted(some)])

    def balance(self, method: str) -> np.ndarray:
        """(seeds,): the worst objective's return on the scale."""
        return scaled(self.returns(method), self.low, self.high).min(1)

    def gain(self, method: str, over: str) -> tuple[float, float]:
        """In balance, paired over seeds: mean and half its 95% interval."""
        both = sorted(self.rows[method].keys() & self.rows[over].keys())
        pairs = [dict(zip(sorted(self.rows[m]), self.balance(m), strict=True)) for m in (method, over)]
        return mean_and_interval([pairs[0][seed] - pairs[1][seed] for seed in both])

    @property
    def by_hand(self) -> list[str]:
        return [method for method in self.rows if method not in (*FOUND, UNTRAINED)]


def results(rows: Rows, tasks: Mapping[str, Task]) -> list[Result]:
    found = []
    for env, task in tasks.items():
        grouped: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if row["env"] == env:
                grouped.setdefault(row["method"], {})[int(row["seed"])] = row
        if not grouped:
            continue
        grouped = {method: grouped[method] for method in sorted(grouped, key=place)}
        known = front(env, task.gamma_of_returns)
        made = Result(env, task.objectives, known, np.zeros(0), np.ones(0), grouped)
        ends = known if known is not None else np.stack([made.returns(method).mean(0) for method in grouped])
        low, high = ends.min(0) if task.worst is None else np.array(task.worst), ends.max(0)
        found.append(Result(env, task.objectives, known, low, np.where(high > low, high, low + 1), grouped))
    return found


def place(method: str) -> tuple[int, str]:
    """The order in tables: hand-tuned, equal, then rules."""
    kinds = (UNTRAINED, "reward", "fixed ", EQUAL, *FOUND)
    return next(i for i, kind in enumerate(kinds) if method.startswith(kind)), method


def label(method: str) -> str:
    if method == EQUAL:
        return "fixed, equal"
    return (
        method.replace("fixed ", "fixed, ")
        .replace(" 0.", " .")
        .replace("reward 1:0:0.001", "Gymnasium's reward")
    )


# --- table ---------------------------------------------------------------------------------------


def table(rows: Rows, tasks: Mapping[str, Task]) -> str:
    lines = []
    for result in results(rows, tasks):
        seeds, task = max(len(some) for some in result.rows.values()), tasks[result.env]
        kind = f"discounted by {task.gamma_of_returns}" if result.known is not None else "not discounted"
        lines.append(f"\n{result.env}, {task.steps} steps, {seeds} seeds, mean returns ({kind})")
        head = "".join(f"{name:>10}" for name in result.objectives)
        lines.append(f"{'':<22}{head}{'front':>8}{'balance':>16}{'over equal':>16}  weights")
        for method, some in result.rows.items():
            returns = result.returns(method)
            cells = "".join(f"{x:10.2f}" for x in returns.mean(0))
            far = (
                ""
                if result.known is None
                else f"{distance(returns, result.known, result.low, result.high).mean():.2f}"
            )
            balance = "{:.2f} ± {:.2f}".format(*mean_and_interval(result.balance(method).tolist()))
            over = method in (EQUAL, UNTRAINED) or EQUAL not in result.rows
            gain = "" if over else "{:+.2f} ± {:.2f}".format(*result.gain(method, EQUAL))
            late = [[row[key] for row in some.values()] for key in row_keys(some)]
            weights = "/".join(f"{np.mean(column):.2f}" for column in late)
            lines.append(f"{label(method):<22}{cells}{far:>8}{balance:>16}{gain:>16}  {weights}")
        lines += hindsight(result)
    lines.append(
        "\nbalance: the worst objective's return, scaled: 1 is the best of the known front, 0 its worst"
        "\n  (safety: certain death); robot: the highest and the lowest mean of the methods"
        "\nfront: distance to its nearest point on this scale; ±: half a 95% interval over seeds"
        "\nover equal: difference in balance, paired by seed"
        "\nweights: mean of the last quarter of the updates"
    )
    return "\n".join(lines)


def row_keys(some: dict[int, dict[str, Any]]) -> list[str]:
    return [key for key in next(iter(some.values())) if key.startswith("weight_")]


def hindsight(result: Result) -> list[str]:
    """Weights from rules against the best hand-tuned weights, chosen after the runs."""
    best = max(result.by_hand, key=lambda method: float(result.balance(method).mean()))
    gains = [
        "{} {:+.2f} ± {:.2f}".format(method, *result.gain(method, best))
        for method in FOUND
        if method in result.rows
    ]
    return [f"over the best hand-tuned weights, in hindsight ({label(best)}): {', '.join(gains)}"]


# --- picture -------------------------------------------------------------------------------------


def draw(path: Path, rows: Rows, tasks: Mapping[str, Task]) -> None:
    plt.rcParams.update({**STYLE, "ytick.color": INK})
    found = results(rows, tasks)
    figure, axes = plt.subplots(
        2, len(found), figsize=(4.6 * len(found), 8.4), layout="constrained", squeeze=False
    )
    for (upper, lower), result in zip(axes.T, found, strict=True):
        profile(upper, result)
        balances(lower, result)
    figure.suptitle(
        "Hand-tuned weights and weights from rules: each objective's return (grey: the known front), and "
        "below, in the same colours, that of the worst objective",
        x=0.01,
        ha="left",
        color=INK,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def style(result: Result, method: str) -> dict[str, Any]:
    if method in FOUND:
        return {"color": FOUND[method], "lw": 2.6, "zorder": 4}
    if method == UNTRAINED:
        return {"color": "#bbbbbb", "lw": 1.2, "ls": ":", "zorder": 1}
    place = result.by_hand.index(method) / max(1, len(result.by_hand) - 1)
    return {"color": plt.get_cmap("YlOrBr")(0.35 + 0.55 * place), "lw": 1.5, "zorder": 3}


def profile(axis: Axes, result: Result) -> None:
    """A line for each method through its mean return in each objective; the known front behind, in grey."""
    places = range(len(result.objectives))
    if result.known is not None:
        for point in scaled(result.known, result.low, result.high):
            axis.plot(places, point, color="#dddddd", lw=5, solid_capstyle="round", zorder=0)
    for method in result.rows:
        heights = scaled(result.returns(method), result.low, result.high).mean(0)
        axis.plot(places, heights, marker="o", ms=4, **style(result, method))
    axis.set_xticks(places, result.objectives, color=INK)
    axis.margins(x=0.08)
    scale = "the known front" if result.known is not None else "the methods' means"
    axis.set(title=result.env, ylabel=f"return, scaled by {scale}")
    axis.grid(True, axis="y", linewidth=0.8)


def balances(axis: Axes, result: Result) -> None:
    """Balance of each method: its seeds, mean and 95% interval."""
    methods = list(result.rows)[::-1]
    for height, method in enumerate(methods):
        values, colour = result.balance(method), style(result, method)["color"]
        middle, half = mean_and_interval(values.tolist())
        axis.scatter(values, [height] * len(values), s=14, color=colour, alpha=0.45, linewidths=0)
        axis.errorbar(middle, height, xerr=half, fmt="o", ms=7, color=colour, capsize=3, lw=1.8)
    axis.set_yticks(range(len(methods)), [label(method) for method in methods])
    for text, method in zip(axis.get_yticklabels(), methods, strict=True):
        text.set_color(style(result, method)["color"])
    axis.set(xlim=(-0.5, 1.5), xticks=(-0.5, 0, 0.5, 1, 1.5))  # intervals of few seeds are wider
    axis.margins(y=0.08)
    axis.grid(True, axis="x", linewidth=0.8)
    axis.set(xlabel="balance: mean and 95% interval over seeds")
