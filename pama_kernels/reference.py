"""The specification of the library: float64, plain PyTorch, obvious rather than fast.

Every backend is tested against this module. The functions have the names and arguments of the public ones
(except `out`, `pairs` and `process_group`); they accept any layout of the public API, turn it into dense
float64 tensors (sequences, tokens, objectives), and follow the formulas of He & Maghsudi 2025 (arXiv
2508.07768) line by line. Nothing here avoids a host synchronisation, an allocation or a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._validate import Layout, resolve_layout
from .rules import Fixed, Pama, RuleLike, SoftMin, UPGrad, noon_of, resolve_rule

MAX_LOG_RATIO = 20.0


class Solution(NamedTuple):
    weights: Tensor
    optimum: Tensor


@dataclass(frozen=True)
class Statistics:
    """Sums over valid tokens, weighted by the token weights of the aggregation, and the quantities derived
    from them."""

    count: Tensor  # (N,) each
    bound_sum: Tensor
    bound_square_sum: Tensor
    logprob_sum: Tensor
    surrogate_sum: Tensor
    advantage_sum: Tensor
    advantage_square_sum: Tensor
    positive_count: Tensor
    clipped_count: Tensor
    token_count: Tensor  # 0-d
    kl_sum: Tensor
    scores: Tensor  # (N,)
    second_moments: Tensor
    signal: Tensor  # bool
    gram: Tensor  # (N, N)
    cosines: Tensor
    advantage_gram: Tensor
    conflict: Tensor


class Combined(NamedTuple):
    advantages: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: Statistics


class Loss(NamedTuple):
    loss: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: Statistics


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


def _scalar_problem(
    a: Tensor, p: Tensor, regularization: float, scale: Tensor | None, present: Tensor
) -> Solution:
    """Solves one row. Absent objectives are excluded; scores are first scaled to magnitude 1."""
    if not present.any():
        return Solution(p.clone(), a.new_zeros(()))
    kept, share = a[present], _normalized(p[present])
    if not torch.isfinite(kept).all() or (
        regularization > 0 and scale is not None and not torch.isfinite(scale)
    ):
        return Solution(torch.full_like(p, math.nan), a.new_tensor(math.nan))
    unit = float(kept.abs().max())
    weights = torch.zeros_like(p)
    if unit == 0:
        weights[present] = share
        return Solution(weights, a.new_zeros(()))
    rho = regularization if scale is None else regularization * float(scale) / unit / unit
    rho = rho if rho > 1e-280 else 0.0
    solution = (
        Solution(share, kept @ share / unit) if math.isinf(rho) else _solve_scalar(kept / unit, share, rho)
    )
    weights[present] = solution.weights
    return Solution(weights, solution.optimum * unit)


def _normalized(p: Tensor) -> Tensor:
    """The preference normalised over the included objectives; uniform if their preferences sum to 0."""
    return p / p.sum() if float(p.sum()) > 0 else torch.full_like(p, 1 / len(p))


def _preference(preference: object, n: int) -> Tensor:
    if preference is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    return _normalized(torch.as_tensor(preference, dtype=torch.float64))


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
    p = _preference(preference, n)
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

    With rho = 0 a ridge of 1e-13 stands for the limit rho -> 0. The support is found by Lawson and
    Hanson's method on the equivalent least-squares problem, one index at a time.
    """
    if not present.any():
        return Solution(p.clone(), m.new_zeros(()))
    kept, share = m[present][:, present], _normalized(p[present])
    if not torch.isfinite(kept).all():
        return Solution(torch.full_like(p, math.nan), m.new_tensor(math.nan))
    weights = torch.zeros_like(p)
    unit = float(kept.diagonal().max())
    if unit <= 0:
        weights[present] = share
        return Solution(weights, m.new_zeros(()))
    kept = (kept + kept.T) / (2 * unit)
    ridge = regularization if regularization > 0 else 1e-13
    c = _lawson_hanson(kept + ridge * torch.eye(len(kept), dtype=kept.dtype), ridge * share)
    weights[present] = c
    return Solution(weights, (c @ kept @ c * unit).clamp(min=0))


def _lawson_hanson(h: Tensor, q: Tensor) -> Tensor:
    """minimise 1/2 c'Hc - q.c over the simplex, H positive definite."""
    n = len(q)
    c = torch.zeros(n, dtype=h.dtype)
    support = torch.zeros(n, dtype=torch.bool)
    first = int((h.diagonal() / 2 - q).argmin())
    c[first], support[first] = 1.0, True
    for _ in range(10 * n + 10):
        gradient = h @ c - q
        level = gradient @ c
        outside = torch.where(support, math.inf, gradient - level)
        enter = int(outside.argmin())
        if float(outside[enter]) >= -1e-15:
            return c
        support[enter] = True
        while True:
            index = support.nonzero().squeeze(1)
            size = len(index)
            system = torch.ones(size + 1, size + 1, dtype=h.dtype)
            system[:size, :size] = h[index][:, index]
            system[size, size] = 0.0
            right = torch.cat([q[index], torch.ones(1, dtype=h.dtype)])
            trial = torch.linalg.lstsq(system, right.unsqueeze(1), driver="gelsd").solution
            target = torch.zeros_like(c)
            target[index] = trial[:size, 0]
            if float(target[index].min()) > 0:
                c = target
                break
            falling = support & (target <= 0)
            step = float((c[falling] / (c[falling] - target[falling])).min())
            c = c + step * (target - c)
            support &= c > 1e-16
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
    p = _preference(preference, n)
    here = torch.ones(n, dtype=torch.bool) if present is None else present
    here = here.expand(*shape, n)
    rows = list(zip(m.reshape(-1, n, n).unbind(), here.reshape(-1, n).unbind(), strict=True))
    return _rows(lambda x, mask: _min_norm_problem(x, p, regularization, mask), rows, n, shape)


# --- UPGrad (Quinton & Rey 2024) ---------------------------------------------------------------------


def _non_negative_least_squares(h: Tensor, q: Tensor) -> Tensor:
    """minimise 1/2 v'Hv - q.v over v >= 0, H positive definite: Lawson & Hanson 1974, one index at a time."""
    n = len(q)
    v, support = torch.zeros(n, dtype=h.dtype), torch.zeros(n, dtype=torch.bool)
    tolerance = 1e-15 * float(h.abs().max()) if n else 0.0
    for _ in range(10 * n + 10):
        rise = torch.where(support, -math.inf, q - h @ v)
        enter = int(rise.argmax())
        if float(rise[enter]) <= tolerance:
            return v
        support[enter] = True
        while True:
            index = support.nonzero().squeeze(1)
            target = torch.zeros_like(v)
            target[index] = torch.linalg.solve(h[index][:, index], q[index])
            if len(index) == 0 or float(target[index].min()) > 0:
                v = target
                break
            falling = support & (target <= 0)
            step = float((v[falling] / (v[falling] - target[falling])).min())
            v = v + step * (target - v)
            support &= v > 0
            support &= ~(falling & (v <= 1e-300))
            v[~support] = 0.0
    return v


def _upgrad_problem(m: Tensor, p: Tensor, present: Tensor) -> Solution:
    """c = sum_i c^(i), c^(i) = argmin c'Mc over c >= p_i e_i, normalised to sum 1.

    With D = diag(sqrt(M_ii)) and C the cosines, c^(i) = p_i (e_i + d_i D^-1 z), z = argmin 1/2 z'Cz + C_i.z
    over z >= 0, whatever the scales. A ridge of 1e-12 chooses among the minimisers of a singular problem.
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
        d = kept.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(d > 0, 1 / d, 0.0)
        h = (kept / 2 + kept.T / 2) * inverse[:, None] * inverse
        total = share.clone()
        regular = h + 1e-12 * torch.eye(len(h), dtype=h.dtype)
        for i in range(len(share)):
            if share[i] > 0 and d[i] > 0:
                z = torch.where(d > 0, _non_negative_least_squares(regular, -h[i]), 0.0)
                total = total + share[i] * d[i] * inverse * z
        weights[present] = total / total.sum()
    c = weights[present]
    return Solution(weights, (c @ kept @ c).clamp(min=0))


def upgrad_weights(gram: Tensor, *, preference: object = None, present: Tensor | None = None) -> Solution:
    """gram (..., N, N) -> weights (..., N), optimum c'Mc (...)."""
    m = gram.detach().double()
    n, shape = m.shape[-1], tuple(m.shape[:-2])
    p = _preference(preference, n)
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
    p = _preference(preference, n)
    here = torch.ones_like(a, dtype=torch.bool) if present is None else present

    def solve(row: Tensor, mask: Tensor) -> Solution:
        if not mask.any():
            return Solution(p.clone(), row.new_zeros(()))
        kept, share, weights = row[mask], _normalized(p[mask]), torch.zeros_like(p)
        if not torch.isfinite(kept).all():
            return Solution(torch.full_like(p, math.nan), row.new_tensor(math.nan))
        least = kept[share > 0].min()  # over positive preferences: prevents underflow of all terms
        weights[mask] = _normalized(
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


# --- dense form of any layout ------------------------------------------------------------------------


class _Dense(NamedTuple):
    layout: Layout
    advantages: Tensor  # (B, T, N)
    valid: Tensor  # (B, T) bool
    present: Tensor  # (B, T, N) bool
    logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor
    pack: Callable[[Tensor], Tensor]  # (B, T) -> the caller's layout


def _dense(
    advantages: Tensor,
    mask: Tensor | None,
    logprobs: Tensor | None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> _Dense:
    layout = resolve_layout(
        advantages,
        mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        objective_mask=objective_mask,
        cu_seqlens=cu_seqlens,
    )
    n, rows = layout.objectives, layout.rows
    if cu_seqlens is None:
        starts, lengths = [b * layout.width for b in range(rows)], [layout.width] * rows
        width = layout.width
    else:
        offsets = [int(x) for x in cu_seqlens]
        starts, lengths = offsets[:-1], [b - a for a, b in pairwise(offsets)]
        width = max(lengths, default=0)
    # Token t of row b is at position[b, t] of the flat tensors.
    position = torch.zeros(rows, width, dtype=torch.long)
    inside = torch.zeros(rows, width, dtype=torch.bool)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        position[b, :length] = torch.arange(start, start + length)
        inside[b, :length] = True

    def per_token(x: Tensor) -> Tensor:
        """(B, T) or (M,) to (B, T)."""
        flat = x.reshape(-1)
        return flat[position] if len(flat) else flat.new_zeros(rows, width)

    def per_objective(x: Tensor, per_sequence: bool) -> Tensor:
        """(B, N), (B, T, N) or (M, N) to (B, T, N)."""
        if per_sequence:
            return x[:, None, :].expand(rows, width, n)
        flat = x.reshape(-1, n)
        return flat[position] if len(flat) else flat.new_zeros(rows, width, n)

    valid = inside if mask is None else inside & (per_token(mask) != 0)
    present = valid[..., None].expand(rows, width, n)
    if objective_mask is not None:
        present = present & (per_objective(objective_mask, layout.mask_per_sequence) != 0)

    def values(x: Tensor | None) -> Tensor | None:
        """Converts to float64 and replaces masked values by 0, so that they are ignored."""
        return None if x is None else torch.where(valid, per_token(x).double(), 0.0)

    raw = per_objective(advantages.detach(), layout.per_sequence).double()
    weights = values(importance_weights)
    flat_result = layout.packed or not layout.sequences
    return _Dense(
        layout=layout,
        advantages=torch.where(present, raw, 0.0),
        valid=valid,
        present=present,
        logprobs=values(logprobs),
        old_logprobs=values(old_logprobs),
        ref_logprobs=values(ref_logprobs),
        importance_weights=valid.double() if weights is None else weights,
        pack=(lambda x: x[inside]) if flat_result else (lambda x: x),
    )


# --- the surrogate and its bound ---------------------------------------------------------------------


class _Terms(NamedTuple):
    advantages: Tensor  # A (B, T, N), NaN where an input is not finite
    bound: Tensor  # I
    surrogate: Tensor  # g, differentiable in logprobs
    unusable: Tensor  # tokens where an input is not finite (B, T) bool
    clipped: Tensor  # A is not 0 and has no gradient, bool
    kl: Tensor  # k3 to the behaviour policy (B, T)


def _terms(x: _Dense, clip_range: object, noon: bool, dual_clip: float | None) -> _Terms:
    low, high = _clip_bounds(clip_range)
    logp = torch.zeros_like(x.importance_weights) if x.logprobs is None else x.logprobs
    old = logp.detach() if x.old_logprobs is None else x.old_logprobs.detach()
    w = x.importance_weights[..., None]
    d = logp - old
    u = torch.exp(d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))[..., None]
    raw = x.advantages
    token_ok = torch.isfinite(logp) & torch.isfinite(old) & torch.isfinite(x.importance_weights)
    own = torch.where(x.present & ~torch.isfinite(raw), math.nan, 0.0)
    poison = torch.where(x.present & ~token_ok[..., None], math.nan, own)

    a = raw.clamp(min=0) if noon else raw
    ratio = u if dual_clip is None else u.clamp(max=dual_clip)
    surrogate = w * torch.minimum(ratio * a, u.clamp(1 - low, 1 + high) * a)
    step = d.detach()[..., None]
    stopped = (a > 0) & (step > math.log1p(high))
    stopped |= (a < 0) & (step < (math.log1p(-low) if low < 1 else -math.inf))
    if dual_clip is not None:
        stopped |= (a < 0) & (step > math.log(dual_clip))
    stopped |= step.abs() > MAX_LOG_RATIO
    bound = torch.where(stopped, 0.0, w.detach() * a)
    clamped = d.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = clamped.exp() - 1 - clamped
    kl = torch.where(x.valid & ~token_ok, math.nan, kl)
    return _Terms(
        torch.where(x.present, a + own, 0.0),
        torch.where(x.present, bound + poison, 0.0),
        torch.where(x.present, surrogate + poison, 0.0),
        x.valid & ~token_ok,
        stopped & (a != 0) & x.present & token_ok[..., None],
        kl,
    )


def _clip_bounds(clip_range: object) -> tuple[float, float]:
    if clip_range is None:
        return 1.0, math.inf
    if isinstance(clip_range, (tuple, list)):
        return float(clip_range[0]), float(clip_range[1])
    return float(clip_range), float(clip_range)  # type: ignore[arg-type]


# --- statistics --------------------------------------------------------------------------------------


def _token_weights(x: _Dense, aggregation: str) -> Tensor:
    """omega (B, T): 1, or 1 / T_s under "seq-mean-token-mean"; 0 where masked."""
    valid = x.valid.double()
    if aggregation != "seq-mean-token-mean":
        return valid
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, with 0 / 0 = 0: without tokens the score is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _statistics(x: _Dense, t: _Terms, aggregation: str) -> Statistics:
    omega = _token_weights(x, aggregation)
    by_token = omega.flatten()

    def total(values: Tensor) -> Tensor:
        return (torch.where(x.present, values, 0.0) * omega[..., None]).sum((0, 1))

    def products(first: Tensor, second: Tensor) -> Tensor:
        return (first.flatten(0, 1) * by_token[:, None]).T @ second.flatten(0, 1)

    logp = torch.zeros_like(x.importance_weights) if x.logprobs is None else x.logprobs.detach()
    raw, bound, here = x.advantages, t.bound, x.present.double()
    count, bound_sum, bound_square_sum = total(here), total(bound), total(bound.square())
    bound_product, advantage_product, pairs = products(bound, bound), products(raw, raw), products(here, here)
    mean = _ratio(products(raw, here), pairs)
    second = _ratio(products(raw.square(), here), pairs)
    variance = second - mean.square()
    variance = torch.where(variance <= 4e-7 * second, 0.0, variance)  # float32 rounding of a constant
    covariance = _ratio(advantage_product, pairs) - mean * mean.T
    norms = bound_product.diagonal().sqrt()
    cosines = _ratio(bound_product, torch.outer(norms, norms))
    cosines = torch.where(torch.eye(len(norms), dtype=torch.bool) & (cosines > 0), 1.0, cosines)
    return Statistics(
        count=count,
        bound_sum=bound_sum,
        bound_square_sum=bound_square_sum,
        logprob_sum=total(bound * logp[..., None]),
        surrogate_sum=total(t.surrogate.detach()),
        advantage_sum=total(raw),
        advantage_square_sum=total(raw.square()),
        positive_count=total((raw > 0).double()),
        clipped_count=total(t.clipped.double()),
        token_count=omega.sum(),
        kl_sum=(torch.where(x.valid, t.kl, 0.0) * omega).sum(),
        scores=_ratio(bound_sum, count),
        second_moments=_ratio(bound_square_sum, count),
        signal=(raw != 0).flatten(0, 1).any(0),
        gram=_ratio(bound_product, torch.outer(count, count).sqrt()),
        cosines=cosines,
        advantage_gram=_ratio(advantage_product, torch.outer(count, count).sqrt()),
        conflict=_ratio(covariance, (variance * variance.T).sqrt()).clamp(-1, 1),
    )


def objective_statistics(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: object = 0.2,
    noon: bool = False,
    dual_clip: float | None = None,
    objective_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
) -> Statistics:
    x = _dense(advantages, mask, logprobs, old_logprobs, None, importance_weights, objective_mask, cu_seqlens)
    return _statistics(x, _terms(x, clip_range, noon, dual_clip), aggregation)


# --- weights -----------------------------------------------------------------------------------------


def batch_weights(
    statistics: Statistics, rule: RuleLike, preference: object, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One set for the batch: weights (N,), optimum, and the preference over the objectives with a signal."""
    rule, p = resolve_rule(rule), _preference(preference, n)
    part = statistics.signal & (statistics.count > 0)
    if isinstance(rule, Pama) and rule.bound == "gram":
        part &= statistics.bound_square_sum != 0
    effective = torch.where(part, p, 0.0)
    effective = effective / effective.sum() if float(effective.sum()) > 0 else p
    if not isinstance(rule, (Pama, UPGrad, Fixed, SoftMin)):
        c = rule(statistics).double()  # type: ignore[arg-type]
        return c, statistics.scores @ c, effective
    if not part.any():
        return p, p.new_zeros(()), effective
    if isinstance(rule, Fixed):
        return effective, statistics.scores @ effective, effective
    if isinstance(rule, UPGrad):
        solution = upgrad_weights(statistics.gram, preference=p, present=part)
    elif isinstance(rule, Pama) and rule.bound == "gram":
        solution = min_norm_weights(
            statistics.cosines, preference=p, regularization=float(rule.regularization), present=part
        )
    else:
        assert isinstance(rule, Pama)
        solution = pama_weights(
            statistics.scores,
            preference=p,
            regularization=float(rule.regularization),
            scale=statistics.second_moments[part].amax(),
            present=part,
        )
    return *solution, effective


def _token_coefficients(
    x: _Dense,
    t: _Terms,
    statistics: Statistics,
    rule: RuleLike,
    preference: object,
    weights: Tensor | None,
    omega: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of every token (B, T, N), and the reported weights and optimum."""
    rows, width, n = x.advantages.shape
    here = x.present.double()
    counts = here.sum(1)
    means = t.bound.sum(1) / counts.clamp(min=1)
    if weights is not None:
        c = weights.detach().double()
        if c.dim() == 1:
            return c.expand(rows, width, n), c, statistics.scores @ c
        return c[:, None].expand(rows, width, n), c, (means * c).sum(-1)
    rule = resolve_rule(rule)

    def shared(c: Tensor, p: Tensor) -> Tensor:
        """c_i divided by the sum of the preferences of the objectives present at the token."""
        return _ratio(here * c, (here * p).sum(-1, keepdim=True))

    if not isinstance(rule, (Pama, SoftMin)) or rule.weights_per == "batch":
        c, optimum, effective = batch_weights(statistics, rule, preference, n)
        return shared(c, effective), c, optimum
    p = _preference(preference, n)
    if rule.weights_per == "sequence":
        if isinstance(rule, SoftMin):
            a = x.advantages.sum(1) / counts.clamp(min=1)
            solution = softmin_weights(
                a, preference=p, temperature=float(rule.temperature), present=counts > 0
            )
        else:
            squares = t.bound.square().sum(1) / counts.clamp(min=1)
            solution = pama_weights(
                means,
                preference=p,
                regularization=float(rule.regularization),
                scale=squares.amax(-1),
                present=counts > 0,
            )
        rowwise = torch.stack([_in_row(p, present) for present in counts > 0]) if rows else p.expand(0, n)
        return shared(solution.weights[:, None], rowwise[:, None]), *solution
    if isinstance(rule, SoftMin):
        raw = x.advantages
        solution = softmin_weights(raw, preference=p, temperature=float(rule.temperature), present=x.present)
    else:
        regularization = float(rule.regularization)
        solution = pama_weights(t.bound, preference=p, regularization=regularization, present=x.present)
    if not x.valid.any():
        return solution.weights, p, t.bound.new_zeros(())
    share = omega[x.valid] / omega.sum()
    return (
        here * solution.weights,
        (solution.weights[x.valid] * share[:, None]).sum(0),
        (solution.optimum[x.valid] * share).sum(),
    )


def _in_row(p: Tensor, present: Tensor) -> Tensor:
    """The preference normalised over the objectives that are present in a sequence."""
    if not present.any():
        return p
    result = torch.zeros_like(p)
    result[present] = _normalized(p[present])
    return result


def combine_advantages(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    rule: RuleLike = None,
    preference: object = None,
    weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: object = None,
    aggregation: str = "token-mean",
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Combined:
    rule = resolve_rule(rule)
    x = _dense(advantages, mask, logprobs, old_logprobs, None, None, objective_mask, cu_seqlens)
    t = _terms(x, clip_range, noon_of(rule), None)
    statistics, omega = _statistics(x, t, aggregation), _token_weights(x, aggregation)
    c, reported, optimum = _token_coefficients(x, t, statistics, rule, preference, weights, omega)
    combined = (c * t.advantages).sum(-1)
    combined = torch.where(x.valid, combined, 0.0)
    if normalize:
        root = ((omega * combined.square()).sum() / omega.sum().clamp(min=1e-300)).sqrt()
        size = _ratio(statistics.advantage_square_sum, statistics.count).sqrt()
        share = reported.abs().mean(0) if reported.dim() == 2 else reported.abs()
        dtype = torch.float64 if advantages.dtype == torch.float64 else torch.float32
        noise = 32 * torch.finfo(dtype).eps * (share * size).sum()  # rounding of the specified arithmetic
        combined = combined if root <= noise else combined / root
    by_token = getattr(rule, "weights_per", "batch") == "token" and weights is None and logprobs is not None
    if not x.layout.per_sequence or by_token:
        return Combined(x.pack(combined), reported, optimum, statistics)
    # One value per sequence: that of any of its valid tokens.
    some = x.valid.any(1)
    result = combined.new_zeros(len(some))
    if combined.shape[1]:
        result = combined.gather(1, x.valid.double().argmax(1, keepdim=True)).squeeze(1)
    return Combined(torch.where(some, result, 0.0), reported, optimum, statistics)


def pama_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    rule: RuleLike = None,
    preference: object = None,
    weights: Tensor | None = None,
    clip_range: object = 0.2,
    dual_clip: float | None = None,
    objective_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Loss:
    """The loss is differentiable by autograd with respect to `logprobs`."""
    rule = resolve_rule(rule)
    x = _dense(
        advantages, mask, logprobs, old_logprobs, ref_logprobs, importance_weights, objective_mask, cu_seqlens
    )
    t = _terms(x, clip_range, noon_of(rule), dual_clip)
    statistics, omega = _statistics(x, t, aggregation), _token_weights(x, aggregation)
    c, reported, optimum = _token_coefficients(x, t, statistics, rule, preference, weights, omega)
    per_token = -(c.detach() * t.surrogate).sum(-1) + torch.where(t.unusable, math.nan, 0.0)
    if kl_coef:
        assert x.logprobs is not None
        assert x.ref_logprobs is not None
        r = x.ref_logprobs.detach() - x.logprobs
        clamped = r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = torch.where(torch.isfinite(r), clamped.exp() - clamped - 1, math.nan)
        per_token = per_token + kl_coef * k3
    per_token = torch.where(x.valid, per_token, 0.0)
    rows = float(len(x.valid))
    denominator = (
        x.valid.double().sum().clamp(min=1) if aggregation == "token-mean" else torch.tensor(max(rows, 1.0))
    )
    if normalizer is not None:
        denominator = torch.as_tensor(normalizer, dtype=torch.float64)
    loss = (per_token * omega).sum() / denominator
    if not x.valid.any():
        loss = per_token.sum()
    return Loss(loss, reported, optimum, statistics)


# --- advantages --------------------------------------------------------------------------------------


def multi_objective_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, T, N) -> (advantages, returns). Schulman et al. 2016, equation 16, for each objective."""
    r, v = rewards.detach().double(), values.detach().double()
    rows, width, n = r.shape
    valid = torch.ones(rows, width, dtype=torch.bool) if mask is None else mask != 0
    over = torch.zeros(rows, width, dtype=torch.bool) if dones is None else dones != 0
    cut = torch.zeros(rows, width, dtype=torch.bool) if truncated is None else truncated != 0
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for b in range(rows):
        following = torch.zeros(n, dtype=torch.float64)
        advantage = torch.zeros(n, dtype=torch.float64)
        if last_values is not None:
            following = last_values[b].detach().double()
        for t in reversed(range(width)):
            if not valid[b, t]:
                continue
            if over[b, t]:
                following, advantage = torch.zeros_like(following), torch.zeros_like(advantage)
            elif cut[b, t]:
                assert final_values is not None
                following, advantage = final_values[b, t].detach().double(), torch.zeros_like(advantage)
            delta = r[b, t] + gamma * following - v[b, t]
            advantage = delta + gamma * lam * advantage
            following = v[b, t]
            advantages[b, t] = advantage
            returns[b, t] = advantage + v[b, t]
    return advantages, returns


def group_normalize(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """(B, N) -> (B, N): subtracts the mean of the group and divides by its standard deviation (ddof 1) plus
    eps."""
    x = rewards.detach().double()
    rows, n = x.shape
    if group_size is not None:
        groups = torch.arange(rows) // group_size
    else:
        groups = torch.zeros(rows) if group_ids is None else group_ids
    result = torch.zeros_like(x)
    for group in torch.unique(groups):
        for i in range(n):
            member = (groups == group) & ~x[:, i].isnan()
            values = x[member, i]
            if values.isinf().any():
                values = torch.full_like(values, math.nan)
            if len(values) < 2 or bool((values == values[0]).all()):
                result[member, i] = values - values  # 0, or NaN
                continue
            centred = values - values.mean()
            result[member, i] = centred / (values.std(correction=1) + eps) if scale else centred
    return result
