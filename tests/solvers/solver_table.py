"""One table of the three solvers: how they are called, what certifies their solutions, and hard inputs.

Wolfe's certificate says of weights, by itself, that they solve a problem, whoever solved it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from problems import EPS32, EPS64
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

Array = NDArray[Any]
KKT = 1e-10  # of max M_ii, as specified; what is measured is below 1e-12
OBJECTIVE = 1e-12  # of max M_ii: how far from the optimum the objective may be, as specified
NEAREST = 1e-6  # from the minimiser nearest to the preference, where it is not unique, as specified
SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64)  # about the borders of what kernels keep in registers
CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}


def eps_of(dtype: torch.dtype) -> float:
    """Of the results, which are float64 for float64 and float32 for all others."""
    return EPS64 if dtype == torch.float64 else EPS32


def on_simplex(preference: Any, n: int) -> Tensor:
    p = torch.ones(n) if preference is None else torch.as_tensor(preference)
    return p.double() / p.double().sum()


def skewed(n: int) -> list[float]:
    """A preference with a zero in it."""
    return [float(i % 4) for i in range(n)] if n > 1 else [2.0]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def wide(m: Array, c: Array) -> Array:
    """M c in long double."""
    return np.asarray((m.astype(np.longdouble) * c.astype(np.longdouble)[..., None, :]).sum(-1))


# --- certificates ------------------------------------------------------------------------------------


def scores_residual(
    a: Tensor, c: Tensor, preference: Any = None, regularization: float = 0.0, scale: Any = None
) -> Array:
    """Wolfe's gap max_j g.(c - e_j), g = s a + rho (c - p), over max a^2 + rho: 0 exactly at the solution."""
    a, c = a.double(), c.double()
    unit = a.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    a = a / unit
    r = a.square().amax(-1, keepdim=True)
    if scale is not None:
        r = torch.as_tensor(scale).double().expand(a.shape[:-1]).unsqueeze(-1) / unit / unit
    rho = regularization * r
    g = (a * c).sum(-1, keepdim=True) * a + rho * (c - on_simplex(preference, a.shape[-1]))
    return np.asarray((((g * c).sum(-1) - g.amin(-1)) / (1 + rho.squeeze(-1))).numpy())


def gram_residual(m: Tensor, c: Tensor, preference: Any = None, regularization: float = 0.0) -> Array:
    """The same with g = Mc + rho (c - p), over max M_ii + rho, in long double."""
    wide_m, point = m.double().numpy().astype(np.longdouble), c.double().numpy().astype(np.longdouble)
    size = np.diagonal(wide_m, axis1=-2, axis2=-1).max(-1)
    size = np.where(size > 0, size, 1)
    p = on_simplex(preference, m.shape[-1]).numpy()
    g = wide(wide_m / size[..., None, None], point) + regularization * (point - p)
    return np.asarray(((g * point).sum(-1) - g.min(-1)) / (1 + regularization), dtype=np.float64)


def conflict_residual(m: Tensor, c: Tensor, preference: Any = None) -> Array:
    """The largest decrease of an objective: max_j -(Mc)_j over max M_ii."""
    wide_m = m.double().numpy().astype(np.longdouble)
    size = np.diagonal(wide_m, axis1=-2, axis2=-1).max(-1)
    size = np.where(size > 0, size, 1)
    return np.asarray(-(wide(wide_m / size[..., None, None], c.double().numpy())).min(-1), dtype=np.float64)


# --- the solvers -------------------------------------------------------------------------------------


class Solver(NamedTuple):
    solve: Callable[..., pk.WeightSolution]
    reference: Callable[..., reference.Solution]
    residual: Callable[..., Array]
    axes: int  # of one problem
    options: tuple[dict[str, Any], ...]  # beside the preference
    families: dict[str, Callable[[np.random.Generator, int, int], Tensor]]

    def inputs(self, family: str, rows: int, n: int, seed: int = 0) -> Tensor:
        """A batch of problems in float64."""
        return self.families[family](np.random.default_rng([seed, n, len(family)]), rows, n)

    def permuted(self, x: Tensor, order: Tensor) -> Tensor:
        return x[..., order] if self.axes == 1 else x[..., order, :][..., order]

    def size(self, x: Tensor) -> Tensor:
        """Of a problem: max |a_i| or max M_ii."""
        return (x if self.axes == 1 else x.diagonal(dim1=-2, dim2=-1)).double().abs().amax(-1)

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        """The optimum that weights c have."""
        x, c = x.double(), c.double()
        if self.axes == 1:
            return (x * c).sum(-1)
        return torch.as_tensor(np.asarray((wide(x.numpy(), c.numpy()) * c.numpy()).sum(-1), np.float64))

    def bound(self, n: int, dtype: torch.dtype) -> float:
        """Of the residual: n-term sums behind lambda and the mean; as specified for matrices. Float32
        weights are rounded by half an eps of themselves, which moves the gap by 2 eps at most."""
        eps = eps_of(dtype)
        return 8 * n * eps if self.axes == 1 else KKT + (2 * eps if eps == EPS32 else 0.0)


def check(
    solver: Solver, x: Tensor, preference: Any = None, slack: Any = 0.0, **options: Any
) -> pk.WeightSolution:
    """On the simplex, certified, with the optimum of the weights. `slack`: of the certificate."""
    s = solver.solve(x, preference=preference, **options)
    n, eps = x.shape[-1], eps_of(x.dtype)
    batch = x.shape[: x.dim() - solver.axes]
    assert s.weights.shape == (*batch, n)
    assert s.optimum.shape == batch
    assert s.weights.dtype == s.optimum.dtype == (torch.float64 if eps == EPS64 else torch.float32)
    assert s.weights.is_contiguous()
    c = s.weights.double()
    assert (c >= 0).all()
    # n weights, each with a rounding or two of numbers up to 1
    assert ((c.sum(-1) - 1).abs() <= 4 * n * eps).all()
    assert (solver.residual(x, s.weights, preference, **options) <= solver.bound(n, x.dtype) + slack).all()
    if solver.axes == 2:
        assert (s.optimum >= 0).all()
    elif not options.get("regularization"):
        projection = x.amin(-1).clamp(min=0) + x.amax(-1).clamp(max=0)
        assert torch.equal(s.optimum, projection.to(s.optimum.dtype))
    # 2 n products of rounded numbers; below the normal numbers no relative accuracy
    rounding = 4 * n * eps * solver.size(x) + torch.finfo(s.optimum.dtype).smallest_normal * eps
    value = solver.value(x, c)
    value = value if solver.axes == 1 else value.clamp(min=0)
    assert ((s.optimum.double() - value).abs() <= rounding + torch.as_tensor(slack) * solver.size(x)).all()
    return s


# --- hard scores -------------------------------------------------------------------------------------


def _grid(low: int, high: int) -> Callable[[np.random.Generator, int, int], Tensor]:
    """Many ties and zeros."""
    return lambda g, rows, n: torch.from_numpy(g.integers(low, high, (rows, n)) / 4.0)


def _spans(exponent: float, signs: bool) -> Callable[[np.random.Generator, int, int], Tensor]:
    """Magnitudes of one row from 10^-exponent to 10^exponent."""

    def make(g: np.random.Generator, rows: int, n: int) -> Tensor:
        size = 10.0 ** g.uniform(-exponent, exponent, (rows, n))
        return torch.from_numpy(size * (g.choice([-1.0, 1.0], (rows, n)) if signs else 1.0))

    return make


SCORES = {
    "grid": _grid(-8, 9),
    "positive grid": _grid(1, 9),
    "negative grid": _grid(-8, 0),
    "ties": _grid(-1, 2),
    "zero": lambda g, rows, n: torch.zeros(rows, n, dtype=torch.float64),
    "normal": lambda g, rows, n: torch.from_numpy(g.standard_normal((rows, n))),
    "nearly tied": lambda g, rows, n: torch.from_numpy(1 + 1e-14 * g.integers(-3, 4, (rows, n))),
    "one large": lambda g, rows, n: torch.from_numpy(
        np.where(np.arange(n) == n - 1, g.choice([-1.0, 1.0], (rows, 1)), 1e-9 * g.standard_normal((rows, n)))
    ),
    "float32 range": _spans(37, True),
    "float32 range, positive": _spans(37, False),
    "float64 range": _spans(300, True),
    "subnormal": lambda g, rows, n: torch.from_numpy(g.integers(-9, 10, (rows, n)) * 1e-42),
    "largest": lambda g, rows, n: torch.from_numpy(g.choice([-3e38, 3e38, 1e-40], (rows, n))),
}

# --- hard Gram matrices ------------------------------------------------------------------------------


def gram_of(factor: Array) -> Tensor:
    """(..., N, D) -> (..., N, N), symmetric to the bit."""
    m = factor @ np.swapaxes(factor, -1, -2)
    return torch.from_numpy(np.tril(m) + np.swapaxes(np.tril(m, -1), -1, -2))


def normal(g: np.random.Generator, rows: int, n: int, d: int) -> Array:
    return g.standard_normal((rows, n, d))


def repeated(g: np.random.Generator, rows: int, n: int, sign: float, integers: bool = True) -> Array:
    """About half of the gradients are copies (or opposites, or zeros) of earlier ones."""
    j = g.integers(-3, 4, (rows, n, n)).astype(np.float64) if integers else normal(g, rows, n, n)
    for b, i in itertools.product(range(rows), range(1, n)):
        if g.integers(2):
            j[b, i] = sign * j[b, g.integers(i)]
    return j


def orthogonal(g: np.random.Generator, rows: int, n: int) -> Array:
    return np.asarray(np.linalg.qr(normal(g, rows, n, n))[0])


# Factors J of M = JJ'. Some are unique problems: with eigenvalues of M from max M_ii / 10 on.
FACTORS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "tall": lambda g, rows, n: normal(g, rows, n, 8 * n),
    "square": lambda g, rows, n: normal(g, rows, n, n),
    "a common direction": lambda g, rows, n: normal(g, rows, n, n) + np.eye(1, n) * n**0.5,
    "rank deficient": lambda g, rows, n: normal(g, rows, n, g.integers(1, n + 1)),
    "rank 1": lambda g, rows, n: g.integers(-3, 4, (rows, n, 1)).astype(np.float64),
    "positive rank 1": lambda g, rows, n: normal(g, rows, n, 1) ** 2 + 0.1,
    "low rank": lambda g, rows, n: g.integers(-3, 4, (rows, n, 2)).astype(np.float64),
    "duplicates": lambda g, rows, n: repeated(g, rows, n, 1.0),
    "opposites": lambda g, rows, n: repeated(g, rows, n, -1.0),
    "zero rows": lambda g, rows, n: repeated(g, rows, n, 0.0) * (np.arange(n) > 0)[:, None],
    "all zero": lambda g, rows, n: np.zeros((rows, n, n)),
    "signs": lambda g, rows, n: g.choice([-1.0, 1.0], (rows, n, max(n // 2, 1))),
    "diagonal": lambda g, rows, n: np.eye(n) * 10.0 ** -g.uniform(0, 10, (rows, n, 1)),
    "ill-conditioned": lambda g, rows, n: (
        orthogonal(g, rows, n) * 10.0 ** (-7 * np.arange(n) / max(n - 1, 1))
    ),
    "graded": lambda g, rows, n: normal(g, rows, n, n) * 10.0 ** g.uniform(-6, 0, (rows, n, 1)),
    "any magnitude": lambda g, rows, n: normal(g, rows, n, n) * 10.0 ** g.uniform(-75, 75, (rows, 1, 1)),
    "nearly parallel": lambda g, rows, n: (
        normal(g, rows, 1, n) + 10.0 ** g.uniform(-12, -2, (rows, 1, 1)) * normal(g, rows, n, n)
    ),
    "near duplicates": lambda g, rows, n: (
        repeated(g, rows, n, 1.0, False) + 10.0 ** g.uniform(-12, -2, (rows, 1, 1)) * normal(g, rows, n, n)
    ),
}


def _near_ties(g: np.random.Generator, rows: int, n: int) -> Tensor:
    """The last multiplier is near 0: its product with the optimum of the others is their optimum."""
    m = gram_of(normal(g, rows, n, 2 * n))
    m[:, -1, -1] = 10.0 * n
    for b in range(rows if n > 1 else 0):
        level = reference.min_norm_weights(m[b, :-1, :-1]).optimum
        m[b, -1, :-1] = m[b, :-1, -1] = level * (1 + 10.0 ** g.uniform(-16, -2) * g.choice([-1, 0, 1]))
    return m


def _family(make: Callable[[np.random.Generator, int, int], Array]) -> Callable[..., Tensor]:
    return lambda g, rows, n: gram_of(make(g, rows, n))


GRAMS: dict[str, Callable[[np.random.Generator, int, int], Tensor]] = {
    **{name: _family(make) for name, make in FACTORS.items()},
    "near ties": _near_ties,
}

RHO = ({"regularization": 0.0}, {"regularization": 0.1})
SOLVERS = {
    "scores": Solver(pk.pama_weights, reference.pama_weights, scores_residual, 1, RHO, SCORES),
    "min_norm": Solver(pk.min_norm_weights, reference.min_norm_weights, gram_residual, 2, RHO, GRAMS),
    "upgrad": Solver(pk.upgrad_weights, reference.upgrad_weights, conflict_residual, 2, ({},), GRAMS),
}
FAMILIES = [(solver, family) for solver in SOLVERS for family in SOLVERS[solver].families]
CASES = [(name, i) for name, solver in SOLVERS.items() for i in range(len(solver.options))]


def mixed(solver: Solver, rows: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Problems of every family side by side, so that the lanes of a vector go different ways, and some that
    hold a NaN or an infinity."""
    wide_range = ("float64 range", "any magnitude", "near ties")
    count = rows // (len(solver.families) - 1) + 1
    parts = [solver.inputs(name, count, n) for name in solver.families if name not in wide_range]
    x = torch.stack(parts, 1).reshape(-1, *parts[0].shape[1:])[:rows].to(dtype)
    last = (n - 1,) * solver.axes
    x[(slice(5, None, 23), *((0,) * (solver.axes - 1)), n - 1)] = math.nan
    x[(slice(11, None, 31), *last)] = math.inf
    return x
