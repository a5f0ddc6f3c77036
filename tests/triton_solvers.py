"""The Triton solvers, GAE and group normalisation, in Triton's interpreter: run by `test_triton_solvers.py`.

Batches are small: an operation of the interpreter takes tens of microseconds, a matrix thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from certificates import prior_of, skewed
from test_advantages import _episodes, _rounding
from test_min_norm import (
    DTYPES,
    FAMILIES,
    NEAREST,
    check_dependent,
    check_solution,
    exact_gram,
    exact_prior,
    exact_solution,
    family,
)
from test_weights import check_solution as check_scores
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels.backends import cpu, find
from pama_kernels.backends.triton import active_set, advantages, launch, solvers

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _memory_that_is_not_zero() -> Iterator[None]:
    """What nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_these_kernels_are_what_the_public_functions_run() -> None:
    assert launch.INTERPRETED
    for name in ("weights", "weights_out", "min_norm", "min_norm_out", "gae", "group_normalize"):
        function = find("cpu", name)
        assert function is not None
        assert function.__module__.startswith("pama_kernels.backends.triton.")


# --- the min-norm problem ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_certified(name: str) -> None:
    """Every family, in batches that share a program; the objective is that of the CPU backend."""
    sizes = (2, 3, 4, 7)
    for n in (3, sizes[len(name) % 4]):
        m = family(name, 5, n, seed=3)
        for prior, regularization in ((None, 0.0), (skewed(n), 0.1)):
            s = check_solution(m, prior, regularization)
            _, optimum = cpu.min_norm(m, prior_of(prior, n), regularization)
            largest = m.diagonal(dim1=-2, dim2=-1).amax(-1)
            # each is within 1e-12 max M_ii of the optimum; with rho the minimiser is unique to n eps / 0.1
            assert ((s.optimum - optimum).abs() <= 2e-12 * largest).all()


@pytest.mark.parametrize("name", ["square", "integer duplicates", "ill-conditioned"])
def test_certified_where_a_program_has_one_matrix(name: str) -> None:
    for n in (12, 33) if name == "square" else (12,):
        check_solution(family(name, 1, n))
    check_solution(family(name, 1, 12), skewed(12), 0.1)


@pytest.fixture
def in_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of more objectives than a tile holds, for few of them; a program takes matrices in turn."""
    monkeypatch.setattr(solvers, "_IN_REGISTERS", 2)
    monkeypatch.setattr(solvers, "_PROGRAMS", 1)


@pytest.mark.usefixtures("in_the_workspace")
@pytest.mark.parametrize("name", ["square", "duplicates", "rank deficient", "nearly parallel", "all zero"])
def test_certified_in_the_workspace(name: str) -> None:
    for n in (3, 8, 11):
        m = family(name, 2, n)
        s = check_solution(m)
        check_solution(m, skewed(n), 0.1)
        m[0, n - 1, 0] = NAN
        other = pk.min_norm_weights(m)
        assert other.weights[0].isnan().all()
        assert torch.equal(other.weights[1], s.weights[1])


@pytest.mark.parametrize(
    ("count", "n", "dimensions", "dtype", "regularization"),
    [
        (8, 4, 1, torch.bfloat16, 0.0),
        (3, 16, 1, torch.float32, 0.0),
        (3, 16, 2, torch.float16, 0.0),
        (2, 16, 1, torch.bfloat16, 1e-3),
    ],
)
def test_dependent_gradients_are_solved_in_spite_of_rounding(
    count: int, n: int, dimensions: int, dtype: torch.dtype, regularization: float
) -> None:
    """Among them matrices on which the first ridge fails."""
    check_dependent(count, n, dimensions, dtype, regularization)


def test_certified_for_more_objectives_than_a_tile_holds() -> None:
    check_solution(family("square", 1, 66), skewed(66), 0.1)


@pytest.mark.parametrize("exponent", [-300, -150, 150, 300])
def test_certified_at_every_scale(exponent: int) -> None:
    for name in ("square", "integer opposites", "diagonal"):
        for n in (1, 2, 3):
            m = family(name, 2, n)
            m = m / m.abs().amax().clamp(min=1e-300) * 10.0**exponent
            check_solution(m, skewed(n), 0.0)


@pytest.mark.parametrize("prior", [None, [2, 0, 1]])
def test_the_minimiser_nearest_to_the_prior(prior: Any) -> None:
    """Integer gradients with copies, opposites and zeros, against rational arithmetic over all faces."""
    g = torch.Generator().manual_seed(5)
    j = torch.randint(-2, 3, (8, 3, 2), generator=g).double()
    j[:2, 2] = j[:2, 0]
    j[2:4, 2] = -j[2:4, 0]
    j[4, 1] = 0
    j[5] = j[5, :1]
    m = j @ j.mT
    s = check_solution(m, prior)
    for matrix, c in zip(m, s.weights, strict=True):
        wanted, _ = exact_solution(exact_gram(matrix), exact_prior(prior, 3), Fraction(0))
        assert (c - torch.tensor([float(x) for x in wanted], dtype=torch.float64)).abs().max() <= NEAREST


def test_duplicates_get_equal_weights() -> None:
    order = [0, 1, 0, 2, 1, 0]
    m = family("square", 3, 3)[:, order][:, :, order]
    for regularization in (0.0, 0.1):
        c = check_solution(m, None, regularization).weights
        for first, second in ((0, 2), (0, 5), (1, 4)):
            assert torch.equal(c[:, first], c[:, second])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_matrix_has_its_own_bits_in_any_batch_and_a_nan_stays_there(n: int) -> None:
    m = torch.cat([family(name, 2, n) for name in ("square", "integer duplicates", "nearly parallel")])
    alone = [pk.min_norm_weights(x) for x in m]
    for bad in (None, NAN, INF):
        batch = m.clone()
        if bad is not None:
            batch[1, 0, n - 1] = bad
        s = pk.min_norm_weights(batch)
        for i, (c, optimum) in enumerate(alone):
            if bad is not None and i == 1:
                assert s.weights[i].isnan().all()
                assert s.optimum[i].isnan()
            else:
                assert torch.equal(s.weights[i], c)
                assert torch.equal(s.optimum[i], optimum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_solved_in_float64(dtype: torch.dtype) -> None:
    m = family("tall", 4, 3).to(dtype)
    s, wide = pk.min_norm_weights(m), pk.min_norm_weights(m.double())
    assert s.weights.dtype == s.optimum.dtype == torch.float32
    assert torch.equal(s.weights, wide.weights.float())
    assert torch.equal(s.optimum, wide.optimum.float())


def test_any_strides_and_axes_and_out() -> None:
    for n in (2, 3):
        m = family("square", 4, n)
        wanted = pk.min_norm_weights(m)
        host = torch.full((4, 2 * n, 3 * n), NAN, dtype=torch.float64)
        host[:, ::2, ::3] = m
        for x in (host[:, ::2, ::3], m.mT, m.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            s = pk.min_norm_weights(x)
            assert torch.equal(s.weights, wanted.weights)
        nested = pk.min_norm_weights(m.reshape(2, 2, n, n))
        assert torch.equal(nested.weights.reshape(4, n), wanted.weights)
        out = pk.WeightSolution(torch.full_like(wanted.weights, NAN), torch.full_like(wanted.optimum, NAN))
        assert pk.min_norm_weights(m, out=out) is out
        assert torch.equal(out.weights, wanted.weights)
        assert torch.equal(out.optimum, wanted.optimum)
        assert pk.min_norm_weights(m[:0]).weights.shape == (0, n)


@pytest.mark.parametrize("registers", [64, 2])
def test_absent_objectives_take_no_part(registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "_IN_REGISTERS", registers)
    n = 6
    counts = torch.tensor([4.0, 0, 16, 1, 64, 0], dtype=torch.float64)
    kept = counts.nonzero().squeeze(1)
    m = family("integer duplicates", 1, n)[0]
    m[counts == 0] = NAN
    m[:, counts == 0] = INF
    products = m * (counts[:, None] * counts).sqrt()  # exact, as they are powers of 4
    p = prior_of(skewed(n), n)
    c, optimum = torch.empty(n, dtype=torch.float64), torch.empty((), dtype=torch.float64)
    solvers.min_norm_out(products, p, 0.1, c, optimum, counts)
    wanted = pk.min_norm_weights(m[kept][:, kept], prior=p[kept], regularization=0.1)
    assert not c[counts == 0].any()
    # the same problem gathered: n-term sums over rho = max M_ii / 10
    tolerance = 10 * 16 * n * torch.finfo(torch.float64).eps
    assert (c[kept] - wanted.weights).abs().max() <= tolerance
    assert (optimum - wanted.optimum).abs() <= 2 * n * tolerance * m[kept][:, kept].diagonal().max()
    solvers.min_norm_out(products, p, 0.1, c, optimum, torch.zeros_like(counts))
    assert torch.equal(c, p)
    assert optimum == 0


@pytest.mark.parametrize("registers", [64, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_matrices_that_are_not_semidefinite_end_on_the_simplex(
    n: int, registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device cannot refuse them: some point of the simplex comes out."""
    monkeypatch.setattr(solvers, "_IN_REGISTERS", registers)
    g = torch.Generator().manual_seed(n)
    x = torch.randn(8, n, n, generator=g, dtype=torch.float64)
    for m in (x, x + x.mT, -x @ x.mT, torch.zeros_like(x) - 1):
        c = pk.min_norm_weights(m).weights
        assert (c >= 0).all()
        assert ((c.sum(-1) - 1).abs() <= 1e-12).all()


def test_the_limit_of_rounds_ends_on_the_simplex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_set, "ROUNDS_PER_OBJECTIVE", 0)
    monkeypatch.setattr(active_set, "SPARE_ROUNDS", 0)
    m = family("nearly parallel", 3, 5)
    c = pk.min_norm_weights(m).weights
    assert torch.equal(c.sort(-1).values, torch.tensor([[0.0, 0, 0, 0, 1]] * 3, dtype=torch.float64))


# --- the scalar problem ------------------------------------------------------------------------------


def scores_of(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    grid = torch.randint(-4, 5, (6, n), generator=g).double() / 4
    positive = grid.abs() + 0.25
    scaled = torch.randn(4, n, generator=g, dtype=torch.float64) * 10.0 ** torch.tensor(
        [[-30.0], [-3], [3], [30]]
    )
    return torch.cat([grid, positive, -positive, scaled, torch.zeros(1, n)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_scores(dtype: torch.dtype, regularization: float) -> None:
    for n in (1, 2, 3, 5, 9):
        a = scores_of(n, n).to(dtype)
        for prior in (None, skewed(n)):
            s = check_scores(a, prior, regularization)
            r = reference.pama_weights(a, prior=prior, regularization=regularization)
            # scores on a grid of 1/4 up to 1: lambda <= 16; the scaled ones are told by their certificate
            eps = torch.finfo(dtype).eps
            assert ((s.weights.double() - r.weights)[:18].abs() <= 16 * 8 * n * eps).all()


def test_scores_with_a_scale_of_any_form() -> None:
    a = scores_of(3)
    rows = len(a)
    sizes = torch.arange(1, rows + 1).double() / 4
    wanted = reference.pama_weights(a, regularization=0.1, scale=sizes)
    for size in (sizes, sizes.repeat_interleave(2)[::2], sizes.float()):
        s = pk.pama_weights(a, regularization=0.1, scale=size)
        assert ((s.weights - wanted.weights).abs()[:18] <= 16 * 8 * 3 * torch.finfo(torch.float64).eps).all()
    one = pk.pama_weights(a, regularization=0.1, scale=0.3)
    same = pk.pama_weights(a, regularization=0.1, scale=torch.full((rows,), 0.3, dtype=torch.float64))
    assert torch.equal(one.weights, same.weights)


def test_scores_of_half_types_any_strides_and_out() -> None:
    a = scores_of(3)[:18]
    for dtype in (torch.bfloat16, torch.float16):
        s = pk.pama_weights(a.to(dtype), regularization=0.1)
        assert s.weights.dtype == torch.float32
        assert torch.equal(s.weights, pk.pama_weights(a.to(dtype).float(), regularization=0.1).weights)
    wanted = pk.pama_weights(a)
    for x in (a.T.contiguous().T, a.repeat_interleave(2, 1)[:, ::2], a.repeat(2, 1)[:18]):
        assert torch.equal(pk.pama_weights(x).weights, wanted.weights)
    assert torch.equal(pk.pama_weights(a.reshape(3, 6, 3)).weights.reshape(18, 3), wanted.weights)
    assert pk.pama_weights(a[0]).weights.shape == (3,)
    assert pk.pama_weights(a[:0]).optimum.shape == (0,)
    out = pk.WeightSolution(torch.full_like(wanted.weights, NAN), torch.full_like(wanted.optimum, NAN))
    pk.pama_weights(a, out=out)
    assert torch.equal(out.weights, wanted.weights)
    assert torch.equal(out.optimum, wanted.optimum)


def test_a_nan_or_infinity_concerns_its_own_row() -> None:
    a = scores_of(4)
    wanted = pk.pama_weights(a)
    for bad in (NAN, INF, -INF):
        x = a.clone()
        x[5, 2] = bad
        s = pk.pama_weights(x)
        assert s.weights[5].isnan().all()
        assert s.optimum[5].isnan()
        others = torch.arange(len(a)) != 5
        assert torch.equal(s.weights[others], wanted.weights[others])


# --- advantages from rewards -------------------------------------------------------------------------


def assert_like_reference(found: Tensor, wanted: Tensor) -> None:
    rtol, atol = _rounding(found.dtype)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [2, 1024])
def test_gae(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all optional tensors; in one chunk, and in chunks whose ends fall anywhere."""
    monkeypatch.setattr(advantages, "_STEPS", 8 * tile)
    x = _episodes(2, 13, 3)
    x["mask"][0, :5] = False
    x["mask"][1, 6:] = False
    y = {name: value.to(dtype) if value.is_floating_point() else value for name, value in x.items()}
    for found, wanted in zip(
        pk.multi_objective_gae(**y, gamma=0.97, lam=0.9),
        reference.multi_objective_gae(**y, gamma=0.97, lam=0.9),
        strict=True,
    ):
        assert found.dtype == dtype
        assert_like_reference(found, wanted)


@pytest.mark.parametrize("tile", [4, 1024])
def test_gae_keeps_what_is_not_finite_in_its_episode(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantages, "_STEPS", tile)
    x = _episodes(1, 9, 2)
    x["mask"][:] = True
    x["dones"][:] = False
    x["dones"][0, 3] = True
    clean = pk.multi_objective_gae(**x)
    x["values"][0, 6, 1] = NAN
    found = pk.multi_objective_gae(**x)
    touched = torch.zeros(1, 9, 2, dtype=torch.bool)
    touched[0, 4:7, 1] = True
    for y, z in zip(found, clean, strict=True):
        assert y[touched].isnan().all()
        assert torch.equal(y[~touched], z[~touched])
    x["mask"][0, 6] = False  # whatever stands in a masked step has no influence
    assert all(torch.isfinite(y).all() for y in pk.multi_objective_gae(**x))


def test_gae_of_many_objectives_and_any_strides() -> None:
    x = _episodes(1, 4, 19)
    for found, wanted in zip(pk.multi_objective_gae(**x), reference.multi_objective_gae(**x), strict=True):
        assert_like_reference(found, wanted)
    x = _episodes(2, 5, 2)
    wanted_pair = pk.multi_objective_gae(**x)
    x["rewards"] = x["rewards"].movedim(-1, 0).contiguous().movedim(0, -1)
    x["mask"] = x["mask"].T.contiguous().T.to(torch.bfloat16)
    x["dones"] = x["dones"].to(torch.int64).repeat_interleave(2, 1)[:, ::2]
    for found, wanted in zip(pk.multi_objective_gae(**x), wanted_pair, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [2, 1024])
def test_group_normalize(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that stand together and groups by ids, in one chunk and in many."""
    monkeypatch.setattr(advantages, "_MEMBERS", 4 * tile)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    x[torch.rand(12, 3, generator=g) < 0.2] = NAN
    x = x.to(dtype)
    ids = torch.tensor([5, -7, 5, 2**40, -7, 5, 0, 0, 2**40, 5, 5, 1])
    for scale in (True, False):
        for options in ({}, {"group_size": 4}, {"group_ids": ids}):
            found = pk.group_normalize(x, **options, scale=scale, eps=0.01)
            assert found.dtype == dtype
            assert_like_reference(found, reference.group_normalize(x, **options, scale=scale, eps=0.01))


def test_group_normalize_edges() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    assert not pk.group_normalize(x, group_size=1).any()
    assert not pk.group_normalize(x, group_ids=torch.arange(8)).any()
    assert not pk.group_normalize(torch.full((6, 2), 0.7), group_size=3).any()
    assert not pk.group_normalize(torch.full((4, 2), NAN)).any()
    y = x.clone()
    y[1, 2] = INF
    found, clean = pk.group_normalize(y, group_size=4), pk.group_normalize(x, group_size=4)
    assert found[:4, 2].isnan().all()
    assert torch.equal(found[:4, :2], clean[:4, :2])
    assert torch.equal(found[4:], clean[4:])
    many = torch.randn(3, 21, dtype=torch.float64)
    assert_like_reference(pk.group_normalize(many), reference.group_normalize(many))


@pytest.mark.parametrize("call", ["min_norm", "weights", "gae", "group_normalize"])
def test_the_same_bits_every_time(call: str) -> None:
    x = _episodes(2, 5, 3)
    m = family("rank deficient", 3, 4)
    ids = torch.tensor([1, 2, 1, 2, 1])
    calls: dict[str, Callable[[], Any]] = {
        "min_norm": lambda: pk.min_norm_weights(m),
        "weights": lambda: pk.pama_weights(m[0], regularization=0.1),
        "gae": lambda: pk.multi_objective_gae(**x),
        "group_normalize": lambda: (pk.group_normalize(x["rewards"][0], group_ids=ids),),
    }
    for first, second in zip(calls[call](), calls[call](), strict=True):
        assert torch.equal(first, second)
