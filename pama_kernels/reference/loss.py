"""The weights of a rule, the combined advantages, and the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pama_kernels.rules import Fixed, Pama, RuleLike, SoftMin, UPGrad, noon_of, resolve_rule

from .solvers import (
    LEAST_SQUARE,
    min_norm_weights,
    normalized,
    normalized_preference,
    pama_weights,
    softmin_weights,
    upgrad_weights,
    without_underflow,
)
from .statistics import Statistics, batch_statistics
from .tokens import MAX_LOG_RATIO, Dense, Terms, check_sequences, dense, ratio, terms, token_weights


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


def batch_weights(
    statistics: Statistics, rule: RuleLike, preference: object, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One set for the batch: weights (N,), optimum, and the preference over the objectives with a signal."""
    rule, p = resolve_rule(rule), normalized_preference(preference, n)
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
            scale=without_underflow(statistics.second_moments[part].amax()),
            present=part,
        )
    return *solution, effective


def _token_coefficients(
    x: Dense,
    t: Terms,
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
        return ratio(here * c, (here * p).sum(-1, keepdim=True))

    if not isinstance(rule, (Pama, SoftMin)) or rule.weights_per == "batch":
        c, optimum, effective = batch_weights(statistics, rule, preference, n)
        return shared(c, effective), c, optimum
    p = normalized_preference(preference, n)
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
                scale=without_underflow(squares.amax(-1)),
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
    result[present] = normalized(p[present])
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
    x = dense(advantages, mask, logprobs, old_logprobs, None, None, objective_mask, cu_seqlens)
    check_sequences(x.layout, aggregation, rule, weights)
    t = terms(x, clip_range, noon_of(rule), None)
    statistics, omega = batch_statistics(x, t, aggregation), token_weights(x, aggregation)
    c, reported, optimum = _token_coefficients(x, t, statistics, rule, preference, weights, omega)
    combined = (c * t.advantages).sum(-1)
    combined = torch.where(x.valid, combined, 0.0)
    if normalize:
        root = ((omega * combined.square()).sum() / omega.sum().clamp(min=1e-300)).sqrt()
        size = ratio(statistics.advantage_square_sum, statistics.count).sqrt()
        share = reported.abs().mean(0) if reported.dim() == 2 else reported.abs()
        dtype = torch.float64 if advantages.dtype == torch.float64 else torch.float32
        noise = 32 * torch.finfo(dtype).eps * (share * size).sum()  # rounding of the specified arithmetic
        least = LEAST_SQUARE**0.5 if dtype == torch.float64 else torch.finfo(dtype).tiny
        root = torch.where(torch.isinf(root), math.nan, root)
        if not root <= max(noise, least):
            combined = torch.where(combined == 0, 0.0, combined / root)  # 0 where masked, also if root is NaN
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
    x = dense(
        advantages, mask, logprobs, old_logprobs, ref_logprobs, importance_weights, objective_mask, cu_seqlens
    )
    check_sequences(x.layout, aggregation, rule, weights)
    t = terms(x, clip_range, noon_of(rule), dual_clip)
    statistics, omega = batch_statistics(x, t, aggregation), token_weights(x, aggregation)
    c, reported, optimum = _token_coefficients(x, t, statistics, rule, preference, weights, omega)
    per_token = -(c.detach() * t.surrogate).sum(-1) + torch.where(t.unusable, math.nan, 0.0)
    assert x.logprobs is not None
    if kl_coef:
        assert x.ref_logprobs is not None
        r = x.ref_logprobs.detach() - x.logprobs
        clamped = r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = torch.where(torch.isfinite(r), clamped.exp() - clamped - 1, math.nan)
        per_token = per_token + kl_coef * k3
    bad = per_token.isnan()  # their gradient is NaN too
    per_token = torch.where(bad, math.nan * torch.where(bad, x.logprobs, 0.0), per_token)
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
    if logprobs.numel() == 0:
        loss = loss + logprobs.double().sum()  # 0, and differentiable
    return Loss(loss, reported, optimum, statistics)
