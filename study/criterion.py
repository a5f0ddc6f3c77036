"""The criterion that selects the library's default rule; fixed before the runs to which it is applied.

Among the candidates, the default is the rule that
(1) on no problem is worse than `fixed` at equal learning rates by more than the paired 95% interval, and
(2) of those has the larger mean gain in balance over `fixed`, paired over seeds and rates.

In numbers: for each problem, seed and rate, the difference of the final balance to that of `fixed` with the
same seed and rate; for each seed its mean over the problem's rates; over the seeds its mean m and the half
width h of Student's 95% interval. A candidate fails (1) on a problem where m + h < 0. (2) is the mean of m
over the problems. The held-out problem is not counted; its result is reported separately.
Problems on which a candidate has no runs are reported and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .measures import interval
from .store import FINAL, Row

CANDIDATES = ("cosines-r0.1", "upgrad")
BASELINE = "fixed"


@dataclass(frozen=True)
class Difference:
    """Of a rule to the baseline on one problem: mean over seeds (of means over rates), and its interval."""

    mean: float
    half: float
    seeds: int
    rates: int

    @property
    def worse(self) -> bool:
        return self.mean + self.half < 0

    @property
    def better(self) -> bool:
        return self.mean - self.half > 0


def paired(
    rows: Sequence[Row],
    problem: str,
    rule: str,
    measure: str = "balance",
    rates: Sequence[float] = (),
    baseline: str = BASELINE,
) -> Difference | None:
    """`rates`: only these; None where there are no runs of both rules."""
    values: dict[str, dict[tuple[float, float], float]] = {rule: {}, baseline: {}}
    for row in rows:
        if row["problem"] == problem and row["rule"] in values and row["step"] == FINAL:
            values[row["rule"]][row["seed"], row["rate"]] = row[measure]
    both = [
        key
        for key in values[rule]
        if key in values[baseline]
        and (not rates or key[1] in rates)
        and not math.isnan(values[rule][key] - values[baseline][key])
    ]
    if not both:
        return None
    seeds = sorted({seed for seed, _ in both})
    each = [
        float(np.mean([values[rule][key] - values[baseline][key] for key in both if key[0] == seed]))
        for seed in seeds
    ]
    mean, half = interval(each)
    return Difference(mean, half, len(seeds), len({rate for _, rate in both}))


@dataclass(frozen=True)
class Verdict:
    """`failed`: the problems where the candidate is worse than the baseline; `gain`: of (2)."""

    rule: str
    failed: tuple[str, ...]
    gain: float
    missing: tuple[str, ...]


def verdicts(rows: Sequence[Row], problems: Sequence[str], measure: str = "balance") -> list[Verdict]:
    found = []
    for rule in CANDIDATES:
        differences = {problem: paired(rows, problem, rule, measure) for problem in problems}
        known = {problem: d for problem, d in differences.items() if d is not None}
        failed = tuple(problem for problem, d in known.items() if d.worse)
        gain = float(np.mean([d.mean for d in known.values()])) if known else math.nan
        missing = tuple(problem for problem, d in differences.items() if d is None)
        found.append(Verdict(rule, failed, gain, missing))
    return found


def selected(found: Sequence[Verdict]) -> str | None:
    """The candidate that the criterion selects; None if none satisfies (1)."""
    passed = [verdict for verdict in found if not verdict.failed]
    return max(passed, key=lambda verdict: verdict.gain).rule if passed else None
