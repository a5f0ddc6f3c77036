"""A batch, and its loss and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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


def make_batch(dtype: torch.dtype = torch.float32) -> Batch:
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


def loss_of(x: Batch, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the leaf that it is a function of."""
    leaf = x["logprobs"].detach().clone().requires_grad_()
    return pk.pama_loss(**{**x, "logprobs": leaf}, **settings).loss, leaf


def gradient_of(x: Batch, **settings: Any) -> Tensor:
    return torch.autograd.grad(*loss_of(x, **settings))[0]


def reference_gradient_of(x: Batch, **settings: Any) -> Tensor:
    leaf = x["logprobs"].detach().double().requires_grad_()
    return torch.autograd.grad(pk.reference.pama_loss(**{**x, "logprobs": leaf}, **settings).loss, leaf)[0]


def assert_close(gradient: Tensor, wanted: Tensor) -> None:
    """Float32: a few roundings per element, and as many of the largest one where terms cancel."""
    few = 32 * 2**-24
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * few, atol=few * wanted.abs().max().item())
