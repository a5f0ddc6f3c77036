"""Gradients flow to the log-probabilities, to nothing else, in every way that PyTorch asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pama_kernels as pk

B, T, N = 6, 7, 3
RULES = {
    "pama": pk.Pama(),
    "scores": pk.Pama(bound="scores", noon=True),
    "sequence": pk.Pama("sequence"),
    "token": pk.Pama("token"),
    "upgrad": pk.UPGrad(),
    "fixed": pk.Fixed(),
    "softmin": pk.SoftMin(),
    "callable": lambda s: s.count / s.count.sum() + 0.25,
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
Batch = dict[str, Tensor]


def _batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Ratios on both sides of the clip range, a few masked tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(B, T) - 2
    mask = torch.rand(B, T, generator=generator) < 0.8
    return {
        "logprobs": (old + 0.3 * normal(B, T)).to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": normal(B, T, N).to(dtype),
        "mask": mask,
    }


def _loss(x: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the leaf that it is a function of."""
    leaf = x["logprobs"].detach().clone().requires_grad_()
    return pk.pama_loss(**{**x, "logprobs": leaf}, **settings).loss, leaf


def _gradient(x: Batch, **settings: Any) -> Tensor:
    return torch.autograd.grad(*_loss(x, **settings))[0]


def _reference_gradient(x: Batch, **settings: Any) -> Tensor:
    leaf = x["logprobs"].detach().double().requires_grad_()
    return torch.autograd.grad(pk.reference.pama_loss(**{**x, "logprobs": leaf}, **settings).loss, leaf)[0]


def _close(gradient: Tensor, wanted: Tensor) -> None:
    """Float32: a few roundings per element, and as many of the largest one where terms cancel."""
    few = 32 * 2**-24
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * few, atol=few * wanted.abs().max().item())


# --- values ------------------------------------------------------------------------------------------


@every_rule
def test_the_gradient_is_that_of_the_reference(rule: Any) -> None:
    x = _batch()
    _close(_gradient(x, rule=rule), _reference_gradient(x, rule=rule))
    per_sequence = {**x, "advantages": x["advantages"][:, 0]}
    _close(_gradient(per_sequence, rule=rule), _reference_gradient(per_sequence, rule=rule))


@pytest.mark.parametrize("shape", [(N,), (B, N)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    """Finite differences with the weights frozen, as the gradient has them, away from the kinks."""
    x = _batch(torch.float64)
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
    x = _batch(dtype)
    loss, leaf = _loss(x)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    computed = 1e-12 if dtype == torch.float64 else 4e-6
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # one denormal
    torch.testing.assert_close(gradient.double(), _reference_gradient(x), rtol=half_ulp + computed, atol=tiny)
    mixed = {**x, "advantages": x["advantages"].float()}
    assert _gradient(mixed).dtype == dtype


def test_through_a_policy_and_a_sum_of_losses() -> None:
    """Log-softmax, gather, masked_scatter; two policy losses and a value loss in one backward pass."""
    x = _batch(torch.float64)
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
    x = _batch()
    pieces = [{name: value[part] for name, value in x.items()} for part in (slice(0, 1), slice(1, 6))]
    merged = sum(pk.objective_statistics(**piece, pairs=True) for piece in pieces)
    weights = pk.min_norm_weights(merged.cosines, regularization=0.1).weights
    whole = pk.pama_loss(**x)
    # those of the whole batch are float32, from sums of the same tokens in float32
    torch.testing.assert_close(whole.weights.double(), weights, rtol=0, atol=1e-5)
    frozen, wanted = _loss(x, weights=weights)[0], _gradient(x, weights=weights)
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
    x = _batch(torch.float16)
    wanted = _reference_gradient(x, normalizer=1e7 / 65536)
    loss, leaf = _loss(x, normalizer=1e7)
    (found,) = torch.autograd.grad(loss * 65536, leaf)
    # below 6.1e-5 float16 has fixed steps of 6e-8
    half_ulp = torch.finfo(torch.float16).eps / 2
    torch.testing.assert_close(found.double(), wanted, rtol=half_ulp + 4e-6, atol=3.1e-8)


# --- what has a gradient -----------------------------------------------------------------------------


def test_only_logprobs_get_a_gradient() -> None:
    x = _batch()
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
    """no_grad, inference mode (and tensors made there), autocast; inputs stay as they are."""
    x = _batch()
    with _untouched(x):
        wanted, gradient = pk.pama_loss(**x).loss, _gradient(x)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                result = pk.pama_loss(**{**x, "logprobs": x["logprobs"].clone().requires_grad_()})
                assert torch.equal(result.metrics()["pama/loss"], wanted)
            assert not result.loss.requires_grad
            assert torch.equal(result.loss, wanted)
        with torch.inference_mode():
            rollout = _batch()
            weights = pk.combine_advantages(rollout["advantages"], rollout["mask"]).weights
        assert torch.equal(_gradient({**rollout, "logprobs": x["logprobs"]}), gradient)
        assert not pk.pama_loss(**{**rollout, "logprobs": x["logprobs"]}, weights=weights).loss.isnan()
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                loss, leaf = _loss(x)
                combined = pk.combine_advantages(x["advantages"], x["mask"]).advantages
            assert loss.dtype == combined.dtype == torch.float32
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], gradient)


@every_rule
def test_nothing_to_learn_from(rule: Any) -> None:
    """No valid token: loss and gradient 0. No sequence: an empty gradient."""
    x = _batch()
    loss, leaf = _loss({**x, "mask": torch.zeros_like(x["mask"])}, rule=rule)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()
    assert _gradient({name: value[:0] for name, value in x.items()}, rule=rule).shape == (0, T)


def test_strided_expanded_and_non_leaf_logprobs() -> None:
    x, once = _batch(), _gradient(_batch())
    leaf = x["logprobs"].T.contiguous().requires_grad_()
    for logprobs in (2 * leaf.T / 2, leaf.T):
        (gradient,) = torch.autograd.grad(pk.pama_loss(**{**x, "logprobs": logprobs}).loss, leaf)
        assert torch.equal(gradient, once.T)
    row = x["logprobs"][:1].clone().requires_grad_()
    expanded = {**x, "logprobs": row.expand(B, T)}
    (gradient,) = torch.autograd.grad(pk.pama_loss(**expanded).loss, row)
    _close(gradient[0], _reference_gradient(expanded).sum(0))


# --- backward passes ---------------------------------------------------------------------------------


def test_backward_scales_accumulates_and_keeps() -> None:
    x, once = _batch(), _gradient(_batch())
    loss, leaf = _loss(x)
    kept = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(kept, once)
    kept.zero_()  # the caller's own, though the graph still needs the values
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, once + once)
    (zero,) = torch.autograd.grad(loss, leaf, torch.tensor(0.0), retain_graph=True)
    assert not zero.any()
    (rows,) = torch.autograd.grad(
        loss, leaf, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True
    )
    assert torch.equal(rows, torch.stack([once, -2 * once]))
    (nan,) = torch.autograd.grad(loss, leaf, torch.tensor(float("nan")), retain_graph=True)
    assert nan[x["mask"]].isnan().all()
    leaf.grad = None
    (loss * -8).backward()
    assert torch.equal(leaf.grad, once * -8)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_the_last_backward_makes_no_copy(upstream: float) -> None:
    loss, leaf = _loss(_batch())
    address = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward(torch.tensor(upstream))
    assert torch.equal(leaf.grad, _gradient(_batch()) * upstream)
    assert leaf.grad.data_ptr() == address


def test_inputs_may_change_between_forward_and_backward() -> None:
    """The gradient was computed in the forward pass, from what the tensors held then."""
    x = _batch()
    loss, leaf = _loss(x)
    wanted = _gradient(x)
    for name in ("old_logprobs", "advantages"):
        x[name].fill_(float("nan"))
    loss.backward()
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x = _batch()
    leaf = x["logprobs"].clone().requires_grad_()
    loss = checkpoint(
        lambda y: pk.pama_loss(**{**x, "logprobs": 2 * y / 2}).loss, leaf, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(leaf.grad, _gradient(x))


def test_saved_tensor_hooks() -> None:
    """Activation offloading: what is saved goes away and comes back."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss, leaf = _loss(_batch())
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, _gradient(_batch()))


def test_func() -> None:
    x, wanted = _batch(), _gradient(_batch())

    def loss(logprobs: Tensor) -> Tensor:
        return pk.pama_loss(**{**x, "logprobs": logprobs}).loss

    gradient, value = torch.func.grad_and_value(loss)(x["logprobs"])
    assert torch.equal(gradient, wanted)
    assert torch.equal(value, loss(x["logprobs"]))
    _, pullback = torch.func.vjp(loss, x["logprobs"])
    assert torch.equal(pullback(torch.tensor(2.0))[0], 2 * wanted)


# --- what is refused ---------------------------------------------------------------------------------

SECOND = pytest.raises(RuntimeError, match=r"pama_loss: the second derivative is not implemented")


def test_the_second_derivative_is_refused() -> None:
    """It is not known, and must not pass for 0: here as a gradient penalty adds it to another gradient."""
    x = _batch()
    loss, leaf = _loss(x)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(gradient.detach(), _gradient(x))
    with SECOND:
        (gradient.square().sum() + leaf.sum()).backward()

    def slope(logprobs: Tensor) -> Tensor:
        loss = torch.func.grad(lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss)
        return loss(logprobs).square().sum()

    with SECOND:
        torch.func.grad(slope)(x["logprobs"])


def test_forward_mode_is_refused() -> None:
    """A tangent must not be lost in silence."""
    x = _batch()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x["logprobs"], torch.ones(B, T))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            pk.pama_loss(**{**x, "logprobs": dual})
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(
            lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss, (x["logprobs"],), (torch.ones(B, T),)
        )


def test_vmap_of_the_gradient_is_refused() -> None:
    x = _batch()
    logprobs = torch.stack([x["logprobs"], x["logprobs"] + 0.1])
    gradient = torch.func.grad(lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(gradient)(logprobs)
