"""The study's figures by problem and rule, read from the files of all parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import criterion, store
from .criterion import Difference
from .measures import interval
from .rules import RULES
from .store import FINAL, Row
from .sweep import HELD_OUT, NO_VOTE, SETTINGS, VOTING

PARTS = ("bandits", "words", "grpo")
OTHERS = ("pretrained", "sentiment_length")
LATER = ("pretrained_gpu",)  # run after the selection, not counted in it


def whole_seeds(rows: Sequence[Row]) -> list[Row]:
    """Leaves out, at each rate, the seeds for which a rule is missing (of a part with a time limit)."""
    found: dict[tuple[float, float], set[str]] = defaultdict(set)
    for row in rows:
        if row["step"] == FINAL:
            found[row["seed"], row["rate"]].add(row["rule"])
    most = max(map(len, found.values()), default=0)
    return [row for row in rows if len(found[row["seed"], row["rate"]]) == most]


class Figures:
    def __init__(self, folder: Path) -> None:
        self.by_problem: dict[str, list[Row]] = defaultdict(list)
        self.curves: dict[str, list[Row]] = defaultdict(list)  # of the parts with language models
        self.part_of: dict[str, str] = {}
        for part in (*PARTS, *OTHERS, *LATER):
            rows = store.read(folder / f"{part}.csv.gz")
            for row in whole_seeds(rows) if part in LATER else rows:
                kind = self.by_problem if row["step"] == FINAL else self.curves
                kind[row["problem"]].append(row)
                self.part_of[row["problem"]] = part
        self.theory = store.read(folder / "theory.csv.gz")

    def problems(self, part: str) -> list[str]:
        """In the order of the study; those of other parts by name."""
        known = [name for name in SETTINGS if self.part_of.get(name) == part]
        return known or sorted(name for name in self.by_problem if self.part_of[name] == part)

    @property
    def voting(self) -> list[str]:
        """The problems of the criterion: the held-out one is not among them."""
        others = [name for part in OTHERS for name in self.problems(part)]
        return self.simulated + [p for p in others if set(self.rules(p)) & set(criterion.CANDIDATES)]

    @property
    def simulated(self) -> list[str]:
        return [name for name in VOTING if name in self.by_problem]

    def rules(self, problem: str) -> list[str]:
        """In the order of the study, then others by name."""
        present = {row["rule"] for row in self.by_problem[problem]}
        return [name for name in RULES if name in present] + sorted(present - set(RULES))

    def rates(self, problem: str) -> list[float]:
        return sorted({row["rate"] for row in self.by_problem[problem]})

    def objectives(self, problem: str) -> int:
        """A file has a column for each objective of its largest problem; the others' cells are empty."""
        row = self.by_problem[problem][0]
        names = (name for name in row if name.startswith("gain_") and name[5:].isdigit())
        return sum(not np.isnan(row[name]) for name in names)

    def finals(self, problem: str, rule: str) -> list[Row]:
        return [row for row in self.by_problem[problem] if row["rule"] == rule]

    def difference(
        self,
        problem: str,
        rule: str,
        measure: str = "balance",
        rates: Sequence[float] = (),
        baseline: str = criterion.BASELINE,
    ) -> Difference | None:
        return criterion.paired(self.by_problem[problem], problem, rule, measure, rates, baseline)

    def verdicts(self, problems: Sequence[str], measure: str = "balance") -> list[criterion.Verdict]:
        rows = [row for problem in problems for row in self.by_problem[problem]]
        return criterion.verdicts(rows, problems, measure)

    def each_seed(self, problem: str, rule: str, measure: str) -> list[float]:
        """For each seed the mean over the rates where it is known."""
        values: dict[float, list[float]] = defaultdict(list)
        for row in self.finals(problem, rule):
            if not np.isnan(row.get(measure, np.nan)):
                values[row["seed"]].append(row[measure])
        return [float(np.mean(values[seed])) for seed in sorted(values)]

    def mean(self, problem: str, rule: str, measure: str) -> float:
        values = self.each_seed(problem, rule, measure)
        return float(np.mean(values)) if values else float("nan")

    def best_rate(self, problem: str, rule: str, seeds: Sequence[int] | None = None) -> float | None:
        """The rate with the largest mean balance (over the given seeds, or all)."""
        means = {}
        for rate in self.rates(problem):
            found = [
                row["balance"]
                for row in self.finals(problem, rule)
                if row["rate"] == rate and (seeds is None or row["seed"] in seeds)
            ]
            if found and not np.isnan(found).any():
                means[rate] = float(np.mean(found))
        return max(means, key=lambda rate: means[rate]) if means else None

    def at_best_rates(self, problem: str, rule: str) -> Difference | None:
        """Each rule at its own best rate, chosen on one half of the seeds and compared on the other."""
        seeds = sorted({int(row["seed"]) for row in self.by_problem[problem]})
        if len(seeds) < 4:
            return None
        differences = []
        for chosen_on, compared_on in ((seeds[::2], seeds[1::2]), (seeds[1::2], seeds[::2])):
            values = []
            for name in (rule, criterion.BASELINE):
                rate = self.best_rate(problem, name, chosen_on)
                rows = [row for row in self.finals(problem, name) if row["rate"] == rate]
                values.append({row["seed"]: row["balance"] for row in rows})
            mine, base = values
            differences += [mine[s] - base[s] for s in compared_on if s in mine and s in base]
        if not differences:
            return None
        return Difference(*interval(differences), len(differences), 1)

    def theory_values(self, problem: str, rule: str | None = None, column: str = "value") -> list[float]:
        return [
            row[column]
            for row in self.theory
            if row["problem"] == problem and (rule is None or row["rule"] == rule)
        ]


__all__ = ["HELD_OUT", "LATER", "NO_VOTE", "OTHERS", "PARTS", "Figures", "whole_seeds"]
