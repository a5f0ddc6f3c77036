"""The tables of docs/study.md and of its appendix, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import theory
from .criterion import CANDIDATES, Difference, selected
from .figures import HELD_OUT, NO_VOTE, OTHERS, Figures
from .measures import interval
from .rules import RAW_ONLY, RULES

MISSING = "-"


REFERENCE = "-reference"  # ends the names of rules whose ratio is to the reference policy


def label(rule: str) -> str:
    base = rule.removesuffix(REFERENCE)
    if base not in RULES:
        return f"`{rule}`"
    return RULES[base].label + (", ratio to the reference" if base != rule else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(x: float, digits: int = 3) -> str:
    if math.isnan(x):
        return MISSING
    text = f"{x:.{digits}f}"
    return text.replace("-", "") if float(text) == 0 else text


def signed(d: Difference | None, digits: int = 3) -> str:
    """A difference with its interval; bold where 0 is outside. Exactly 0 is "0 (same)"."""
    if d is None or math.isnan(d.mean):
        return MISSING
    if abs(d.mean) < 1e-9 and not d.half > 1e-9:
        return "same"
    text = f"{d.mean:+.{digits}f}" + ("" if math.isnan(d.half) else f" ± {d.half:.{digits}f}")
    return f"**{text}**" if d.worse or d.better else text


def mean_cell(values: Sequence[float], digits: int = 3) -> str:
    if not len(values):
        return MISSING
    mean, half = interval(values)
    return number(mean, digits) + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def verdict(f: Figures) -> str:
    """One line for each problem of the criterion: paired differences to Fixed."""
    rows = []
    without_vote = [name for name in NO_VOTE if name != "bandit-3-scales"]
    for problem in [*f.voting, *without_vote]:
        if problem not in f.by_problem:
            continue
        cells = [signed(f.difference(problem, rule)) for rule in CANDIDATES]
        first, second = CANDIDATES
        cells.append(signed(f.difference(problem, second, baseline=first)))
        cells += [signed(f.difference(problem, rule, "worst_gain")) for rule in CANDIDATES]
        known = f.difference(problem, CANDIDATES[0]) or f.difference(problem, CANDIDATES[1])
        size = f"{known.seeds} x {known.rates}" if known else MISSING
        name = f"{problem} (not counted)" if problem in NO_VOTE else problem
        rows.append([name, size, *cells])
    found = f.verdicts(f.voting)
    worst = f.verdicts(f.voting, "worst_gain")
    means = [f"{v.gain:+.4f}" for v in (*found, *worst)]
    failed = [", ".join(v.failed) or "none" for v in (*found, *worst)]
    rows.append(["**mean of the counted problems**", "", *means[:2], "", *means[2:]])
    rows.append(["**worse on**", "", *failed[:2], "", *failed[2:]])
    names = [label(rule) for rule in CANDIDATES]
    header = [
        "problem",
        "seeds x rates",
        *(f"{n}: balance" for n in names),
        "UPGrad less Pama: balance",
        *(f"{n}: worst gain" for n in names),
    ]
    return table(header, rows)


def selection(f: Figures) -> str:
    """The criterion's result in a sentence."""
    found = f.verdicts(f.voting)
    rule = selected(found)
    parts = [
        f"{label(v.rule)}: significantly worse on {', '.join(v.failed) or 'no problem'}, "
        f"mean gain {v.gain:+.4f}"
        for v in found
    ]
    answer = f"the criterion selects **{label(rule)}**" if rule else "**no candidate satisfies (1)**"
    return f"{'; '.join(parts)}: {answer}"


def rules(f: Figures) -> str:
    """One line for each rule over the simulated problems of the criterion."""
    lines = []
    for rule in RULES:
        if rule in RAW_ONLY:
            continue
        known = [p for p in f.simulated if f.finals(p, rule)]
        if not known:
            continue
        d = [f.difference(p, rule) for p in known]
        w = [f.difference(p, rule, "worst_gain") for p in known]
        better = sum(x is not None and x.better for x in d)
        worse = sum(x is not None and x.worse for x in d)
        gain = np.mean([x.mean for x in d if x is not None])
        worst = np.mean([x.mean for x in w if x is not None])
        rest = [number(_mean(f, known, rule, m), 2) for m in ("sacrifice", "kl", "mgda_tv")]
        if rule == "fixed":
            lines.append([label(rule), "0", "", "0", *rest])
        else:
            lines.append([label(rule), f"{gain:+.3f}", f"{better} / {worse}", f"{worst:+.3f}", *rest])
    header = ["rule", "balance", "problems better / worse", "worst gain"]
    return table([*header, "steps that sacrifice", "KL", "TV to batch MGDA"], lines)


def _mean(f: Figures, problems: Sequence[str], rule: str, measure: str) -> float:
    """Over the problems where it was measured; NaN if it was on none."""
    found = [x for x in (f.mean(p, rule, measure) for p in problems) if not math.isnan(x)]
    return float(np.mean(found)) if found else math.nan


def by_problem(f: Figures, problems: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """Rules down, problems across."""
    names = [r for r in RULES if any(f.finals(p, r) for p in problems)]
    rows = [[label(r), *(cell(p, r) if f.finals(p, r) else MISSING for p in problems)] for r in names]
    return table(["rule", *problems], rows)


def differences(f: Figures, problems: Sequence[str], measure: str = "balance") -> str:
    def cell(problem: str, rule: str) -> str:
        if rule == "fixed":
            return mean_cell(f.each_seed(problem, rule, measure))
        return signed(f.difference(problem, rule, measure))

    return by_problem(f, problems, cell)


def means(f: Figures, problems: Sequence[str], measure: str, digits: int = 2) -> str:
    return by_problem(f, problems, lambda p, r: number(f.mean(p, r, measure), digits))


def best_rates(f: Figures) -> str:
    """The candidates with every rule at its own best rate, and at Fixed's best rate."""
    rows = []
    for problem in [*f.simulated, HELD_OUT]:
        if problem not in f.by_problem:
            continue
        best = f.best_rate(problem, "fixed") or math.nan
        cells = [signed(f.at_best_rates(problem, rule)) for rule in CANDIDATES]
        cells += [signed(f.difference(problem, rule, rates=[best])) for rule in CANDIDATES]
        rates = " ".join(f"{x:g}" for x in f.rates(problem))
        chosen = " / ".join(f"{f.best_rate(problem, rule) or math.nan:g}" for rule in ("fixed", *CANDIDATES))
        rows.append([problem, rates, chosen, *cells])
    names = [label(rule) for rule in CANDIDATES]
    header = ["problem", "learning rates", "best: Fixed / " + " / ".join(names)]
    header += [f"{n}: own best rates" for n in names] + [f"{n}: Fixed's best rate" for n in names]
    return table(header, rows)


def objectives(f: Figures, problem: str) -> str:
    """Gains and weights of each objective of one problem, means over seeds and rates."""
    n = f.objectives(problem)
    rows = []
    for rule in f.rules(problem):
        cells = [mean_cell(f.each_seed(problem, rule, f"gain_{i}")) for i in range(n)]
        cells += [number(f.mean(problem, rule, f"weight_{i}"), 2) for i in range(n)]
        rows.append([label(rule), *cells])
    header = [f"gain {i + 1}" for i in range(n)] + [f"weight {i + 1}" for i in range(n)]
    return table(["rule", *header], rows)


def model(f: Figures, part: str) -> str:
    """A part with a language model: differences to Fixed, and the measures at the end."""
    found = []
    for problem in f.problems(part):
        rows = []
        for rule in f.rules(problem):
            compared = [
                "" if rule == "fixed" else signed(f.difference(problem, rule, m))
                for m in ("balance", "worst_gain")
            ]
            gains = [mean_cell(f.each_seed(problem, rule, f"gain_{i}")) for i in range(f.objectives(problem))]
            digits = {"kl": 2, "gain_per_kl": 2, "sacrifice": 2, "mgda_tv": 2}
            rest = [mean_cell(f.each_seed(problem, rule, m), d) for m, d in digits.items()]
            runs = str(len(f.finals(problem, rule)))
            rows.append([label(rule), *compared, *gains, *rest, runs])
        gains = [f"gain {i + 1}" for i in range(f.objectives(problem))]
        header = ["rule", "balance to Fixed", "worst gain to Fixed", *gains, "KL", "gain per KL"]
        header += ["steps that sacrifice", "TV to batch MGDA", "runs"]
        title = f"{problem}:\n\n" if len(f.problems(part)) > 1 else ""
        found.append(title + table(header, rows))
    return "\n\n".join(found) or "Not run yet."


def theorem_1(f: Figures) -> str:
    rows = []
    for n in (2, 3, 4, 8, 16):
        problem = f"theorem-1-N{n}"
        off = f.theory_values(problem, "quadprog")
        if not off:
            continue
        medians = [np.nanmedian(f.theory_values(problem, rule)) for rule in theory.COMPARED]
        rows.append([str(n), f"{max(off):.0e}", *(f"{x:.2f}" for x in medians)])
    return table(["N", "difference to quadprog", *theory.COMPARED], rows)


def theorem_2(f: Figures, problem: str) -> str:
    rows = []
    for rule in theory.RULES:
        found = [r for r in f.theory if (r["problem"], r["rule"]) == (f"theorem-2-{problem}", rule)]
        one = [row for row in found if row["rate"] == 1.0]
        if not one:
            continue
        columns = ("combined_norm", "surrogate_min_norm", "true_min_norm", "improvable")
        cells = [f"{np.mean([row[c] for row in one]):.1e}" for c in columns]
        slack, promised = min(row["slack"] for row in found), max(row["promised"] for row in one)
        rows.append([rule, *cells, f"{slack:.0e}", f"{promised:.2f}"])
    header = ["combined gradient", "smallest, surrogate", "smallest, true", "distance to front"]
    return table(["weights", *header, "smallest slack", "promised in total"], rows)


def first_order(f: Figures) -> str:
    rows = []
    for rule in theory.FIRST_ORDER_RULES:
        cells = [
            mean_cell(f.theory_values(f"first-order-{problem}-{kind}", rule), 2)
            for problem in theory.FIRST_ORDER
            for kind in ("sample", "exact", "early")
        ]
        rows.append([label(rule), *cells])
    kinds = ("in the rollout", "exact", "exact, first 20 steps")
    return table(["rule", *(f"{p}, {kind}" for p in theory.FIRST_ORDER for kind in kinds)], rows)


def all_tables(f: Figures) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {
        "verdict": lambda: verdict(f),
        "rules": lambda: rules(f),
        "best-rates": lambda: best_rates(f),
        "theorem-1": lambda: theorem_1(f),
        "first-order": lambda: first_order(f),
    }
    for part in OTHERS:
        found[part] = lambda p=part: model(f, p)
    for problem in theory.PROBLEMS:
        found[f"theorem-2-{problem}"] = lambda p=problem: theorem_2(f, p)
    for part in ("bandits", "words", "grpo"):
        problems = f.problems(part)
        for measure in ("balance", "worst_gain"):
            found[f"{part}-{measure}"] = lambda p=problems, m=measure: differences(f, p, m)
        for measure, digits in (("sacrifice", 2), ("kl", 2), ("gain_per_kl", 2), ("mgda_tv", 2)):
            found[f"{part}-{measure}"] = lambda p=problems, m=measure, d=digits: means(f, p, m, d)
        for problem in problems:
            found[f"objectives-{problem}"] = lambda p=problem: objectives(f, p)
    return found
