"""Whitens the advantages of each objective, and recognises constant rewards despite rounding errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._layout import check_tokens
from ._validate import check_memory, check_process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def masked_whiten(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    objective_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Whitens each objective: mean 0 and standard deviation 1 (ddof 0) over its valid tokens.

    Args:
        advantages: (B, T, N), (B, N) or (M, N), objectives last. With a (B, T) mask, (B, N) advantages count
            once per valid token of the sequence.
        mask: (B, T) or (M,), non-zero at valid tokens; masked values are ignored, including NaN.
        objective_mask: (B, N), or (M, N) when flat: zero where an objective does not apply.
        process_group: compute mean and deviation over all ranks of the group, by one all-gather.

    Returns:
        The shape and dtype of `advantages`; 0 where masked or absent. An objective that is constant over its
        valid tokens, up to rounding (eight units in the last place), becomes exactly 0. A NaN or infinity at
        a valid token makes its objective NaN. Computed in float64.
    """
    _, layout = check_tokens(advantages, mask, objective_mask=objective_mask)
    check_process_group(process_group, batch=True)
    for name, given in (("advantages", advantages), ("mask", mask), ("objective_mask", objective_mask)):
        if given is not None:
            check_memory(name, given)
    x = advantages.detach().to(torch.float64)
    counts = torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)
    if mask is not None:
        valid = (mask != 0).to(torch.float64)
        counts = valid.sum(1) if layout.per_sequence else valid
    counts = counts.unsqueeze(-1).expand(x.shape)
    if objective_mask is not None:
        here = (objective_mask != 0).to(torch.float64)
        counts = counts * (here.unsqueeze(1) if x.dim() == 3 else here)
    present = counts > 0
    flat = torch.where(present, x, 0.0).reshape(-1, layout.objectives)
    weight = counts.reshape(flat.shape)
    local = _moments(flat, weight)
    moments = local if process_group is None else _merged(local, process_group)
    unit, low, high, count, mean, square = moments
    constant = high - low <= rounding(advantages.dtype) * unit
    deviation = (square / count.clamp(min=1)).sqrt()
    whitened = (flat / unit - mean) / torch.where(constant, 1.0, deviation)
    whitened = torch.where(constant & (mean - mean == 0), 0.0, whitened).reshape(x.shape)
    return torch.where(present, whitened, 0.0).to(advantages.dtype)


def rounding(dtype: torch.dtype) -> float:
    """The spread of equal values that were computed in different orders, relative to their magnitude: eight
    units in the last place. A half-precision type rounds most such differences away, and its own unit is too
    large to be noise."""
    return 8 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


class _Moments(NamedTuple):
    """(N,) each: a unit of the magnitude of the values, the smallest and the largest value, the number of
    tokens, their mean, and the sum of squared deviations from it, both in this unit, so that no square
    overflows."""

    unit: Tensor
    low: Tensor
    high: Tensor
    tokens: Tensor
    mean: Tensor
    square: Tensor


def _moments(x: Tensor, weight: Tensor) -> _Moments:
    """The moments of values (K, N), each counted `weight` times."""
    absent, infinity = weight == 0, x.new_full((1, x.shape[1]), float("inf"))
    low = torch.cat([torch.where(absent, infinity, x), infinity]).amin(0)
    high = torch.cat([torch.where(absent, -infinity, x), -infinity]).amax(0)
    count = weight.sum(0)
    largest = torch.cat([x.abs(), x.new_zeros((1, x.shape[1]))]).amax(0)
    unit = torch.where(largest == 0, 1.0, largest)
    scaled = x / unit
    mean = (scaled * weight).sum(0) / count.clamp(min=1)
    return _Moments(unit, low, high, count, mean, ((scaled - mean).square() * weight).sum(0))


def _merged(local: _Moments, group: ProcessGroup) -> _Moments:
    """Merges the moments of all ranks, by one collective (Chan, Golub & LeVeque 1979)."""
    mine = torch.stack(local)
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, mine, group=group)
    units, low, high, count, mean, square = torch.stack(parts, 1).unbind(0)
    units = torch.where(count > 0, units, 0.0)  # an empty rank's is no measure of the others' values
    unit = units.amax(0)
    unit = torch.where(unit == 0, 1.0, unit)
    mean, square = mean * (units / unit), square * (units / unit).square()
    total = count.sum(0)
    merged = (mean * count).sum(0) / total.clamp(min=1)
    square = (square + count * (mean - merged).square()).sum(0)
    return _Moments(unit, low.amin(0), high.amax(0), total, merged, square)


# --- rewards ------------------------------------------------------------------------------------------------


def without_rounding(rewards: Tensor, groups: Tensor) -> Tensor:
    """Makes rewards (B, N) that differ within a group (B,) by rounding errors of float32 only equal: a rule
    would take the errors of a constant reward for an objective, and give it weight."""
    index = torch.unique(groups, return_inverse=True)[1][:, None].expand_as(rewards)
    absent = rewards.isnan()

    def extreme(which: str, fill: float) -> Tensor:
        filled = rewards.masked_fill(absent, fill)
        return torch.full_like(rewards, fill).scatter_reduce(0, index, filled, which).gather(0, index)

    high, low = extreme("amax", -math.inf), extreme("amin", math.inf)
    largest = torch.maximum(high.abs(), low.abs())
    constant = largest.isfinite() & (high - low <= rounding(torch.float32) * largest)
    return torch.where(constant & ~absent, high, rewards)
