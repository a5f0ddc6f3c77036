"""Gradients flow to the log-probabilities, to nothing else, in every way that PyTorch asks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import WEIGHTS_PER
from torch import Tensor

import pama_kernels as pk

B, T, N = 6, 7, 3


def _tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Ratios on both sides of the clip range, a few masked tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(B, T) - 2
    mask = torch.rand(B, T, generator=generator) < 0.8
    mask[0, 0] = True
    return {
        "logprobs": (old + 0.3 * normal(B, T)).to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": normal(B, T, N).to(dtype),
        "mask": mask,
    }


def _gradient(x: dict[str, Tensor], **settings: Any) -> Tensor:
    logprobs = x["logprobs"].detach().clone().requires_grad_()
    pk.pama_loss(**{**x, "logprobs": logprobs}, **settings).loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad


def _reference_gradient(x: dict[str, Tensor], **settings: Any) -> Tensor:
    logprobs = x["logprobs"].detach().double().requires_grad_()
    loss = pk.reference.pama_loss(**{**x, "logprobs": logprobs}, **settings).loss
    return torch.autograd.grad(loss, logprobs)[0]


def _close(gradient: Tensor, wanted: Tensor) -> None:
    """Float32: a few roundings per element, and as many of the largest one where terms cancel."""
    few = 32 * 2**-24
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * few, atol=few * wanted.abs().max().item())


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("noon", [True, False])
def test_gradient_is_that_of_the_reference(weights_per: str, noon: bool) -> None:
    x = _tensors()
    settings: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "regularization": 0.1}
    _close(_gradient(x, **settings), _reference_gradient(x, **settings))


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_gradcheck(weights_per: str) -> None:
    """Finite differences with the weights frozen, as the gradient has them, away from the kinks."""
    x = _tensors(torch.float64)
    settings: dict[str, Any] = {"noon": False, "dual_clip": 3.0, "regularization": 0.1}
    weights = pk.pama_loss(**x, weights_per=weights_per, **settings).weights
    if weights_per == "token":
        weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    assert ((ratio - 0.8).abs() > 1e-4).all()
    assert ((ratio - 1.2).abs() > 1e-4).all()

    def loss(logprobs: Tensor) -> Tensor:
        arguments = {
            **x,
            "logprobs": logprobs,
            "ref_logprobs": x["old_logprobs"],
            "importance_weights": x["old_logprobs"].exp(),
        }
        return pk.pama_loss(
            **arguments, weights_per=weights_per, weights=weights, kl_coef=0.3, **settings
        ).loss

    logprobs = x["logprobs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_only_logprobs_get_a_gradient() -> None:
    x = _tensors()
    x["ref_logprobs"] = x["old_logprobs"] - 0.1
    x["importance_weights"] = x["old_logprobs"].exp()
    x["weights"] = torch.tensor([0.2, 0.3, 0.5])
    names = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "importance_weights", "weights")
    leaves = {name: x[name].clone().requires_grad_() for name in names}
    result = pk.pama_loss(**{**x, **leaves}, weights_per="batch", kl_coef=0.1)
    assert result.loss.requires_grad
    assert not result.weights.requires_grad
    assert not result.optimum.requires_grad
    assert not result.statistics.buffer.requires_grad
    assert not any(value.requires_grad for value in result.metrics().values())
    result.loss.backward()
    assert leaves["logprobs"].grad is not None
    assert all(leaves[name].grad is None for name in names[1:])


def test_nothing_else_is_differentiable() -> None:
    x = _tensors()
    for name in ("logprobs", "old_logprobs", "advantages"):
        x[name].requires_grad_()
    combined = pk.combine_advantages(
        x["advantages"],
        x["mask"],
        weights_per="token",
        logprobs=x["logprobs"],
        old_logprobs=x["old_logprobs"],
        clip_range=0.2,
    )
    assert not any(y.requires_grad for y in (combined.advantages, combined.weights, combined.optimum))
    assert not pk.objective_statistics(**x).buffer.requires_grad
    values = torch.randn(B, T, N, requires_grad=True)
    assert not any(y.requires_grad for y in pk.multi_objective_gae(values, values))
    assert not pk.group_normalize(values[:, 0]).requires_grad
    assert not pk.pama_weights(values).weights.requires_grad
    frozen = {**x, "logprobs": x["logprobs"].detach()}
    assert not pk.pama_loss(**frozen, weights_per="batch").loss.requires_grad


def test_no_grad_and_inference_mode() -> None:
    x = _tensors()
    x["logprobs"].requires_grad_()
    wanted = pk.pama_loss(**x, weights_per="batch")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            result = pk.pama_loss(**x, weights_per="batch")
            made_inside = pk.pama_loss(**_tensors(), weights_per="batch")
            metrics = result.metrics()
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, wanted.loss.detach())
        assert torch.equal(made_inside.loss, wanted.loss.detach())
        assert torch.equal(metrics["pama/loss"], wanted.loss.detach())
    with torch.inference_mode():
        rollout = _tensors()
        weights = pk.combine_advantages(rollout["advantages"], rollout["mask"], weights_per="batch").weights
    _close(
        _gradient({**rollout, "weights": weights, "logprobs": x["logprobs"]}, weights_per="batch"),
        _reference_gradient({**rollout, "weights": weights, "logprobs": x["logprobs"]}, weights_per="batch"),
    )


def test_gradient_accumulation_with_frozen_weights_is_one_batch() -> None:
    """Uneven micro-batches, weights from the merged statistics, one denominator: one gradient."""
    x = _tensors()
    pieces = [{name: value[part] for name, value in x.items()} for part in (slice(0, 1), slice(1, 6))]
    statistics = sum(
        (pk.objective_statistics(**piece) for piece in pieces[1:]), pk.objective_statistics(**pieces[0])
    )
    weights = pk.pama_weights(
        statistics.scores, regularization=0.1, scale=statistics.second_moments.max()
    ).weights
    whole = x["logprobs"].clone().requires_grad_()
    result = pk.pama_loss(**{**x, "logprobs": whole}, weights_per="batch", regularization=0.1)
    # The weights of the whole batch are float32; the merged ones are float64.
    torch.testing.assert_close(result.weights.double(), weights, rtol=0, atol=1e-5)
    frozen = pk.pama_loss(**{**x, "logprobs": whole}, weights_per="batch", weights=weights)
    frozen.loss.backward()
    tokens = int(x["mask"].sum())
    for normalizer in (tokens, float(tokens), torch.tensor(tokens)):
        parts = x["logprobs"].clone().requires_grad_()
        total = 0.0
        for piece, start, stop in zip(pieces, (0, 1), (1, 6), strict=True):
            loss = pk.pama_loss(
                **{**piece, "logprobs": parts[start:stop]},
                weights_per="batch",
                weights=weights,
                normalizer=normalizer,
            ).loss
            loss.backward()
            total += loss.item()
        assert parts.grad is not None
        assert whole.grad is not None
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=0)
        assert total == pytest.approx(frozen.loss.item(), rel=1e-6)


def test_backward_scales_and_accumulates() -> None:
    x = _tensors()
    once = _gradient(x, weights_per="batch")
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(logprobs.grad, once + once)
    logprobs.grad = None
    (loss * -8).backward()
    assert torch.equal(logprobs.grad, once * -8)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_the_last_backward_makes_no_copy(upstream: float) -> None:
    x = _tensors()
    once = _gradient(x, weights_per="batch")
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    address = loss.grad_fn.saved_tensors[0].data_ptr()
    kept = torch.autograd.grad(loss, logprobs, retain_graph=True)[0]
    kept.zero_()  # the caller's own, though the graph still needs the values
    loss.backward(torch.tensor(upstream))
    assert torch.equal(logprobs.grad, once * upstream)
    assert logprobs.grad.data_ptr() == address


def test_a_batch_of_upstreams() -> None:
    x = _tensors()
    once = _gradient(x, weights_per="batch")
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    (rows,) = torch.autograd.grad(loss, logprobs, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    assert torch.equal(rows, torch.stack([once, -2 * once]))


def test_a_zero_and_a_nan_upstream() -> None:
    x = _tensors()
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    (zero,) = torch.autograd.grad(loss, logprobs, torch.tensor(0.0), retain_graph=True)
    assert not zero.any()
    (nan,) = torch.autograd.grad(loss, logprobs, torch.tensor(float("nan")))
    assert nan[x["mask"]].isnan().all()


def test_non_leaf_and_strided_logprobs() -> None:
    x = _tensors()
    once = _gradient(x, weights_per="batch")
    leaf = x["logprobs"].T.contiguous().requires_grad_()
    doubled = 2 * leaf.T  # not contiguous, not a leaf
    pk.pama_loss(**{**x, "logprobs": doubled / 2}, weights_per="batch").loss.backward()
    assert torch.equal(leaf.grad, once.T)
    leaf.grad = None
    pk.pama_loss(**{**x, "logprobs": leaf.T}, weights_per="batch").loss.backward()
    assert torch.equal(leaf.grad, once.T)
    row = x["logprobs"][:1].clone().requires_grad_()
    expanded = {**x, "logprobs": row.expand(B, T)}
    pk.pama_loss(**expanded, weights_per="batch").loss.backward()
    assert row.grad is not None
    _close(
        row.grad[0],
        _reference_gradient(expanded, weights_per="batch").sum(0),
    )


def test_through_a_policy() -> None:
    """Log-softmax and gather before the loss: the parameters' gradient is the reference's."""
    x = _tensors(torch.float64)
    logits = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (B, T, 1))

    def gradient(loss_of: Any) -> Tensor:
        logprobs = logits.log_softmax(-1).gather(-1, actions).squeeze(-1)
        loss = loss_of(**{**x, "logprobs": logprobs, "old_logprobs": None}, weights_per="sequence").loss
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(gradient(pk.pama_loss), gradient(pk.reference.pama_loss), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("noon", [True, False])
def test_through_masked_scatter_and_a_sum_of_losses(weights_per: str, noon: bool) -> None:
    """Valid tokens scattered into (B, T); two policy losses and a value loss in one backward pass."""
    x = _tensors()
    old, advantages, mask = x["old_logprobs"], x["advantages"], x["mask"]
    trunk = torch.randn(int(mask.sum()), 4, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "regularization": 0.1}
    gradients = []
    for backend in (pk, pk.reference):
        head, critic = torch.linspace(-1, 1, 4).requires_grad_(), torch.ones(4, N, requires_grad=True)
        dense = torch.zeros(B, T).masked_scatter(mask, x["logprobs"][mask] + 0.1 * trunk @ head)
        values = torch.zeros(B, T, N).masked_scatter(mask.unsqueeze(-1), trunk @ critic)
        rows = (slice(0, 2), slice(2, None))
        losses = [
            backend.pama_loss(dense[r], old[r], advantages[r], mask[r], **settings).loss.float() for r in rows
        ]
        (2 * losses[0] + losses[1] + (values - advantages)[mask].square().mean()).backward()
        assert head.grad is not None
        assert critic.grad is not None
        gradients.append((head.grad, critic.grad))
    (head_gradient, critic_gradient), (wanted, wanted_critic) = gradients
    assert head_gradient.norm() > 1e-2
    assert torch.equal(critic_gradient, wanted_critic)
    # 42 tokens of either sign in float32 on both sides; |trunk| < 4
    torch.testing.assert_close(head_gradient, wanted, rtol=0, atol=2 * 42 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_precision_of_the_gradient(dtype: torch.dtype) -> None:
    """The gradient is computed in float32 (float64) from the rounded inputs, and rounded once."""
    x = _tensors(dtype)
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.dtype == dtype
    wanted = _reference_gradient(x, weights_per="batch")
    half_ulp = torch.finfo(dtype).eps / 2
    computed = 1e-12 if dtype == torch.float64 else 4e-6
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # one denormal
    torch.testing.assert_close(logprobs.grad.double(), wanted, rtol=half_ulp + computed, atol=tiny)


def test_loss_scaling_happens_before_the_rounding_to_half() -> None:
    """What GradScaler relies on: gradients below float16's range survive a factor of 65536."""
    x = _tensors(torch.float16)
    normalizer = 1e7  # gradients near 1e-8, below the smallest denormal 6e-8
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch", normalizer=normalizer).loss
    (plain,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (loss * 65536).backward()
    assert logprobs.grad is not None
    wanted = 65536 * _reference_gradient(x, weights_per="batch", normalizer=normalizer)
    assert (wanted != 0).sum() > 5
    half_ulp = torch.finfo(torch.float16).eps / 2
    # Below 6.1e-5 float16 has fixed steps of 6e-8.
    torch.testing.assert_close(logprobs.grad.double(), wanted, rtol=half_ulp + 4e-6, atol=3.1e-8)
    assert (logprobs.grad != 0).sum() > (plain != 0).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x = _tensors()
    wanted = pk.pama_loss(**x, weights_per="batch").loss
    gradient = _gradient(x, weights_per="batch")
    logprobs = x["logprobs"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
        combined = pk.combine_advantages(x["advantages"], x["mask"], weights_per="batch")
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), wanted)
    assert torch.equal(logprobs.grad, gradient)
    assert combined.advantages.dtype == torch.float32


def test_inputs_are_not_modified() -> None:
    x = _tensors()
    before = {name: value.clone() for name, value in x.items()}
    _gradient(x, weights_per="token", noon=False)
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_inputs_may_change_between_forward_and_backward() -> None:
    """The gradient was computed in the forward pass, from what stood there then."""
    x = _tensors()
    wanted = _gradient(x, weights_per="batch")
    logprobs = x["logprobs"].clone().requires_grad_()
    changed = {name: value.clone() for name, value in x.items()}
    loss = pk.pama_loss(**{**changed, "logprobs": logprobs}, weights_per="batch").loss
    for name in ("old_logprobs", "advantages"):
        changed[name].fill_(float("nan"))
    loss.backward()
    assert torch.equal(logprobs.grad, wanted)


def test_no_valid_token_gives_zero_gradient() -> None:
    x = _tensors()
    x["mask"] = torch.zeros_like(x["mask"])
    for weights_per in WEIGHTS_PER:
        gradient = _gradient(x, weights_per=weights_per)
        assert not gradient.any()
        assert pk.pama_loss(**x, weights_per=weights_per).loss == 0


def test_empty_batch_has_an_empty_gradient() -> None:
    x = {name: value[:0] for name, value in _tensors().items()}
    assert _gradient(x, weights_per="batch").shape == (0, T)


def test_func_grad() -> None:
    x = _tensors()

    def loss(logprobs: Tensor) -> Tensor:
        return pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss

    wanted = _gradient(x, weights_per="batch")
    assert torch.equal(torch.func.grad(loss)(x["logprobs"]), wanted)
    gradient, value = torch.func.grad_and_value(loss)(x["logprobs"])
    assert torch.equal(gradient, wanted)
    assert torch.equal(value, loss(x["logprobs"]))
    _, pullback = torch.func.vjp(loss, x["logprobs"])
    assert torch.equal(pullback(torch.tensor(2.0))[0], 2 * wanted)


def test_second_derivative_is_refused() -> None:
    """The second derivative is not known. It must not pass for 0."""
    x = _tensors()
    logprobs = x["logprobs"].clone().requires_grad_()
    loss = pk.pama_loss(**{**x, "logprobs": logprobs}, weights_per="batch").loss
    (gradient,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    assert torch.equal(gradient.detach(), _gradient(x, weights_per="batch"))
    # As a gradient penalty adds it to a loss that has a gradient of its own.
    penalised = gradient.square().sum() + logprobs.sum()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)twice|second deriv|double backward"):
        penalised.backward()


def test_second_derivative_by_func_is_refused() -> None:
    x = _tensors()

    def slope(logprobs: Tensor) -> Tensor:
        loss = torch.func.grad(lambda y: pk.pama_loss(**{**x, "logprobs": y}, weights_per="batch").loss)
        return loss(logprobs).square().sum()

    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)twice|second deriv|double backward"):
        torch.func.grad(slope)(x["logprobs"])


def test_forward_mode_works_or_is_refused() -> None:
    """A tangent must not be lost in silence."""
    x = _tensors()
    tangent = torch.randn(B, T)
    wanted = (_gradient(x, weights_per="batch") * tangent).sum()
    try:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x["logprobs"], tangent)
            loss = pk.pama_loss(**{**x, "logprobs": dual}, weights_per="batch").loss
            found = forward_ad.unpack_dual(loss).tangent
    except (NotImplementedError, RuntimeError) as error:
        said = str(error)
    else:
        assert found is not None, "the tangent was lost"
        torch.testing.assert_close(found, wanted)
        return
    assert "jvp" in said or "forward" in said


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("what", ["loss", "gradient", "combine", "weights", "statistics", "gae", "normalize"])
def test_vmap_works_or_is_refused(what: str) -> None:
    """Equal to a loop, or an error that names vmap or batching."""
    x = _tensors()
    logprobs = torch.stack([x["logprobs"], x["logprobs"] + 0.1])
    advantages = torch.stack([x["advantages"], -x["advantages"]])

    def loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
        arguments = {**x, "logprobs": logprobs, "advantages": advantages}
        return pk.pama_loss(**arguments, weights_per="batch").loss

    function: Any = {
        "loss": loss,
        "gradient": torch.func.grad(loss),
        "combine": lambda p, a: pk.combine_advantages(a, weights_per="token").advantages,
        "weights": lambda p, a: pk.pama_weights(a).weights,
        "statistics": lambda p, a: pk.objective_statistics(p, None, a).buffer,
        "gae": lambda p, a: pk.multi_objective_gae(a, a)[0],
        "normalize": lambda p, a: pk.group_normalize(a[:, 0]),
    }[what]
    wanted = torch.stack([function(p, a) for p, a in zip(logprobs, advantages, strict=True)])
    try:
        found = torch.func.vmap(function)(logprobs, advantages)
    except (NotImplementedError, RuntimeError) as error:
        said = str(error)
    else:
        assert torch.equal(found, wanted)
        return
    assert "vmap" in said or "atching rule" in said
