"""Batches of tokens: the cases that are timed, and pools of their inputs larger than the last-level cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

POOL_BYTES = 512e6  # at most; twice the last-level cache where that is less
SEQUENCE, PADDED, PACKED = "per sequence", "padded", "packed"  # advantages (B, N), (B, T, N), (M, N)


@dataclass(frozen=True)
class Case:
    tokens: int
    n: int
    layout: str = PADDED
    dtype: torch.dtype = torch.float32
    threads: int = 1
    width: int = 1024

    @property
    def name(self) -> str:
        threads = f", {self.threads} threads" * (self.threads > 1)
        return f"{self.layout}, {str(self.dtype).removeprefix('torch.')}{threads}"


@dataclass
class Batch:
    """The tensors of one call."""

    logprobs: Tensor  # requires a gradient
    old: Tensor
    advantages: Tensor
    single: Tensor  # the advantages of one objective
    mask: Tensor
    cu_seqlens: Tensor | None

    @property
    def per_sequence(self) -> bool:
        return self.advantages.dim() == self.logprobs.dim() == 2

    @property
    def objectives(self) -> Tensor:
        """The advantages in the shape that eager code broadcasts."""
        return self.advantages.unsqueeze(1) if self.per_sequence else self.advantages

    @property
    def one(self) -> Tensor:
        """The same for one objective."""
        return self.single.unsqueeze(1) if self.per_sequence else self.single

    @property
    def bytes(self) -> int:
        listed = (self.logprobs, self.old, self.advantages, self.mask, self.cu_seqlens)
        return sum(x.numel() * x.element_size() for x in listed if x is not None)

    @property
    def gradient_bytes(self) -> int:
        return self.logprobs.numel() * self.logprobs.element_size()

    def integer_mask(self) -> Batch:
        fresh = copy.copy(self)
        fresh.mask = self.mask.long()
        return fresh

    def clone(self) -> Batch:
        fresh = copy.copy(self)
        for name in ("old", "advantages", "single", "mask"):
            setattr(fresh, name, getattr(self, name).clone())
        fresh.logprobs = self.logprobs.detach().clone().requires_grad_()
        return fresh


def batch(case: Case) -> Batch:
    g = torch.Generator().manual_seed(case.tokens + case.n)
    width = min(case.width, case.tokens)
    rows = case.tokens // width
    old = torch.randn(rows, width, generator=g) - 2
    logprobs = old + 0.15 * torch.randn(rows, width, generator=g)
    shape = (rows, case.n) if case.layout == SEQUENCE else (rows, width, case.n)
    # Of different scales, so that rounding does not decide which score is the smallest.
    advantages = torch.randn(shape, generator=g) * (1 + 0.5 * torch.arange(case.n))
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=g)
    mask = torch.arange(width) < lengths.unsqueeze(1)
    single = torch.randn(shape[:-1], generator=g)
    cu_seqlens = None
    if case.layout == PACKED:
        old, logprobs, mask, single = (x.flatten() for x in (old, logprobs, mask, single))
        advantages = advantages.flatten(0, 1)
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * width
        mask = torch.ones_like(mask)
    old, logprobs, advantages, single = (x.to(case.dtype) for x in (old, logprobs, advantages, single))
    return Batch(logprobs.requires_grad_(), old, advantages, single, mask, cu_seqlens)


def copies(size: int) -> int:
    """The number of inputs of that size that exceeds the last-level cache."""
    return min(int(min(POOL_BYTES, 2 * last_level_cache()) / size), 2000) + 1


def pool(case: Case) -> list[Batch]:
    first = batch(case)
    return [first, *(first.clone() for _ in range(copies(first.bytes) - 1))]


def last_level_cache() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (ValueError, OSError):
        return 1 << 25
