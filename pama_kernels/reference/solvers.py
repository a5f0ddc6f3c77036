"""The solvers: weights from scores, from Gram matrices and from advantages, for one row or many.

Objectives with `present` False are excluded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .least_squares import factored, nearest_non_negative, non_negative_least_squares

MAX_NORM_RATIO = 1024.0
LEAST_SQUARE = 2.0**-972  # a mean of squares below it counts as underflowed


class Solution(NamedTuple):
    weights: Tensor
    optimum: Tensor


# --- the scalar problem (Theorem 1) ------------------------------------------------------------------


def project_on_simplex(v: Tensor) -> Tensor:
    """The point of the simplex nearest to v (N,), by sorting (Held, Wolfe & Crowder 1974)."""
    ordered = v.sort(descending=True).values
    thresholds = (ordered.cumsum(0) - 1) / torch.arange(1, len(v) + 1, dtype=v.dtype)
    size = int((ordered > thresholds).sum())
    return (v - thresholds[size - 1]).clamp(min=0)


def _solve_scalar(a: Tensor, p: Tensor, rho: float) -> Solution:
    """minimise 1/2 (a.c)^2 + rho/2 ||c - p||^2 over the simplex; rho = 0 is the limit rho -> 0.

    Stationarity makes c(lam) the projection of p - lam a on the simplex, with lam = a.c / rho. a.c(lam) is
    decreasing in lam, so lam is found by bisection.
    """
    low, high = float(a.min()), float(a.max())
    if rho == 0 and not low < 0 < high:
        s = max(low, 0.0) + min(high, 0.0)
        c = torch.zeros_like(p)
        tied = a == s
        c[tied] = p[tied] + (1 - p[tied].sum()) / tied.sum()
        return Solution(c, a.new_tensor(s))
    sign = 1.0 if float(a @ p) >= 0 else -1.0
    away = sign * a - (sign * a).min()  # same projection; keeps the digits of p

    def excess(lam: float) -> float:
        return sign * float(a @ project_on_simplex(p - lam * away)) - rho * lam

    left, right = 0.0, 1.0
    while excess(right) > 0 and right < 1e300:
        left, right = right, 2 * right
    for _ in range(1100):
        middle = (left + right) / 2
        if middle in (left, right):
            break
        left, right = (middle, right) if excess(middle) > 0 else (left, middle)
    c = project_on_simplex(p - right * away)
    return Solution(c, a @ c if rho > 0 else a.new_zeros(()))


def without_underflow(squares: Tensor) -> Tensor:
    """The scale of the regularization; -1, for max a^2, where squares underflow."""
    return torch.where(squares < LEAST_SQUARE, -1.0, squares)


def _scalar_problem(
    a: Tensor, p: Tensor, regularization: float, scale: Tensor | None, present: Tensor
) -> Solution:
    """Solves one row, scaled to magnitude 1. A scale of None or below 0 stands for max a^2."""
    if not present.any():
        return Solution(p.clone(), a.new_zeros(()))
    kept, share = a[present], normalized(p[present])
    if not torch.isfinite(kept).all() or (
        regularization > 0 and scale is not None and not torch.isfinite(scale)
    ):
        return Solution(torch.full_like(p, math.nan), a.new_tensor(math.nan))
    unit = float(kept.abs().max())
    weights = torch.zeros_like(p)
    if unit == 0:
        weights[present] = share
        return Solution(weights, a.new_zeros(()))
    given = scale is not None and not scale < 0
    rho = regularization * float(scale) / unit / unit if given else regularization  # type: ignore[arg-type]
    rho = rho if rho > 1e-280 else 0.0
    solution = (
        Solution(share, kept @ share / unit) if math.isinf(rho) else _solve_scalar(kept / unit, share, rho)
    )
    weights[present] = solution.weights
    return Solution(weights, solution.optimum * unit)


def normalized(p: Tensor) -> Tensor:
    """The preference normalised over the included objectives; uniform if their preferences sum to 0."""
    return p / p.sum() if float(p.sum()) > 0 else torch.full_like(p, 1 / len(p))


def normalized_preference(preference: object, n: int) -> Tensor:
    if preference is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    return normalized(torch.as_tensor(preference, dtype=torch.float64))


def _rows(
    solve: Callable[..., Solution], rows: Sequence[tuple[Tensor | None, ...]], n: int, shape: tuple[int, ...]
) -> Solution:
    solutions = [solve(*row) for row in rows]
    weights = torch.stack([s.weights for s in solutions]) if rows else torch.zeros(0, n)
    optima = torch.stack([s.optimum for s in solutions]) if rows else torch.zeros(0)
    return Solution(weights.double().reshape(*shape, n), optima.double().reshape(shape))


def pama_weights(
    scores: Tensor,
    *,
    preference: object = None,
    regularization: float = 0.0,
    scale: object = None,
    present: Tensor | None = None,
) -> Solution:
    """scores (..., N) -> weights (..., N), optimum (...). Objectives with `present` (..., N) False are
    excluded."""
    a = scores.detach().double()
    n, shape = a.shape[-1], tuple(a.shape[:-1])
    p = normalized_preference(preference, n)
    here = torch.ones_like(a, dtype=torch.bool) if present is None else present
    a = torch.where(here, a, 0.0)
    present_rows = here.reshape(-1, n).unbind()
    r: Sequence[Tensor | None] = [None] * len(present_rows)
    if scale is not None:
        r = torch.as_tensor(scale, dtype=torch.float64).expand(shape).reshape(-1).unbind()
    rows = list(zip(a.reshape(-1, n).unbind(), r, present_rows, strict=True))
    return _rows(lambda x, size, mask: _scalar_problem(x, p, regularization, size, mask), rows, n, shape)


# --- the min-norm problem ----------------------------------------------------------------------------


def _min_norm_problem(m: Tensor, p: Tensor, regularization: float, present: Tensor) -> Solution:
    """minimise 1/2 c'Mc + rho/2 ||c - p||^2 over the simplex, choosing the minimiser nearest to p.

    With rho = 0 a ridge far above rounding finds a minimiser, and proximal steps in the units of each
    objective remove its bias: the weights are exact for objectives of any scale. From it follows the nearest.
    """
    if not present.any():
        return Solution(p.clone(), m.new_zeros(()))
    kept, share = m[present][:, present], normalized(p[present])
    if not torch.isfinite(kept).all():
        return Solution(torch.full_like(p, math.nan), m.new_tensor(math.nan))
    weights = torch.zeros_like(p)
    unit = float(kept.diagonal().max())
    if unit <= 0:
        weights[present] = share
        return Solution(weights, m.new_zeros(()))
    kept = kept / (2 * unit) + kept.T / (2 * unit)
    ridge = regularization if regularization > 0 else 1e-8
    c = _lawson_hanson(kept + ridge * torch.eye(len(kept), dtype=kept.dtype), ridge * share)
    own = kept.diagonal()
    own = torch.where(own > 0, own, own[own > 0].min())
    for step in range(20 if regularization == 0 else 0):
        if _is_min_norm(kept, c):
            break
        metric = own * ridge * 10.0 ** min(0, max(6 - step, -6))  # smaller for nearly parallel gradients
        c = _lawson_hanson(kept + torch.diag(metric), metric * c)
    if regularization == 0:
        d, _, null = factored(kept)
        free = torch.linalg.qr(null / d[:, None]).Q  # Mw = 0
        sums = free.sum(0)
        if float(sums.norm()) > 1e-10:  # above rounding: of these the w with sum w = 0
            free = free @ torch.linalg.qr(sums[:, None], mode="complete").Q[:, 1:]
        c = nearest_non_negative(share, c, free)
        c = c / c.sum()
    weights[present] = c
    return Solution(weights, (c @ kept @ c * unit).clamp(min=0))


def _is_min_norm(m: Tensor, c: Tensor) -> bool:
    """Whether c satisfies the optimality conditions up to the rounding of each product (Mc)_i."""
    product, rounding = m @ c, 1e-15 * (m.abs() @ c)
    excess = product - product @ c
    tolerance = rounding + rounding @ c
    return bool((torch.where(c > 0, excess.abs(), -excess) <= tolerance).all())


def _lawson_hanson(h: Tensor, q: Tensor) -> Tensor:
    """minimise 1/2 c'Hc - q.c over the simplex, H positive definite: Lawson and Hanson's method on the
    equivalent least-squares problem, one index at a time."""
    n = len(q)
    c = torch.zeros(n, dtype=h.dtype)
    support = torch.zeros(n, dtype=torch.bool)
    first = int((h.diagonal() / 2 - q).argmin())
    c[first], support[first] = 1.0, True
    for _ in range(10 * n + 10):
        gradient, rounding = h @ c - q, 1e-15 * (h.abs() @ c + q.abs())
        level = gradient @ c
        outside = torch.where(support, math.inf, gradient - level + rounding + rounding @ c)
        enter = int(outside.argmin())
        if float(outside[enter]) >= 0:
            return c
        support[enter] = True
        while True:
            index = support.nonzero().squeeze(1)
            scale = h.diagonal()[index].rsqrt()  # solved with a diagonal of 1
            right = torch.stack([scale, q[index] * scale], 1)
            system = h[index][:, index] * scale[:, None] * scale
            direction, centre = torch.linalg.lstsq(system, right, driver="gelsd").solution.T * scale
            target = torch.zeros_like(c)
            target[index] = centre + direction * ((1 - centre.sum()) / direction.sum())
            if float(target[index].min()) > 0:
                c = target
                break
            falling = support & (target <= 0)
            step = float((c[falling] / (c[falling] - target[falling]).clamp(min=1e-300)).min())
            c = c + step * (target - c)
            support &= c > 0
            support &= ~(falling & (c <= 1e-300))
            c[~support] = 0.0
            c = c / c.sum()
    return c


def min_norm_weights(
    gram: Tensor,
    *,
    preference: object = None,
    regularization: float = 0.0,
    present: Tensor | None = None,
) -> Solution:
    """gram (..., N, N) -> weights (..., N), optimum c'Mc (...)."""
    m = gram.detach().double()
    n, shape = m.shape[-1], tuple(m.shape[:-2])
    p = normalized_preference(preference, n)
    here = torch.ones(n, dtype=torch.bool) if present is None else present
    here = here.expand(*shape, n)
    rows = list(zip(m.reshape(-1, n, n).unbind(), here.reshape(-1, n).unbind(), strict=True))
    return _rows(lambda x, mask: _min_norm_problem(x, p, regularization, mask), rows, n, shape)


# --- UPGrad (Quinton & Rey 2024) ---------------------------------------------------------------------


def _upgrad_problem(m: Tensor, p: Tensor, present: Tensor) -> Solution:
    """c = sum_i c^(i), c^(i) = argmin c'Mc over c >= p_i e_i, normalised to sum 1.

    With M = DJ'JD, D = diag(d), c^(i) = p_i (e_i + d_i D^-1 z), z = argmin |J (z + e_i)| over z >= 0, at any
    scales. If M is singular, c^(i) is the minimiser nearest to p_i e_i (ratios of norms are capped).
    """
    weights = p.clone()
    if not present.any():
        return Solution(weights, m.new_zeros(()))
    kept, share = m[present][:, present], p[present]
    if not torch.isfinite(kept).all():
        return Solution(torch.full_like(p, math.nan), m.new_tensor(math.nan))
    if float(share.sum()) > 0:
        share = share / share.sum()
        weights = torch.zeros_like(p)
        total, live = share.clone(), kept.diagonal() > 0
        if live.any():
            d, factor, null = factored(kept[live][:, live])
            unit = (d.max() / d).clamp(max=MAX_NORM_RATIO)  # of z, in c
            free = torch.linalg.qr(unit[:, None] * null).Q
            for own, part, gradient in zip(d, share[live], factor.T, strict=True):
                if part > 0:
                    z = non_negative_least_squares(factor, -gradient)
                    z = nearest_non_negative(torch.zeros_like(z), unit * z, free) / unit
                    total[live] += part * own / d * z
        weights[present] = total / total.sum()
    c = weights[present]
    return Solution(weights, (c @ kept @ c).clamp(min=0))


def upgrad_weights(gram: Tensor, *, preference: object = None, present: Tensor | None = None) -> Solution:
    """gram (..., N, N) -> weights (..., N), optimum c'Mc (...)."""
    m = gram.detach().double()
    n, shape = m.shape[-1], tuple(m.shape[:-2])
    p = normalized_preference(preference, n)
    here = torch.ones(n, dtype=torch.bool) if present is None else present
    here = here.expand(*shape, n)
    rows = list(zip(m.reshape(-1, n, n).unbind(), here.reshape(-1, n).unbind(), strict=True))
    return _rows(lambda x, mask: _upgrad_problem(x, p, mask), rows, n, shape)


# --- SoftMin (RVPO) ----------------------------------------------------------------------------------


def softmin_weights(
    advantages: Tensor, *, preference: object = None, temperature: float = 1.0, present: Tensor | None = None
) -> Solution:
    """advantages (..., N) -> c_i proportional to p_i exp(-A_i / temperature) (..., N), and c.A (...)."""
    a = advantages.detach().double()
    n, shape = a.shape[-1], tuple(a.shape[:-1])
    p = normalized_preference(preference, n)
    here = torch.ones_like(a, dtype=torch.bool) if present is None else present

    def solve(row: Tensor, mask: Tensor) -> Solution:
        if not mask.any():
            return Solution(p.clone(), row.new_zeros(()))
        kept, share, weights = row[mask], normalized(p[mask]), torch.zeros_like(p)
        if not torch.isfinite(kept).all():
            return Solution(torch.full_like(p, math.nan), row.new_tensor(math.nan))
        least = kept[share > 0].min()  # over positive preferences: prevents underflow of all terms
        weights[mask] = normalized(
            torch.where(share > 0, share * torch.exp((least - kept) / temperature), 0.0)
        )
        return Solution(weights, weights[mask] @ kept)

    rows = list(zip(a.reshape(-1, n).unbind(), here.reshape(-1, n).unbind(), strict=True))
    return _rows(solve, rows, n, shape)


def pareto_gap(gram: Tensor, weights: Tensor) -> Tensor:
    """Wolfe gap c'Mc - min_j (Mc)_j: 0 exactly where c is a min-norm point. (...)"""
    m, c = gram.double(), weights.double()
    product = (m @ c.unsqueeze(-1)).squeeze(-1)
    return (product * c).sum(-1) - product.amin(-1)
