"""Writes the study's figures into its pages in docs, and draws its pictures.

The table NAME is written between `<!-- study:NAME -->` and `<!-- end -->`, the figure NAME between
`<!--study NAME-->` and `<!---->`. An unknown name is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from . import pictures, pretrained_report, tables
from .criterion import BASELINE, CANDIDATES, selected
from .figures import HELD_OUT, LATER, Figures

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("study.md", "study_appendix.md", "study_models.md", "../README.md")


def fill(text: str, found: Mapping[str, Callable[[], str]], figure: Callable[[str], str]) -> str:
    """The page with its tables and figures replaced."""

    def whole(match: re.Match[str]) -> str:
        return f"<!-- study:{match[1]} -->\n{found[match[1]]()}\n<!-- end -->"

    def single(match: re.Match[str]) -> str:
        return f"<!--study {match[1]}-->{figure(match[1])}<!---->"

    text = re.sub(r"<!-- study:(\S+) -->\n.*?<!-- end -->", whole, text, flags=re.DOTALL)
    return re.sub(r"<!--study (\S+?)-->.*?<!---->", single, text)


def figure(f: Figures, name: str) -> str:
    """`selection`; `default`; `held-out`; `without/PROBLEM`; `margin` and `margin/PROBLEM`, without it;
    `runs`; `d/PROBLEM/RULE`, the difference to Fixed in balance, or `d/PROBLEM/RULE/MEASURE`, or
    `d/PROBLEM/RULE/MEASURE/BASELINE`;
    `mean/PROBLEM/RULE/MEASURE`; `t/PROBLEM/RULE/WHAT`, of the values of the theory part: max, min,
    mean, or negative, the share below 0."""
    kind, *rest = name.split("/")
    if kind == "selection":
        return tables.selection(f)
    if kind == "default":
        rule = selected(f.verdicts(f.voting))
        return tables.label(rule) if rule else "neither candidate"
    if kind == "without":  # the mean gains without one problem
        found = f.verdicts([name for name in f.voting if name != rest[0]])
        return " and ".join(f"{v.gain:+.4f}" for v in found)
    if kind == "margin":  # of the second candidate's mean gain over the first's, without a problem
        first, second = CANDIDATES
        each = [f.difference(name, second, baseline=first) for name in f.voting if name not in rest]
        known = [d for d in each if d is not None]
        half = math.sqrt(sum(d.half**2 for d in known)) / len(known)
        return f"{sum(d.mean for d in known) / len(known):+.4f} ± {half:.4f}"
    if kind == "held-out":
        texts = [f"{tables.label(v.rule)} {v.gain:+.3f}" for v in f.verdicts([HELD_OUT])]
        return " and ".join(texts)
    if kind == "d":
        problem, rule, measure, base = (*rest, *("balance", BASELINE)[len(rest) - 2 :])
        text = tables.signed(f.difference(problem, rule, measure, baseline=base))
        return "the same" if text == "same" else text.replace("**", "")
    if kind == "mean":
        problem, rule, measure = rest
        return tables.number(f.mean(problem, rule, measure), 2)
    if kind == "runs":
        return f"{sum(len(rows) for name, rows in f.by_problem.items() if f.part_of[name] not in LATER):,}"
    if kind == "t":
        problem, rule, what = rest
        values = np.array(f.theory_values(problem, rule or None))
        if not len(values):
            return tables.MISSING
        if what == "negative":
            return f"{(values < -1e-6).mean():.0%}"
        return f"{getattr(np, what)(values):.2g}"
    raise KeyError(f"figure: unknown name {name!r}")


def filled(text: str, folder: Path) -> str:
    """The page with the tables and figures of the results in `folder`."""
    found = Figures(folder)
    known = tables.all_tables(found)
    known |= {name: partial(str, table) for name, table in pretrained_report.tables(folder).items()}
    return fill(text, known, lambda key: figure(found, key))


def write(folder: Path) -> None:
    found = Figures(folder)
    if not found.by_problem:
        raise SystemExit(f"no figures in {folder}: run `python -m study --out {folder}` first")
    for name in PAGES:
        page = DOCS / name
        page.write_text(filled(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
        print(f"wrote {page}")
    pictures.draw(found, DOCS / "images")
    pretrained_report.pictures(DOCS / "images", folder)
    print(tables.selection(found))
