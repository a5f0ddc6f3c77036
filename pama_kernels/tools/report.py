"""Formats an `Inspection` as self-explanatory text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from .inspect import SUM, Inspection

NAME_WIDTH = 24
REDUNDANT = 0.9  # correlation from which two rewards are called redundant
CONFLICT = -0.1  # and below which in conflict, if it is also beyond chance
SMALL = 0.015  # a negative covariance of at most this size counts as 0 (advantages have standard deviation 1)
RARE = 0.1  # share of groups below which a reward is nearly saturated
MATRIX_UP_TO = 8  # rewards; beyond, the strongest pairs


def format_inspection(found: Inspection) -> str:
    parts = [_head(found), _rewards(found), _pairs(found), *_rules(found), "In short", *findings(found)]
    return "\n".join(parts)


def two_digits(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 0.005 else "0.00"


def figure(value: float) -> str:
    """Two decimals, or an exponent where these would say little or too much."""
    if math.isnan(value) or value == 0 or 0.005 <= abs(value) < 1e5:
        return two_digits(value)
    return f"{value:.1e}"


def _marked(value: float) -> str:
    """Formats a number, with an exclamation mark if it is below -SMALL."""
    return two_digits(value) + ("!" if value < -SMALL else " ")


def percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    return f"{min(max(round(100 * share), 1), 99) if 0 < share < 1 else round(100 * share)}%"


def short_name(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Columns of words to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  " + "  ".join(cells).rstrip() + "\n")
    return "".join(text)


def _head(found: Inspection) -> str:
    low, high = found.group_sizes
    size = str(low) if low == high else f"{low} to {high}"
    steps = f", {found.steps} steps (column {found.step_column})" if found.steps > 1 else ""
    left_out = f"\nColumns left out: {', '.join(found.left_out)}." if found.left_out else ""
    return (
        f"{found.source}: {len(found.names)} rewards, {found.rows} completions in {found.groups} groups of "
        f"{size}{steps}.{left_out}\n"
    )


# --- rewards ------------------------------------------------------------------------------------------------


def verdict(found: Inspection, i: int) -> str:
    applies, varies = float(found.applies[i]), float(found.varies[i])
    if applies == 0:
        return "absent: never applied"
    if varies == 0:
        return "saturated: the same within every group"
    words = [] if applies == 1 else [f"absent in {percent(1 - applies)} of completions"]
    if varies < RARE:
        words.append("nearly saturated")
    return ", ".join(words) or "ok"


def _rewards(found: Inspection) -> str:
    rows = [
        (
            short_name(name),
            figure(float(found.mean[i])),
            figure(float(found.deviation[i])),
            percent(float(found.applies[i])),
            percent(float(found.varies[i])),
            verdict(found, i),
        )
        for i, name in enumerate(found.names)
    ]
    return (
        "Each reward separately\n"
        "  mean, deviation  over all completions\n"
        "  applies          share of the completions that have a number\n"
        "  varies           share of the groups in which completions get different rewards:\n"
        "                   only from those does the policy learn anything about this reward\n\n"
        + _table(["reward", "mean", "deviation", "applies", "varies", "verdict"], rows, words=(0, 5))
    )


# --- pairs --------------------------------------------------------------------------------------------------


def pair_verdict(found: Inspection, i: int, j: int) -> str | None:
    """ "redundant", "in conflict" or None."""
    value = float(found.correlation[i, j])
    chance = 2 / math.sqrt(max(1.0, float(found.together[i, j])))
    if value >= REDUNDANT:
        return "redundant"
    return "in conflict" if value < min(CONFLICT, -chance) else None


def sorted_pairs(found: Inspection) -> list[tuple[int, int]]:
    n = len(found.names)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if not math.isnan(found.correlation[i, j])]
    return sorted(pairs, key=lambda pair: float(found.correlation[pair]))


def _pairs(found: Inspection) -> str:
    title = (
        "Do they agree? Correlation of two rewards within groups\n"
        "  1: they rank completions alike; 0: unrelated; -1: they rank them in opposite order\n\n"
    )
    n = len(found.names)
    if n <= MATRIX_UP_TO:
        header = ["", *(f"({i + 1})" for i in range(n))]
        rows = [
            [f"({i + 1}) {short_name(name)}"]
            + ["" if i == j else two_digits(float(found.correlation[i, j])) for j in range(n)]
            for i, name in enumerate(found.names)
        ]
        return title + _table(header, rows)
    pairs = sorted_pairs(found)
    shown = pairs if len(pairs) <= 10 else pairs[:5] + pairs[-5:]
    return title + _table(
        ["lowest and highest pairs", ""],
        [
            (
                f"{short_name(found.names[i])} ~ {short_name(found.names[j])}",
                two_digits(float(found.correlation[i, j])),
            )
            for i, j in shown
        ],
    )


# --- rules --------------------------------------------------------------------------------------------------

EXPLAINED = """\
  fixed    the same for all rewards, or those of --preference
  upgrad   the fixed weights, changed so that no reward decreases; the default
  pama     the convex combination of smallest norm (min-norm on cosines)
  softmin  separately for each completion: most weight to its worst reward
  paper    PAMA as published: only completions above their group's mean in every reward
"""


def _by_rule(found: Inspection, columns: Mapping[str, Tensor], shown: Callable[[float], str]) -> str:
    rows = [
        [short_name(name), *(shown(float(column[i])) for column in columns.values())]
        for i, name in enumerate(found.names)
    ]
    return _table(["reward", *(rule + " " * (shown is _marked) for rule in columns)], rows)


def _rules(found: Inspection) -> list[str]:
    many = found.steps > 1
    effects = found.effects
    weights = {
        rule: effect.mean_weights for rule, effect in effects.items() if effect.mean_weights is not None
    }
    covariance = {rule: effect.mean_covariance for rule, effect in effects.items()}
    parts = [
        f"Weights under each rule{many * ', mean over steps'}\n"
        + EXPLAINED
        + "\n"
        + _by_rule(found, weights, two_digits),
        f"Effect of each rule: covariance with the combined advantage{many * ', mean over steps'}\n"
        "  above 0: the reward rises; below 0: it falls; below -0.015 (marked !) it is sacrificed\n"
        f"  {SUM} adds up the raw rewards and normalises once: what trainers do by default\n\n"
        + _by_rule(found, covariance, _marked),
    ]
    if many:
        shares = {rule: effect.sacrificed(SMALL) for rule, effect in effects.items()}
        parts.append(
            f"Share of the {found.steps} steps in which the rule sacrifices the reward\n\n"
            + _by_rule(found, shares, percent)
        )
    return parts


# --- in short -----------------------------------------------------------------------------------------------


def findings(found: Inspection) -> list[str]:
    """One sentence per finding."""
    said = [*_of_rewards(found), *_of_pairs(found), *_of_rules(found)]
    return [f"  - {sentence}" for sentence in said]


def _of_rewards(found: Inspection) -> Iterator[str]:
    for i, name in enumerate(found.names):
        varies = float(found.varies[i])
        if float(found.applies[i]) == 0:
            yield f"{name} never applied: no completion has a number."
        elif varies == 0:
            yield f"{name} is saturated: fixed, pama and upgrad give it no weight."
        elif varies < RARE:
            yield f"{name} varies in only {percent(varies)} of the groups."


def _of_pairs(found: Inspection) -> Iterator[str]:
    for i, first in enumerate(found.names):
        for j in range(i + 1, len(found.names)):
            kind, value = pair_verdict(found, i, j), two_digits(float(found.correlation[i, j]))
            both = f"{first} and {found.names[j]} are {kind} ({value})"
            if kind == "redundant":
                yield f"{both}: with fixed weights they count twice."
            elif kind:
                yield f"{both}: what raises one tends to lower the other."


def _of_rules(found: Inspection) -> Iterator[str]:
    many = found.steps > 1
    worst = {}
    for rule, effect in found.effects.items():
        mean = effect.mean_covariance.tolist()
        lost = [name for name, value in zip(found.names, mean, strict=True) if value < -SMALL]
        if lost:
            yield f"{rule} sacrifices {', '.join(lost)}{many * ' on average'}."
        if bool((effect.covariance > SMALL).any()):
            worst[rule] = float(effect.sacrificed(SMALL).nan_to_num().max())
        else:
            reason = "they cancel out, or none varies"
            if rule == "paper":
                reason = "no completion is above its group's mean in every reward"
            yield f"{rule} moves no reward: {reason}."
    if not worst:
        return
    best = min(worst.values())
    rules = ", ".join(rule for rule, share in worst.items() if share == best)
    if best == 0:
        yield f"Without a sacrifice{many * ' in any step'} (none below -{SMALL}): {rules}."
    elif many:
        yield f"Fewest sacrifices: {rules} (no reward in more than {percent(best)} of the steps)."
    else:
        yield "Every rule sacrifices a reward."
