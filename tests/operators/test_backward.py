"""Backward passes: repeated, under checkpoints and hooks; derivatives that are not supported."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from gradient_setup import B, T, gradient_of, loss_of, make_batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pama_kernels as pk

# --- backward passes ---------------------------------------------------------------------------------


def test_backward_scales_accumulates_and_can_be_repeated() -> None:
    x, once = make_batch(), gradient_of(make_batch())
    loss, leaf = loss_of(x)
    kept = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(kept, once)
    kept.zero_()  # the caller's tensor, although the graph still needs the values
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


@pytest.mark.cpu
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_the_last_backward_makes_no_copy(upstream: float) -> None:
    loss, leaf = loss_of(make_batch())
    address = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward(torch.tensor(upstream))
    assert torch.equal(leaf.grad, gradient_of(make_batch()) * upstream)
    assert leaf.grad.data_ptr() == address


def test_inputs_may_change_between_forward_and_backward() -> None:
    """The gradient was computed in the forward pass, from the values at that time."""
    x = make_batch()
    loss, leaf = loss_of(x)
    wanted = gradient_of(x)
    for name in ("old_logprobs", "advantages"):
        x[name].fill_(float("nan"))
    loss.backward()
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x = make_batch()
    leaf = x["logprobs"].clone().requires_grad_()
    loss = checkpoint(
        lambda y: pk.pama_loss(**{**x, "logprobs": 2 * y / 2}).loss, leaf, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(leaf.grad, gradient_of(x))


def test_saved_tensor_hooks() -> None:
    """Activation offloading: saved tensors are moved away and back."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss, leaf = loss_of(make_batch())
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, gradient_of(make_batch()))


@pytest.mark.cpu
def test_func() -> None:
    x, wanted = make_batch(), gradient_of(make_batch())

    def loss(logprobs: Tensor) -> Tensor:
        return pk.pama_loss(**{**x, "logprobs": logprobs}).loss

    gradient, value = torch.func.grad_and_value(loss)(x["logprobs"])
    assert torch.equal(gradient, wanted)
    assert torch.equal(value, loss(x["logprobs"]))
    _, pullback = torch.func.vjp(loss, x["logprobs"])
    assert torch.equal(pullback(torch.tensor(2.0))[0], 2 * wanted)


# --- what is refused ---------------------------------------------------------------------------------

SECOND = pytest.raises(RuntimeError, match=r"pama_loss: the second derivative is not implemented")


@pytest.mark.cpu
def test_the_second_derivative_is_an_error() -> None:
    """It is not implemented, and must not count as 0: a gradient penalty would add it to another gradient."""
    x = make_batch()
    loss, leaf = loss_of(x)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(gradient.detach(), gradient_of(x))
    with SECOND:
        (gradient.square().sum() + leaf.sum()).backward()

    def slope(logprobs: Tensor) -> Tensor:
        loss = torch.func.grad(lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss)
        return loss(logprobs).square().sum()

    with SECOND:
        torch.func.grad(slope)(x["logprobs"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_derivative_of_the_gradient_with_respect_to_a_factor(dtype: torch.dtype) -> None:
    """A learned factor of the loss: the gradient is linear in it."""
    x = make_batch(dtype)
    once = gradient_of(x)
    loss, leaf = loss_of(x)
    factor = torch.tensor(3.0, dtype=loss.dtype, requires_grad=True)
    direction = torch.randn(B, T).to(dtype)
    (gradient,) = torch.autograd.grad(factor.square() * loss, leaf, create_graph=True)
    along = (gradient * direction).sum()
    (slope,) = torch.autograd.grad(along, factor, retain_graph=True, create_graph=True)
    wanted = (once.double() * direction.double()).sum()
    error = 64 * torch.finfo(dtype).eps * float((once.double() * direction.double()).abs().sum())
    assert slope.item() == pytest.approx(6 * wanted.item(), abs=6 * error)
    (again,) = torch.autograd.grad(slope, factor, retain_graph=True)
    assert again.item() == pytest.approx(2 * wanted.item(), abs=2 * error)
    for second in (lambda: torch.autograd.grad(along, leaf, retain_graph=True), along.backward):
        with SECOND:
            second()
    loss, leaf = loss_of(x)
    of_factor, _ = torch.autograd.grad(factor * loss, (factor, leaf), create_graph=True)
    (first,) = torch.autograd.grad(of_factor, leaf)  # of_factor is the loss
    assert torch.equal(first, once)


@pytest.mark.cpu
def test_the_factor_of_a_transformed_gradient() -> None:
    x = make_batch()

    def along(factor: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda y: factor * pk.pama_loss(**{**x, "logprobs": y}).loss)
        return gradient(x["logprobs"]).sum()

    slope = torch.func.grad(along)(torch.tensor(3.0))
    torch.testing.assert_close(slope, gradient_of(x).sum())


@pytest.mark.cpu
def test_forward_mode_is_an_error() -> None:
    """A tangent must not be dropped silently."""
    x = make_batch()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x["logprobs"], torch.ones(B, T))
        with pytest.raises(NotImplementedError, match=r"pama_loss: forward-mode .* use reverse mode"):
            pk.pama_loss(**{**x, "logprobs": dual})
    with pytest.raises(NotImplementedError, match=r"pama_loss: forward-mode .* use reverse mode"):
        torch.func.jvp(
            lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss, (x["logprobs"],), (torch.ones(B, T),)
        )


@pytest.mark.cpu
def test_vmap_of_the_gradient_is_an_error() -> None:
    x = make_batch()
    logprobs = torch.stack([x["logprobs"], x["logprobs"] + 0.1])
    gradient = torch.func.grad(lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss)
    with pytest.raises(NotImplementedError, match=r"pama_loss: torch.vmap .* is not implemented"):
        torch.func.vmap(gradient)(logprobs)


@pytest.mark.cpu
def test_the_jacobian_is_the_gradient() -> None:
    x = make_batch()
    jacobian = torch.func.jacrev(lambda y: pk.pama_loss(**{**x, "logprobs": y}).loss)
    assert torch.equal(jacobian(x["logprobs"]), gradient_of(x))
