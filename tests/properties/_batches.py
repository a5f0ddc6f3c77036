"""Batches for the tests of `PamaLoss`, and the state of a module."""

from __future__ import annotations

import torch
from torch import Tensor

import pama_kernels as pk

B, T, N = 6, 7, 3


def batch(seed: int = 0, n: int = N) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=g) - 2
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0] = True
    return {
        "logprobs": old + 0.3 * torch.randn(B, T, generator=g),
        "old_logprobs": old,
        "advantages": torch.randn(B, T, n, generator=g),
        "mask": mask,
    }


def state_of(module: pk.PamaLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name
