"""`combine` and `loss` with weights of the batch: the first pass in CUDA C++, the second one by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pama_kernels._codes import BATCH, GRAM
from pama_kernels.backends.triton import passes

from .statistics import statistics_weights


def combine(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, prior, layout, clip, noon, weights_per, _, regularization, _, pairs = rest
    tensors = logprobs, old_logprobs, advantages, mask, objective_mask
    first = None
    if weights_per in (BATCH, GRAM):
        wide = advantages.dtype == torch.float64
        first = statistics_weights(
            *(*tensors, None, cu_seqlens, layout, clip, noon),
            *(pairs or weights_per == GRAM, weights_per == GRAM, prior, regularization, wide),
        )
    return passes.combine(*tensors, cu_seqlens, *rest, first=first)


def loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    importance_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, prior, layout, clip, noon, weights_per, _, regularization, aggregation, *_ = rest
    tensors = logprobs, old_logprobs, advantages, mask, objective_mask, importance_weights
    first = None
    row_mean = aggregation == passes.SEQUENCE_MEAN_TOKEN_MEAN
    if weights_per == GRAM or (weights_per == BATCH and not row_mean):  # Triton counts the rows on its way
        gram, wide = weights_per == GRAM, logprobs.dtype == torch.float64
        first = statistics_weights(
            *(*tensors, cu_seqlens, layout, clip, noon), *(gram, gram, prior, regularization, wide)
        )
    return passes.loss(*tensors, ref_logprobs, cu_seqlens, *rest, first=first)
