"""The min-norm problem and UPGrad in rational arithmetic: every support is tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

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


def rational_gram(factor: Any) -> Rows:
    """(N, D) -> (N, N)."""
    rows = [[Fraction(x) for x in row] for row in factor.tolist()]
    return [[dot(x, y) for y in rows] for x in rows]


def exact_upgrad(m: Rows, p: list[int]) -> list[Fraction]:
    """The weights: the sum of the minimisers nearest to p_i e_i in the Euclidean norm."""
    n = len(m)
    tiny = Fraction(1, 10**30)
    ridged = [[m[i][j] + tiny * (i == j) for j in range(n)] for i in range(n)]
    total = [Fraction(x) for x in p]
    for i in range(n):
        x = non_negative(ridged, [-m[i][j] for j in range(n)])
        total = [a + p[i] * b for a, b in zip(total, x, strict=True)]
    return [x / sum(total) for x in total]


def non_negative(h: Rows, q: list[Fraction]) -> list[Fraction]:
    """minimise 1/2 x'Hx - q.x over x >= 0, H positive definite."""
    n = len(q)
    for s in [*supports(list(range(n))), []]:
        part = rational_solve([[h[i][j] for j in s] for i in s], [q[i] for i in s]) if s else []
        x = [Fraction(0)] * n
        for i, value in zip(s, part or [], strict=True):
            x[i] = value
        if min(x) >= 0 and all(dot(h[i], x) >= q[i] for i in range(n)):
            return x
    raise AssertionError("no support is optimal")
