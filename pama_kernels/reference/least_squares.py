"""Non-negative least squares, and which of its solutions is nearest to a point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Eigenvalues of cosines up to it may be rounding (a few eps for each of n terms), and count as 0.
SINGULAR = 1e-13
DEPENDENT = 1e-12  # from the span of others: a column that is nearer is in it


def factored(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d, J and Z with m = DJ'JD, D = diag(d), Z an orthonormal basis of {z: Jz = 0}. Columns of J have
    length 1, or 0 where m_ii is 0."""
    d = torch.where(m.diagonal() > 0, m.diagonal().sqrt(), 1.0)
    values, vectors = torch.linalg.eigh((m / 2 + m.T / 2) / d[:, None] / d)
    kept = values > SINGULAR
    return d, values[kept].sqrt()[:, None] * vectors[:, kept].T, vectors[:, ~kept]


def non_negative_least_squares(a: Tensor, b: Tensor) -> Tensor:
    """minimise |a v - b| over v >= 0, columns of a of length up to 1: Lawson & Hanson 1974, chapter 23."""
    n = a.shape[1]
    v, support = torch.zeros(n, dtype=a.dtype), torch.zeros(n, dtype=torch.bool)
    refused = support.clone()  # their rise is rounding
    for _ in range(10 * n + 10):
        rounding = 1e-15 * (a.abs() @ v + b.abs())
        rise = a.T @ (b - a @ v) - a.abs().T @ rounding
        rise = torch.where(support | refused, -math.inf, rise)
        enter = int(rise.argmax())
        if float(rise[enter]) <= 0:
            break
        index = support.nonzero().squeeze(1)
        part = torch.linalg.lstsq(a[:, index], a[:, enter, None], driver="gelsd").solution
        if float((a[:, enter] - (a[:, index] @ part)[:, 0]).norm()) <= DEPENDENT:
            refused[enter] = True
            continue
        support[enter] = True
        while True:
            index = support.nonzero().squeeze(1)
            target = torch.zeros_like(v)
            target[index] = torch.linalg.lstsq(a[:, index], b[:, None], driver="gelsd").solution[:, 0]
            falling = support & (target <= 0)
            if not falling.any():
                v = target
                break
            # 0 if `enter` does not rise
            step = float((v[falling] / (v[falling] - target[falling]).clamp(min=1e-300)).min())
            v = v + step * (target - v)
            support &= v > 0
            support &= ~(falling & (v <= 1e-300))
            v[~support] = 0.0
        refused = torch.zeros_like(support) if support[enter] else refused | (torch.arange(n) == enter)
    return v


def nearest_non_negative(centre: Tensor, point: Tensor, free: Tensor) -> Tensor:
    """The x >= 0 nearest to `centre` with x - point in the span of `free`, orthonormal columns; point >= 0.

    Least distance programming (Lawson & Hanson 1974, chapter 23). Where its multipliers are large, rounding
    moves x out of that span; proximal steps bring it back.
    """
    base = point + free @ (free.T @ (centre - point))
    x = base.clamp(min=0)
    if float(base.min()) < 0:
        reach = (base - point).norm()  # x is no farther from base: the point is feasible
        system = torch.cat([free.T, -base[None] / reach])
        length = system.norm(dim=0)
        system = (system / length)[:, length > 1e-12]  # the others are fixed at 0 up to rounding
        last = torch.zeros(len(system), dtype=x.dtype)
        last[-1] = 1.0
        residual = system @ non_negative_least_squares(system, last) - last
        x = (base - reach * (free @ (residual[:-1] / residual[-1]))).clamp(min=0)
    rest = torch.linalg.qr(free, mode="complete").Q[:, free.shape[1] :].T
    ridge = 1e-5 * torch.eye(len(x), dtype=x.dtype)
    for _ in range(20):
        if float((rest @ (x - point)).norm()) <= 1e-15 * float(point.norm()):
            break
        x = non_negative_least_squares(torch.cat([rest, ridge]), torch.cat([rest @ point, ridge @ x]))
    return x
