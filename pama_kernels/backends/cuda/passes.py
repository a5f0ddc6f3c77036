"""`combine` and `loss` with weights of the batch: the first pass in CUDA C++, the second one by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pama_kernels._codes import BATCH, GRAM
from pama_kernels.backends.inputs import TokenInputs
from pama_kernels.backends.triton import passes

from .statistics import statistics_weights


def combine(
    given: TokenInputs,
    weights: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    token_shape: Sequence[int] | None,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = None
    if weights_per in (BATCH, GRAM):
        gram, wide = weights_per == GRAM, given.advantages.dtype == torch.float64
        first = statistics_weights(given, pairs or gram, gram, prior, regularization, wide)
    rest = weights, prior, weights_per, uniform, regularization, token_shape, pairs
    return passes.combine(given, *rest, first=first)


def loss(
    given: TokenInputs,
    weights: Tensor | None,
    normalizer: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    aggregation: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert given.logprobs is not None
    first = None
    row_mean = aggregation == passes.SEQUENCE_MEAN_TOKEN_MEAN
    if weights_per == GRAM or (weights_per == BATCH and not row_mean):  # Triton counts the rows on its way
        gram, wide = weights_per == GRAM, given.logprobs.dtype == torch.float64
        first = statistics_weights(given, gram, gram, prior, regularization, wide)
    rule = weights, normalizer, prior, weights_per, uniform, regularization, aggregation
    return passes.loss(given, *rule, *rest, first=first)
