"""What surrounds a call: default devices, tracing modes, odd views, memory that is shared."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pama_kernels as pk


def _solve_all() -> None:
    advantages = torch.randn(3, 5, 2, device="cpu")
    logprobs = torch.zeros(3, 5, device="cpu")
    pk.combine_advantages(advantages, weights_per="batch", prior=[1, 2])
    pk.pama_loss(logprobs, None, advantages, weights_per="token")
    pk.pama_weights(advantages[0, 0], prior=[1.0, 2.0])
    pk.pama_weights(advantages[0, 0])
    pk.min_norm_weights(torch.eye(2, device="cpu"), prior=[1.0, 2.0])
    pk.multi_objective_gae(advantages, advantages)
    pk.group_normalize(advantages[0])
    pk.objective_statistics(None, None, advantages, gram=True)


def test_a_default_device_changes_nothing() -> None:
    """In a process of its own: what is made on a wrong device is written through a wrong pointer."""
    code = (
        "import torch, tests.test_surroundings as t\n"
        "with torch.device('meta'): t._solve_all()\n"
        "torch.set_default_device('meta'); t._solve_all()\n"
        "torch.set_default_dtype(torch.float64); t._solve_all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_fake_tensors_leave_nothing_behind() -> None:
    x = torch.randn(2, 3, 7)
    with FakeTensorMode() as mode:
        fake = pk.combine_advantages(mode.from_tensor(x), weights_per="batch")
        assert fake.weights.shape == (7,)
    assert torch.isfinite(pk.combine_advantages(x, weights_per="batch").weights).all()


def test_a_traced_graph_computes() -> None:
    x = torch.randn(2, 3, 2)
    graph = make_fx(lambda a: pk.combine_advantages(a, weights_per="token").advantages)(x)
    y = torch.randn(2, 3, 2)
    assert torch.equal(graph(y), pk.combine_advantages(y, weights_per="token").advantages)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :1],
        lambda x: x[::2, 2:3],
        lambda x: x[1:2].expand(4, 5, *x.shape[2:]),
        lambda x: x[:1, :1].expand(3, 1, *x.shape[2:]),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
    ],
)
def test_batches_of_any_strides(view: object) -> None:
    assert callable(view)
    scores = view(torch.randn(4, 5, 3))
    assert torch.equal(pk.pama_weights(scores).weights, pk.pama_weights(scores.contiguous()).weights)
    vectors = torch.randn(4, 5, 3, 6)
    gram = view(vectors @ vectors.mT)
    assert torch.equal(pk.min_norm_weights(gram).weights, pk.min_norm_weights(gram.contiguous()).weights)


def test_a_negated_view_is_refused() -> None:
    x = torch.complex(torch.zeros(2, 3, 2), torch.ones(2, 3, 2)).conj().imag
    assert x.is_neg()
    with pytest.raises(ValueError, match=r"advantages: .*resolve_neg"):
        pk.combine_advantages(x, weights_per="batch")


def test_out_is_checked_and_counted() -> None:
    scores = torch.randn(3)
    weights, optimum = torch.empty(3), torch.empty(())
    factor = torch.ones(3, requires_grad=True)
    product = (factor * weights).sum()
    pk.pama_weights(scores, out=pk.WeightSolution(weights, optimum))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(ValueError, match=r"out: .*share"):
        pk.pama_weights(scores, out=pk.WeightSolution(scores, optimum))
    with pytest.raises(ValueError, match=r"out\.weights: .*requires_grad"):
        pk.pama_weights(scores, out=pk.WeightSolution(weights.clone().requires_grad_(), optimum))
    with pytest.raises(TypeError, match=r"out\.weights: expected a tensor"):
        pk.pama_weights(scores, out=pk.WeightSolution(None, optimum))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regularization", [1e-300, 1e-46, 1e-40, 1e-33])
def test_a_vanishing_regularization_is_the_limit(dtype: torch.dtype, regularization: float) -> None:
    scores = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 3.0]], dtype=dtype)
    got = pk.pama_weights(scores, regularization=regularization)
    wanted = pk.pama_weights(scores)
    assert torch.allclose(got.weights, wanted.weights, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert torch.allclose(got.optimum, wanted.optimum, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrices_of_half_precision_are_accepted(dtype: torch.dtype) -> None:
    """Three nearly parallel gradients: rounding alone makes the matrix indefinite."""
    for seed in range(50):
        torch.manual_seed(seed)
        g = (torch.randn(64) + 0.01 * torch.randn(3, 64)).to(dtype)
        assert torch.isfinite(pk.min_norm_weights(g @ g.mT).weights).all()


def test_a_mask_per_token_does_not_go_with_one_result_per_sequence() -> None:
    with pytest.raises(ValueError, match=r"objective_mask: expected shape \(2, 3\)"):
        pk.combine_advantages(
            torch.ones(2, 3),
            weights_per="batch",
            cu_seqlens=torch.tensor([0, 2, 5]),
            mask=torch.ones(5),
            objective_mask=torch.ones(5, 3),
        )


def test_conflict_is_a_correlation() -> None:
    statistics = pk.objective_statistics(None, None, torch.randn(8, 64, 3) + 3000, gram=True)
    assert statistics.conflict is not None
    assert (statistics.conflict.abs() <= 1).all()


def test_statistics_can_be_summed() -> None:
    parts = [pk.objective_statistics(None, None, torch.randn(2, 4, 3)) for _ in range(3)]
    assert torch.equal(sum(parts).buffer, (parts[0] + parts[1] + parts[2]).buffer)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objectives", [2, 3, 16])
@pytest.mark.parametrize("weights_per", ["batch", "sequence", "token"])
def test_a_batch_full_of_nan_leaves_nothing_behind(
    isa: str, weights_per: str, objectives: int, dtype: torch.dtype
) -> None:
    """Nine tokens end within a vector: what kernels keep beyond them must not come from an earlier call."""

    def results(tokens: int, value: float | None) -> list[Tensor]:
        g = torch.Generator().manual_seed(tokens)
        drawn = [torch.randn(1, tokens, generator=g, dtype=dtype) for _ in range(4)]
        logprobs, old, ref, factors = drawn if value is None else [torch.full_like(drawn[0], value)] * 4
        advantages = torch.randn(1, tokens, objectives, generator=g, dtype=dtype)
        if value is not None:
            advantages.fill_(value)
        present = torch.rand(1, objectives, generator=g) < 0.9
        logprobs = logprobs.clone().requires_grad_()
        output = pk.pama_loss(
            logprobs,
            old,
            advantages,
            weights_per=weights_per,
            noon=False,
            ref_logprobs=ref,
            kl_coef=0.1,
            importance_weights=factors.abs(),
            objective_mask=present,
        )
        output.loss.backward()
        assert logprobs.grad is not None
        pairs = pk.objective_statistics(
            logprobs, old, advantages, objective_mask=present.expand(1, -1), gram=True
        )
        return [output.loss, output.weights, output.optimum, logprobs.grad, pairs.buffer]

    before = results(9, None)
    assert all(torch.isfinite(x).all() for x in before)
    results(300, math.nan)
    for x, y in zip(results(9, None), before, strict=True):
        assert torch.equal(x, y)
