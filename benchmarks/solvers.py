"""The two solvers, whole calls from Python, beside every solver that a user could pick.

scores: `pama_weights` of one row beside eager PyTorch with the same rule, TorchJD's MGDA and cvxpy.
gram: `min_norm_weights` of one float64 matrix beside QP solvers, on NumPy arrays in the form each likes best.
upgrad: `upgrad_weights` of one float64 matrix beside TorchJD's UPGrad, whose ridge moves its weights.
cost: one small call, taken apart: the public function and the backend's.
batch: 10,000 matrices of 8 objectives beside a loop over DAQP.
rows: a million rows of 4 scores as a share of copy bandwidth.

Single inputs come from pools that mix interior optima, sparse supports and near ties; "singular" pools
(duplicates, dependent gradients, zero rows) are apart, since some solvers do not take them.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import registry

from . import plots
from .harness import Contestant, Missing, Session, available_threads, read

Array = NDArray[np.float64]

QP_TOLERANCE = 1e-5  # of the objective over max M_ii: some stop at an infeasibility of 1e-6
# Too many for a branch predictor to learn by heart, few enough to stay in a cache as a fresh input would be.
POOL = 500
LARGEST = 64  # objectives for every peer; beyond, for those that take well under a second
UP_TO_ANY = ("DAQP", "quadprog", "TorchJD MGDA")
UPGRAD_SIZES = (2, 4, 8, 16, 32, 64)


def run(session: Session) -> None:
    session.notes += [
        "microseconds: median over rounds of ours and one peer in turns; spread: interquartile range over it",
        "ratio: median over rounds of the contestant's time over ours (the copy's: our share of its speed)",
        "difference, scores: largest |c - ours| for eager, else of (a.c)^2 over max a^2",
        "difference, gram and batch: largest of c'Mc over max M_ii; of ours Wolfe's gap",
        "difference, upgrad: of ours the -(Mc)_j over max M_ii; of TorchJD's |c - ours| at sum 1",
    ]
    sizes = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
    score_sizes = (2, 4, 16) if session.quick else sizes
    gram_sizes = (2, 8, 32, 64) if session.quick else sizes
    singular_sizes = (8,) if session.quick else (4, 8, 16, 32, 64)
    cases: list[tuple[Callable[..., None], Any]] = [
        *((scores, (n,)) for n in score_sizes),
        *((gram, (n, "regular")) for n in gram_sizes),
        *((gram, (n, "singular")) for n in singular_sizes),
        *((upgrad, (n,)) for n in UPGRAD_SIZES[: 2 if session.quick else None]),
        (cost_of_scores, (4,)),
        *((cost_of_gram, (n,)) for n in (2, 8)),
        (batch, ()),
        *((rows, (case,)) for case in ROW_CASES),
    ]
    for work, arguments in session.works(cases, len(cases)):
        work(session, *arguments)
    session.write()
    plot(session.csv)


# --- pools -------------------------------------------------------------------------------------------


def pool_size(n: int) -> int:
    """POOL while the matrices take less than 8 MB."""
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


# --- scores ------------------------------------------------------------------------------------------


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
            for x, a, s in some(zip(c.inputs, pool, found, strict=True)):
                exact = a.double().numpy()
                value = (exact @ simplex(weights(c.call(x)))) ** 2 - float(s.optimum) ** 2
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


def simplex(c: Array) -> Array:
    """Without the infeasibility that a solver's tolerance leaves."""
    c = np.maximum(np.asarray(c, dtype=np.float64), 0)
    return c / c.sum()


def some(pairs: Any, seconds: float = 0.5) -> Any:
    """As many as there is time for."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, pairs)


# --- gram --------------------------------------------------------------------------------------------

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


def through_qpsolvers(solver: str, **options: Any) -> Callable[[int], Peer]:
    def peer(n: int) -> Peer:
        import qpsolvers

        if solver not in qpsolvers.available_solvers:
            raise ImportError(f"qpsolvers does not find {solver}")
        solve = qpsolvers.solve_qp
        q, a, b, lower = np.zeros(n), np.ones((1, n)), np.ones(1), np.zeros(n)
        return lambda m: solve(m, q, A=a, b=b, lb=lower, solver=solver, **options), same, same

    return peer


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


PEERS: list[tuple[str, Callable[[int], Peer], str]] = [
    ("DAQP", daqp_raw, ""),
    ("quadprog", quadprog_raw, ""),
    ("PIQP", piqp_raw, "workspace kept"),
    ("ProxQP", proxsuite_raw, ""),
    ("DAQP via qpsolvers", through_qpsolvers("daqp"), ""),
    ("quadprog via qpsolvers", through_qpsolvers("quadprog"), ""),
    ("PIQP via qpsolvers", through_qpsolvers("piqp"), ""),
    ("ProxQP via qpsolvers", through_qpsolvers("proxqp", eps_abs=1e-9), ""),
    ("TorchJD MGDA", torchjd_mgda, "inexact"),
    ("cvxpy (Clarabel)", cvxpy_clarabel, "problem built in each call"),
]


def wolfe_gap(pool: Sequence[Array]) -> Callable[[Contestant], float]:
    """Of our own weights, over max M_ii."""

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


def contestant(
    name: str, make: Callable[[int], Peer], note: str, n: int, pool: list[Array], optima: list[float]
) -> Contestant | Missing:
    """The peer on those matrices of the pool that it takes; how many it does not is said."""
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
    return Contestant(name, call, inputs, check, None if "inexact" in note else QP_TOLERANCE, note)


def gram(session: Session, n: int, kind: str) -> None:
    pool = gram_pool(n, pool_size(n), kind)
    ours = [torch.from_numpy(m) for m in pool]
    optima = [float(pk.min_norm_weights(m).optimum) for m in ours]
    contestants: list[Contestant | Missing] = [
        Contestant("min_norm_weights", pk.min_norm_weights, ours, wolfe_gap(pool), 1e-10)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a peer's own, on singular matrices
        for name, *peer in PEERS:
            if n > LARGEST and name not in UP_TO_ANY:
                contestants.append(Missing(name, f"left out above N={LARGEST}, for time"))
            else:
                contestants.append(contestant(name, *peer, n, pool, optima))
        session.measure("gram", f"float64, {kind} pool", n, contestants)


# --- upgrad ------------------------------------------------------------------------------------------


def upgrad(session: Session, n: int) -> None:
    pool = [torch.from_numpy(m) for m in gram_pool(n, pool_size(n), "regular")]

    def conflict(c: Contestant) -> float:
        products = [(m @ c.call(m).weights) / m.diagonal().max() for m in pool]
        return max(float(-x.min()) for x in products)

    contestants: list[Contestant | Missing] = [
        Contestant("upgrad_weights", pk.upgrad_weights, pool, conflict, 1e-9)
    ]
    try:
        from torchjd.aggregation import UPGradWeighting

        def apart(c: Contestant) -> float:
            found = [(c.call(m), pk.upgrad_weights(m).weights) for m in pool[:50]]
            return max(float((x / x.sum() - ours).abs().max()) for x, ours in found)

        contestants.append(Contestant("TorchJD UPGrad", UPGradWeighting(), pool, apart, None, "inexact"))
    except ImportError as error:
        contestants.append(Missing("TorchJD UPGrad", str(error)))
    session.measure("upgrad", "float64, regular pool", n, contestants)


# --- the parts of a call ------------------------------------------------------------------------------


def cost_of_scores(session: Session, n: int) -> None:
    inner = registry.find("cpu", "weights")
    cost(
        *(session, n, "pama_weights, one row, float32", pk.pama_weights, score_pool(n, POOL)),
        lambda a: inner.weights(a, None, 0.0, None, torch.empty_like(a), a.new_empty(())),
    )


def cost_of_gram(session: Session, n: int) -> None:
    inner = registry.find("cpu", "min_norm")
    pool = [torch.from_numpy(m) for m in gram_pool(n, POOL, "regular")]
    cost(
        *(session, n, "min_norm_weights, one matrix, float64", pk.min_norm_weights, pool),
        lambda m: inner.min_norm(m, None, 0.0, m.new_empty(m.shape[-1]), m.new_empty(())),
    )


def cost(
    session: Session,
    n: int,
    case: str,
    public: Callable[[Tensor], Any],
    pool: list[Tensor],
    backend: Callable[[Tensor], Any],
) -> None:
    session.measure(
        "cost",
        case,
        n,
        [
            Contestant(case.partition(",")[0], public, pool),
            Contestant("the backend's function", backend, pool),
            Contestant("an empty Python function", lambda x: None, pool),
        ],
    )


# --- many at once ------------------------------------------------------------------------------------


def batch(session: Session) -> None:
    n, count = 8, 10_000
    factor = np.random.default_rng(0).standard_normal((2, count, n, n))
    pool = [torch.from_numpy(np.stack([symmetric(f) for f in half])) for half in factor]
    listed = [list(half.numpy()) for half in pool]
    solutions = [pk.min_norm_weights(half) for half in pool]

    def gap(c: Contestant) -> float:
        largest = pool[0].diagonal(dim1=-2, dim2=-1).amax(-1)
        return float((pk.pareto_gap(pool[0], c.call(pool[0]).weights) / largest).max())

    contestants: list[Contestant | Missing] = [
        Contestant("min_norm_weights", pk.min_norm_weights, pool, gap, 1e-10)
    ]
    if available_threads() > 1:
        contestants.append(Contestant("min_norm_weights, 2 threads", pk.min_norm_weights, pool, threads=2))
    else:
        contestants.append(Missing("min_norm_weights, 2 threads", "one processor"))
    try:
        solve = daqp_raw(n)[0]

        def loop(matrices: list[Array]) -> list[Any]:
            return [solve(m) for m in matrices]

        def check(c: Contestant) -> float:
            m, found = pool[0], torch.from_numpy(np.array([simplex(x) for x in loop(listed[0])]))
            value = torch.einsum("bi,bij,bj->b", found, m, found) - solutions[0].optimum
            return float((value.abs() / m.diagonal(dim1=-2, dim2=-1).amax(-1)).max())

        contestants.append(Contestant("loop over DAQP", loop, listed, check, QP_TOLERANCE))
    except ImportError as error:
        contestants.append(Missing("loop over DAQP", str(error)))
    session.measure("batch", "10,000 square Wishart matrices, float64", n, contestants)


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


# --- plot --------------------------------------------------------------------------------------------

TITLES = {"scores": "pama_weights, one row, float32", "gram": "min_norm_weights, one matrix, float64"}
STYLES = {
    "pama_weights": (plots.OURS, "o"),
    "min_norm_weights": (plots.OURS, "o"),
    "eager PyTorch": ("#e07a1f", "s"),
    "DAQP": ("#1d4e89", "s"),
    "quadprog": ("#3a86c8", "^"),
    "PIQP": ("#2a9d8f", "v"),
    "ProxQP": ("#7ab648", "D"),
    "TorchJD MGDA": ("#7b4fa3", "P"),
    "TorchJD UPGrad": ("#b48ad6", "X"),
    "cvxpy (Clarabel)": ("#555555", "*"),
}


def plot(path: Path) -> None:
    """Latency against the number of objectives, from the CSV."""
    records = [r for r in read(path) if r["work"] in TITLES and "singular" not in r["case"]]
    with plots.figure(path.with_suffix(".png"), 2) as panels:
        for axes, (work, title) in zip(panels, TITLES.items(), strict=False):
            own = [r for r in records if r["work"] == work and r["microseconds"]]
            series: plots.Series = {}
            for r in own:
                series.setdefault(r["contestant"], []).append((float(r["n"]), float(r["microseconds"])))
            plots.lines(axes, series, STYLES)
            sizes = sorted({int(r["n"]) for r in own})
            axes.set_xticks(sizes, [str(n) if n & (n - 1) == 0 else "" for n in sizes])
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("objectives N")
            axes.set_ylabel("microseconds per call, one thread (lower is better)")
            axes.label_outer()
