"""The solvers, complete calls from Python, compared with other solvers.

scores: `pama_weights` of one row; eager PyTorch with the same rule, TorchJD's MGDA and cvxpy.
gram: `min_norm_weights` of one float64 matrix; QP solvers, DAQP for every N up to 64.
upgrad: `upgrad_weights` of one float64 matrix; TorchJD's UPGrad for every N up to 64, with its default ridge,
    which changes its weights, and with one that does not.
batch: 10,000 matrices of 8 objectives; a loop over DAQP.
rows: a million rows of 4 scores; a copy of as many bytes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pama_kernels as pk

from . import plots, qp
from .harness import Session, read
from .pools import POOL, REGULAR, SINGULAR, Array, gram_pool, pool_size, score_pool, symmetric
from .timing import Contestant, Missing, available_threads

ALL = 64  # objectives up to which every N is timed, and every peer at powers of two; beyond, DAQP alone
TORCHJD, TORCHJD_DEFAULT = "TorchJD UPGrad, ridge 1e-10", "TorchJD UPGrad, default ridge"
UPGRAD_TOLERANCE = 1e-8  # of d'Md over max M_ii, d the difference of the weights


def run(session: Session) -> None:
    session.notes += [
        "microseconds: median over rounds of ours and one peer in turns; spread: interquartile range over it",
        "ratio: median over rounds of the contestant's time over ours (the copy's: our share of its speed)",
        "difference, scores: largest |c - ours| for eager, else of (a.c)^2 over max a^2",
        "difference, gram and batch: largest of c'Mc over max M_ii; of ours Wolfe's gap",
        "difference, upgrad: largest d'Md over max M_ii, d from our weights; of ours -(Mc)_j over it",
    ]
    quick, part = session.quick, functools.partial
    every = (2, 8, 64) if quick else range(2, ALL + 1)
    works: list[Callable[[], None]] = []
    works += [part(scores, session, n) for n in ((2, 16) if quick else (2, 4, 8, 16, 64, 256, 1024))]
    for kind in (REGULAR, SINGULAR):
        works += [part(gram, session, n, kind) for n in every]
    works += [part(gram, session, n, REGULAR) for n in (() if quick else (128, 256, 512, 1024))]
    for kind in (REGULAR, SINGULAR):
        works += [part(upgrad, session, n, kind) for n in every]
    works += [part(batch, session, threads) for threads in sorted({1, min(available_threads(), 2)})]
    works += [*(part(rows, session, case) for case in ROW_CASES)]
    session.each(works)
    plot(session.csv)


def power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def eager_weights(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of `pama_weights` with regularization 0, as one would write it in PyTorch for the CPU."""
    low, high = torch.aminmax(a)
    if low < 0 < high:
        inside = torch.ones_like(a)
        while True:
            # the projection of p on {c: e'c = 1, a.c = 0} within the support
            size, total = inside.sum(), (inside * a).sum()
            mean, excess = total / size, (inside * p).sum() - 1
            slope = ((inside * a) @ p - mean * excess) / ((inside * a) @ a - mean * total)
            c = inside * (p - slope * a - (excess - slope * total) / size)
            if (c >= 0).all():
                return c, a.new_zeros(())
            inside = inside * (c >= 0)
    s = low.clamp(min=0) + high.clamp(max=0)
    tied = (a == s).to(a.dtype)
    c = tied * (p + (1 - tied @ p) / tied.sum())
    return c, s


def scores(session: Session, n: int) -> None:
    pool = score_pool(n, POOL)
    uniform = torch.full((n,), 1 / n)
    found = [pk.pama_weights(a) for a in pool]

    def weights_apart(c: Contestant) -> float:
        return max(
            float((c.call(x)[0] - s.weights).abs().max()) for x, s in zip(c.inputs, found, strict=True)
        )

    def optimum_apart(weights: Callable[[Any], Array]) -> Callable[[Contestant], float]:
        def check(c: Contestant) -> float:
            apart = 0.0
            for x, a, s in qp.some(zip(c.inputs, pool, found, strict=True)):
                exact = a.double().numpy()
                value = (exact @ qp.simplex(weights(c.call(x)))) ** 2 - float(s.optimum) ** 2
                apart = max(apart, abs(value) / ((exact**2).max() or 1.0))
            return apart

        return check

    contestants: list[Contestant | Missing] = [
        Contestant("pama_weights", pk.pama_weights, pool),
        # float32: c moves by eps times the condition of the scores, which is large for some of these
        Contestant("eager PyTorch", lambda a: eager_weights(a, uniform), pool, weights_apart, 1e-2),
    ]
    try:
        from torchjd.aggregation import MGDAWeighting

        mgda = MGDAWeighting()
        outer = [torch.outer(a, a) for a in pool]
        check = optimum_apart(lambda c: c.double().numpy())
        contestants.append(Contestant("TorchJD MGDA", mgda, outer, check, None, "inexact"))
    except ImportError as error:
        contestants.append(Missing("TorchJD MGDA", str(error)))
    try:
        import cvxpy

        x, parameter = cvxpy.Variable(n, nonneg=True), cvxpy.Parameter(n)
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.square(parameter @ x)), [cvxpy.sum(x) == 1])

        def solve(a: Array) -> Any:
            parameter.value = a
            problem.solve(solver="CLARABEL")
            return x.value

        inputs = [a.double().numpy() for a in pool]
        check = optimum_apart(lambda c: c)
        contestants.append(Contestant("cvxpy (Clarabel)", solve, inputs, check, 1e-5, "problem built once"))
    except ImportError as error:
        contestants.append(Missing("cvxpy (Clarabel)", str(error)))
    session.measure("scores", "float32, mixed pool", n, contestants)


def gram(session: Session, n: int, kind: str) -> None:
    pool = gram_pool(n, pool_size(n), kind)
    ours = [torch.from_numpy(m) for m in pool]
    optima = [float(pk.min_norm_weights(m).optimum) for m in ours]
    contestants: list[Contestant | Missing] = [
        Contestant("min_norm_weights", pk.min_norm_weights, ours, qp.wolfe_gap(pool), 1e-10)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer's own, on singular matrices
        names = list(qp.PEERS) if power_of_two(n) and n <= ALL else [qp.DAQP]
        contestants += [qp.contestant(name, n, pool, optima) for name in names]
        session.measure("gram", f"float64, {kind} pool", n, contestants)


def upgrad(session: Session, n: int, kind: str) -> None:
    pool = [torch.from_numpy(m) for m in gram_pool(n, pool_size(n), kind)]

    def conflict(c: Contestant) -> float:
        products = [(m @ c.call(m).weights) / m.diagonal().max() for m in pool]
        return max(float(-x.min()) for x in products)

    def apart(c: Contestant) -> float:
        worst = 0.0
        for m in qp.some(pool):
            weights = c.call(m)
            d = weights / weights.sum() - pk.upgrad_weights(m).weights
            worst = max(worst, float(d @ m @ d / m.diagonal().max()))
        return worst

    contestants: list[Contestant | Missing] = [
        Contestant("upgrad_weights", pk.upgrad_weights, pool, conflict, 1e-9)
    ]
    try:
        from torchjd.aggregation import UPGradWeighting
        from torchjd.linalg import QuadprogProjector

        exact = UPGradWeighting(projector=QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10))
        contestants.append(Contestant(TORCHJD, exact, pool, apart, UPGRAD_TOLERANCE))
        if power_of_two(n):
            default = UPGradWeighting()
            contestants.append(Contestant(TORCHJD_DEFAULT, default, pool, apart, None, "inexact"))
    except ImportError as error:
        contestants.append(Missing(TORCHJD, str(error)))
    session.measure("upgrad", f"float64, {kind} pool", n, contestants)


def batch(session: Session, threads: int = 1) -> None:
    n, count = 8, 10_000
    factor = np.random.default_rng(0).standard_normal((2, count, n, n))
    pool = [torch.from_numpy(np.stack([symmetric(f) for f in half])) for half in factor]
    listed = [list(half.numpy()) for half in pool]
    solutions = [pk.min_norm_weights(half) for half in pool]

    def gap(c: Contestant) -> float:
        largest = pool[0].diagonal(dim1=-2, dim2=-1).amax(-1)
        return float((pk.pareto_gap(pool[0], c.call(pool[0]).weights) / largest).max())

    contestants: list[Contestant | Missing] = [
        Contestant("min_norm_weights", pk.min_norm_weights, pool, gap, 1e-10, threads=threads)
    ]
    try:
        solve = qp.daqp_raw(n)[0]

        def loop(matrices: list[Array]) -> list[Any]:
            return [solve(m) for m in matrices]

        def check(c: Contestant) -> float:
            m, found = pool[0], torch.from_numpy(np.array([qp.simplex(x) for x in loop(listed[0])]))
            value = torch.einsum("bi,bij,bj->b", found, m, found) - solutions[0].optimum
            return float((value.abs() / m.diagonal(dim1=-2, dim2=-1).amax(-1)).max())

        contestants.append(Contestant("loop over DAQP", loop, listed, check, qp.TOLERANCE))
    except ImportError as error:
        contestants.append(Missing("loop over DAQP", str(error)))
    case = "10,000 square Wishart matrices, float64" + f", {threads} threads" * (threads > 1)
    session.measure("batch", case, n, contestants)


ROW_CASES = ("non-negative", "mixed signs", "mixed signs, regularization 0.1")


def rows(session: Session, case: str) -> None:
    """A row is read (16 bytes) and its weights and optimum are written (20 bytes); the copy moves as much."""
    count, n, sets = 1_000_000, 4, 4
    g = torch.Generator().manual_seed(0)
    pool = []
    for _ in range(sets):
        a = torch.randn(count, n, generator=g)
        a = a.abs() if case == "non-negative" else a
        pool.append((a, pk.WeightSolution(torch.zeros(count, n), torch.zeros(count))))
    copies = [(torch.zeros(count * 9 // 2), torch.ones(count * 9 // 2)) for _ in range(sets)]
    regularization = 0.1 if "regularization" in case else 0.0

    def ours(x: Any) -> Any:
        return pk.pama_weights(x[0], regularization=regularization, out=x[1])

    session.measure(
        "rows",
        f"1e6 rows, float32, {case}",
        n,
        [
            Contestant("pama_weights(out=)", ours, pool),
            Contestant("copy of as many bytes", lambda x: x[0].copy_(x[1]), copies),
        ],
    )


TITLES = {
    "scores": "pama_weights, one row, float32",
    "gram": "min_norm_weights, one matrix, float64",
    "upgrad": "upgrad_weights, one matrix, float64",
}
STYLES = {
    "pama_weights": (plots.OURS, "o"),
    "min_norm_weights": (plots.OURS, "o"),
    "upgrad_weights": (plots.OURS, "o"),
    "eager PyTorch": ("#e07a1f", "s"),
    "DAQP": ("#1d4e89", "s"),
    "quadprog": ("#3a86c8", "^"),
    "PIQP": ("#2a9d8f", "v"),
    "ProxQP": ("#7ab648", "D"),
    "TorchJD MGDA": ("#7b4fa3", "P"),
    TORCHJD: ("#b48ad6", "X"),
    "cvxpy (Clarabel)": ("#555555", "*"),
}


def plot(path: Path) -> None:
    """Latency against the number of objectives, from the CSV."""
    records = [r for r in read(path) if "singular" not in r["case"] and power_of_two(int(r["n"]))]
    with plots.figure(path.with_suffix(".png"), len(TITLES)) as panels:
        for axes, (work, title) in zip(panels, TITLES.items(), strict=False):
            series: plots.Series = {}
            for r in records:
                if r["work"] == work and r["microseconds"]:
                    series.setdefault(r["contestant"], []).append((float(r["n"]), float(r["microseconds"])))
            plots.lines(axes, series, STYLES)
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("objectives N")
            axes.set_ylabel("microseconds per call, one thread (lower is better)")
            axes.label_outer()
