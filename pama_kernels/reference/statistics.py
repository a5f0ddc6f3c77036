"""The sums over tokens, and the quantities derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import Dense, Terms, check_sequences, dense, ratio, terms, token_weights


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


def batch_statistics(x: Dense, t: Terms, aggregation: str) -> Statistics:
    omega = token_weights(x, aggregation)
    by_token = omega.flatten()

    def total(values: Tensor) -> Tensor:
        return (torch.where(x.present, values, 0.0) * omega[..., None]).sum((0, 1))

    def products(first: Tensor, second: Tensor) -> Tensor:
        return (first.flatten(0, 1) * by_token[:, None]).T @ second.flatten(0, 1)

    logp = torch.zeros_like(x.importance_weights) if x.logprobs is None else x.logprobs.detach()
    raw, bound, here = x.advantages, t.bound, x.present.double()
    count, bound_sum, bound_square_sum = total(here), total(bound), total(bound.square())
    bound_product, advantage_product, pairs = products(bound, bound), products(raw, raw), products(here, here)
    mean = ratio(products(raw, here), pairs)
    second = ratio(products(raw.square(), here), pairs)
    variance = second - mean.square()
    variance = torch.where(variance <= 4e-7 * second, 0.0, variance)  # float32 rounding of a constant
    covariance = ratio(advantage_product, pairs) - mean * mean.T
    norms = bound_product.diagonal().sqrt()
    cosines = ratio(bound_product, torch.outer(norms, norms))
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
        scores=ratio(bound_sum, count),
        second_moments=ratio(bound_square_sum, count),
        signal=(raw != 0).flatten(0, 1).any(0),
        gram=ratio(bound_product, torch.outer(count, count).sqrt()),
        cosines=cosines,
        advantage_gram=ratio(advantage_product, torch.outer(count, count).sqrt()),
        conflict=ratio(covariance, (variance * variance.T).sqrt()).clamp(-1, 1),
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
    x = dense(advantages, mask, logprobs, old_logprobs, None, importance_weights, objective_mask, cu_seqlens)
    check_sequences(x.layout, aggregation)
    return batch_statistics(x, terms(x, clip_range, noon, dual_clip), aggregation)
