"""What the three solvers promise of every problem, however hard."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS32, EPS64
from solver_table import (
    CASES,
    FAMILIES,
    KKT,
    NEAREST,
    OBJECTIVE,
    SIZES,
    SOLVERS,
    Solver,
    bits,
    check,
    eps_of,
    gram_of,
    mixed,
    normal,
    on_simplex,
    skewed,
)
from torch import Tensor

import pama_kernels as pk

INF, NAN = math.inf, math.nan
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_family = pytest.mark.parametrize(("name", "family"), FAMILIES)
every_case = pytest.mark.parametrize(
    ("solver", "options"),
    [(SOLVERS[name], SOLVERS[name].options[i]) for name, i in CASES],
    ids=[f"{name}-{i}" for name, i in CASES],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def assert_bits(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(bits(x), bits(y))


# --- optimal -----------------------------------------------------------------------------------------


@every_family
@both_dtypes
def test_certified(name: str, family: str, dtype: torch.dtype) -> None:
    """Every number of objectives, with and without regularization and preference."""
    solver = SOLVERS[name]
    for n in SIZES:
        x = solver.inputs(family, 4, n)
        if dtype == torch.float32:
            x = x.clamp(-3e38, 3e38).float() if solver.axes == 1 else _normal_range(x).float()
        slack = _indefinite(x) if solver.axes == 2 else 0.0
        for preference in (None, skewed(n)):
            for options in solver.options:
                check(solver, x, preference, slack, **options)


def _normal_range(m: Tensor) -> Tensor:
    return m / m.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)


def _indefinite(m: Tensor) -> Any:
    """What a negative eigenvalue is worth that rounding to a narrower type left: twice its size for each of n
    objectives, over max M_ii."""
    if m.dtype == torch.float64:
        return 0.0
    m = m.double()
    size = m.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    m = m / size[:, None, None]
    return (-2 * m.shape[-1] * torch.linalg.eigvalsh(m)[:, 0].clamp(max=0)).numpy() + 4 * EPS32


@pytest.mark.cpu
@every_solver
def test_certified_under_every_instruction_set(solver: Solver, isa: str) -> None:
    for family in solver.families:
        for n in (2, 3, 5, 8, 17):
            check(solver, solver.inputs(family, 9, n, seed=1))
            check(solver, solver.inputs(family, 9, n, seed=1), skewed(n), **solver.options[-1])


@every_solver
@pytest.mark.parametrize("exponent", [-300, -150, -75, 75, 150, 300])
def test_certified_at_every_scale(solver: Solver, exponent: int) -> None:
    for family in set(solver.families) - {"float64 range", "any magnitude", "largest"}:
        for n in (1, 2, 3, 8, 20):
            x = solver.inputs(family, 2, n)
            x = x / x.abs().amax().clamp(min=1e-300) * 10.0**exponent
            for options in solver.options:
                check(solver, x, skewed(n), **options)


@every_solver
def test_more_objectives(solver: Solver) -> None:
    families = ("grid", "normal") if solver.axes == 1 else ("square", "tall", "rank deficient", "signs")
    for n in (65, 128, 256):
        for family in families:
            for options in solver.options:
                check(solver, solver.inputs(family, 1, n)[0], skewed(n), **options)


@every_family
def test_no_worse_than_the_reference(name: str, family: str) -> None:
    """In the objective; and its weights where they are unique by regularization."""
    solver = SOLVERS[name]
    for n in (2, 3, 5, 8):
        x = solver.inputs(family, 3, n, seed=2)
        size = solver.size(x)
        for preference in (None, skewed(n)):
            p = on_simplex(preference, n)
            for options in solver.options:
                s = solver.solve(x, preference=preference, **options)
                r = solver.reference(x, preference=preference, **options)
                rho = options.get("regularization", 0.0)
                if solver.axes == 1:
                    assert rho or (s.optimum.abs() - r.optimum.abs() <= 64 * n * EPS64 * size).all()
                elif name == "min_norm":
                    unit = torch.where(size > 0, size, 1.0)
                    values = [
                        solver.value(x, c) / unit / 2 + rho / 2 * (c - p).square().sum(-1)
                        for c in (s.weights, r.weights)
                    ]
                    assert (values[0] - values[1] <= OBJECTIVE * (1 + rho)).all()
                if rho:
                    # strongly convex: n-term sums with relative error n eps, over rho
                    assert ((s.weights - r.weights).abs() <= 16 * n * EPS64 / rho).all()


@every_case
def test_the_optimum_is_never_negative(solver: Solver, options: dict[str, Any]) -> None:
    """So that its square root, the norm of the combined gradient, is a number. Zero lies in the hull here."""
    if solver.axes == 2:
        for n in (2, 3, 8, 33):
            for dtype in (torch.float32, torch.float64):
                m = solver.inputs("opposites", 50, n).to(dtype)
                assert (solver.solve(m, **options).optimum >= 0).all()


# --- of the nature of the problem --------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("n", [2, 3, 8, 9, 33])
def test_permuting_objectives_permutes_weights(solver: Solver, options: dict[str, Any], n: int) -> None:
    order = torch.randperm(n)
    p = on_simplex(skewed(n), n)
    unique = ("grid", "normal") if solver.axes == 1 else ("tall", "a common direction")
    for family in unique:
        x = solver.inputs(family, 4, n)
        s = solver.solve(x, preference=p, **options)
        t = solver.solve(solver.permuted(x, order), preference=p[order], **options)
        # n-term sums in another order, over eigenvalues or gaps of scores from 1/64 of the largest on; where
        # scores nearly tie lambda is as large as their gap is small
        tolerance = 64 * 16 * n * EPS64 * (64 if family == "normal" else 1)
        assert ((s.weights[..., order] - t.weights).abs() <= tolerance).all()


@every_family
def test_scaling_by_powers_of_two_changes_no_bit(name: str, family: str) -> None:
    solver = SOLVERS[name]
    for n in (1, 2, 3, 8, 9, 20):
        x = solver.inputs(family, 3, n)
        if family in ("float64 range", "any magnitude", "largest", "subnormal", "float32 range"):
            x = x / x.abs().amax(tuple(range(1, x.dim())), keepdim=True)
            x = torch.where(x.abs() < 1e-80, 0.0, x)  # to stay in the normal numbers
        for options in solver.options:
            s = solver.solve(x, preference=skewed(n), **options)
            for exponent in (-600, -101, 2, 700):
                t = solver.solve(x * 2.0**exponent, preference=skewed(n), **options)
                assert_bits((t.weights, t.optimum), (s.weights, s.optimum * 2.0**exponent))


@every_case
def test_duplicates_get_equal_weights(solver: Solver, options: dict[str, Any]) -> None:
    """Bitwise, for equal objectives with equal preference, wherever they are."""
    g = np.random.default_rng(5)
    for n in (2, 3, 4, 8, 9, 16, 33):
        distinct = max(n // 2, 1)
        origin = torch.from_numpy(np.append(np.arange(distinct), g.integers(distinct, size=n - distinct)))
        origin = origin[torch.from_numpy(g.permutation(n))]
        for family in ("grid", "normal") if solver.axes == 1 else ("square", "rank 1", "low rank"):
            x = solver.permuted(solver.inputs(family, 6, distinct), origin)
            for preference in (None, [float(1 + int(i) % 3) for i in origin]):
                for dtype in (torch.float32, torch.float64):
                    c = solver.solve(x.to(dtype), preference=preference, **options).weights
                    for i in range(n):
                        first = int((origin == origin[i]).nonzero()[0])
                        assert torch.equal(c[:, i], c[:, first])


@pytest.mark.parametrize("name", ["scores", "min_norm"])
@pytest.mark.parametrize("regularization", [0.03, 0.1, 1.0])
def test_continuity(name: str, regularization: float) -> None:
    """|dc| <= |d(gradient)| / rho by strong convexity, with rho and the change of the problem bounded."""
    solver, g = SOLVERS[name], np.random.default_rng(3)
    for n in (2, 3, 8, 16):
        for delta in (1e-9, 1e-5):
            if solver.axes == 1:
                x = solver.inputs("grid", 6, n) / 2
                moved = x + delta * torch.from_numpy(g.uniform(-1, 1, x.shape))
                extra: dict[str, Any] = {"scale": 1.0}
                # the gradient s a, |a| <= 1: changes by delta in s and in a
                change = torch.full((6,), 2 * math.sqrt(n) * delta * (1 + delta))
            else:
                factor = np.concatenate([normal(g, 6, n, n) / n, np.zeros((6, n, 1))], -1)
                factor[:, 0, -1] = 2.0  # the largest M_ii, always 4 or above
                x, moved = gram_of(factor), gram_of(factor + delta * normal(g, *factor.shape) / n)
                extra, change = {}, (x - moved).norm(dim=(-2, -1)) * (1 + regularization) / 4
            options = {"regularization": regularization, **extra}
            s, t = solver.solve(x, **options), solver.solve(moved, **options)
            noise = 64 * n * EPS64 / regularization
            assert ((s.weights - t.weights).norm(dim=-1) <= change / regularization + noise).all()


@pytest.mark.parametrize("name", ["scores", "min_norm"])
def test_the_limits_of_regularization(name: str) -> None:
    """0 is the limit of small ones; large ones, of any size, give the preference."""
    solver = SOLVERS[name]
    for n in (2, 3, 5, 9):
        for family in (
            ("grid", "ties") if solver.axes == 1 else ("rank 1", "duplicates", "opposites", "zero rows")
        ):
            x = solver.inputs(family, 5, n)
            exact = solver.solve(x, preference=skewed(n)).weights
            near = solver.solve(x, preference=skewed(n), regularization=1e-9).weights
            # the path is Lipschitz: its constant is a ratio of eigenvalues or gaps of small integers
            assert ((exact - near).abs() <= 1e-6).all()
            for huge, k in ((1e9, 1e300), (1e20, 1.0), (1e300, 1e-100), (1e300, 1e100)):
                for dtype in (torch.float64, torch.float32):
                    if dtype == torch.float64 or k == 1.0:
                        c = solver.solve((k * x).to(dtype), preference=skewed(n), regularization=huge).weights
                        # the largest eigenvalue over rho, and the rounding of n weights
                        size = n * 1e-9 if huge == 1e9 else 0.0
                        assert ((c - on_simplex(skewed(n), n)).abs() <= size + 4 * eps_of(dtype)).all()


@every_solver
def test_nothing_to_decide_gives_the_preference(solver: Solver) -> None:
    for n in (1, 2, 3, 8, 9, 40):
        for preference in (None, skewed(n), [1.0] * (n - 1) + [0.0] if n > 1 else [3.0]):
            for dtype in (torch.float32, torch.float64):
                x = torch.zeros((4,) + (n,) * solver.axes, dtype=dtype)
                for options in solver.options:
                    s = solver.solve(x, preference=preference, **options)
                    assert (s.weights - on_simplex(preference, n)).abs().max() <= 2 * eps_of(dtype)
                    assert (s.optimum == 0).all()
                    assert torch.equal(s.optimum.signbit(), torch.zeros(4, dtype=torch.bool))


@every_case
def test_one_objective_gets_all_the_weight(solver: Solver, options: dict[str, Any]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.tensor([7.0, 0.5, 0.0], dtype=dtype).reshape((3,) + (1,) * solver.axes)
        s = solver.solve(x, **options)
        assert s.weights.flatten().tolist() == [1.0, 1.0, 1.0]
        assert s.optimum.tolist() == [7.0, 0.5, 0.0]


@every_case
def test_a_preference_of_zero_is_not_exclusion(solver: Solver, options: dict[str, Any]) -> None:
    """What the problem decides, it decides; in UPGrad only the objectives that conflict call for it."""
    x = torch.tensor([1.0, 4.0, 4.0]).double()
    x = x if solver.axes == 1 else torch.diag(x)
    if solver.solve is pk.upgrad_weights:
        x[0, 1] = x[1, 0] = -1.5
    c = solver.solve(x, preference=[0, 1, 1], **options).weights
    assert c[0] > 0.2


@every_case
def test_forms_of_the_preference_and_of_numbers(solver: Solver, options: dict[str, Any]) -> None:
    x = solver.inputs("grid" if solver.axes == 1 else "square", 7, 3)
    wanted = solver.solve(x, preference=[0.25, 0.25, 0.5], **options)
    forms = (
        (1, 1, 2),
        torch.tensor([2, 2, 4]),
        np.array([0.5, 0.5, 1.0]),
        [1e300, 1e300, 2e300],
        [1e-300] * 2 + [2e-300],
    )
    for preference in forms:
        assert_bits(solver.solve(x, preference=preference, **options), wanted)
    uniform = solver.solve(x, **options)
    # 1/3 as a sum of three shares may differ by a rounding, over gaps of at least 1/64
    for found, default in zip(solver.solve(x, preference=[1, 1, 1], **options), uniform, strict=True):
        assert ((found - default).abs() <= 64 * 64 * EPS64).all()
    for name, value in options.items():
        for dtype in (torch.float64, torch.float32):
            exact = {name: float(torch.tensor(value, dtype=dtype))}
            assert_bits(solver.solve(x, **{name: torch.tensor(value, dtype=dtype)}), solver.solve(x, **exact))


# --- bits --------------------------------------------------------------------------------------------


@pytest.mark.cpu
@every_case
@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 17, 33])
def test_a_problem_has_the_same_bits_alone_in_any_batch_and_for_any_threads(
    solver: Solver, options: dict[str, Any], dtype: torch.dtype, n: int, threads: int
) -> None:
    rows = (40 if n > 8 else 700) if solver.axes == 2 else 1500
    x = mixed(solver, rows, n, dtype)
    for preference in (None, skewed(n)):
        whole = solver.solve(x, preference=preference, **options)
        for i in range(0, len(x), 13 if len(x) > 100 else 3):
            alone = solver.solve(x[i], preference=preference, **options)
            assert_bits(alone, (whole.weights[i], whole.optimum[i]))
        for size in (2, 7, 8, 15, 17, 33):
            part = solver.solve(x[3 : 3 + size], preference=preference, **options)
            assert_bits(part, (whole.weights[3 : 3 + size], whole.optimum[3 : 3 + size]))
        torch.set_num_threads(1)
        assert_bits(solver.solve(x, preference=preference, **options), whole)
        torch.set_num_threads(threads)


@every_case
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@both_dtypes
def test_a_nan_or_infinity_reaches_its_own_row_only(
    solver: Solver, options: dict[str, Any], n: int, dtype: torch.dtype
) -> None:
    x = solver.inputs("grid" if solver.axes == 1 else "square", 20, n).to(dtype)
    before, rest = solver.solve(x, **options), torch.arange(20) != 7
    for place in {
        (0,) * solver.axes,
        (n - 1,) * solver.axes,
        (0, n - 1)[-solver.axes :],
        (n - 1, 0)[: solver.axes],
    }:
        for bad in (NAN, INF, -INF):
            y = x.clone()
            y[(7, *place)] = bad
            after = solver.solve(y, **options)
            assert after.weights[7].isnan().all()
            assert after.optimum[7].isnan()
            assert_bits(
                (after.weights[rest], after.optimum[rest]), (before.weights[rest], before.optimum[rest])
            )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_strides_axes_and_addresses(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    family, n = ("grid" if solver.axes == 1 else "tall"), 5
    x = solver.inputs(family, 24, n).reshape(4, 6, *([n] * solver.axes)).to(dtype)
    host = torch.zeros([2 * size + 1 for size in x.shape], dtype=dtype)
    spread = host[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)
    views = [
        x,
        x[0],
        x[0, 0],
        x[:, ::2],
        x.transpose(0, 1),
        x[:1, :1].expand_as(x),
        x[:, :1].expand_as(x),
        spread,
    ]
    views += [
        spread[2, 3],
        x.movedim(-1, 0).contiguous().movedim(0, -1),
        x[None, :, None],
        x[1:, 1:],
        x[..., 1:4],
    ]
    views += [x.mT] if solver.axes == 2 else [x[..., :1].expand(4, 6, 7)]
    if solver.axes == 2:
        views[-2] = x[..., 1:4, 1:4]
    for view in views:
        assert_bits(solver.solve(view, **options), solver.solve(view.contiguous().clone(), **options))
    for shift in range(4):
        memory = torch.empty(x.numel() + shift, dtype=dtype)
        assert_bits(solver.solve(memory[shift:].view_as(x).copy_(x), **options), solver.solve(x, **options))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_out_receives_the_solution(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    for n in (1, 2, 3, 9):
        x = solver.inputs("grid" if solver.axes == 1 else "tall", 6, n).to(dtype)
        for y in (x.reshape(2, 3, *x.shape[1:]), x[0]):
            wanted = solver.solve(y, preference=skewed(n), **options)
            out = pk.WeightSolution(*(torch.full_like(z, NAN) for z in wanted))
            assert solver.solve(y, preference=skewed(n), **options, out=out) is out
            assert_bits(out, wanted)
    factor = torch.ones(n, requires_grad=True)
    product = (factor * out.weights).sum()
    solver.solve(x[0], **options, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@every_case
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty_batches(solver: Solver, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    for n in (1, 2, 3, 70):
        s = solver.solve(torch.zeros(shape + (n,) * solver.axes), **options)
        assert s.weights.shape == (*shape, n)
        assert s.optimum.shape == shape


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(solver: Solver, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Half types of scores are solved in float32, of matrices in float64 like float32, and rounded once."""
    wide = torch.float32 if solver.axes == 1 else torch.float64
    for family in ("grid", "ties") if solver.axes == 1 else ("tall", "duplicates", "zero rows", "signs"):
        for n in (1, 2, 3, 8, 12):
            x = solver.inputs(family, 5, n).to(dtype)
            s = solver.solve(x, preference=skewed(n), **options)
            t = solver.solve(x.to(wide), preference=skewed(n), **options)
            assert_bits(s, [y.float() for y in t])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dependent_gradients_are_solved_in_spite_of_rounding(
    solver: Solver, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Rounded, the matrix is not quite semidefinite: half gradients, more objectives than dimensions."""
    for n in (3, 8, 16) if solver.axes == 2 else ():
        for dimensions in (1, 2, 8, 64):
            factor = torch.randn(40, n, dimensions, generator=torch.Generator().manual_seed(n)) + 0.5
            m = (factor.double() @ factor.double().mT).to(dtype)
            # entries rounded by half an eps of max M_ii, and (Mc)_j by as much; a few such for a projection
            slack = _indefinite(m) if options else 4 * torch.finfo(dtype).eps
            check(solver, m, None, slack, **options)
            rounded = (factor[:, :1] + 0.01 * factor).to(dtype)
            assert torch.isfinite(solver.solve(rounded @ rounded.mT, **options).weights).all()


@every_case
def test_results_have_no_gradient(solver: Solver, options: dict[str, Any]) -> None:
    leaf = solver.inputs("grid" if solver.axes == 1 else "square", 2, 3).requires_grad_()
    for x in (leaf, torch.nn.Parameter(leaf.detach()), 2 * leaf):
        assert not any(y.requires_grad for y in solver.solve(x, **options))


# --- only matrices -----------------------------------------------------------------------------------

matrices = pytest.mark.parametrize(
    "solver", [SOLVERS["min_norm"], SOLVERS["upgrad"]], ids=["min_norm", "upgrad"]
)
_EYE = torch.eye(3, dtype=torch.float64)
BAD_MATRICES = {
    "not symmetric": torch.tensor([[1.0, 0.5, 0], [0.3, 1, 0], [0, 0, 1]]),
    "triangular": torch.tensor([[2.0, 1], [0, 2]]),
    "antisymmetric": torch.tensor([[1.0, 0.5], [-0.5, 1]]),
    "negative diagonal": torch.diag(torch.tensor([1.0, -0.5, 2])),
    "only negative": -torch.ones(1, 1),
    "large correlation": torch.tensor([[1.0, 2], [2, 1]]),
    "large anticorrelation": torch.tensor([[1.0, -2], [-2, 1]]),
    "zero diagonal": torch.tensor([[0.0, 1], [1, 0]]),
    "negative at the middle": 1.9 * _EYE - 0.9,
    "indefinite, no negative entry": torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.9], [0.1, 0.9, 1]]),
}


@pytest.mark.cpu
@matrices
@pytest.mark.parametrize("name", BAD_MATRICES)
def test_a_matrix_that_is_clearly_no_gram_matrix_is_refused(solver: Solver, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        for k in (1e-30, 1.0, 1e30):
            bad = (k * BAD_MATRICES[name].double()).to(dtype)
            with pytest.raises(ValueError, match="gram: expected a symmetric positive semidefinite matrix"):
                solver.solve(bad)
            batch = (torch.eye(len(bad), dtype=dtype) * k).repeat(5, 1, 1)
            batch[3] = bad
            with pytest.raises(ValueError, match="batch index 3"):
                solver.solve(batch)
            out = pk.WeightSolution(torch.empty(len(bad), dtype=dtype), torch.empty((), dtype=dtype))
            with pytest.raises(ValueError, match="gram"):
                solver.solve(bad, out=out)


@matrices
def test_asymmetry_by_rounding_is_averaged(solver: Solver) -> None:
    for n in (2, 3, 8, 20):
        m = solver.inputs("tall", 5, n).float()
        noisy = m * (1 + EPS32 * torch.randn(m.shape))
        s = solver.solve(noisy)
        t = solver.solve((noisy.double() + noisy.double().mT) / 2)
        # rounding to float32, and n-term sums of float64 over an eigenvalue of max M_ii / 10
        assert ((s.weights - t.weights).abs() <= EPS32).all()
        assert torch.equal(solver.solve(noisy.mT).weights, s.weights)


# --- only UPGrad -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for name, family in FAMILIES if name == "upgrad"])
def test_each_projection_is_certified(family: str) -> None:
    """With all preference on one objective the weights are its projection: v_i = 1, v >= 0, (Mv)_j >= 0 for
    the others, and 0 where v_j is not."""
    for n in (2, 3, 5, 8, 17):
        m = SOLVERS["upgrad"].inputs(family, 3, n)
        size = m.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
        for i in range(min(n, 4)):
            c = pk.upgrad_weights(m, preference=torch.eye(n)[i]).weights
            assert (c[:, i] > 0).all()
            others = torch.arange(n) != i
            product = torch.from_numpy(
                ((m / size[:, None, None]).numpy().astype(np.longdouble) * c.numpy()[:, None, :])
                .sum(-1)
                .astype(float)
            )
            assert (product[:, others] >= -KKT).all()
            assert ((product * c)[:, others].abs() <= KKT).all()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_upgrad_is_the_sum_of_projections_and_linear_under_scaling(n: int) -> None:
    """D M D with preference p is M with preference p_i d_i, divided by d: each projection scales with its own
    objective alone."""
    solver, g = SOLVERS["upgrad"], np.random.default_rng(n)
    m = solver.inputs("a common direction", 5, n)
    d, p = torch.from_numpy(10.0 ** g.uniform(-2, 2, n)), on_simplex([1.0 + i % 3 for i in range(n)], n)
    scaled = solver.solve(d[:, None] * m * d, preference=p).weights
    plain = solver.solve(m, preference=p * d).weights / d
    plain = plain / plain.sum(-1, keepdim=True)
    assert ((scaled - plain).abs() <= 1e-9).all()
    unit = torch.stack([solver.solve(m, preference=torch.eye(n)[i]).weights for i in range(n)])
    total = sum(p[i] * unit[i] / unit[i][:, i, None] for i in range(n))
    assert ((solver.solve(m, preference=p).weights - total / total.sum(-1, keepdim=True)).abs() <= 1e-9).all()
    r = solver.reference(m, preference=p)
    # the reference's ridge of 1e-13 over eigenvalues from 1e-3 max M_ii on
    assert ((solver.solve(m, preference=p).weights - r.weights).abs() <= 1e-9).all()


def test_upgrad_without_conflict_is_the_preference() -> None:
    m = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    assert pk.upgrad_weights(m, preference=[1, 3]).weights.tolist() == [0.25, 0.75]
    # v_1 = 1 calls for v_2 = 1/2, v_2 = 1 for v_1 = 1/2: (1.5, 1.5) / 3
    assert pk.upgrad_weights(torch.tensor([[2.0, -1], [-1, 2]]).double()).weights.tolist() == [0.5, 0.5]


# --- only scores -------------------------------------------------------------------------------------


@both_dtypes
@given(data=st.data(), regularization=st.sampled_from([0.0, 0.01, 0.1, 10.0]))
def test_any_finite_scores_are_solved(dtype: torch.dtype, data: st.DataObject, regularization: float) -> None:
    """From subnormal to the largest number, in one row."""
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32 if dtype == torch.float32 else 64)
    n = data.draw(st.integers(1, 6))
    values = data.draw(st.lists(numbers, min_size=3 * n, max_size=3 * n))
    check(SOLVERS["scores"], torch.tensor(values, dtype=dtype).reshape(3, n), regularization=regularization)


@both_dtypes
@given(
    data=st.data(),
    regularization=st.sampled_from([0.0, 0.01, 0.1, 1.0, 30.0]),
    scale=st.sampled_from([None, 0.25, 64.0, "rows"]),
)
def test_scores_on_a_grid_match_the_reference(
    dtype: torch.dtype, data: st.DataObject, regularization: float, scale: Any
) -> None:
    n, low = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([-8, 0, 1]))
    values = data.draw(st.lists(st.integers(low, 8), min_size=4 * n, max_size=4 * n))
    x = torch.tensor(values, dtype=dtype).reshape(4, n) / 4
    preference = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    preference = preference if preference and sum(preference) else None
    scale = torch.arange(1, 5, dtype=dtype) if scale == "rows" else scale
    options = {"regularization": regularization, "scale": scale}
    s = check(SOLVERS["scores"], x, preference, **options)
    r = SOLVERS["scores"].reference(x, preference=preference, **options)
    # scores differ by 1/8 of the largest or not at all: lambda <= 64; the reference stops at 1e-15
    tolerance = 64 * 8 * n * max(eps_of(dtype), 2 * EPS64)
    assert ((s.weights - r.weights).abs() <= tolerance).all()
    assert ((s.optimum - r.optimum).abs() <= 2 * tolerance).all()


@pytest.mark.parametrize("preference", [None, [1.0, 2.0, 3.0]])
def test_nearest_to_the_preference_in_float32_when_magnitudes_differ(preference: Any) -> None:
    """Small scores around 0 beside one large one: each weight is a smooth function of their ratios."""
    for exponent in (6, 12, 18, 24, 30):
        small = torch.tensor([[1.0, 2], [1, -1], [3, -2], [-1, -3], [0.625, -0.75]]) * 2.0**-exponent
        x = torch.cat([torch.cat([small, torch.full((5, 1), s)], 1) for s in (1.0, -1.0, 0.8125, -1.625)])
        s, r = (solve(x, preference=preference) for solve in SOLVERS["scores"][:2])
        # a handful of float32 operations on numbers up to 1 for each of 3 objectives
        assert ((s.weights.double() - r.weights).abs() <= 32 * EPS32).all()


@both_dtypes
@pytest.mark.parametrize("exponent", [-290, -60, -39, 39, 60, 290])
def test_scale_and_regularization_beyond_float32(dtype: torch.dtype, exponent: int) -> None:
    """Their product is 1; or the square of the scores, which float32 does not hold either."""
    a = torch.tensor([[1.0, 0.5], [1.0, -0.75], [0.0, 0.0]], dtype=dtype)
    s = pk.pama_weights(a, regularization=10.0**-exponent, scale=10.0**exponent)
    t = pk.pama_weights(a, regularization=1.0, scale=1.0)
    # 10^-x and 10^x are rounded: rho = 1 + 2 eps
    assert ((s.weights - t.weights).abs() <= 8 * eps_of(dtype)).all()
    k = 2.0 ** (exponent // 3)
    scale = torch.tensor([5.0, 1.0, 0.75], dtype=torch.float64)
    s, t = (pk.pama_weights(x * a, regularization=0.1, scale=scale * x * x) for x in (1.0, k))
    assert_bits((s.weights, s.optimum * k), t)


@both_dtypes
def test_a_scale_that_is_not_finite_concerns_its_own_row(dtype: torch.dtype) -> None:
    a, scale = torch.randn(4, 3, dtype=dtype), torch.ones(4, dtype=dtype)
    for bad in (NAN, INF):
        scale[2] = bad
        rows = pk.pama_weights(a, regularization=0.1, scale=scale).weights.isnan()
        assert rows.all(-1).tolist() == rows.any(-1).tolist() == [False, False, True, False]
        assert not pk.pama_weights(a, scale=scale).weights.isnan().any()


@both_dtypes
@pytest.mark.parametrize("regularization", [1e-300, 1e-46, 1e-29, 1e-15])
def test_a_vanishing_regularization_is_the_limit(dtype: torch.dtype, regularization: float) -> None:
    a = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 3.0]], dtype=dtype)
    for size in (1.1e-12, 1.0, 9e11):
        got, wanted = pk.pama_weights(size * a, regularization=regularization), pk.pama_weights(size * a)
        # lambda <= 1 here: rho moves c by rho itself
        assert ((got.weights - wanted.weights).abs() <= 8 * eps_of(dtype) + 2 * regularization).all()


@pytest.mark.cpu
@both_dtypes
def test_the_optimum_lies_between_the_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores of the largest number: a.c, with weights whose sum is rounded up, would be infinite."""
    for n in range(1, 17):
        a = torch.full((3, n), torch.finfo(dtype).max, dtype=dtype)
        for sign in (1, -1):
            optimum = pk.pama_weights(sign * a, regularization=0.1).optimum
            assert ((optimum.abs() / a[:, 0] - 1).abs() <= 4 * n * eps_of(dtype)).all()


@pytest.mark.cpu
@pytest.mark.parametrize("n", [2, 3, 4, 8, 32])
def test_rows_go_their_own_way_beside_others(isa: str, n: int) -> None:
    """Rows without a negative score go a quicker way where no neighbour has one; a NaN hides none."""
    a = torch.randint(0, 3, (64, n)).float()
    a[::4] = 1  # all tied
    signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None]
    for preference in (None, skewed(n), [float(1 + i % 3) for i in range(n)]):
        s, t = pk.pama_weights(a, preference=preference), pk.pama_weights(a * signs, preference=preference)
        assert torch.equal(s.weights[::2], t.weights[::2])
    for at in range(n, 64 * n, 7):
        a = torch.ones(64, n)
        a[0, 0] = NAN
        a.view(-1)[at] = -1
        optimum = pk.pama_weights(a).optimum
        assert optimum[0].isnan()
        assert optimum[1:].tolist() == [0.0 if row == at // n else 1.0 for row in range(1, 64)]


def test_rank_one_matrices_are_the_scalar_problem() -> None:
    """M = a a': the same weights as from the scores a, ties and signs included."""
    for n in (2, 3, 8, 9, 40):
        for low, high in ((1, 6), (-5, 6), (-6, 0), (0, 4)):
            a = torch.randint(low, high, (4, n)).double()
            for preference in (None, skewed(n)):
                for options in SOLVERS["min_norm"].options:
                    s = pk.min_norm_weights(a[:, :, None] * a[:, None, :], preference=preference, **options)
                    t = pk.pama_weights(a, preference=preference, **options)
                    # with rho >= max M_ii / 10: n-term sums with relative error n eps, over rho
                    tolerance = 10 * 16 * n * EPS64 if options["regularization"] else NEAREST
                    assert ((s.weights - t.weights).abs() <= tolerance).all()
