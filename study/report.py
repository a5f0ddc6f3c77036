"""From the logs to tables, pictures and docs/study.md: no figure is typed by hand.

A table goes between `<!-- study:NAME -->` and `<!-- end -->`; a single figure within a sentence between
`<!--study NAME-->` and `<!---->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import language, store, theory
from .measures import Array, front_of_two, hypervolume, mean_interval
from .problems import SPECS, build
from .rules import BY_NAME, GRIDS, RULES, Rule
from .store import Rows

ROOT = Path(__file__).resolve().parents[1]
MISSING = "-"


def cell(values: Sequence[float] | Array, digits: int = 3) -> str:
    mean, half = mean_interval(values)
    if math.isnan(mean):
        return MISSING
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the broad sweep -----------------------------------------------------------------------------


class Finals:
    """What the runs of one rule on one problem came to: (runs,) or (runs, N) each."""

    def __init__(self, rows: Rows) -> None:
        last = max(row["step"] for row in rows)
        self.rows = rows
        self.start = _rewards([row for row in rows if row["step"] == 0])
        final = [row for row in rows if row["step"] == last]
        self.rewards = _rewards(final)
        start = np.array([row["improvable"] for row in rows if row["step"] == 0])
        left = np.array([row["improvable"] for row in final])
        # In percent of the way; where nothing was left to gain at the start, nothing is.
        self.distance = 100 * np.divide(left, start, out=np.zeros_like(left), where=start > 1e-6)
        self.balance = np.exp(np.log(self.rewards.clip(1e-9)).mean(1))
        self.worst_gain = (self.rewards - self.start).min(1)
        self.stationarity = np.array([row["true_min_norm"] for row in final])
        logged = [row for row in rows if row["step"] > 0]
        self.jitter = np.array(
            [
                np.mean([r["jitter"] for r in logged if r["seed"] == seed])
                for seed in {r["seed"] for r in final}
            ]
        )
        self.rate = rows[0]["rate"]


def _rewards(rows: Rows) -> Array:
    names = [key for key in rows[0] if key.startswith("reward_")]
    return np.array([[row[name] for name in names] for row in rows])


class Sweep:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def finals(self) -> dict[tuple[str, str], Finals]:
        return {
            (problem, path.stem): Finals(store.read(path))
            for problem in SPECS
            for path in sorted((self.folder / problem).glob("*.csv"))
        }

    def compare(
        self, problems: Sequence[str], measure: str, digits: int, rules: Sequence[Rule] = RULES
    ) -> str:
        """One row for each rule, one column for each problem."""
        rows = []
        for rule in rules:
            cells = []
            for problem in problems:
                found = self.finals.get((problem, rule.name))
                cells.append(cell(getattr(found, measure), digits) if found else MISSING)
            if any(c != MISSING for c in cells):
                rows.append([rule.label, *cells])
        return table(["rule", *problems], rows)

    def one_problem(self, problem: str, rules: Sequence[Rule] = RULES) -> str:
        """Everything about one problem."""
        rows = []
        n = SPECS[problem].objectives
        for rule in rules:
            found = self.finals.get((problem, rule.name))
            if found:
                rewards = [cell(found.rewards[:, i], 2) for i in range(n)]
                rest = [
                    cell(found.balance),
                    cell(found.worst_gain),
                    cell(found.distance, 1),
                    cell(found.stationarity),
                    cell(found.jitter, 2),
                ]
                rows.append([rule.label, *rewards, *rest])
        header = [f"reward {i + 1}" for i in range(n)]
        return table(["rule", *header, "balance", "worst gain", "% left", "true min-norm", "unrest"], rows)

    def grids(self) -> str:
        """Hypervolume of what a rule reaches with seven preferences, of that of the front."""
        problems = [name for name, spec in SPECS.items() if spec.grids]
        rows = []
        for base in GRIDS:
            cells = []
            for problem in problems:
                names = [base, *(rule.name for rule in GRIDS[base])]
                found = [self.finals.get((problem, name)) for name in names]
                if any(f is None for f in found):
                    cells += [MISSING, MISSING]
                    continue
                points = np.stack([f.rewards for f in found if f])  # (7, runs, 2)
                whole = build(problem, points.shape[1])
                volumes, spreads = [], []
                for run in range(points.shape[1]):
                    front = _volume_of_front(whole.vertices(run))
                    volumes.append(100 * hypervolume(points[:, run], [0.0, 0.0]) / front)
                    spreads.append(np.ptp(points[:, run, 0]))
                cells += [cell(volumes, 1), cell(spreads, 2)]
            rows.append([BY_NAME[base].label, *cells])
        header = [x for problem in problems for x in (f"{problem}: % of the front's", "spread of reward 1")]
        return table(["rule, seven preferences", *header], rows)


GLANCE = {
    "bandits, N 2 to 4": ("bandit-2", "bandit-3", "bandit-4"),
    "N 8, 16": ("bandit-8", "bandit-16"),
    "noisy": ("bandit-2-noisy",),
    "a dead objective": ("bandit-dead",),
    "scales 1 to 100, raw": ("bandit-2-raw-10", "bandit-2-raw-100", "words-2-raw-10", "words-2-raw-100"),
    "words": ("words-2", "words-3"),
}


def at_a_glance(sweep: Sweep, lm: Language) -> str:
    """Mean balance over groups of problems (language model: hypervolume in percent)."""
    lines = []
    for rule in RULES:
        cells = []
        for problems in GLANCE.values():
            found = [sweep.finals.get((problem, rule.name)) for problem in problems]
            if any(f is None for f in found):
                cells.append(MISSING)
                continue
            # Seeds are the sample; where problems have different numbers of them, the fewest.
            balances = [f.balance for f in found if f]
            seeds = min(map(len, balances))
            cells.append(cell(np.mean([b[:seeds] for b in balances], axis=0)))
        volumes = [lm.volumes(experiment, rule.name) for experiment in language.EXPERIMENTS]
        seeds = min(map(len, volumes))
        cells.append(cell(np.mean([v[:seeds] for v in volumes], axis=0), 1) if seeds else MISSING)
        lines.append([rule.label, *cells])
    return table(["rule", *GLANCE, "language model"], lines)


def _volume_of_front(vertices: Array) -> float:
    """Area under the front of conv(vertices) above the origin."""
    corners = front_of_two(vertices)
    corners = np.array([[0.0, corners[0, 1]], *corners, [corners[-1, 0], 0.0]])
    widths, heights = np.diff(corners[:, 0]), (corners[1:, 1] + corners[:-1, 1]) / 2
    return float(widths @ heights)


# --- theorems ------------------------------------------------------------------------------------


class Theory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, problem: str, rule: str, size: str = "1", baseline: str = "fixed") -> Rows:
        path = self.folder / f"{problem}--{rule}--{size}--{baseline}.csv"
        return store.read(path) if path.exists() else []

    def final(self, problem: str, rule: str, key: str) -> str:
        """The mean over seeds after the last step; of what was promised, the largest."""
        rows = self.rows(problem, rule)
        if not rows:
            return MISSING
        last = max(row["step"] for row in rows)
        values = [row[key] for row in rows if row["step"] == last]
        return f"{max(values) if key == 'telescoped' else np.mean(values):.2g}"

    def theorem_1(self) -> str:
        path = self.folder / "theorem-1.csv"
        if not path.exists():
            return MISSING
        rows = store.read(path)
        rules = theory.SHOWN
        lines = []
        for n in sorted({row["n"] for row in rows}):
            some = [row for row in rows if row["n"] == n]
            off = max(abs(row["optimum"] - row["by_quadprog"]) for row in some)
            # Where the least is 0 a ratio says nothing.
            medians = [np.median([row[rule] for row in some if row[rule] < 1e6]) for rule in rules]
            lines.append([f"{n:g}", f"{off:.0e}", *(f"{x:.2f}" for x in medians)])
        return table(["N", "optimum off by", *rules], lines)

    def theorem_2(self, problem: str) -> str:
        lines = []
        for rule in theory.RULES:
            rows = self.rows(problem, rule)
            if not rows:
                continue
            last = max(row["step"] for row in rows)
            final = [row for row in rows if row["step"] == last]
            both = [row for size in ("1", "1.9") for row in self.rows(problem, rule, size)]
            values = [
                f"{np.mean([row[key] for row in final]):.1e}"
                for key in ("combined_norm", "surrogate_min_norm", "true_min_norm", "improvable")
            ]
            worst = min(row["slack"] for row in both if row["step"] == last)
            most = max(row["telescoped"] for row in final)
            lines.append([rule, *values, f"{worst:.0e}", f"{most:.2f}"])
        header = ["weights", "combined gradient", "least, surrogate", "least, true", "distance to front"]
        return table([*header, "least slack", "promised in all"], lines)


# --- language model ------------------------------------------------------------------------------


class Language:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finals(self, experiment: str, rule: str) -> Rows:
        paths = sorted((self.folder / experiment).glob(f"{rule}--*.csv"))
        return [store.read(path)[-1] | {"seed": path.stem.split("--")[1]} for path in paths]

    def curve(self, experiment: str, rule: str) -> list[Rows]:
        return [store.read(path) for path in sorted((self.folder / experiment).glob(f"{rule}--*.csv"))]

    def volumes(self, experiment: str, rule: str) -> list[float]:
        """Each run's hypervolume over the worst rewards, in percent of what the best of each would have."""
        worst, best = (np.array(x[experiment]) for x in (language.WORST, language.BEST))
        whole = float((best - worst).prod())
        return [100 * hypervolume(_rewards([row]), worst) / whole for row in self.finals(experiment, rule)]

    def volume(self, experiment: str, rule: str) -> str:
        volumes = self.volumes(experiment, rule)
        return cell(volumes, 1) if volumes else MISSING

    def reward(self, experiment: str, rule: str, index: int) -> str:
        rows = self.finals(experiment, rule)
        return cell(_rewards(rows)[:, index]) if rows else MISSING

    def share(self, experiment: str, rule: str) -> str:
        """Of a training step's processor time that goes into weights and loss: the median over seeds."""
        rows = self.finals(experiment, rule)
        return f"{np.median([row['loss_ms'] / row['step_ms'] for row in rows]):.1%}" if rows else MISSING

    def result(self, experiment: str) -> str:
        names = list(language.EXPERIMENTS[experiment])
        lines: list[list[str]] = []
        start = self.finals(experiment, "start")
        if not start:
            return MISSING
        rewards = [cell(_rewards(start)[:, i]) for i in range(len(names))]
        lines.append(["start", *rewards, self.volume(experiment, "start"), "0", "", "", "", str(len(start))])
        for rule in language.rules(len(names)):
            rows = self.finals(experiment, rule.name)
            if not rows:
                continue
            values = _rewards(rows)
            share = [row["true_min_norm"] / max(row["largest_norm"], 1e-9) for row in rows]
            lines.append(
                [
                    rule.label,
                    *(cell(values[:, i]) for i in range(len(names))),
                    self.volume(experiment, rule.name),
                    cell([row["kl"] for row in rows], 1),
                    cell(share, 2),
                    cell([_unrest(rows) for rows in self.curve(experiment, rule.name)], 2),
                    self.share(experiment, rule.name),
                    str(len(rows)),
                ]
            )
        header = [
            "hypervolume, %",
            "KL",
            "true min-norm / largest",
            "unrest",
            "loss's share of a step",
            "seeds",
        ]
        return table(["rule", *names, *header], lines)


def published(lm: Language) -> str:
    """Ours in the form of the paper's table: the pair after its first experiment, and the conflicting one."""
    rules = ("mgda-ub", "fixed", "paper-batch", "cosines-r0.1", "upgrad")
    lines = []
    for experiment in ("sentiment-length", "information-conciseness"):
        for i, name in enumerate(language.EXPERIMENTS[experiment]):
            found = [lm.finals(experiment, rule) for rule in rules]
            lines.append([name, *(cell(_rewards(rows)[:, i]) if rows else MISSING for rows in found)])
    return table(["ours", *(BY_NAME[rule].label for rule in rules)], lines)


def _unrest(rows: Rows) -> float:
    return float(np.mean([row["jitter"] for row in rows if row["kind"] == "log" and row["step"] > 0]))


# --- into the pages ------------------------------------------------------------------------------


def write(out: Path, in_docs: bool) -> None:
    from . import pictures

    sweep, theorems, lm = Sweep(out / "sweep"), Theory(out / "theory"), Language(out / "language")
    tables = found_tables(sweep, theorems, lm)
    images = (ROOT / "docs" if in_docs else out) / "images"
    pictures.draw(sweep, theorems, lm, images)
    if in_docs:
        page = ROOT / "docs" / "study.md"
        text = fill(page.read_text(encoding="utf-8"), tables, found_figures(sweep, theorems, lm))
    else:
        page = out / "tables.md"
        text = "\n\n".join(f"{name}\n\n{found}" for name, found in tables.items()) + "\n"
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page} and {images}")


def found_tables(sweep: Sweep, theorems: Theory, lm: Language) -> dict[str, str]:
    bandits = ("bandit-2", "bandit-3", "bandit-4", "bandit-8", "bandit-16", "bandit-2-noisy")
    scales = ("bandit-2-raw", "bandit-2-raw-10", "bandit-2-raw-100")
    words = ("words-2-raw", "words-2-raw-10", "words-2-raw-100")
    tables = {
        "distance": sweep.compare(bandits, "distance", 1),
        "worst-gain": sweep.compare(bandits, "worst_gain", 3),
        "unrest": sweep.compare(
            ("bandit-2", "bandit-3", "bandit-2-noisy", "words-2", "words-3"), "jitter", 2
        ),
        "scales-bandit": sweep.compare(scales, "balance", 3),
        "scales-words": sweep.compare(words, "balance", 3),
        "words-2": sweep.one_problem("words-2"),
        "words-3": sweep.one_problem("words-3"),
        "dead": sweep.one_problem("bandit-dead"),
        "solved": sweep.one_problem("bandit-solved"),
        "three-arms": sweep.one_problem("three-arms"),
        "grids": sweep.grids(),
        "theorem-1": theorems.theorem_1(),
        "glance": at_a_glance(sweep, lm),
        "published": published(lm),
    }
    for problem in theory.PROBLEMS:
        tables[f"theorem-2-{problem}"] = theorems.theorem_2(problem)
    for experiment in language.EXPERIMENTS:
        tables[f"language-{experiment}"] = lm.result(experiment)
    return tables


def found_figures(sweep: Sweep, theorems: Theory, lm: Language) -> dict[str, Callable[[], str]]:
    """Single figures in sentences: `problem/rule/measure`, looked up when asked for."""
    found: dict[str, Callable[[], str]] = {}
    for (problem, rule), finals in sweep.finals.items():
        for measure, digits in (
            ("distance", 1),
            ("worst_gain", 3),
            ("balance", 3),
            ("jitter", 2),
            ("stationarity", 3),
        ):
            found[f"{problem}/{rule}/{measure}"] = lambda f=finals, m=measure, d=digits: cell(
                getattr(f, m), d
            )
    for problem in theory.PROBLEMS:
        for rule_name in theory.RULES:
            for key in ("combined_norm", "true_min_norm", "improvable", "telescoped"):
                found[f"theory/{problem}/{rule_name}/{key}"] = lambda p=problem, r=rule_name, k=key: (
                    theorems.final(p, r, k)
                )
    for experiment, scorers in language.EXPERIMENTS.items():
        for rule in language.rules(len(scorers)):
            found[f"{experiment}/{rule.name}/hypervolume"] = lambda e=experiment, r=rule: lm.volume(e, r.name)
            found[f"{experiment}/{rule.name}/share"] = lambda e=experiment, r=rule: lm.share(e, r.name)
            for i, name in enumerate(scorers):
                found[f"{experiment}/{rule.name}/{name}"] = lambda e=experiment, r=rule, i=i: lm.reward(
                    e, r.name, i
                )
    return found


def fill(text: str, tables: dict[str, str], figures: dict[str, Any]) -> str:
    """The page with its tables and figures replaced; an unknown name is an error."""

    def whole(match: re.Match[str]) -> str:
        return f"<!-- study:{match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    def single(match: re.Match[str]) -> str:
        return f"<!--study {match[1]}-->{figures[match[1]]()}<!---->"

    text = re.sub(r"<!-- study:(\S+?) -->\n.*?<!-- end -->", whole, text, flags=re.DOTALL)
    return re.sub(r"<!--study (\S+?)-->.*?<!---->", single, text)
