"""The terms of every token: any layout as dense float64 tensors (sequences, tokens, objectives), the clipped
surrogate, and its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pama_kernels._layout import Layout, check_weights, resolve_layout
from pama_kernels.rules import RuleLike

MAX_LOG_RATIO = 20.0


# --- dense form of any layout ------------------------------------------------------------------------


class Dense(NamedTuple):
    layout: Layout
    advantages: Tensor  # (B, T, N); NaN where not finite
    valid: Tensor  # (B, T) bool
    present: Tensor  # (B, T, N) bool
    logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor
    pack: Callable[[Tensor], Tensor]  # (B, T) -> the caller's layout


def dense(
    advantages: Tensor,
    mask: Tensor | None,
    logprobs: Tensor | None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Dense:
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
    raw = torch.where(torch.isfinite(raw), raw, math.nan)
    weights = values(importance_weights)
    flat_result = layout.packed or not layout.sequences
    return Dense(
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


def check_sequences(
    layout: Layout, aggregation: str, rule: RuleLike = None, weights: Tensor | None = None
) -> None:
    """Flat tokens without `cu_seqlens` have no sequences: a mean or weights per sequence are undefined."""
    if weights is not None:
        check_weights(weights, layout, weights.device)
    if layout.sequences:
        return
    if aggregation != "token-mean":
        raise ValueError(f"aggregation: {aggregation!r} needs cu_seqlens where tensors are flat, got none")
    if weights is None and getattr(rule, "weights_per", "batch") == "sequence":
        raise ValueError("rule: weights per sequence need cu_seqlens where tensors are flat, got none")


class Terms(NamedTuple):
    advantages: Tensor  # A (B, T, N)
    bound: Tensor  # I
    surrogate: Tensor  # g, differentiable in logprobs
    unusable: Tensor  # tokens where an input is not finite (B, T) bool
    clipped: Tensor  # A is not 0 and has no gradient, bool
    kl: Tensor  # k3 to the behaviour policy (B, T)


def terms(x: Dense, clip_range: object, noon: bool, dual_clip: float | None) -> Terms:
    low, high = _clip_bounds(clip_range)
    logp = torch.zeros_like(x.importance_weights) if x.logprobs is None else x.logprobs
    old = logp.detach() if x.old_logprobs is None else x.old_logprobs.detach()
    w = x.importance_weights[..., None]
    d = logp - old
    u = torch.exp(d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))[..., None]
    raw = x.advantages
    token_ok = torch.isfinite(logp) & torch.isfinite(old) & torch.isfinite(x.importance_weights)
    poison = torch.where(token_ok[..., None] & ~raw.isnan(), 0.0, math.nan)

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
    return Terms(
        a,
        torch.where(x.present, bound + poison, 0.0),
        torch.where(x.present, surrogate + poison, 0.0),
        x.valid & ~token_ok,
        stopped & ((a > 0) | (a < 0)) & x.present & token_ok[..., None],
        kl,
    )


def _clip_bounds(clip_range: object) -> tuple[float, float]:
    if clip_range is None:
        return 1.0, math.inf
    if isinstance(clip_range, (tuple, list)):
        return float(clip_range[0]), float(clip_range[1])
    return float(clip_range), float(clip_range)  # type: ignore[arg-type]


# --- statistics --------------------------------------------------------------------------------------


def token_weights(x: Dense, aggregation: str) -> Tensor:
    """omega (B, T): 1, or 1 / T_s under "seq-mean-token-mean"; 0 where masked."""
    valid = x.valid.double()
    if aggregation != "seq-mean-token-mean":
        return valid
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, with 0 / 0 = 0: without tokens the score is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)
