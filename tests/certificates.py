"""Wolfe's certificate: what says of weights, by itself, that they solve the min-norm problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KKT = 1e-10  # of max M_ii, as specified; what is measured is below 1e-12
OBJECTIVE = 1e-12  # of max M_ii: how far from the optimum the objective may be, as specified

Array = NDArray[Any]


def prior_of(prior: Any, n: int) -> Tensor:
    p = torch.tensor([1.0] * n if prior is None else prior, dtype=torch.float64)
    return p / p.sum()


def skewed(n: int) -> list[float]:
    """A prior with a zero in it."""
    return [float(i % 4) for i in range(n)] if n > 1 else [2.0]


def wide_product(m: Array, c: Array) -> Array:
    """M c in long double."""
    product: Array = (m.astype(np.longdouble) * c.astype(np.longdouble)[..., None, :]).sum(-1)
    return product


def kkt_residual(gram: Tensor, c: Tensor, prior: Any = None, regularization: float = 0.0) -> Array:
    """Wolfe's gap max_j g.(c - e_j), g = M c + rho (c - p), over max M_ii + rho: 0 at the solution."""
    m, point = gram.double().numpy().astype(np.longdouble), c.double().numpy().astype(np.longdouble)
    size = np.diagonal(m, axis1=-2, axis2=-1).max(-1)
    size = np.where(size > 0, size, 1)
    p = prior_of(prior, m.shape[-1]).numpy()
    gradient = wide_product(m / size[..., None, None], point) + regularization * (point - p)
    gap = (gradient * point).sum(-1) - gradient.min(-1)
    return np.asarray(gap / (1 + regularization), dtype=np.float64)
