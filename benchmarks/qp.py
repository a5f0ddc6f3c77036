"""The min-norm problem with QP solvers: direct calls, on NumPy arrays in the form that suits each solver."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from .pools import Array
from .timing import Contestant, Missing

TOLERANCE = 1e-5  # of the objective over max M_ii: some stop at an infeasibility of 1e-6

T = TypeVar("T")


def simplex(c: Array) -> Array:
    """Removes the infeasibility within the solver's tolerance."""
    c = np.maximum(np.asarray(c, dtype=np.float64), 0)
    return c / c.sum()


def some(pairs: Iterable[T], seconds: float = 0.2) -> Iterator[T]:
    """The number of matrices that fits the time."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, pairs)


# A peer: (its call on one prepared input, how to prepare a matrix, how to get c from what it returns).
Peer = tuple[Callable[[Any], Any], Callable[[Array], Any], Callable[[Any], Any]]


def same(x: Any) -> Any:
    return x


def first(x: Any) -> Any:
    return x[0]


def torchjd_mgda(n: int) -> Peer:
    from torchjd.aggregation import MGDAWeighting

    return MGDAWeighting(), torch.from_numpy, lambda c: c.numpy()


def daqp_raw(n: int) -> Peer:
    import daqp

    solve = daqp.solve
    f, a = np.zeros(n), np.ones((1, n))
    upper, lower = np.append(np.full(n, 1e30), 1.0), np.append(np.zeros(n), 1.0)
    sense = np.array([0] * n + [5], dtype=np.int32)

    def call(m: Array) -> Any:
        x, _, flag, _ = solve(m, f, a, upper, lower, sense)
        return x if flag > 0 else None

    return call, same, same


def quadprog_raw(n: int) -> Peer:
    import quadprog

    solve = quadprog.solve_qp
    f = np.zeros(n)
    constraints = np.concatenate([np.ones((n, 1)), np.eye(n)], 1)
    bounds = np.append(1.0, np.zeros(n))
    return lambda m: solve(m, f, constraints, bounds, 1), same, first


def piqp_raw(n: int) -> Peer:
    import piqp

    solver = piqp.DenseSolver()
    q, a, b, lower = np.zeros(n), np.asfortranarray(np.ones((1, n))), np.ones(1), np.zeros(n)
    solver.setup(P=np.eye(n, order="F"), c=q, A=a, b=b, x_l=lower)

    def call(m: Array) -> Any:
        solver.update(P=m)
        return solver.result.x if solver.solve() == piqp.PIQP_SOLVED else None

    return call, np.asfortranarray, same


def proxsuite_raw(n: int) -> Peer:
    import proxsuite

    solve = proxsuite.proxqp.dense.solve
    solved = proxsuite.proxqp.PROXQP_SOLVED
    q, a, b = np.zeros(n), np.ones((1, n)), np.ones(1)
    lower, upper = np.zeros(n), np.full(n, 1e20)

    def call(m: Array) -> Any:
        result = solve(m, q, a, b, l_box=lower, u_box=upper, eps_abs=1e-9)
        return result.x if result.info.status == solved else None

    return call, same, same


def cvxpy_clarabel(n: int) -> Peer:
    import cvxpy

    def call(m: Array) -> Any:
        x = cvxpy.Variable(n, nonneg=True)
        objective = cvxpy.Minimize(cvxpy.quad_form(x, cvxpy.psd_wrap(m)))
        cvxpy.Problem(objective, [cvxpy.sum(x) == 1]).solve(solver="CLARABEL")
        return x.value

    return call, same, same


DAQP = "DAQP"
PEERS: dict[str, tuple[Callable[[int], Peer], str]] = {
    DAQP: (daqp_raw, ""),
    "quadprog": (quadprog_raw, ""),
    "PIQP": (piqp_raw, "workspace kept"),
    "ProxQP": (proxsuite_raw, ""),
    "TorchJD MGDA": (torchjd_mgda, "inexact"),
    "cvxpy (Clarabel)": (cvxpy_clarabel, "problem built in each call"),
}


def wolfe_gap(pool: Sequence[Array]) -> Callable[[Contestant], float]:
    """The gap of this library's weights, divided by max M_ii."""

    def check(c: Contestant) -> float:
        gap = 0.0
        for m, x in zip(pool, c.inputs, strict=True):
            weights = c.call(x).weights.numpy()
            product = m @ weights
            gap = max(gap, float(weights @ product - product.min()) / m.diagonal().max())
        return gap

    return check


def objective_apart(
    pool: Sequence[Array], optima: Sequence[float], weights: Callable[[Any], Any]
) -> Callable[[Contestant], float]:
    def check(c: Contestant) -> float:
        apart = 0.0
        for m, optimum, x in some(zip(pool, optima, c.inputs, strict=True)):
            point = simplex(weights(c.call(x)))
            apart = max(apart, abs(point @ m @ point - optimum) / m.diagonal().max())
        return apart

    return check


def contestant(name: str, n: int, pool: list[Array], optima: list[float]) -> Contestant | Missing:
    """The peer on the matrices of the pool that it solves; the note has the number of the others."""
    make, note = PEERS[name]
    try:
        call, prepare, weights = make(n)
    except ImportError as error:
        return Missing(name, str(error))

    def solves(m: Array) -> bool:
        try:
            c = weights(call(prepare(m)))
        except Exception:  # each has its own; what counts is that it gives no answer
            return False
        return c is not None and bool(np.isfinite(c).all())

    tried = list(some(enumerate(pool)))
    failed = {i for i, m in tried if not solves(m)}
    if failed:
        note = f"{note}; " * bool(note) + f"fails on {len(failed)} of {len(tried)}"
    if 2 * len(failed) >= len(tried):
        return Missing(name, note)
    kept = [i for i, _ in tried if i not in failed]
    inputs = [prepare(pool[i]) for i in kept]
    check = objective_apart([pool[i] for i in kept], [optima[i] for i in kept], weights)
    return Contestant(name, call, inputs, check, None if "inexact" in note else TOLERANCE, note)
