"""Pools of solver inputs: interior optima, sparse supports, near ties; separately, singular matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pama_kernels as pk

Array = NDArray[np.float64]

# Too many for a branch predictor to learn by heart, few enough to stay in a cache as a fresh input would be.
POOL = 500
REGULAR, SINGULAR = "regular", "singular"  # singular: duplicates, dependent gradients, zero rows


def pool_size(n: int) -> int:
    """POOL, or fewer if the matrices would take more than 8 MB."""
    return max(5, min(POOL, 2**20 // n**2))


def score_pool(n: int, count: int) -> list[Tensor]:
    """Of both signs, of one sign, and with ties, in equal parts."""
    g = torch.Generator().manual_seed(n)
    a = torch.randn(count, n, generator=g)
    a[1::4] = a[1::4].abs() + 0.01
    a[2::4] = (a[2::4] * 2).round() / 2
    a[3::4] = -a[3::4].abs() - 0.01
    order = torch.randperm(count, generator=g)
    return [a[i].clone() for i in order]


def gram_pool(n: int, count: int, kind: str) -> list[Array]:
    g = np.random.default_rng([n, kind == "singular"])

    def tall() -> Array:  # all objectives in the support
        return g.standard_normal((n, 8 * n))

    def square() -> Array:  # about two thirds of them
        return g.standard_normal((n, n))

    def graded() -> Array:  # gradients that share a direction, of different lengths: few
        factor = g.standard_normal((n, 2 * n)) * 10.0 ** g.uniform(-1, 0, (n, 1))
        factor[:, 0] += 2
        return factor

    def near_duplicates() -> Array:
        factor = g.standard_normal((n, 2 * n))
        for i in range(1, n, 2):
            factor[i] = factor[i - 1] + 1e-3 * factor[i]
        return factor

    def duplicates() -> Array:
        return g.standard_normal((n, n))[g.integers((n + 1) // 2, size=n)]

    def dependent() -> Array:
        return g.standard_normal((n, max(n // 2, 1)))

    def zero_rows() -> Array:
        return np.where(np.arange(n)[:, None] % 4 == 3, 0.0, g.standard_normal((n, 2 * n)))

    def near_ties(factor: Array) -> Array:
        """One objective's multiplier is near 0."""
        m = factor @ factor.T
        if n > 2:
            level = float(pk.min_norm_weights(torch.from_numpy(m[:-1, :-1].copy())).optimum)
            m[-1, :-1] = m[:-1, -1] = level * (1 + 10.0 ** g.uniform(-12, -3) * g.choice([-1, 1]))
            m[-1, -1] = 4 * m.diagonal().max()
        return m

    if kind == "singular":
        makers = [lambda f=f: symmetric(f()) for f in (duplicates, dependent, zero_rows)]
    else:
        makers = [lambda f=f: symmetric(f()) for f in (tall, square, graded, near_duplicates)]
        makers.append(lambda: near_ties(tall()))
    return [makers[i % len(makers)]() for i in g.permutation(count)]


def symmetric(factor: Array) -> Array:
    m = factor @ factor.T
    return np.ascontiguousarray(np.tril(m) + np.tril(m, -1).T)
