"""From rewards to advantages: generalised advantage estimation, and group normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    eps. Rewards that are equal up to eight units in the last place give 0."""
    rounding = 2.0**-49 if rewards.dtype == torch.float64 else 2.0**-20
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
            if len(values) < 2 or bool(values.max() - values.min() <= rounding * values.abs().max()):
                result[member, i] = values - values  # 0, or NaN
                continue
            unit = values.abs().max()  # squares of any finite values stay in range
            centred = values / unit - (values / unit).mean()
            deviation = centred.square().sum().div(len(values) - 1).sqrt()
            result[member, i] = centred / (deviation + eps / unit) if scale else centred * unit
    return result
