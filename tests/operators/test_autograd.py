"""The gradient of the loss: its values, and which tensors have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gradient_setup import (
    B,
    Batch,
    N,
    T,
    assert_close,
    every_rule,
    gradient_of,
    loss_of,
    make_batch,
    reference_gradient_of,
)
from torch import Tensor

import pama_kernels as pk

# --- values ------------------------------------------------------------------------------------------


@every_rule
def test_the_gradient_is_that_of_the_reference(rule: Any) -> None:
    x = make_batch()
    assert_close(gradient_of(x, rule=rule), reference_gradient_of(x, rule=rule))
    per_sequence = {**x, "advantages": x["advantages"][:, 0]}
    assert_close(gradient_of(per_sequence, rule=rule), reference_gradient_of(per_sequence, rule=rule))


@pytest.mark.parametrize("shape", [(N,), (B, N)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    """Finite differences with the weights frozen, as the gradient has them, away from the kinks."""
    x = make_batch(torch.float64)
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    assert all(((ratio - kink).abs() > 1e-4).all() for kink in (0.8, 1.2))
    extra = {"ref_logprobs": x["old_logprobs"], "importance_weights": x["old_logprobs"].exp()}
    weights = torch.rand(shape, dtype=torch.float64)

    def loss(logprobs: Tensor) -> Tensor:
        arguments = {**x, **extra, "logprobs": logprobs}
        return pk.pama_loss(**arguments, weights=weights, kl_coef=0.3, dual_clip=3.0).loss

    assert torch.autograd.gradcheck(loss, (x["logprobs"].clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_precision(dtype: torch.dtype) -> None:
    """Computed in float32 (float64) from the rounded inputs, and rounded once, to the dtype of logprobs."""
    x = make_batch(dtype)
    loss, leaf = loss_of(x)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    computed = 1e-12 if dtype == torch.float64 else 4e-6
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # one denormal
    torch.testing.assert_close(
        gradient.double(), reference_gradient_of(x), rtol=half_ulp + computed, atol=tiny
    )
    mixed = {**x, "advantages": x["advantages"].float()}
    assert gradient_of(mixed).dtype == dtype


def test_through_a_policy_and_a_sum_of_losses() -> None:
    """Log-softmax, gather, masked_scatter; two policy losses and a value loss in one backward pass."""
    x = make_batch(torch.float64)
    logits, actions = torch.randn(B, T, 5, dtype=torch.float64), torch.randint(5, (B, T, 1))
    gradients = []
    for library in (pk, pk.reference):
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1).gather(-1, actions).squeeze(-1)
        dense = torch.zeros_like(logprobs).masked_scatter(x["mask"], logprobs[x["mask"]])
        rows = (slice(0, 2), slice(2, None))
        losses = [
            library.pama_loss(dense[r], None, x["advantages"][r], x["mask"][r], rule=pk.Pama("sequence")).loss
            for r in rows
        ]
        (2 * losses[0] + losses[1] + leaf.square().mean()).backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_accumulation_with_frozen_weights_is_one_batch() -> None:
    """Uneven micro-batches, weights from the merged statistics, one denominator: one gradient."""
    x = make_batch()
    pieces = [{name: value[part] for name, value in x.items()} for part in (slice(0, 1), slice(1, 6))]
    merged = sum(pk.objective_statistics(**piece, pairs=True) for piece in pieces)
    weights = pk.upgrad_weights(merged.gram).weights
    whole = pk.pama_loss(**x)
    # those of the whole batch are float32, from sums of the same tokens in float32
    torch.testing.assert_close(whole.weights.double(), weights, rtol=0, atol=1e-5)
    frozen, wanted = loss_of(x, weights=weights)[0], gradient_of(x, weights=weights)
    tokens = int(x["mask"].sum())
    for normalizer in (tokens, float(tokens), torch.tensor(tokens)):
        leaf, total = x["logprobs"].clone().requires_grad_(), 0.0
        for piece, part in zip(pieces, leaf.split([1, 5]), strict=True):
            loss = pk.pama_loss(**{**piece, "logprobs": part}, weights=weights, normalizer=normalizer).loss
            loss.backward()
            total += loss.item()
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-6, atol=0)
        assert total == pytest.approx(frozen.item(), rel=1e-6)


def test_small_gradients_of_half_precision() -> None:
    """Float16 has no 1e-8, so the factor of a GradScaler is applied before the conversion."""
    x = make_batch(torch.float16)
    wanted = reference_gradient_of(x, normalizer=1e7 / 65536)
    loss, leaf = loss_of(x, normalizer=1e7)
    (found,) = torch.autograd.grad(loss * 65536, leaf)
    # below 6.1e-5 float16 has fixed steps of 6e-8
    half_ulp = torch.finfo(torch.float16).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=half_ulp + 4e-6, atol=3.1e-8)


# --- what has a gradient -----------------------------------------------------------------------------


def test_only_logprobs_get_a_gradient() -> None:
    x = make_batch()
    x["ref_logprobs"] = x["old_logprobs"] - 0.1
    x["importance_weights"] = x["old_logprobs"].exp()
    x["weights"] = torch.tensor([0.2, 0.3, 0.5])
    leaves = {name: v.clone().requires_grad_() for name, v in x.items() if v.is_floating_point()}
    result = pk.pama_loss(**{**x, **leaves}, kl_coef=torch.tensor(0.1, requires_grad=True))
    others = (result.weights, result.optimum, result.statistics.buffer, *result.metrics().values())
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in others)
    result.loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["logprobs"]
    assert not pk.pama_loss(**{**x, "advantages": leaves["advantages"]}).loss.requires_grad


@contextmanager
def _untouched(x: Batch) -> Iterator[None]:
    before = {name: value.clone() for name, value in x.items()}
    yield
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_modes() -> None:
    """no_grad, inference mode (and tensors created in it), autocast; inputs are not changed."""
    x = make_batch()
    with _untouched(x):
        wanted, gradient = pk.pama_loss(**x).loss, gradient_of(x)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                result = pk.pama_loss(**{**x, "logprobs": x["logprobs"].clone().requires_grad_()})
                assert torch.equal(result.metrics()["pama/loss"], wanted)
            assert not result.loss.requires_grad
            assert torch.equal(result.loss, wanted)
        with torch.inference_mode():
            rollout = make_batch()
            weights = pk.combine_advantages(rollout["advantages"], rollout["mask"]).weights
        assert torch.equal(gradient_of({**rollout, "logprobs": x["logprobs"]}), gradient)
        assert not pk.pama_loss(**{**rollout, "logprobs": x["logprobs"]}, weights=weights).loss.isnan()
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                loss, leaf = loss_of(x)
                combined = pk.combine_advantages(x["advantages"], x["mask"]).advantages
            assert loss.dtype == combined.dtype == torch.float32
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], gradient)


@every_rule
def test_without_any_signal(rule: Any) -> None:
    """Without a valid token loss and gradient are 0; without a sequence the gradient is empty."""
    x = make_batch()
    loss, leaf = loss_of({**x, "mask": torch.zeros_like(x["mask"])}, rule=rule)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()
    assert gradient_of({name: value[:0] for name, value in x.items()}, rule=rule).shape == (0, T)


def test_strided_expanded_and_non_leaf_logprobs() -> None:
    x, once = make_batch(), gradient_of(make_batch())
    leaf = x["logprobs"].T.contiguous().requires_grad_()
    for logprobs in (2 * leaf.T / 2, leaf.T):
        (gradient,) = torch.autograd.grad(pk.pama_loss(**{**x, "logprobs": logprobs}).loss, leaf)
        assert torch.equal(gradient, once.T)
    row = x["logprobs"][:1].clone().requires_grad_()
    expanded = {**x, "logprobs": row.expand(B, T)}
    (gradient,) = torch.autograd.grad(pk.pama_loss(**expanded).loss, row)
    assert_close(gradient[0], reference_gradient_of(expanded).sum(0))
