"""What the two parts with language models say beyond the tables of all parts: rewards at the end and at equal
KL, weights, correlations with the update, completions; and a picture of each part."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from . import ranges, store
from .criterion import BASELINE, CANDIDATES, Difference
from .figures import whole_seeds
from .measures import interval
from .pictures import INK, SHOWN, style
from .rules import RULES
from .store import FINAL, Row
from .tables import MISSING, REFERENCE, label, mean_cell, number, signed, table

RESULTS = Path(__file__).parent / "results"
OBJECTIVES = ("helpful", "friendly", "brief")
SHOWN_REPLIES, SHOWN_SEED = 3, 0  # the first complaints, none picked
Run = tuple[str, float, float]  # rule, rate, seed


def runs(rows: Iterable[Row]) -> dict[Run, list[Row]]:
    """The rows of each run: steps in order, then the final one."""
    found: dict[Run, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["rule"], row["rate"], row["seed"]].append(row)
    last = float("inf")
    for some in found.values():
        some.sort(key=lambda row: last if row["step"] == FINAL else row["step"])
    return found


def rules_of(found: dict[Run, Any]) -> list[str]:
    """In the order of the study, then others by name; a rule's variants follow it."""
    order = list(RULES)

    def place(name: str) -> tuple[int, str]:
        base = name.removesuffix(REFERENCE)
        return (order.index(base) if base in order else len(order)), name

    return sorted({rule for rule, _, _ in found}, key=place)


def mean_gain(row: Row) -> float:
    return float(np.mean([x for key, x in row.items() if key.startswith("gain_") and key[5:].isdigit()]))


def curve(run: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """KL (never falling) and mean gain at the logged steps."""
    points = [(row["kl"], mean_gain(row)) for row in run if row["step"] != FINAL]
    kl, gain = np.array(points).T
    return np.maximum.accumulate(kl), gain


def at_equal_kl(run: list[Row], base: list[Row]) -> float:
    """Difference of the mean gains at the largest KL that both runs have reached."""
    (kl, gain), (base_kl, base_gain) = curve(run), curve(base)
    common = min(kl[-1], base_kl[-1])
    return float(np.interp(common, kl, gain) - np.interp(common, base_kl, base_gain))


def to_baseline(
    found: dict[Run, list[Row]], rule: str, measure: Any, rates: Iterable[float], baseline: str = BASELINE
) -> Difference:
    """Paired over seeds; of each seed the mean over the rates. `measure` takes a run and its counterpart."""
    values: dict[float, list[float]] = defaultdict(list)
    chosen = set(rates)
    for (name, rate, seed), run in found.items():
        base = found.get((baseline, rate, seed))
        if name == rule and base is not None and rate in chosen:
            values[seed].append(measure(run, base))
    return Difference(*interval([float(np.mean(x)) for x in values.values()]), len(values), len(chosen))


def finals(found: dict[Run, list[Row]], rule: str, rates: Iterable[float]) -> list[Row]:
    chosen = set(rates)
    return [run[-1] for (name, rate, _), run in found.items() if name == rule and rate in chosen]


def start(row: Row, i: int) -> float:
    """The reward that the gain of the row counts from."""
    part = row["part"]
    return float(row[f"reward_{i}"] - row[f"gain_{i}"] * (ranges.HIGH[part][i] - ranges.LOW[part][i]))


def rewards_at_end(found: dict[Run, list[Row]], names: tuple[str, ...], rates: list[float]) -> str:
    """Held-out rewards; means over runs, with intervals over seeds where there is one rate."""
    first = finals(found, BASELINE, rates)
    lines = [["initial", *(mean_cell([start(row, i) for row in first]) for i in range(len(names)))]]
    lines[0] += ["0", *[""] * 3, str(len(first))]
    for rule in rules_of(found):
        rows = finals(found, rule, rates)
        cells = [mean_cell([row[f"reward_{i}"] for row in rows]) for i in range(len(names))]
        cells.append(mean_cell([row["kl"] for row in rows], 2))
        cells += [mean_cell([row[m] for row in rows], 2) for m in ("balance", "gain_per_kl", "sacrifice")]
        lines.append([label(rule), *cells, str(len(rows))])
    header = ["KL, nats per completion", "balance", "gain per KL", "steps that sacrifice", "runs"]
    return table(["rule", *names, *header], lines)


def differences(
    found: dict[Run, list[Row]], names: tuple[str, ...], rates: list[float], candidates: bool = False
) -> str:
    """To Fixed, paired over seeds: at the end, and at equal KL; and of the candidates to each other."""

    def end(key: str) -> Any:
        return lambda run, base: run[-1][key] - base[-1][key]

    measures = {name: end(f"gain_{i}") for i, name in enumerate(names)}
    measures |= {"worst gain": end("worst_gain"), "balance": end("balance"), "KL": end("kl")}
    measures["mean gain at equal KL"] = at_equal_kl
    lines = []
    for rule in rules_of(found):
        if rule != BASELINE:
            found_here = [to_baseline(found, rule, m, rates) for m in measures.values()]
            lines.append([label(rule), *(signed(d) for d in found_here), str(found_here[0].seeds)])
    if candidates:
        first, second = CANDIDATES
        between = [to_baseline(found, second, m, rates, first) for m in measures.values()]
        name = f"{label(second)} less {label(first)}"
        lines.append([name, *(signed(d) for d in between), str(between[0].seeds)])
    header = [f"gain, {name}" for name in names] + list(measures)[len(names) :]
    return table(["rule", *header, "seeds"], lines)


def late_rollouts(run: list[Row]) -> float:
    """Mean reward of the rollouts of the second half of the steps, in units of the rewards' ranges."""
    low, high = ranges.LOW["pretrained"], ranges.HIGH["pretrained"]
    late = run[len(run) // 2 :]
    return float(
        np.mean([[row[f"reward_{i}"] / (high[i] - low[i]) for i in range(len(low))] for row in late])
    )


def steps_table(found: dict[Run, list[Row]]) -> str:
    """Means over all steps of all runs: weights, correlations with the update, how often these are negative;
    and the reward of the later rollouts, to Fixed, paired over seeds."""
    rates = {rate for _, rate, _ in found}
    lines = []
    for rule in rules_of(found):
        rows = [row for (name, _, _), run in found.items() if name == rule for row in run]
        columns = [
            [row[f"{kind}_{i}"] for row in rows] for kind in ("weight", "correlation") for i in range(3)
        ]
        negative = [f"{np.mean([row[f'correlation_{i}'] < -1e-4 for row in rows]):.0%}" for i in range(3)]
        some = f"{np.mean([row['sacrificed'] for row in rows]):.0%}"
        late = to_baseline(found, rule, lambda run, base: late_rollouts(run) - late_rollouts(base), rates)
        means = [number(float(np.mean(x)), 2) for x in columns]
        lines.append([label(rule), *means, *negative, some, "" if rule == BASELINE else signed(late)])
    header = [f"{kind}, {name}" for kind in ("weight", "correlation", "negative") for name in OBJECTIVES]
    return table(["rule", *header, "any negative", "reward of later rollouts"], lines)


def gradients_table(found: dict[Run, list[Row]]) -> str:
    """At the steps where the objectives' gradients were measured: means over steps and rates, with intervals
    over seeds for what decides."""
    lines = []
    for rule in rules_of(found):
        seeds: dict[float, list[Row]] = defaultdict(list)
        for (name, _, seed), run in found.items():
            if name == rule:
                seeds[seed] += [row for row in run if not np.isnan(row["mgda_tv"])]
        rows = [row for some in seeds.values() for row in some]
        cells = [
            number(float(np.mean([row[f"{kind}_{i}"] for row in rows])), 2)
            for kind in ("weight", "mgda", "cosine")
            for i in range(3)
        ]
        cells += [
            mean_cell([float(np.mean([row[key] for row in some])) for some in seeds.values()], 2)
            for key in ("mgda_tv", "gradient_sacrificed", "sacrificed")
        ]
        lines.append([label(rule), *cells, str(len(rows))])
    kinds = "weight", "min-norm weight", "cosine to the update"
    header = [f"{kind}, {name}" for kind in kinds for name in OBJECTIVES]
    ends = ["TV to min-norm", "steps that sacrifice, gradients", "the same, advantages", "steps"]
    return table(["rule", *header, *ends], lines)


def replies(folder: Path) -> list[dict[str, Any]]:
    path = folder / "pretrained_replies.jsonl.gz"
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replies_table(found: list[dict[str, Any]]) -> str:
    """Greedy completions of one seed for the first held-out complaints."""
    shown: dict[str, dict[str, str]] = defaultdict(dict)
    for row in found:
        if row["kind"] == "greedy" and row["seed"] == SHOWN_SEED:
            shown[row["complaint"]][row["rule"]] = row["reply"]
    first = list(shown.items())[:SHOWN_REPLIES]
    names = [rule for rule in RULES if any(rule in by_rule for _, by_rule in first)]
    lines = [
        [label(rule), *(by_rule.get(rule, MISSING).replace("|", r"\|") for _, by_rule in first)]
        for rule in names
    ]
    return table(["rule", *(complaint for complaint, _ in first)], lines)


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Markdown by name; what was not run is left out."""
    result = {}
    found = runs(store.read(folder / "pretrained.csv.gz"))
    if found:
        rates = sorted({rate for _, rate, _ in found})
        result["pretrained-rewards"] = rewards_at_end(found, OBJECTIVES, rates)
        result["pretrained-differences"] = differences(found, OBJECTIVES, rates)
        result["pretrained-steps"] = steps_table(runs(store.read(folder / "pretrained_steps.csv.gz")))
        result["pretrained-replies"] = replies_table(replies(folder))
    found = runs(whole_seeds(store.read(folder / "pretrained_gpu.csv.gz")))
    if found:
        rates = sorted({rate for _, rate, _ in found})
        for rate in rates:
            result[f"pretrained-gpu-rewards-{rate:g}"] = rewards_at_end(found, OBJECTIVES, [rate])
            result[f"pretrained-gpu-differences-{rate:g}"] = differences(found, OBJECTIVES, [rate], True)
        result["pretrained-gpu-differences"] = differences(found, OBJECTIVES, rates, True)
        steps = runs(store.read(folder / "pretrained_gpu_steps.csv.gz"))
        result["pretrained-gpu-gradients"] = gradients_table({run: steps[run] for run in found})
    found = runs(store.read(folder / "sentiment_length.csv.gz"))
    names = ("sentiment", "length")
    for rate in sorted({rate for _, rate, _ in found}):
        result[f"sentiment-length-rewards-{rate:g}"] = rewards_at_end(found, names, [rate])
        result[f"sentiment-length-differences-{rate:g}"] = differences(found, names, [rate])
    return result


# --- pictures -------------------------------------------------------------------------------------


def draw_curves(axis: Any, found: dict[Run, list[Row]], x: str, y: Any, rate: float) -> None:
    """Seeds as thin lines, and for each rule the means over seeds, step by step."""
    for rule in rules_of(found):
        colour, marker = SHOWN[rule.removesuffix(REFERENCE)]
        dashed = "--" if rule.endswith(REFERENCE) else "-"
        points = []
        for (name, at, _), run in found.items():
            if name == rule and at == rate:
                points.append([(row[x], y(row)) for row in run if row["step"] != FINAL])
                axis.plot(*np.array(points[-1]).T, color=colour, lw=0.6, alpha=0.45, ls=dashed)
        if points:
            mean = np.array(points).mean(0).T
            axis.plot(*mean, color=colour, lw=2, ls=dashed, marker=marker, ms=5, label=label(rule))


def pretrained_picture(found: dict[Run, list[Row]], steps: dict[Run, list[Row]]) -> Any:
    """Each reward against KL, and the objective that has the smallest correlation with the update."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.6), layout="constrained")
    rate = next(iter(found))[1]
    for i, (axis, name) in enumerate(zip(axes, OBJECTIVES, strict=False)):
        draw_curves(axis, found, "kl", lambda row, i=i: row[f"reward_{i}"], rate)
        axis.set(title=name, xlabel="KL to the initial policy, nats per completion")
    axes[0].set_ylabel("held-out reward")
    draw_curves(axes[3], steps, "step", lambda row: min(row[f"correlation_{i}"] for i in range(3)), rate)
    axes[3].axhline(0, color=INK, lw=1)
    axes[3].set(title="smallest correlation with the update", xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def sentiment_length_picture(found: dict[Run, list[Row]]) -> Any:
    """Both gains against KL, at each rate."""
    rates = sorted({rate for _, rate, _ in found})
    figure, axes = plt.subplots(
        1, 2 * len(rates), figsize=(7.5 * len(rates), 4.8), layout="constrained", squeeze=False
    )
    for column, axis in enumerate(axes[0]):
        rate, i = rates[column // 2], column % 2
        draw_curves(axis, found, "kl", lambda row, i=i: row[f"reward_{i}"], rate)
        axis.set(
            title=f"{('sentiment', 'length')[i]}, rate {rate:g}", xlabel="KL to the initial policy, nats"
        )
    axes[0, 0].set_ylabel("held-out reward")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def pictures(folder: Path, results: Path = RESULTS) -> None:
    """study-pretrained.png and study-sentiment-length.png; what was not run is left out."""
    style()
    drawn = {}
    found = runs(store.read(results / "pretrained.csv.gz"))
    if found:
        steps = runs(store.read(results / "pretrained_steps.csv.gz"))
        drawn["pretrained"] = pretrained_picture(found, steps)
    found = runs(store.read(results / "sentiment_length.csv.gz"))
    if found:
        drawn["sentiment-length"] = sentiment_length_picture(found)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = folder / f"study-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(f"wrote {path}")
