"""Properties that only the Triton kernels have, in the interpreter: a session with TRITON_INTERPRET=1.

Batches are small: an operation of the interpreter takes tens of microseconds, a matrix thousands of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels._layout import check_tokens
from pama_kernels.backends.native import NoMemory

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("PAMA_BACKEND") != "triton":
    reason = "runs Triton's interpreter: PAMA_BACKEND=triton TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)
from pama_kernels.backends import triton as backend
from pama_kernels.backends.triton import active_set, advantages, launch, statistics

pytestmark = pytest.mark.portable

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _memory_that_is_not_zero() -> Iterator[None]:
    """Uninitialized memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def gram(kind: str, count: int, n: int, scale: float = 1.0) -> Tensor:
    """Of gradients in n + 2 dimensions; in 2, so that M is singular; with copies and opposites; of scales
    apart."""
    j = torch.randn(count, n, 2 if kind == "wide" else n + 2, dtype=torch.float64)
    if kind == "copies" and n > 2:
        j[:, 1], j[:, 2] = j[:, 0], -j[:, 0]
    if kind == "scales":
        j *= 10.0 ** torch.linspace(-4, 4, n, dtype=torch.float64)[:, None]
    return j @ j.mT * scale


KINDS = ("tall", "wide", "copies", "scales")


def solved(solver: Any, dimensions: int, x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Weights and optimum of problems that take so many dimensions of x."""
    shape = x.shape[: x.dim() - dimensions]
    result, optimum = x.new_empty((*shape, x.shape[-1])), x.new_empty(shape)
    solver(x, *options, result, optimum)
    return result, optimum


def skewed(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) / sum(range(1, n + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_min_norm_is_certified(kind: str, n: int) -> None:
    for scale in (1.0, 1e-150, 1e150):
        m = gram(kind, 3, n, scale)
        largest = m.diagonal(dim1=-2, dim2=-1).amax(-1)
        for p, regularization in ((None, 0.0), (skewed(n), 0.1)):
            c, optimum = solved(backend.min_norm, 2, m, p, regularization)
            assert (c >= 0).all()
            assert ((c.sum(-1) - 1).abs() <= 1e-14 * n).all()
            centre = torch.full((n,), 1 / n, dtype=torch.float64) if p is None else p
            gradient = (m @ c[..., None]).squeeze(-1) + regularization * largest[:, None] * (c - centre)
            gap = (c * gradient).sum(-1) - gradient.amin(-1)
            assert (gap <= 1e-12 * largest).all()
            assert (optimum >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_upgrad_decreases_no_objective(kind: str, n: int) -> None:
    for p in (None, skewed(n)):
        m = gram(kind, 2, n)
        c, optimum = solved(backend.upgrad, 2, m, p)
        product, root = (m @ c[..., None]).squeeze(-1), m.diagonal(dim1=-2, dim2=-1).sqrt()
        terms = root * (root * c).sum(-1, keepdim=True)  # |M_jk| c_k <= sqrt(M_jj M_kk) c_k
        assert (product >= -1e-11 * terms).all()
        assert (optimum >= 0).all()
        if kind == "tall":
            wanted = reference.upgrad_weights(m, preference=p)
            torch.testing.assert_close(c, wanted.weights, rtol=0, atol=1e-9)


def test_matrices_of_a_batch_are_independent() -> None:
    m = torch.cat([gram(kind, 1, 4) for kind in KINDS])
    for solve in (
        lambda x: solved(backend.min_norm, 2, x, None, 0.0),
        lambda x: solved(backend.upgrad, 2, x, None),
    ):
        alone = torch.stack([solve(x)[0] for x in m])
        bad = m.clone()
        bad[1, 0, 3] = NAN
        c, optimum = solve(bad)
        assert c[1].isnan().all()
        assert optimum[1].isnan()
        others = [0, 2, 3]
        assert torch.equal(c[others], alone[others])


def test_without_a_certificate_the_result_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_set, "ROUNDS_PER_OBJECTIVE", 0)
    monkeypatch.setattr(active_set, "SPARE_ROUNDS", 0)
    m = gram("tall", 2, 5)
    for c, optimum in (solved(backend.min_norm, 2, m, None, 0.0), solved(backend.upgrad, 2, m, None)):
        assert c.isnan().all()
        assert optimum.isnan().all()


def test_too_many_objectives_for_a_tile_are_an_error() -> None:
    for solve in (
        lambda m: solved(backend.min_norm, 2, m, None, 0.0),
        lambda m: solved(backend.upgrad, 2, m, None),
    ):
        with pytest.raises(ValueError, match="gram: expected at most 64 objectives on this backend, got 65"):
            solve(torch.eye(65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("span", [1e8, 1e20, 1e34])
def test_weights_are_on_the_simplex_for_any_span_of_scores(dtype: torch.dtype, span: float) -> None:
    a = (torch.randn(16, 5, dtype=torch.float64) * span ** -torch.rand(16, 5, dtype=torch.float64)).to(dtype)
    for p, regularization in ((None, 0.0), (skewed(5), 0.0), (None, 0.1)):
        c, optimum = solved(backend.weights, 1, a, p, regularization, None)
        assert (c >= 0).all()
        assert ((c.sum(-1) - 1).abs() <= 8 * torch.finfo(dtype).eps).all()
        wanted = reference.pama_weights(a, preference=p, regularization=regularization).optimum
        largest = a.abs().amax(-1)
        assert ((optimum - wanted).abs() <= 64 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("tile", [64, 1024])
def test_gae_in_chunks(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks whose ends fall anywhere among masked, last and truncated steps."""
    monkeypatch.setattr(advantages, "_STEPS", tile)
    shape = 2, 70, 2
    options: dict[str, Any] = {
        "mask": torch.rand(shape[:2]) < 0.8,
        "dones": torch.rand(shape[:2]) < 0.1,
        "truncated": torch.rand(shape[:2]) < 0.1,
        "last_values": torch.randn(2, 2, dtype=torch.float64),
        "final_values": torch.randn(shape, dtype=torch.float64),
    }
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    found = pk.multi_objective_gae(x, y, **options, gamma=0.97, lam=0.9)
    for one, wanted in zip(
        found, reference.multi_objective_gae(x, y, **options, gamma=0.97, lam=0.9), strict=True
    ):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [8, 1024])
def test_group_normalize_in_chunks(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantages, "_MEMBERS", tile)
    x = torch.randn(12, 2, dtype=torch.float64)
    x[torch.rand(12, 2) < 0.2] = NAN
    for options in (
        {"group_size": 4},
        {"group_ids": torch.tensor([5, -7, 5, 2**40, -7, 5, 0, 0, 2**40, 5, 5, 1])},
    ):
        found, wanted = (f.group_normalize(x, **options, eps=0.01) for f in (pk, reference))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_offsets_beyond_32_bits() -> None:
    """Objectives first, (N - 1) * stride >= 2^31; few of the buffer's pages are touched."""
    rows, stride = 16, 2**31 // 15 + 8
    advantages = torch.empty(0, dtype=torch.float16)
    advantages.set_(torch.UntypedStorage(2 * rows * stride), 0, (rows, stride))
    x = advantages[:, :4].movedim(0, -1)
    x.copy_(torch.arange(64, dtype=torch.float16).view(4, 16))
    tokens, _ = check_tokens(x, torch.ones(4, dtype=torch.bool))
    sums = statistics(tokens, False)
    torch.testing.assert_close(sums[16:32], x.double().sum(0))


def test_a_tensor_without_memory_is_named_in_the_error() -> None:
    mask = torch.ones(3, 4)
    mask.untyped_storage().resize_(0)
    tokens, _ = check_tokens(torch.randn(3, 4, 2), mask)
    with pytest.raises(NoMemory, match="mask: expected a tensor with memory of its own, got one without"):
        backend.statistics(tokens, False)
    assert launch.INTERPRETED


def test_range_of_the_statistics() -> None:
    """Terms are float32 and added in float32 up to 32 times: exact up to 2^122, infinite beyond. Squares are
    float64, so that weights on the Gram matrix are right up to the limits of the inputs."""
    tokens = 3 * 512 * 32  # 32 terms for each element of a tile
    for size, fits in ((2.0**122, True), (2.0**123, False)):
        advantages = torch.full((1, tokens, 1), size)
        s = pk.objective_statistics(None, None, advantages, pairs=True)
        assert s.gram is not None
        assert s.gram.item() == pytest.approx(size**2)
        assert s.scores.item() == (size if fits else INF)


@pytest.mark.parametrize(("power", "moment"), [(63, 2.0**252), (64, INF), (-74, 2.0**-296), (-75, 0.0)])
def test_range_of_bound_terms(power: int, moment: float) -> None:
    """I = w A is a float32: NaN weights where it overflows, 0 where it is below 2^-149."""
    advantages = torch.tensor([1.0, -1.0]).expand(2, 4, 2) * 2.0**power
    importance = torch.full((2, 4), 2.0**power)
    found = pk.pama_loss(torch.zeros(2, 4), None, advantages, importance_weights=importance)
    assert (found.statistics.second_moments == moment).all()
    assert bool(found.weights.isnan().all()) == (moment == INF)


def test_gradient_beyond_the_range_of_the_statistics() -> None:
    """It depends on the weights only, which are given here."""
    logprobs = torch.zeros(2, 4, requires_grad=True)
    advantages = torch.full((2, 4, 2), 2.0**100)
    importance = torch.full((2, 4), 2.0**100)
    output = pk.pama_loss(
        logprobs, None, advantages, importance_weights=importance, weights=torch.tensor([0.5, 0.5]),
        normalizer=2.0**90,
    )  # fmt: skip
    output.loss.backward()
    assert output.statistics.scores.isinf().all()
    assert output.loss == -(2.0**113)
    assert (logprobs.grad == -(2.0**110)).all()
