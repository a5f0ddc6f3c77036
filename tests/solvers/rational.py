"""The min-norm problem in rational arithmetic: every support is tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

Rows = list[list[Fraction]]


def rational_solve(a: Rows, b: list[Fraction]) -> list[Fraction] | None:
    """Some solution of a x = b (free unknowns 0), or None."""
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    pivots: list[int] = []
    for column in range(len(a[0])):
        top = len(pivots)
        found = next((r for r in range(top, len(rows)) if rows[r][column]), None)
        if found is None:
            continue
        rows[top], rows[found] = rows[found], rows[top]
        rows[top] = [x / rows[top][column] for x in rows[top]]
        for r in range(len(rows)):
            if r != top and (factor := rows[r][column]):
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[top], strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    x = [Fraction(0)] * len(a[0])
    for row, column in zip(rows, pivots, strict=False):
        x[column] = row[-1]
    return x


def supports(members: list[int]) -> Iterator[list[int]]:
    for size in range(len(members), 0, -1):
        yield from (list(chosen) for chosen in itertools.combinations(members, size))


def dot(x: list[Fraction], y: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def exact_solution(m: Rows, p: list[Fraction], rho: Fraction) -> tuple[list[Fraction], Fraction]:
    """The minimiser (of several the nearest to p) and c'Mc, by trying every support in exact arithmetic."""
    n = len(m)
    h = [[m[i][j] + rho * (i == j) for j in range(n)] for i in range(n)]
    for s in supports(list(range(n))):
        # H_SS c - mu e = rho p_S, e'c = 1
        system = [[h[i][j] for j in s] + [Fraction(-1)] for i in s] + [[Fraction(1)] * len(s) + [Fraction(0)]]
        x = rational_solve(system, [rho * p[i] for i in s] + [Fraction(1)])
        if x is None or min(x[:-1]) < 0:
            continue
        c = [Fraction(0)] * n
        for i, value in zip(s, x, strict=False):
            c[i] = value
        gradient = [dot(h[i], c) - rho * p[i] for i in range(n)]
        if all(g >= x[-1] for g in gradient):
            break
    else:
        raise AssertionError("no support is optimal")
    product = [dot(row, c) for row in m]
    if rho == 0:
        c = nearest(m, p, product, [i for i in range(n) if gradient[i] == x[-1]])
    return c, dot(c, product)


def nearest(m: Rows, p: list[Fraction], product: list[Fraction], members: list[int]) -> list[Fraction]:
    """Of the minimisers {c in the simplex: Mc = product}, on these members only, the nearest to p."""
    found = []
    for s in supports(members):
        # project p_S on {e'c = 1, M_S c = product}: c = p_S + A' y with A A' y = b - A p_S
        a = [[Fraction(1)] * len(s), *([row[j] for j in s] for row in m)]
        own = [p[j] for j in s]
        right = [b - dot(r, own) for r, b in zip(a, [Fraction(1), *product], strict=True)]
        y = rational_solve([[dot(r, q) for q in a] for r in a], right)
        if y is None:
            continue
        c = [Fraction(0)] * len(p)
        for k, j in enumerate(s):
            c[j] = p[j] + sum((y[r] * a[r][k] for r in range(len(a))), Fraction(0))
        if min(c) >= 0:
            away = [x - q for x, q in zip(c, p, strict=True)]
            found.append((dot(away, away), c))
    return min(found)[1]
