"""What the passes over tokens read: the first arguments of their operators, and of every backend as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenInputs(NamedTuple):
    """Shapes as `pama_loss` documents them; `layout` as `_arguments.Layout.numbers` gives it."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    objective_mask: Tensor | None
    importance_weights: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    layout: Sequence[int]
    clip: Sequence[float]
    noon: bool

    @property
    def objectives(self) -> int:
        return self.advantages.shape[-1]

    @property
    def wide(self) -> bool:
        """Whether something is float64, so that all is computed in it."""
        floats = self.logprobs, self.old_logprobs, self.advantages, self.importance_weights, self.ref_logprobs
        return any(x is not None and x.dtype == torch.float64 for x in floats)


# The same as an operator's schema has it.
SCHEMA = (
    "Tensor? logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, Tensor? objective_mask, "
    "Tensor? importance_weights, Tensor? ref_logprobs, Tensor? cu_seqlens, SymInt[] layout, float[] clip, "
    "bool noon"
)
COUNT = len(TokenInputs._fields)
