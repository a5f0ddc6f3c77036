"""min_norm_weights and pareto_gap: the min-norm point, against independent judges.

The judges: rational arithmetic over all faces (integer matrices), long double over all faces (real ones, up
to seven objectives), cvxpy, closed forms, and Wolfe's certificate for everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from certificates import KKT, OBJECTIVE, Array, kkt_residual, prior_of, skewed, wide_product
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS32, EPS64
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64]
NEAREST = 1e-6  # how far from the minimiser nearest to the prior, as specified
CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}

Rows = list[list[Fraction]]


def gram_of(factor: Array) -> Tensor:
    """(..., N, D) -> (..., N, N), symmetric to the bit."""
    m = factor @ np.swapaxes(factor, -1, -2)
    return torch.from_numpy(np.tril(m) + np.swapaxes(np.tril(m, -1), -1, -2))


# --- Wolfe's certificate -----------------------------------------------------------------------------


def check_solution(gram: Tensor, prior: Any = None, regularization: float = 0.0) -> pk.WeightSolution:
    """On the simplex; certified; the optimum reported is c'Mc."""
    s = pk.min_norm_weights(gram, prior=prior, regularization=regularization)
    n = gram.shape[-1]
    dtype = torch.float64 if gram.dtype == torch.float64 else torch.float32
    eps = EPS64 if dtype == torch.float64 else EPS32
    assert s.weights.shape == gram.shape[:-1]
    assert s.optimum.shape == gram.shape[:-2]
    assert s.weights.dtype == s.optimum.dtype == dtype
    c = s.weights.double()
    assert (c >= 0).all()
    # n weights, each with a rounding or two of numbers up to 1
    assert ((c.sum(-1) - 1).abs() <= 4 * n * eps).all()
    # float32: weights rounded by eps / 2 of themselves move the gap by at most 2 eps max M_ii
    assert (kkt_residual(gram, c, prior, regularization) <= KKT + (2 * eps if eps == EPS32 else 0)).all()
    m = gram.double().numpy()
    largest = np.abs(np.diagonal(m, axis1=-2, axis2=-1)).max(-1)
    value = (wide_product(m, c.numpy()) * c.numpy()).sum(-1)
    # 2 n products of weights and entries up to max M_ii; below the normal numbers no relative accuracy
    bound = 4 * n * eps * largest + torch.finfo(dtype).smallest_normal * eps
    assert (np.abs(s.optimum.double().numpy() - value) <= bound).all()
    return s


# --- rational judge ----------------------------------------------------------------------------------


def rational_solve(a: Rows, b: list[Fraction]) -> list[Fraction] | None:
    """Some solution of a x = b (free unknowns 0), or None."""
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    width = len(a[0])
    pivots: list[int] = []
    for column in range(width):
        top = len(pivots)
        found = next((r for r in range(top, len(rows)) if rows[r][column]), None)
        if found is None:
            continue
        rows[top], rows[found] = rows[found], rows[top]
        rows[top] = [x / rows[top][column] for x in rows[top]]
        for r in range(len(rows)):
            if r != top and (factor := rows[r][column]):
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[top], strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    x = [Fraction(0)] * width
    for row, column in zip(rows, pivots, strict=False):
        x[column] = row[-1]
    return x


def supports(members: list[int]) -> Iterator[list[int]]:
    for size in range(len(members), 0, -1):
        yield from (list(chosen) for chosen in itertools.combinations(members, size))


def dot(x: list[Fraction], y: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def exact_solution(m: Rows, p: list[Fraction], rho: Fraction) -> tuple[list[Fraction], Fraction]:
    """The minimiser (of several the nearest to p) and c'Mc, by trying every support in exact arithmetic."""
    n = len(m)
    h = [[m[i][j] + rho * (i == j) for j in range(n)] for i in range(n)]
    for s in supports(list(range(n))):
        # H_SS c - mu e = rho p_S, e'c = 1
        system = [[h[i][j] for j in s] + [Fraction(-1)] for i in s] + [[Fraction(1)] * len(s) + [Fraction(0)]]
        x = rational_solve(system, [rho * p[i] for i in s] + [Fraction(1)])
        if x is None or min(x[:-1]) < 0:
            continue
        c = [Fraction(0)] * n
        for i, value in zip(s, x, strict=False):
            c[i] = value
        gradient = [dot(h[i], c) - rho * p[i] for i in range(n)]
        if all(g >= x[-1] for g in gradient):
            break
    else:
        raise AssertionError("no support is optimal")
    product = [dot(row, c) for row in m]
    if rho == 0:
        c = nearest(m, p, product, [i for i in range(n) if gradient[i] == x[-1]])
    return c, dot(c, product)


def nearest(m: Rows, p: list[Fraction], product: list[Fraction], members: list[int]) -> list[Fraction]:
    """Of the minimisers {c in the simplex: Mc = product}, on these members only, the nearest to p."""
    n = len(p)
    best: tuple[Fraction, list[Fraction]] | None = None
    for s in supports(members):
        # project p_S on {e'c = 1, M_S c = product}: c = p_S + A' y with A A' y = b - A p_S
        a = [[Fraction(1)] * len(s), *([row[j] for j in s] for row in m)]
        right = [Fraction(1), *product]
        own = [p[j] for j in s]
        y = rational_solve(
            [[dot(r, q) for q in a] for r in a],
            [b - dot(r, own) for r, b in zip(a, right, strict=True)],
        )
        if y is None:
            continue
        c = [Fraction(0)] * n
        for k, j in enumerate(s):
            c[j] = p[j] + sum((y[r] * a[r][k] for r in range(len(a))), Fraction(0))
        if min(c) < 0:
            continue
        distance = dot([x - q for x, q in zip(c, p, strict=True)], [x - q for x, q in zip(c, p, strict=True)])
        if best is None or distance < best[0]:
            best = distance, c
    assert best is not None
    return best[1]


@st.composite
def integer_factors(draw: st.DrawFn) -> Array:
    """Integer gradients (N, D), N <= 4: full rank or not, with repeated, opposite and zero rows."""
    n, d = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    largest = draw(st.integers(1, 3))
    j = np.array(draw(st.lists(st.integers(-largest, largest), min_size=n * d, max_size=n * d))).reshape(n, d)
    for i in range(1, n):
        kind = draw(st.sampled_from(["own", "own", "copy", "opposite", "zero"]))
        if kind != "own":
            j[i] = {"copy": 1, "opposite": -1, "zero": 0}[kind] * j[draw(st.integers(0, i - 1))]
    return j.astype(np.float64)


priors = st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=4, max_size=4))


def cut(prior: Any, n: int) -> Any:
    """The first n numbers of a prior; None where they give no mass."""
    return [float(x) for x in prior[:n]] if prior is not None and sum(prior[:n]) > 0 else None


def exact_prior(prior: Any, n: int) -> list[Fraction]:
    values = [Fraction(1)] * n if prior is None else [Fraction(x) for x in prior]
    return [x / sum(values) for x in values]


def exact_gram(m: Tensor) -> Rows:
    return [[Fraction(x) for x in row] for row in m.tolist()]


@given(factor=integer_factors(), prior=priors)
def test_integer_matrices_give_the_minimiser_nearest_to_the_prior(factor: Array, prior: Any) -> None:
    m = gram_of(factor)
    n = m.shape[-1]
    prior = cut(prior, n)
    s = check_solution(m, prior)
    c, optimum = exact_solution(exact_gram(m), exact_prior(prior, n), Fraction(0))
    largest = float(m.diagonal().max())
    assert abs(float(s.optimum) - float(optimum)) <= OBJECTIVE * largest
    assert (s.weights - torch.tensor([float(x) for x in c], dtype=torch.float64)).abs().max() <= NEAREST


@given(factor=integer_factors(), prior=priors, regularization=st.sampled_from([0.03125, 0.25, 1.0, 32.0]))
def test_integer_matrices_with_regularization(factor: Array, prior: Any, regularization: float) -> None:
    m = gram_of(factor)
    n = m.shape[-1]
    prior = cut(prior, n)
    s = check_solution(m, prior, regularization)
    largest = float(m.diagonal().max())
    rho = Fraction(regularization * largest)
    c, optimum = exact_solution(exact_gram(m), exact_prior(prior, n), rho if rho else Fraction(1))
    # strongly convex: n-term sums with relative error n eps, over rho >= max M_ii / 32
    tolerance = 32 * 16 * n * EPS64
    assert (s.weights - torch.tensor([float(x) for x in c], dtype=torch.float64)).abs().max() <= tolerance
    # c'Mc moves by 2 |Mc| |dc| <= 2 n max M_ii |dc|
    assert abs(float(s.optimum) - float(optimum)) <= 2 * n * tolerance * largest


# --- families of matrices ----------------------------------------------------------------------------

Family = Callable[[np.random.Generator, int, int], Array]


def normal(g: np.random.Generator, rows: int, n: int, d: int) -> Array:
    return g.standard_normal((rows, n, d))


def repeated(g: np.random.Generator, rows: int, n: int, sign: float, integers: bool) -> Array:
    """About half of the gradients are copies (or opposites, or zeros) of earlier ones."""
    j = g.integers(-3, 4, (rows, n, n)).astype(np.float64) if integers else normal(g, rows, n, n)
    for b, i in itertools.product(range(rows), range(1, n)):
        if g.integers(2):
            j[b, i] = sign * j[b, g.integers(i)]
    return j


def zero_rows(g: np.random.Generator, rows: int, n: int) -> Array:
    j = repeated(g, rows, n, 0.0, True)
    j[:, g.integers(n)] = 0
    return j


def diagonal(g: np.random.Generator, rows: int, n: int) -> Array:
    """M_ii down to 1e-20 of the largest."""
    j = np.zeros((rows, n, n))
    j[:, range(n), range(n)] = 10.0 ** g.uniform(-10, 0, (rows, n))
    j[:, 0, 0], j[:, -1, -1] = 1.0, 1e-10
    return j


def ill_conditioned(g: np.random.Generator, rows: int, n: int) -> Array:
    """Eigenvalues of M down to 1e-14."""
    q: Array = np.linalg.qr(normal(g, rows, n, n))[0]
    return q * 10.0 ** (-7 * np.arange(n) / max(n - 1, 1))


def nearly_parallel(g: np.random.Generator, rows: int, n: int) -> Array:
    return normal(g, rows, 1, n) + 10.0 ** g.uniform(-12, -2, (rows, 1, 1)) * normal(g, rows, n, n)


def near_duplicates(g: np.random.Generator, rows: int, n: int) -> Array:
    j = repeated(g, rows, n, 1.0, False)
    return np.asarray(j + 10.0 ** g.uniform(-12, -2, (rows, 1, 1)) * normal(g, rows, n, n))


FACTORS: dict[str, Family] = {
    "square": lambda g, rows, n: normal(g, rows, n, n),
    "tall": lambda g, rows, n: normal(g, rows, n, 8 * n),
    "rank deficient": lambda g, rows, n: normal(g, rows, n, g.integers(1, n + 1)),
    "a common direction": lambda g, rows, n: normal(g, rows, n, n) + np.eye(1, n) * n**0.5,
    "rank 1": lambda g, rows, n: g.integers(-3, 4, (rows, n, 1)).astype(np.float64),
    "positive rank 1": lambda g, rows, n: normal(g, rows, n, 1) ** 2 + 0.1,
    "low rank integers": lambda g, rows, n: g.integers(-3, 4, (rows, n, 2)).astype(np.float64),
    "integer duplicates": lambda g, rows, n: repeated(g, rows, n, 1.0, True),
    "integer opposites": lambda g, rows, n: repeated(g, rows, n, -1.0, True),
    "duplicates": lambda g, rows, n: repeated(g, rows, n, 1.0, False),
    "zero rows": zero_rows,
    "all zero": lambda g, rows, n: np.zeros((rows, n, n)),
    "signs": lambda g, rows, n: g.choice([-1.0, 1.0], (rows, n, max(n // 2, 1))),
    "diagonal": diagonal,
    "ill-conditioned": ill_conditioned,
    "any magnitude": lambda g, rows, n: normal(g, rows, n, n) * 10.0 ** g.uniform(-75, 75, (rows, 1, 1)),
    "graded rows": lambda g, rows, n: normal(g, rows, n, n) * 10.0 ** g.uniform(-6, 0, (rows, n, 1)),
    "nearly parallel": nearly_parallel,
    "near duplicates": near_duplicates,
}


def near_ties(g: np.random.Generator, rows: int, n: int) -> Tensor:
    """The last multiplier is near 0: its product with the optimum of the others is their optimum."""
    m = gram_of(normal(g, rows, n, 2 * n))
    m[:, -1, -1] = 10.0 * n
    for b in range(rows):
        if n > 1:
            level = pk.min_norm_weights(m[b, :-1, :-1]).optimum
            m[b, -1, :-1] = m[b, :-1, -1] = level * (1 + 10.0 ** g.uniform(-16, -2) * g.choice([-1, 0, 1]))
    return m


def family(name: str, rows: int, n: int, seed: int = 0) -> Tensor:
    g = np.random.default_rng([seed, n, len(name)])
    return near_ties(g, rows, n) if name == "near ties" else gram_of(FACTORS[name](g, rows, n))


FAMILIES = [*FACTORS, "near ties"]


@pytest.mark.parametrize("name", FAMILIES)
def test_certified_for_every_number_of_objectives(name: str) -> None:
    """Wolfe's residual in long double, 1 to 64 objectives, with and without regularization and prior."""
    for n in range(1, 65):
        m = family(name, 6, n)
        for prior in (None, skewed(n)):
            for regularization in (0.0, 0.1):
                check_solution(m, prior, regularization)


@pytest.mark.parametrize("name", FAMILIES)
def test_certified_under_every_instruction_set(name: str, isa: str) -> None:
    for n in (2, 3, 5, 8, 9, 17, 40):
        check_solution(family(name, 9, n, seed=1))
        check_solution(family(name, 9, n, seed=1), skewed(n), 0.1)


@pytest.mark.parametrize("exponent", [-300, -150, -75, 75, 150, 300])
def test_certified_at_every_scale(exponent: int) -> None:
    """Beyond the specified 1e-150 to 1e150, as far as double goes."""
    for name in FAMILIES:
        for n in (1, 2, 3, 8, 20):
            m = family(name, 2, n)
            m = m / m.abs().amax().clamp(min=1e-300) * 10.0**exponent
            for regularization in (0.0, 0.1):
                check_solution(m, skewed(n), regularization)


@pytest.mark.parametrize("n", [65, 100, 129, 256, 512])
def test_more_objectives(n: int) -> None:
    for name in ("square", "tall", "rank deficient", "integer duplicates", "signs"):
        check_solution(family(name, 1, n)[0])
    check_solution(family("square", 1, n)[0], skewed(n), 0.1)


# --- all faces, cvxpy, closed forms ------------------------------------------------------------------


def eliminate(a: Array, b: Array) -> Array:
    """a x = b for a batch in long double, with row exchanges; infinity or NaN where singular."""
    a = np.concatenate([a, b[..., None]], -1)
    batch, size = np.arange(a.shape[0]), a.shape[1]
    for k in range(size):
        pivot = k + np.abs(a[:, k:, k]).argmax(-1)
        a[batch, k], a[batch, pivot] = a[batch, pivot].copy(), a[batch, k].copy()
        a[:, k] /= a[:, k, k, None].copy()
        factor = a[:, :, k].copy()
        factor[:, k] = 0
        a -= factor[..., None] * a[:, k, None]
    return np.asarray(a[..., -1])


def smallest_over_faces(m: Array, p: Array, rho: float) -> np.longdouble:
    """The least objective of all faces' stationary points that lie in the simplex."""
    n = len(m)
    subsets = np.array(list(itertools.product([0, 1], repeat=n))[1:], dtype=np.longdouble)
    h = m.astype(np.longdouble) + rho * np.eye(n, dtype=np.longdouble)
    system = np.zeros((len(subsets), n + 1, n + 1), dtype=np.longdouble)
    system[:, :n, :n] = h * subsets[:, :, None] * subsets[:, None, :]
    system[:, range(n), range(n)] += 1 - subsets
    system[:, :n, n], system[:, n, :n] = -subsets, subsets
    right = np.concatenate([rho * p * subsets, np.ones((len(subsets), 1))], -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        c = eliminate(system, right)[:, :n]
        # rounding to the simplex changes the objective by 1e-18 max M_ii or so, never below the optimum
        inside = (c >= -1e-18).all(-1) & np.isfinite(c).all(-1)
    c = np.maximum(c[inside], 0)
    c = c / c.sum(-1, keepdims=True)
    value = ((c @ m.astype(np.longdouble)) * c).sum(-1) / 2 + rho / 2 * ((c - p) ** 2).sum(-1)
    return np.longdouble(value.min())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "all zero"])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_no_face_has_a_smaller_objective(name: str, regularization: float) -> None:
    for n in range(2, 8):
        m = family(name, 3, n, seed=2)
        for prior in (None, skewed(n)):
            c = pk.min_norm_weights(m, prior=prior, regularization=regularization).weights.numpy()
            for matrix, point in zip(m.numpy(), c.astype(np.longdouble), strict=True):
                largest, p = matrix.diagonal().max(), prior_of(prior, n).numpy()
                if largest == 0:
                    continue
                scaled, x = matrix / largest, point / point.sum()
                value = (wide_product(scaled, x) * x).sum() / 2 + regularization / 2 * ((x - p) ** 2).sum()
                least = smallest_over_faces(scaled, p, regularization)
                assert value - least <= OBJECTIVE * (1 + regularization)


@pytest.mark.parametrize("regularization", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("uniform", [True, False])
def test_matches_cvxpy(n: int, regularization: float, uniform: bool) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    g = np.random.default_rng(n)
    for factor in (g.standard_normal((n, 2 * n)), g.standard_normal((n, n)) + 0.5):
        m = gram_of(factor)
        prior = None if uniform else skewed(n)
        p = prior_of(prior, n).numpy()
        s = pk.min_norm_weights(m, prior=prior, regularization=regularization)
        largest = float(m.diagonal().max())
        rho = regularization * largest
        x = cvxpy.Variable(n, nonneg=True)
        objective = cvxpy.sum_squares(factor.T @ x) / 2 + rho / 2 * cvxpy.sum_squares(x - p)
        least = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(x) == 1]).solve(**CLARABEL)
        c = s.weights.numpy()
        # Clarabel's gap of 1e-13 and infeasibility of 1e-13, times objectives and gradients up to max M_ii
        value = float(s.optimum) / 2 + rho / 2 * ((c - p) ** 2).sum()
        assert value == pytest.approx(least, abs=1e-10 * largest)
        # that gap moves x by sqrt(2 gap / smallest eigenvalue), which is above 1e-3 max M_ii here
        assert np.linalg.eigvalsh(m.numpy())[0] + rho > 1e-3 * largest
        assert abs(x.value - c).max() < 1e-5


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("uniform", [True, False])
def test_rank_one_is_the_scalar_problem(regularization: float, uniform: bool) -> None:
    """M = a a': the same weights as from the scores a, ties and signs included."""
    for n in (2, 3, 4, 7, 8, 9, 16, 40, 64):
        g = torch.Generator().manual_seed(n)
        for low, high in ((1, 6), (-5, 6), (-6, 0), (0, 4)):
            a = torch.randint(low, high, (4, n), generator=g).double()
            prior = None if uniform else skewed(n)
            s = pk.min_norm_weights(a[:, :, None] * a[:, None, :], prior=prior, regularization=regularization)
            r = reference.pama_weights(a, prior=prior, regularization=regularization)
            # with rho >= max M_ii / 10: n-term sums with relative error n eps, over rho
            tolerance = NEAREST if regularization == 0 else 10 * 16 * n * EPS64
            assert ((s.weights - r.weights).abs() <= tolerance).all()
            largest = a.square().amax(-1)
            error = OBJECTIVE if regularization == 0 else 2 * n * tolerance
            assert ((s.optimum - r.optimum.square()).abs() <= error * largest).all()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 17, 33, 64])
def test_closed_forms_where_the_minimiser_is_not_unique(n: int) -> None:
    """The one nearest to the prior, for both priors."""
    for prior in (None, skewed(n)):
        p = prior_of(prior, n)

        def near(m: Tensor, wanted: Tensor, prior: Any = prior) -> None:
            assert (check_solution(m.double(), prior).weights - wanted).abs().max() <= NEAREST

        near(torch.zeros(n, n), p)
        # all the same: every point is optimal
        near(torch.full((n, n), 3.0), p)
        # zero rows take everything, shared as near to the prior as can be
        zeros = torch.arange(n) % 3 == 0
        m = torch.eye(n) * (~zeros) * 2
        near(m, reference.project_on_simplex(torch.where(zeros, p, -9.0)))
        # copies of orthogonal gradients of different lengths: each group's mass is fixed
        group = torch.arange(n) // 2
        length = 1 + torch.arange(n).double() % 5
        m = (group[:, None] == group[None, :]) * (length[2 * group][:, None])
        mass = torch.zeros(n).double().index_add(0, group, torch.ones(n).double()).clamp(max=1)
        mass = mass[: int(group[-1]) + 1] / length[::2][: int(group[-1]) + 1]
        mass = mass / mass.sum()
        wanted = torch.zeros(n).double()
        for k, share in enumerate(mass):
            inside = group == k
            wanted[inside] = share * reference.project_on_simplex(p[inside] / share)
        near(m, wanted)
        # pairs of opposite orthogonal gradients: the minimum 0 needs equal weights within each pair
        if n % 2 == 0:
            sign = 1 - 2 * (torch.arange(n) % 2)
            m = (group[:, None] == group[None, :]) * (sign[:, None] * sign[None, :])
            pair = p.reshape(-1, 2).mean(-1).repeat_interleave(2)
            near(m, pair)


def test_written_out_examples() -> None:
    def solve(rows: list[list[float]], **options: Any) -> list[Any]:
        s = pk.min_norm_weights(torch.tensor(rows, dtype=torch.float64), **options)
        return [s.weights.tolist(), s.optimum.tolist()]

    assert solve([[1, 0], [0, 1]]) == [[0.5, 0.5], 0.5]
    assert solve([[1, 0], [0, 3]]) == [[0.75, 0.25], 0.75]
    assert solve([[1, 2], [2, 5]]) == [[1, 0], 1]
    assert solve([[4, -4], [-4, 4]], prior=[3, 1]) == [[0.5, 0.5], 0]
    assert solve([[4, 4], [4, 4]], prior=[3, 1]) == [[0.75, 0.25], 4]
    assert solve([[0, 0], [0, 0]], prior=[3, 1]) == [[0.75, 0.25], 0]
    assert solve([[7]]) == [[1], 7]
    assert solve([[0]]) == [[1], 0]
    # rho = 1 and p = (1, 0): 1/2 (c^2 + (1-c)^2) + (1-c)^2 is least where c = 3/4
    assert solve([[1, 0], [0, 1]], prior=[1, 0], regularization=1.0) == [[0.75, 0.25], 0.625]


# --- invariances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_permuting_objectives_permutes_weights(n: int, regularization: float) -> None:
    g = torch.Generator().manual_seed(n)
    for name in ("tall", "rank 1", "integer duplicates", "zero rows", "ill-conditioned"):
        if name == "ill-conditioned" and regularization == 0:
            continue
        m = family(name, 4, n)
        order = torch.randperm(n, generator=g)
        prior = prior_of(skewed(n), n)
        s = pk.min_norm_weights(m, prior=prior, regularization=regularization)
        t = pk.min_norm_weights(m[:, order][:, :, order], prior=prior[order], regularization=regularization)
        # eigenvalues from max M_ii / 10 on (rho, or those of a tall factor): n-term sums in another order
        unique = name == "tall" or regularization > 0
        tolerance = 10 * 16 * n * EPS64 if unique else 2 * NEAREST
        assert ((s.weights[:, order] - t.weights).abs() <= tolerance).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_scaling_by_powers_of_two_changes_nothing(name: str, regularization: float) -> None:
    for n in (1, 2, 3, 8, 9, 20):
        m = family(name, 3, n)
        if name == "any magnitude":
            m = m / m.abs().amax((-2, -1), keepdim=True)
        s = pk.min_norm_weights(m, prior=skewed(n), regularization=regularization)
        for exponent in (-600, -101, -1, 2, 77, 700):
            t = pk.min_norm_weights(m * 2.0**exponent, prior=skewed(n), regularization=regularization)
            assert torch.equal(s.weights, t.weights)
            assert torch.equal(s.optimum * 2.0**exponent, t.optimum)


@pytest.mark.parametrize("regularization", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("integers", [True, False])
def test_duplicates_get_equal_weights(regularization: float, integers: bool) -> None:
    """Bitwise, for equal rows with equal prior, wherever they stand."""
    g = np.random.default_rng(5)
    for n in (2, 3, 4, 8, 9, 16, 31, 64):
        distinct = max(n // 2, 1)
        j = g.integers(-3, 4, (6, distinct, n)).astype(np.float64) if integers else normal(g, 6, distinct, n)
        origin = torch.from_numpy(
            np.concatenate([np.arange(distinct), g.integers(distinct, size=n - distinct)])
        )
        origin = origin[torch.from_numpy(g.permutation(n))]
        m = gram_of(j)[:, origin][:, :, origin]
        for prior in (None, [float(1 + int(i) % 3) for i in origin]):
            c = check_solution(m, prior, regularization).weights
            for i in range(n):
                first = int((origin == origin[i]).nonzero()[0])
                assert torch.equal(c[:, i], c[:, first])


@pytest.mark.parametrize("regularization", [0.03, 0.1, 1.0])
def test_continuity_with_regularization(regularization: float) -> None:
    g = np.random.default_rng(3)
    for name in ("square", "rank 1", "integer duplicates", "zero rows", "nearly parallel"):
        for n in (2, 3, 8, 16):
            factor = FACTORS[name](g, 4, n)
            largest = (factor**2).sum(-1).max()
            factor = np.concatenate([factor, np.zeros((4, n, 1))], -1) / math.sqrt(largest)
            factor[:, 0, -1] = 2.0  # the largest M_ii, always 4 or above
            for delta in (1e-9, 1e-5):
                moved = factor + delta * normal(g, *factor.shape) / n
                m, other = gram_of(factor), gram_of(moved)
                s = pk.min_norm_weights(m, regularization=regularization)
                t = pk.min_norm_weights(other, regularization=regularization)
                change = (m - other).norm(dim=(-2, -1))
                # |dc| <= |d gradient| / rho with rho >= 4 regularization, which changes with max M_ii itself
                bound = change * (1 + regularization) / (4 * regularization)
                noise = 16 * n * EPS64 / regularization
                assert ((s.weights - t.weights).norm(dim=-1) <= bound + noise).all()


def test_regularization_zero_is_the_limit() -> None:
    for name in ("rank 1", "low rank integers", "integer duplicates", "integer opposites", "zero rows"):
        m = family(name, 5, 5)
        exact = pk.min_norm_weights(m, prior=[1, 2, 0, 1, 3])
        near = pk.min_norm_weights(m, prior=[1, 2, 0, 1, 3], regularization=1e-8)
        # the path c(rho) is Lipschitz: its constant is a ratio of eigenvalues of small integer matrices
        assert ((exact.weights - near.weights).abs() <= 1e-5).all()


def test_large_regularization_gives_the_prior() -> None:
    m = family("square", 4, 3)
    for huge in (1e20, 1e300):
        for k in (1e-100, 1.0, 1e100):
            s = pk.min_norm_weights(m * k, prior=[1, 2, 5], regularization=huge)
            # the smallest eigenvalue over rho, and the rounding of three weights
            assert ((s.weights - prior_of([1, 2, 5], 3)).abs() <= 1e-20 + 4 * EPS64).all()


@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_a_prior_of_zero_is_not_exclusion(regularization: float) -> None:
    m = torch.diag(torch.tensor([1.0, 4.0, 4.0])).double()
    c = pk.min_norm_weights(m, prior=[0, 1, 1], regularization=regularization).weights
    assert c[0] > 0.25


# --- bits --------------------------------------------------------------------------------------------


def mixed(rows: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices of every family side by side, and some with a NaN or an infinity."""
    parts = [family(name, rows // len(FAMILIES) + 1, n) for name in FAMILIES if name != "any magnitude"]
    parts += [family("any magnitude", rows // len(FAMILIES) + 1, n) ** 0 * family("square", 1, n)]
    m = torch.stack(parts, 1).reshape(-1, n, n)[:rows].clone()
    m[5::23, 0, n - 1] = NAN
    m[11::31, n - 1, n - 1] = INF
    return m.to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 16, 17, 33])
def test_a_matrix_alone_has_the_bits_that_it_has_in_a_batch(n: int, dtype: torch.dtype, threads: int) -> None:
    m = mixed(40 if n > 8 else 700, n, dtype)
    for prior, regularization in ((None, 0.0), (skewed(n), 0.1)):
        whole = pk.min_norm_weights(m, prior=prior, regularization=regularization)
        for i in range(0, len(m), 1 if n > 8 else 7):
            alone = pk.min_norm_weights(m[i], prior=prior, regularization=regularization)
            assert torch.equal(bits(alone.weights), bits(whole.weights[i]))
            assert torch.equal(bits(alone.optimum), bits(whole.optimum[i]))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_every_size_of_batch(rows: int) -> None:
    for n in (3, 8, 12):
        m = mixed(40, n)
        whole = pk.min_norm_weights(m)
        part = pk.min_norm_weights(m[3 : 3 + rows])
        assert torch.equal(bits(part.weights), bits(whole.weights[3 : 3 + rows]))
        assert torch.equal(bits(part.optimum), bits(whole.optimum[3 : 3 + rows]))


def test_same_bits_for_every_number_of_threads(threads: int) -> None:
    for rows, n in ((9000, 2), (2000, 8), (60, 40)):
        m = mixed(rows, n)
        for regularization in (0.0, 0.1):
            s = pk.min_norm_weights(m, regularization=regularization)
            torch.set_num_threads(1)
            t = pk.min_norm_weights(m, regularization=regularization)
            torch.set_num_threads(threads)
            for x, y in zip(s, t, strict=True):
                assert torch.equal(bits(x), bits(y))


def test_same_bits_from_run_to_run_and_at_any_address() -> None:
    for n in (2, 3, 8, 16, 50):
        m = mixed(20, n)
        wanted = pk.min_norm_weights(m)
        for shift in range(4):
            memory = torch.empty(m.numel() + shift, dtype=m.dtype)
            moved = memory[shift:].view_as(m).copy_(m)
            for x, y in zip(pk.min_norm_weights(moved), wanted, strict=True):
                assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_a_nan_or_infinity_concerns_its_own_matrix(n: int, bad: float, regularization: float) -> None:
    for i, j in {(0, 0), (n - 1, n - 1), (0, n - 1), (n - 1, 0)}:
        m = family("square", 20, n)
        before = pk.min_norm_weights(m, regularization=regularization)
        m[7, i, j] = bad
        after = pk.min_norm_weights(m, regularization=regularization)
        assert after.weights[7].isnan().all()
        assert after.optimum[7].isnan()
        rest = torch.arange(20) != 7
        assert torch.equal(after.weights[rest], before.weights[rest])
        assert torch.equal(after.optimum[rest], before.optimum[rest])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_out_receives_the_solution(dtype: torch.dtype, n: int) -> None:
    for m in (family("tall", 6, n).reshape(2, 3, n, n).to(dtype), family("tall", 1, n)[0].to(dtype)):
        wanted = pk.min_norm_weights(m, regularization=0.1)
        out = pk.WeightSolution(torch.full_like(wanted.weights, NAN), torch.full_like(wanted.optimum, NAN))
        returned = pk.min_norm_weights(m, regularization=0.1, out=out)
        assert returned is out
        assert torch.equal(out.weights, wanted.weights)
        assert torch.equal(out.optimum, wanted.optimum)


# --- inputs of every kind ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types_are_solved_in_float64(dtype: torch.dtype) -> None:
    """The float64 solution of the same numbers, rounded once to float32."""
    for name in ("tall", "integer duplicates", "zero rows", "signs"):
        for n in (1, 2, 3, 8, 12):
            m = family(name, 5, n).to(dtype)
            for regularization in (0.0, 0.1):
                s = check_solution(m, skewed(n), regularization)
                t = pk.min_norm_weights(m.double(), prior=skewed(n), regularization=regularization)
                assert torch.equal(s.weights, t.weights.float())
                assert torch.equal(s.optimum, t.optimum.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rank 1", "duplicates", "nearly parallel", "positive rank 1"])
def test_rounding_of_the_input_is_no_indefiniteness(name: str, dtype: torch.dtype) -> None:
    """A Gram matrix of dependent gradients rounded to its dtype: minors are negative by rounding."""
    for n in (2, 3, 8, 16):
        m = family(name, 20, n, seed=7)
        s = pk.min_norm_weights((m / m.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)).to(dtype))
        assert (s.weights >= 0).all()
        assert ((s.weights.double().sum(-1) - 1).abs() <= 4 * n * EPS32).all()


def check_dependent(count: int, n: int, dimensions: int, dtype: torch.dtype, regularization: float) -> None:
    """More objectives than dimensions: after rounding the matrix is not quite semidefinite."""
    g = torch.Generator().manual_seed(n)
    factor = torch.randn(count, n, dimensions, generator=g, dtype=torch.float64) + 0.5
    m = (factor @ factor.mT).to(dtype)
    c = pk.min_norm_weights(m, regularization=regularization).weights.double()
    a = m.double() / m.diagonal(dim1=-2, dim2=-1).amax(-1).double()[:, None, None]
    gradient = (a @ c[..., None])[..., 0] + regularization * (c - 1 / n)
    gap = (gradient * c).sum(-1) - gradient.amin(-1)
    # what the negative eigenvalue is worth, and weights rounded to float32
    indefinite = -torch.linalg.eigvalsh(a)[:, 0].clamp(max=0)
    assert (gap <= 2 * indefinite + 4 * EPS32).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 8, 9, 16, 32])
@pytest.mark.parametrize("regularization", [0.0, 1e-3])
def test_dependent_gradients_are_solved_in_spite_of_rounding(
    n: int, dtype: torch.dtype, regularization: float
) -> None:
    for dimensions in (1, 2, 8):
        check_dependent(100, n, dimensions, dtype, regularization)


def test_asymmetry_by_rounding_is_averaged() -> None:
    for n in (2, 3, 8, 20):
        m = family("tall", 5, n).float()
        noisy = m * (1 + EPS32 * torch.randn(m.shape))
        s = pk.min_norm_weights(noisy)
        t = pk.min_norm_weights((noisy.double() + noisy.double().mT) / 2)
        # rounding to float32, and n-term sums of float64 over an eigenvalue of max M_ii / 10
        assert ((s.weights - t.weights).abs() <= EPS32).all()
        assert torch.equal(pk.min_norm_weights(noisy.mT).weights, s.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides_and_any_number_of_axes(dtype: torch.dtype) -> None:
    m = family("tall", 24, 5).reshape(4, 6, 5, 5).to(dtype)
    wide = torch.zeros(4, 6, 11, 10, dtype=dtype)
    wide[:, :, 1::2, ::2] = m
    views = [
        m,
        m[0],
        m[0, 0],
        m.mT,
        m[:, ::2],
        m.transpose(0, 1),
        m[..., 1:4, 1:4],
        m[:1, :1].expand(4, 6, 5, 5),
        m[:, :1].expand(4, 6, 5, 5),
        m.movedim((2, 3), (0, 1)).contiguous().movedim((0, 1), (2, 3)),
        wide[:, :, 1::2, ::2],
        wide[2, 3, 1::2, ::2],
        m[None, :, None],
        m[:, :, :1, :1].expand(4, 6, 5, 5),
    ]
    for view in views:
        for regularization in (0.0, 0.1):
            s = pk.min_norm_weights(view, regularization=regularization)
            t = pk.min_norm_weights(view.contiguous(), regularization=regularization)
            assert s.weights.shape == view.shape[:-1]
            assert s.weights.is_contiguous()
            assert torch.equal(s.weights, t.weights)
            assert torch.equal(s.optimum, t.optimum)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (0, 1, 1), (0, 2, 2), (0, 70, 70)])
def test_no_matrices(shape: tuple[int, ...]) -> None:
    for regularization in (0.0, 0.1):
        s = pk.min_norm_weights(torch.zeros(shape), regularization=regularization)
        assert s.weights.shape == shape[:-1]
        assert s.optimum.shape == shape[:-2]


def test_prior_forms_are_equal() -> None:
    m = family("rank 1", 7, 3)
    wanted = pk.min_norm_weights(m, prior=[0.25, 0.25, 0.5]).weights
    for prior in ((1, 1, 2), torch.tensor([2, 2, 4]), torch.tensor([0.5, 0.5, 1.0]), [1e300, 1e300, 2e300]):
        assert torch.equal(pk.min_norm_weights(m, prior=prior).weights, wanted)


def test_uniform_prior_by_default() -> None:
    for n in (1, 2, 3, 8, 9):
        for regularization in (0.0, 0.1):
            m = family("integer duplicates", 7, n)
            s = pk.min_norm_weights(m, regularization=regularization)
            t = pk.min_norm_weights(m, prior=[1] * n, regularization=regularization)
            assert torch.equal(s.weights, t.weights)


def test_results_have_no_gradient() -> None:
    leaf = family("square", 2, 3).requires_grad_()
    for m in (leaf, torch.nn.Parameter(leaf.detach()), 2 * leaf):
        s = pk.min_norm_weights(m, regularization=0.1)
        assert not s.weights.requires_grad
        assert not s.optimum.requires_grad
        assert not pk.pareto_gap(m, s.weights).requires_grad


class Labelled(Tensor):
    pass


def test_subclasses_and_vmap() -> None:
    for n in (1, 2, 5, 12):
        m = family("square", 4, n)
        wanted = pk.min_norm_weights(m)
        s = pk.min_norm_weights(m.as_subclass(Labelled))
        assert torch.equal(s.weights, wanted.weights)
        assert torch.equal(s.optimum, wanted.optimum)
        mapped = torch.func.vmap(lambda x: pk.min_norm_weights(x).weights)(m)
        assert torch.equal(mapped, wanted.weights)


def test_lazily_negated_values_are_refused() -> None:
    """Imaginary parts of conjugates: their memory holds the opposite numbers."""
    m = family("square", 4, 3)
    imaginary = torch.complex(torch.zeros_like(m), -m).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(imaginary, m)
    for options in ({}, {"prior": [1, 1, 2]}):
        with pytest.raises(ValueError, match="gram: expected a plain tensor, got a negated view"):
            pk.min_norm_weights(imaginary, **options)
        assert torch.equal(
            pk.min_norm_weights(imaginary.resolve_neg(), **options).weights,
            pk.min_norm_weights(m, **options).weights,
        )


# --- bad input ---------------------------------------------------------------------------------------

IDENTITY = torch.eye(3, dtype=torch.float64)
NOT_SYMMETRIC = torch.tensor([[1.0, 0.5, 0], [0.3, 1, 0], [0, 0, 1]]).double()
BAD_MATRICES = {
    "not symmetric": NOT_SYMMETRIC,
    "triangular": torch.tensor([[2.0, 1], [0, 2]]).double(),
    "antisymmetric": torch.tensor([[1.0, 0.5], [-0.5, 1]]).double(),
    "negative diagonal": torch.diag(torch.tensor([1.0, -0.5, 2])).double(),
    "only negative": -torch.ones(1, 1).double(),
    "large correlation": torch.tensor([[1.0, 2], [2, 1]]).double(),
    "large anticorrelation": torch.tensor([[1.0, -2], [-2, 1]]).double(),
    "zero diagonal": torch.tensor([[0.0, 1], [1, 0]]).double(),
    "negative at the middle": 1.9 * IDENTITY - 0.9,
    "indefinite, no negative entry": torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.9], [0.1, 0.9, 1]]).double(),
}


@pytest.mark.parametrize("name", BAD_MATRICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1e-30, 1.0, 1e30])
def test_a_matrix_that_is_clearly_no_gram_matrix_is_refused(name: str, dtype: torch.dtype, k: float) -> None:
    bad = (k * BAD_MATRICES[name]).to(dtype)
    with pytest.raises(ValueError, match="gram: expected a symmetric positive semidefinite matrix"):
        pk.min_norm_weights(bad)
    batch = (torch.eye(len(bad), dtype=dtype) * k).repeat(5, 1, 1)
    batch[3] = bad
    with pytest.raises(ValueError, match="batch index 3"):
        pk.min_norm_weights(batch)
    out = pk.WeightSolution(torch.empty(len(bad), dtype=dtype), torch.empty((), dtype=dtype))
    with pytest.raises(ValueError, match="gram"):
        pk.min_norm_weights(bad, out=out)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 2), (0, 0), (4, 0, 0)])
def test_a_shape_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gram: expected shape \(\.\.\., N, N\)"):
        pk.min_norm_weights(torch.ones(shape))


@pytest.mark.parametrize(
    ("prior", "error"),
    [
        ([1, 1], ValueError),
        ([1, 1, -1], ValueError),
        ([0, 0, 0], ValueError),
        ([1, NAN, 1], ValueError),
        ([1, INF, 1], ValueError),
        (torch.ones(2), ValueError),
        (torch.ones(1, 3), ValueError),
        (torch.tensor([1.0, -1, 1]), ValueError),
        (torch.ones(3, dtype=torch.complex64), TypeError),
        ("abc", TypeError),
        (1.0, TypeError),
    ],
)
def test_a_wrong_prior_is_refused(prior: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prior"):
        pk.min_norm_weights(IDENTITY, prior=prior)


@pytest.mark.parametrize("value", [-0.1, INF, NAN])
def test_a_wrong_regularization_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="regularization"):
        pk.min_norm_weights(IDENTITY, regularization=value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_wrong_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="gram"):
        pk.min_norm_weights(IDENTITY.to(dtype))


# --- pareto_gap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_pareto_gap_bounds_what_can_still_be_gained(n: int) -> None:
    m = family("square", 30, n)
    c = torch.rand(30, n).double()
    c = c / c.sum(-1, keepdim=True)
    gap, least = pk.pareto_gap(m, c), pk.min_norm_weights(m)
    value = torch.einsum("bi,bij,bj->b", c, m, c)
    largest = m.diagonal(dim1=-2, dim2=-1).amax(-1)
    # n^2 products up to max M_ii
    rounding = 4 * n * EPS64 * largest
    wanted = value - torch.einsum("bij,bj->bi", m, c).amin(-1)
    assert ((gap - wanted).abs() <= rounding).all()
    # convex: 1/2 c'Mc - 1/2 optimum <= gap
    assert ((value - least.optimum) / 2 <= gap + rounding).all()
    assert (pk.pareto_gap(m, least.weights).abs() <= KKT * largest).all()
    assert (gap >= -rounding).all()


def test_pareto_gap_written_out() -> None:
    m = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[4.0, -4.0], [-4.0, 4.0]]])
    c = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    assert pk.pareto_gap(m, c).tolist() == [0.0, 8.0]
    assert pk.pareto_gap(m[0], c[1]).tolist() == 1.0
    assert pk.pareto_gap(torch.tensor([[2.0]]), torch.ones(1)).tolist() == 0.0


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product([torch.float32, torch.float64, torch.bfloat16], repeat=2))
)
def test_pareto_gap_has_the_promoted_dtype(first: torch.dtype, second: torch.dtype) -> None:
    m, c = torch.eye(3).repeat(4, 2, 1, 1).to(first), torch.ones(4, 2, 3).to(second) / 4
    gap = pk.pareto_gap(m, c)
    assert gap.dtype == torch.promote_types(first, second)
    assert gap.shape == (4, 2)
    # 3/16 - 1/4
    assert torch.equal(gap, torch.full_like(gap, -0.0625))


def test_pareto_gap_of_a_nan_is_nan() -> None:
    m = torch.eye(3).repeat(4, 1, 1)
    m[2, 0, 1] = NAN
    gap = pk.pareto_gap(m, torch.ones(4, 3) / 3)
    assert gap.isnan().tolist() == [False, False, True, False]
