"""Values of extreme size: what is scale-free, what is finite, and what the outcome is beyond the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import FLOATS, ON_TRITON
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Pama, SoftMin, reference

SCALE_FREE: tuple[Any, ...] = (pk.Pama(), pk.UPGrad(), Pama(bound="scores"), Pama.paper("token"))
# Powers of two that advantages of size 1 may be multiplied by: squares of float64 are then exact.
POWERS = {
    torch.float32: (-120, 120),
    torch.bfloat16: (-120, 120),
    torch.float16: (-10, 10),
    torch.float64: (-480, 480),
}


def _advantages(per_sequence: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (6, 3) if per_sequence else (6, 5, 3)
    values = torch.randint(-16, 17, shape, generator=generator) / 8  # exact in every dtype
    return values.to(dtype), torch.rand(6, 5, generator=generator) < 0.8


@pytest.mark.portable
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_and_normalized_advantages_do_not_depend_on_the_scale(
    dtype: torch.dtype, per_sequence: bool
) -> None:
    advantages, mask = _advantages(per_sequence, dtype)
    for rule in SCALE_FREE:
        wanted = pk.combine_advantages(advantages, mask, rule=rule, normalize=True)
        for power in POWERS[dtype]:
            scaled = (advantages.double() * 2.0**power).to(dtype)
            found = pk.combine_advantages(scaled, mask, rule=rule, normalize=True)
            eps = torch.finfo(wanted.weights.dtype).eps
            torch.testing.assert_close(found.weights, wanted.weights, rtol=0, atol=64 * eps)
            error = 64 * eps + 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found.advantages, wanted.advantages, rtol=error, atol=error)


@pytest.mark.portable
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
def test_beyond_the_scales_of_float64(per_sequence: bool) -> None:
    """Squares that overflow: NaN where a rule or `normalize` needs them. Squares that underflow: scores are
    regularized by their own size, cosines count as absent, and nothing is divided by them."""
    advantages, mask = _advantages(per_sequence, torch.float64)
    large, small = advantages * 2.0**540, advantages * 2.0**-560
    for combine in (pk.combine_advantages, reference.combine_advantages):
        for rule in (pk.Pama(), pk.UPGrad(), Pama(bound="scores")):
            assert combine(large, mask, rule=rule).weights.isnan().all()
        for rule in (pk.Fixed(), Pama.paper("token"), SoftMin(1e160)):
            assert combine(large, mask, rule=rule).advantages.isfinite().all()
        assert combine(large, mask, rule="fixed", normalize=True).advantages.isnan().any()
        for rule in (pk.Pama(), pk.UPGrad()):
            found = combine(small, mask, rule=rule, preference=[1, 1, 2])
            torch.testing.assert_close(found.weights, torch.tensor([0.25, 0.25, 0.5]).double())
        for rule in (pk.Fixed(), Pama.paper("token")):
            found = combine(small, mask, rule=rule, normalize=True)
            torch.testing.assert_close(found.advantages, combine(small, mask, rule=rule).advantages)
    for rule in (Pama(bound="scores"), Pama("sequence")):
        found = pk.combine_advantages(small, mask, rule=rule)
        wanted = reference.combine_advantages(small, mask, rule=rule)
        assert found.weights.isfinite().all()
        torch.testing.assert_close(found.weights, wanted.weights, rtol=0, atol=1e-9)


@pytest.mark.portable
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
def test_denormal_advantages_are_not_divided(per_sequence: bool) -> None:
    """float32 advantages of 1e-45 were divided by a root mean square that had become 0."""
    advantages, mask = _advantages(per_sequence, torch.float32)
    tiny = advantages * 2.0**-149
    for rule in (pk.Pama(), pk.Fixed(), Pama.paper("token"), SoftMin()):
        found = pk.combine_advantages(tiny, mask, rule=rule, normalize=True).advantages
        assert (found.abs() <= tiny.abs().max()).all()


@pytest.mark.portable
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("size", [1e-39, 1e-42, 1e-44])
def test_denormal_advantages_are_combined_to_multiples_of_the_least_number(
    size: float, per_sequence: bool
) -> None:
    """float32 is absolute there: each product c_i A_i per token is rounded by half of 2^-149, and so is the
    result of the specification; per sequence, in float64, only the result is. Nothing is flushed to 0."""
    advantages, mask = _advantages(per_sequence, torch.float32)
    tiny, least = advantages * size, 2.0**-149
    for rule in (pk.Fixed(), pk.Pama(), pk.UPGrad(), Pama(bound="scores")):
        found = pk.combine_advantages(tiny, mask, rule=rule, preference=[0.2, 0.3, 0.5])
        wanted = reference.combine_advantages(tiny, mask, rule=rule, preference=[0.2, 0.3, 0.5])
        torch.testing.assert_close(found.weights.double(), wanted.weights, rtol=0, atol=1e-6)
        halves = 1 if per_sequence else 3  # roundings
        # the weights are rounded too: 6e-8, and to 1e-6 of the solvers
        error = halves * 0.5 * least + 2e-6 * float(tiny.abs().max())
        difference = (found.advantages.double() - wanted.advantages).abs().max()
        assert float(difference) <= error
        assert (found.advantages != 0)[wanted.advantages.abs() > (halves + 1) * 0.5 * least].all()


@pytest.mark.cpu
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("rule", [None, "fixed", Pama("token"), "softmin"], ids=str)
def test_a_loss_beyond_float32(rule: Any, per_sequence: bool) -> None:
    """Terms beyond 3e38 of both signs: the loss is what float64 gives, infinite where that is too large."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3) if per_sequence else (4, 9, 3)
    signs = torch.randn(shape, generator=generator).sign()
    logprobs = torch.randn(4, 9, generator=generator)
    old = logprobs - 0.15
    for size, factor in ((3e38, 1.0), (3e38, 1e3), (1e20, 1e20), (-1e30, 1e30)):
        importance = torch.full((4, 9), factor)
        arguments = {"rule": rule, "importance_weights": importance, "aggregation": "seq-mean-token-sum"}
        for advantages in (size * signs, torch.full(shape, size)):
            found = pk.pama_loss(logprobs, old, advantages, **arguments)
            wanted = reference.pama_loss(logprobs, old, advantages, **arguments).loss.float()
            assert not found.loss.isnan()
            torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e33)
    bad = signs.clone()
    bad.flatten()[0] = math.inf
    assert pk.pama_loss(logprobs, old, bad, rule=rule).loss.isnan()


_NEVER = (1.0, math.inf)  # no clipping
# (size of the advantages, log ratio, importance weight, normalizer, kl_coef): each gradient is within
# float32, while a product that leads to it is not.
_GRADIENTS = {
    "advantage times ratio": (1e38, 3.0, None, None, 0.0),
    "advantage times importance weight": (1e38, -15.0, 1e6, None, 0.0),
    "small normalizer": (1e-30, 0.0, None, 1e-39, 0.0),
    "large normalizer": (1e30, 0.0, None, 1e40, 0.0),
    "KL coefficient": (1.0, 0.5, None, 1e38, 1e38),
    "denormal advantage": (1e-42, 15.0, None, None, 0.0),
}


@pytest.mark.portable
@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "no statistics"])
@pytest.mark.parametrize("noon", [False, True], ids=["signed", "noon"])
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("case", _GRADIENTS)
def test_a_gradient_within_float32(case: str, per_sequence: bool, noon: bool, statistics: bool) -> None:
    size, log_ratio, importance, normalizer, kl_coef = _GRADIENTS[case]
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2) if per_sequence else (4, 300, 2)
    advantages = torch.randn(shape, generator=generator).sign() * size
    logprobs = torch.full((4, 300), -1.0)
    # Triton's weights of a batch are NaN where a bound term overflows (test_triton_kernels.py)
    overflows = ON_TRITON and importance is not None and not per_sequence
    for weights in (None, torch.tensor([0.5, 0.5]))[overflows:]:
        arguments: dict[str, Any] = {
            "rule": Pama(noon=noon), "weights": weights, "clip_range": _NEVER, "normalizer": normalizer
        }  # fmt: skip
        if importance is not None:
            arguments["importance_weights"] = torch.full((4, 300), importance)
        if kl_coef:
            arguments |= {"ref_logprobs": logprobs - 0.5, "kl_coef": kl_coef}
        given, exact = logprobs.clone().requires_grad_(), logprobs.double().requires_grad_()
        pk.pama_loss(
            given, logprobs - log_ratio, advantages, statistics=statistics, **arguments
        ).loss.backward()
        reference.pama_loss(exact, logprobs - log_ratio, advantages, **arguments).loss.backward()
        assert given.grad is not None
        assert exact.grad is not None
        wanted = exact.grad.float()
        assert wanted.isfinite().all()
        error = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(given.grad, wanted, rtol=0, atol=error)


@pytest.mark.cpu
def test_given_weights_whose_combined_advantage_is_beyond_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.full((4, 300), -1.0)
    for shape in ((4, 2), (4, 300, 2)):
        advantages = torch.rand(shape, generator=generator) * 1e38 + 2e38
        given, exact = logprobs.clone().requires_grad_(), logprobs.double().requires_grad_()
        for loss, x in ((pk.pama_loss, given), (reference.pama_loss, exact)):
            loss(x, logprobs, advantages, weights=torch.tensor([2.0, 3.0])).loss.backward()
        assert given.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(given.grad, exact.grad.float(), rtol=1e-5, atol=0)
