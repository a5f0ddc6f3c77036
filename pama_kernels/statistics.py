"""Per-objective statistics of a batch: sums over valid tokens that micro-batches and ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._call import FIELDS, PAIRS, TOTALS, Number
from ._layout import check_tokens
from ._validate import ClipRange, check_flag
from .backends import arguments, operators

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


class ObjectiveStatistics:
    """Sums over valid tokens in one float64 buffer, and quantities derived from them.

    Every sum is weighted by the token weights of the aggregation: 1, or one over the valid tokens of the
    sequence under "seq-mean-token-mean". ``s1 + s2`` merges two micro-batches, ``all_reduce`` merges ranks
    with one collective. Every property is a float64 tensor on the device of the inputs; reading one computes
    it and never synchronises.

    Attributes:
        buffer: all sums, one float64 tensor.
        objectives: N.
        has_pairs: whether the buffer has the N x N sums.
    """

    __slots__ = ("buffer", "has_pairs", "objectives")

    def __init__(self, buffer: Tensor, objectives: int, has_pairs: bool) -> None:
        self.buffer = buffer
        self.objectives = objectives
        self.has_pairs = has_pairs

    def __repr__(self) -> str:
        return f"ObjectiveStatistics(objectives={self.objectives}, has_pairs={self.has_pairs})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectiveStatistics, (self.buffer, self.objectives, self.has_pairs)

    # --- merging -------------------------------------------------------------------------------------

    def __add__(self, other: ObjectiveStatistics) -> ObjectiveStatistics:
        if not isinstance(other, ObjectiveStatistics):
            return NotImplemented
        if (self.objectives, self.has_pairs) != (other.objectives, other.has_pairs):
            raise ValueError(f"statistics: expected {self!r} on both sides of +, got {other!r}")
        return ObjectiveStatistics(self.buffer + other.buffer, self.objectives, self.has_pairs)

    def __radd__(self, other: int) -> ObjectiveStatistics:
        """Supports ``sum(parts)``."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, process_group: ProcessGroup | None = None) -> ObjectiveStatistics:
        """The sums over all ranks of the group (None: the default one), by one all-reduce.

        All ranks must hold statistics of the same objectives. The result is bitwise equal on all.
        """
        buffer = self.buffer.clone()
        torch.distributed.all_reduce(buffer, group=process_group)
        return ObjectiveStatistics(buffer, self.objectives, self.has_pairs)

    # --- sums ----------------------------------------------------------------------------------------

    def _field(self, name: str) -> Tensor:
        start = FIELDS.index(name) * self.objectives
        return self.buffer[start : start + self.objectives]

    def _pair(self, name: str) -> Tensor | None:
        if not self.has_pairs:
            return None
        n = self.objectives
        start = len(FIELDS) * n + len(TOTALS) + PAIRS.index(name) * n * n
        return self.buffer[start : start + n * n].view(n, n)

    @property
    def count(self) -> Tensor:
        """Sum of the token weights over the valid tokens where the objective is present (N,)."""
        return self._field("count")

    @property
    def token_count(self) -> Tensor:
        """Sum of the token weights over the valid tokens, 0-d."""
        return self.buffer[len(FIELDS) * self.objectives]

    @property
    def logprob_sum(self) -> Tensor:
        """Sum of I * logp, the log-probabilities weighted by the bound terms (N,)."""
        return self._field("logprob_sum")

    @property
    def surrogate_sum(self) -> Tensor:
        """Sum of the clipped surrogate terms g (N,)."""
        return self._field("surrogate_sum")

    @property
    def signal(self) -> Tensor:
        """Whether a raw advantage is not 0 at some valid token (N,): a constant reward has no signal."""
        return (self._field("positive_count") > 0) | (self._field("advantage_sum") != 0)

    # --- means ---------------------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:
        """Mean of the bound term I over the tokens where the objective is present (N,)."""
        return _ratio(self._field("bound_sum"), self.count)

    @property
    def second_moments(self) -> Tensor:
        """Mean of I^2 (N,); the largest is the scale of the regularization."""
        return _ratio(self._field("bound_square_sum"), self.count)

    @property
    def advantage_mean(self) -> Tensor:
        """Mean of the raw advantages A' (N,)."""
        return _ratio(self._field("advantage_sum"), self.count)

    @property
    def advantage_std(self) -> Tensor:
        """Standard deviation (ddof 0) of the raw advantages (N,)."""
        square = _ratio(self._field("advantage_square_sum"), self.count)
        return (square - self.advantage_mean.square()).clamp(min=0).sqrt()

    @property
    def positive_fraction(self) -> Tensor:
        """Share of the tokens where A' > 0 (N,)."""
        return _ratio(self._field("positive_count"), self.count)

    @property
    def clip_fraction(self) -> Tensor:
        """Share of the tokens whose advantage is not 0 but whose gradient is clipped away (N,)."""
        return _ratio(self._field("clipped_count"), self.count)

    @property
    def approx_kl(self) -> Tensor:
        """Mean over valid tokens of u - 1 - log u, the k3 estimate of KL to the behaviour policy, 0-d."""
        return _ratio(self.buffer[len(FIELDS) * self.objectives + 1], self.token_count)

    # --- pairs (with pairs=True) ---------------------------------------------------------------------

    @property
    def gram(self) -> Tensor | None:
        """M_ij = sum I_i I_j / sqrt(count_i count_j) (N, N): the mean of I_i I_j if all objectives are
        present at every token."""
        product = self._pair("bound_product")
        if product is None:
            return None
        root = self.count.sqrt()
        return _ratio(product, torch.outer(root, root))

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the objectives' bound terms I (N, N); 0 where one of them vanishes."""
        product = self._pair("bound_product")
        if product is None:
            return None
        norm = product.diagonal().sqrt()
        cosines = _ratio(product, torch.outer(norm, norm))
        own = torch.eye(self.objectives, dtype=torch.bool, device=cosines.device)
        return torch.where(own & (cosines > 0), 1.0, cosines)  # exactly 1, without rounding errors

    @property
    def advantage_gram(self) -> Tensor | None:
        """sum A'_i A'_j / sqrt(count_i count_j) (N, N) of the raw advantages: c'Mc is the mean square of the
        combined advantage without Noon, if every objective is present at every token."""
        product = self._pair("advantage_product")
        if product is None:
            return None
        root = self.count.sqrt()
        return _ratio(product, torch.outer(root, root))

    @property
    def covariance(self) -> Tensor | None:
        """Covariances of the raw advantages A' over the tokens where both are present (N, N).

        (covariance @ c)_j < 0: to first order, a step on the combination with weights c makes objective j
        worse. Computed from raw moments, see `conflict`.
        """
        moments = self._moments()
        return None if moments is None else moments[0]

    @property
    def conflict(self) -> Tensor | None:
        """Correlations of the raw advantages A' over the tokens where both are present (N, N).

        Computed from advantages before the Noon clamp, which would hide conflicts: -1 if two objectives
        always disagree. Computed from raw moments: with float32 inputs, precision is lost if a mean exceeds
        1,000 times its standard deviation.
        """
        moments = self._moments()
        if moments is None:
            return None
        covariance, variance = moments
        return _ratio(covariance, variance.sqrt() * variance.T.sqrt()).clamp(-1, 1)

    def _moments(self) -> tuple[Tensor, Tensor] | None:
        """Covariances, and the variances of i over the tokens where both i and j are present (N, N)."""
        product, counts = self._pair("advantage_product"), self._pair("pair_count")
        sums, squares = self._pair("pair_advantage"), self._pair("pair_advantage_square")
        if product is None or counts is None or sums is None or squares is None:
            return None
        mean = _ratio(sums, counts)
        second = _ratio(squares, counts)
        variance = second - mean.square()
        variance = torch.where(variance <= 4e-7 * second, 0.0, variance)  # float32 rounding of a constant
        return _ratio(product, counts) - mean * mean.T, variance

    # --- logging -------------------------------------------------------------------------------------

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Named 0-d tensors for a logger: ``pama/score/helpful``, ``pama/conflict/helpful~short`` ...

        `names`: one per objective, "0", "1", ... by default. No device synchronisation.
        """
        labels = objective_names(names, self.objectives)
        metrics = {"pama/approx_kl": self.approx_kl, "pama/tokens": self.token_count}
        for what, values in (
            ("score", self.scores),
            ("advantage_mean", self.advantage_mean),
            ("advantage_std", self.advantage_std),
            ("positive_fraction", self.positive_fraction),
            ("clip_fraction", self.clip_fraction),
        ):
            for label, value in zip(labels, values.unbind(), strict=True):
                metrics[f"pama/{what}/{label}"] = value
        for what, matrix in (("conflict", self.conflict), ("cosine", self.cosines)):
            if matrix is None:
                continue
            for i, first in enumerate(labels):
                for j in range(i + 1, len(labels)):
                    metrics[f"pama/{what}/{first}~{labels[j]}"] = matrix[i, j]
        return metrics


def objective_names(names: Sequence[str] | None, objectives: int) -> list[str]:
    if names is None:
        return [str(i) for i in range(objectives)]
    if isinstance(names, str) or len(names) != objectives or len(set(names)) != objectives:
        raise ValueError(f"names: expected {objectives} different names, got {names!r}")
    return [str(name) for name in names]


def result_metrics(
    statistics: ObjectiveStatistics, weights: Tensor, optimum: Tensor, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """The statistics' metrics with the weights (their mean where there is one row per sequence)."""
    labels = objective_names(names, statistics.objectives)
    metrics = statistics.metrics(labels)
    mean = weights.mean(0) if weights.dim() == 2 else weights
    metrics["pama/optimum"] = optimum.mean() if optimum.dim() else optimum
    for label, value in zip(labels, mean.unbind(), strict=True):
        metrics[f"pama/weight/{label}"] = value
        metrics[f"pama/active/{label}"] = (value > 0).to(value.dtype)
    return metrics


def objective_statistics(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_range: ClipRange = 0.2,
    noon: bool = False,
    dual_clip: Number | None = None,
    objective_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    pairs: bool = False,
) -> ObjectiveStatistics:
    """The sums over tokens from which weights, loss and metrics are computed, in one fused pass.

    Args:
        logprobs: (B, T) or (M,), of the current policy; None: the ratio is 1.
        old_logprobs: (B, T) or (M,), of the policy that sampled the batch; None: on-policy (ratio 1).
        advantages: raw advantages A', objectives last: (B, T, N), (B, N) or (M, N).
        mask: (B, T) or (M,), non-zero at valid tokens; masked values are ignored, including NaN.
        clip_range: eps, or (eps_low, eps_high), of the PPO surrogate.
        noon: keep positive advantages only, A = max(A', 0).
        dual_clip: upper limit of the ratio where the advantage is negative; above 1 + eps_high.
        objective_mask: (B, N), or (M, N) where flat: zero where an objective does not apply.
        importance_weights: (B, T) or (M,), non-negative factors w of every token.
        aggregation: as in `pama_loss`; "seq-mean-token-mean" weights each token by one over the valid tokens
            of its sequence.
        cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences in flat tensors. Where B = M,
            tensors of either size are read as per sequence.
        pairs: also the N x N sums behind `.gram`, `.cosines`, `.conflict` and `.covariance`.

    Returns:
        An `ObjectiveStatistics`.

    Sums run in float32 over at most 256 tokens and in float64 across them (float64 throughout when an
    input is float64): the relative error of a sum of positive terms stays below 2e-5 and is typically
    1e-7. A NaN or infinity at a valid token makes every sum that depends on it NaN; it is counted neither as
    positive nor as clipped. Beyond a log ratio of 20 the ratio is clamped and has no gradient, so the bound
    term is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Section 4: I(A) and the Noon PPO surrogate.
    """
    pairs = check_flag("pairs", pairs)
    tokens, layout = check_tokens(
        advantages,
        mask,
        objective_mask=objective_mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        importance_weights=importance_weights,
        cu_seqlens=cu_seqlens,
        clip_range=clip_range,
        dual_clip=dual_clip,
        aggregation=aggregation,
        noon=noon,
    )
    sums = operators.statistics(tokens, arguments.Statistics(pairs))
    return ObjectiveStatistics(sums, layout.objectives, pairs)
