"""The records that the public functions pass to a backend, and their enumerations.

Fields are read by name, never by position. `csrc/core/records.hpp` mirrors them for the native backends;
`tests/test_contract.py` checks that both agree.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

# A setting that may change from step to step: a float, or a 0-d tensor. A tensor on a device is never read on
# the host.
Number = float | Tensor


class Kind(IntEnum):
    """How the objective weights of a call are computed."""

    GIVEN = 0  # the caller's, used as they are
    SOLVED = 1  # one set for the batch, solved elsewhere (all ranks, a running mean, a callable rule)
    FIXED = 2  # the preference
    SCORES = 3  # the scalar problem on the mean bound terms
    GRAM = 4  # the min-norm problem on the cosines of the bound terms
    UPGRAD = 5  # the sum of projections on the Gram matrix of the bound terms
    SOFTMIN = 6  # softmin of the advantages


class WeightsPer(IntEnum):
    BATCH = 0
    SEQUENCE = 1
    TOKEN = 2


class Aggregation(IntEnum):
    TOKEN_MEAN = 0
    SEQ_MEAN_TOKEN_SUM = 1
    SEQ_MEAN_TOKEN_MEAN = 2


# Layout of the statistics, one float64 buffer of sums over tokens: (N,) per field, the totals, then, on
# request, (N, N) per pair. Every sum is weighted by the token weights of the aggregation.
FIELDS = (
    "count",
    "bound_sum",
    "bound_square_sum",
    "logprob_sum",
    "surrogate_sum",
    "advantage_sum",
    "advantage_square_sum",
    "positive_count",
    "clipped_count",
)
TOTALS = ("token_count", "kl_sum")
PAIRS = (
    "bound_product",
    "advantage_product",
    "pair_count",
    "pair_advantage",
    "pair_advantage_square",
)


def statistics_size(objectives: int, pairs: bool) -> int:
    """Number of elements of the buffer of statistics."""
    n = objectives
    return len(FIELDS) * n + len(TOTALS) + (len(PAIRS) * n * n if pairs else 0)


class Tokens(NamedTuple):
    """The inputs of a pass over tokens. Shapes as documented in `pama_loss`."""

    advantages: Tensor
    mask: Tensor | None
    objective_mask: Tensor | None
    logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    cu_seqlens: Tensor | None
    rows: int  # sequences; 1 where tokens are flat without offsets
    width: int  # tokens of a padded row; all tokens where flat or packed; -1 where only cu_seqlens has it
    per_sequence: bool  # advantages (B, N)
    mask_per_sequence: bool  # objective_mask (B, N)
    aggregation: int  # Aggregation: it decides the token weights of the statistics
    noon: bool
    eps_low: Number
    eps_high: Number | None  # None: no upper end
    dual_clip: Number | None  # None: no dual clip

    @property
    def objectives(self) -> int:
        return self.advantages.shape[-1]

    @property
    def wide(self) -> bool:
        """Whether any input is float64; the computation is then in float64."""
        for x in (
            self.logprobs,
            self.old_logprobs,
            self.advantages,
            self.importance_weights,
            self.ref_logprobs,
        ):
            if x is not None and x.dtype is torch.float64:
                return True
        return False


class Rule(NamedTuple):
    """The rule of the weights. `number` is the regularization of SCORES and GRAM, the temperature of
    SOFTMIN."""

    kind: int  # Kind
    weights_per: int  # WeightsPer
    number: Number


class Outputs(NamedTuple):
    """The results that `apply` computes, in addition to weights, optimum and statistics."""

    advantages: bool  # the combined advantages
    loss: bool
    gradient: bool
    statistics: bool  # False: a backend may leave them out, and fill `sums` with NaN
    pairs: bool  # the pair statistics too
    normalize: bool  # divide the combined advantages by their root mean square
    normalizer: Number | None  # replaces the denominator of the loss
    kl_coef: Number


class Results(NamedTuple):
    """The results of `apply`; a result that was not requested is a tensor without elements."""

    advantages: Tensor
    loss: Tensor  # 0-d
    gradient: Tensor  # in the shape of logprobs and `gradient_dtype`
    weights: Tensor  # (N,), or (B, N) with weights per sequence or given per sequence
    optimum: Tensor  # 0-d, or (B,)
    sums: Tensor  # the statistics
    square_sum: Tensor  # 0-d float64, sum of token weight * combined advantage^2; with `advantages` only


def result_dtype(x: Tensor) -> torch.dtype:
    """Weights, optimum and loss: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gradient_dtype(logprobs: Tensor) -> torch.dtype:
    """The dtype of logprobs, except for float16, where it is wider: gradients below 6e-8 would underflow
    before a GradScaler's factor is applied, so the backward pass scales first and converts afterwards."""
    return torch.float32 if logprobs.dtype == torch.float16 else logprobs.dtype


def one_result_per_row(tokens: Tokens, rule: Rule) -> bool:
    """Whether the combined advantages are (B,), because they are equal for all tokens of a sequence."""
    solved_by_token = rule.weights_per == WeightsPer.TOKEN and rule.kind not in (Kind.GIVEN, Kind.SOLVED)
    by_token = solved_by_token and tokens.logprobs is not None
    return tokens.per_sequence and not by_token


def weights_by_row(rule: Rule, weights: Tensor | None) -> bool:
    """Whether weights and optimum are per sequence."""
    return rule.weights_per == WeightsPer.SEQUENCE if weights is None else weights.dim() == 2
