"""From rewards to per-objective advantages, and from those to the one that a trainer uses."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import (
    ClipRange,
    Prior,
    check_device,
    check_flag,
    check_float,
    check_mask,
    check_number,
    check_regularization,
    check_same_shape,
    check_weighting,
    check_weights,
    clip_bounds,
    prior_tensor,
    resolve_layout,
    shape_of,
)
from ._codes import BATCH, GIVEN, GRAM, SEQUENCE, TOKEN
from .backends import operators
from .backends.inputs import TokenInputs
from .statistics import ObjectiveStatistics, result_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# `combine_advantages` takes the N x N statistics along, for its logs, up to this many objectives.
PAIRS_UP_TO = 16


def weighting_code(weights_per: str, bound: str, weights: Tensor | None) -> int:
    if weights is not None:
        return GIVEN
    if weights_per == "batch":
        return GRAM if bound == "gram" else BATCH
    return SEQUENCE if weights_per == "sequence" else TOKEN


def weights_from_statistics(
    statistics: ObjectiveStatistics,
    bound: str,
    prior: Tensor,
    regularization: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Weights of the whole batch and their optimum, from merged or averaged statistics."""
    result: tuple[Tensor, Tensor] = operators.batch_weights(
        statistics.buffer, statistics.objectives, bound == "gram", prior, regularization, wide
    )
    return result


class CombinedAdvantages(NamedTuple):
    """What `combine_advantages` returns."""

    advantages: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: ObjectiveStatistics

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Named 0-d tensors for a logger, per objective and pair of objectives."""
        return result_metrics(self.statistics, self.weights, self.optimum, names)


def combine_advantages(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    weights_per: str = "batch",
    bound: str = "scores",
    noon: bool = True,
    prior: Prior = None,
    regularization: float = 0.1,
    weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: ClipRange | None = None,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> CombinedAdvantages:
    """N advantages per token (or sequence) to the one that a trainer already knows what to do with.

    The combined advantage is sum_i c_i A_i with A_i = max(A'_i, 0) (`noon`) and PAMA's weights c. With
    Noon, the trainer's own clipped loss on it is exactly the PAMA loss; so most trainers need only this.

    Args:
        advantages: raw advantages A', objectives last: (B, T, N) per token, (B, N) per sequence, or
            (M, N) flat. Any strides: an (N, B, T) array is passed as ``x.movedim(0, -1)``.
        mask: (B, T) or (M,), non-zero where a token counts. Whatever stands elsewhere has no influence.
        weights_per: whose weights: one set for the "batch", for each "sequence" or for each "token".
            "batch" is the default because it alone combines the N gradients convexly, which Pareto
            stationarity is a statement about, and because it works for every number of objectives; "token"
            with Noon and regularization 0 is better for two to four of them, but from about eight on hardly
            any token remains to learn from (docs/study.md).
        bound: "scores" (Theorem 1 on the mean of each objective's bound term), or "gram" (the min-norm
            problem on their second moments; "batch" only).
        noon: keep positive advantages only. Where False, the trainer's loss on the combination differs
            from the PAMA loss where signs disagree and clipping binds: use `pama_loss`.
        prior: N non-negative numbers, normalised: where c lies when the scores do not decide.
        regularization: pull towards the prior, relative to the scores' second moment; 0 is the paper's
            problem. 0.1 is the default because without it one objective that has nothing to tell in a batch
            takes all the weight and stops all learning, and weights per batch follow noise (docs/study.md).
        weights: given weights (N,) or (B, N), used as they are, instead of a solution.
        objective_mask: (B, N), or (M, N) when flat: zero where an objective does not apply.
        logprobs, old_logprobs, clip_range: with them the bound term is 0 where the policy has already
            moved out of the clip range; without them the ratio is 1.
        cu_seqlens: B + 1 offsets of packed sequences in flat tensors.
        process_group: solve one set of weights over all ranks of the group, by one all-reduce
            (`weights_per="batch"` only). All ranks get bitwise equal weights.

    Returns:
        `.advantages` in the dtype of the input and its shape less the last axis, 0 where masked ((B, T) or
        (M,) where weights per token depend on `logprobs`); `.weights` (N,), per sequence (B, N), per
        token their mean (N,); `.optimum`, the value of a.c or c'Mc; `.statistics`, with conflict and overlap
        for up to 16 objectives; `.metrics(names)`.

    A sequence or batch without a valid token gets the prior as weights and 0 as advantage. A NaN or
    infinity at a valid place makes the weights and advantages that depend on it NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Section 4 and Algorithm 1.
    """
    layout = resolve_layout(
        advantages,
        mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        objective_mask=objective_mask,
        cu_seqlens=cu_seqlens,
    )
    check_weighting(layout, weights_per, bound, process_group, weights)
    if old_logprobs is not None and logprobs is None:
        raise ValueError("old_logprobs: expected None without logprobs, got a tensor")
    if old_logprobs is not None and clip_range is None:
        raise ValueError("clip_range: expected a number or (low, high) with old_logprobs, got None")
    clip = list(clip_bounds((1.0, float("inf")) if clip_range is None else clip_range))
    noon = check_flag("noon", noon)
    regularization = check_regularization(regularization)
    p, uniform = prior_tensor(prior, layout.objectives, advantages.device)
    if weights is not None:
        check_weights(weights, layout, advantages.device)
    merged = None
    optimum = None
    code = weighting_code(weights_per, bound, weights)
    pairs = bound == "gram" or layout.objectives <= PAIRS_UP_TO
    if objective_mask is not None and layout.per_sequence and not layout.mask_per_sequence:
        raise ValueError(
            f"objective_mask: expected shape ({layout.rows}, {layout.objectives}) with advantages per "
            f"sequence, got {shape_of(objective_mask)}"
        )
    tokens = TokenInputs(
        *(logprobs, old_logprobs, advantages, mask, objective_mask, None, None, cu_seqlens),
        *(layout.numbers(), clip, noon),
    )
    if process_group is not None:
        sums = operators.statistics(*tokens, pairs)
        merged = ObjectiveStatistics(sums, layout.objectives, pairs).all_reduce(process_group)
        if weights is None:
            wide = advantages.dtype == torch.float64
            weights, optimum = weights_from_statistics(merged, bound, p, regularization, wide)
        code = GIVEN
    by_token = layout.per_sequence and code == TOKEN and logprobs is not None
    token_shape = list(logprobs.shape) if by_token and logprobs is not None else None
    combined, solved, value, sums = operators.combine(
        *tokens, weights, p, code, uniform, regularization, token_shape, pairs
    )
    statistics = ObjectiveStatistics(sums, layout.objectives, pairs) if merged is None else merged
    if merged is not None and optimum is None:
        optimum = _given_optimum(merged, solved)
    return CombinedAdvantages(combined, solved, value if optimum is None else optimum, statistics)


def _given_optimum(merged: ObjectiveStatistics, weights: Tensor) -> Tensor | None:
    """a.c of weights that the caller gave, on the merged scores; (B, N) weights have their own rows."""
    if weights.dim() == 2:
        return None
    return (merged.scores.to(weights.dtype) * weights).sum()


def multi_objective_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation for N value heads at once.

    Args:
        rewards, values: (B, T, N); `values` are those of the state in which the step was taken.
        mask: (B, T), non-zero where a step counts; masked steps are skipped over: the value that
            follows a step is that of the next valid one.
        gamma, lam: discount and GAE parameter, both in [0, 1].
        dones: (B, T), non-zero where the episode ends after the step; not looked at where masked.
        last_values: (B, N), the value of the state after the last valid step (0 by default, and where
            that step is done).

    Returns:
        (advantages, returns), both (B, T, N) in the promoted dtype of the inputs, 0 at masked steps;
        returns = advantages + values. Computed in float64.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16, for each objective.
    """
    check_float("rewards", rewards)
    check_float("values", values)
    if rewards.dim() != 3:
        raise ValueError(f"rewards: expected shape (B, T, N), got {shape_of(rewards)}")
    check_same_shape("values", values, "rewards", rewards)
    check_device("values", values, "rewards", rewards)
    for name, x in (("mask", mask), ("dones", dones)):
        if x is None:
            continue
        check_mask(name, x)
        check_device(name, x, "rewards", rewards)
        if x.shape != rewards.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(rewards.shape[:2])}, got {shape_of(x)}")
    if last_values is not None:
        check_float("last_values", last_values)
        check_device("last_values", last_values, "rewards", rewards)
        wanted = (rewards.shape[0], rewards.shape[2])
        if last_values.shape != wanted:
            raise ValueError(f"last_values: expected shape {wanted}, got {shape_of(last_values)}")
    gamma = check_number("gamma", gamma, 0.0, 1.0)
    lam = check_number("lam", lam, 0.0, 1.0)
    result: tuple[Tensor, Tensor] = operators.gae(rewards, values, mask, dones, last_values, gamma, lam)
    return result


def group_normalize(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Group-relative advantages (GRPO) for each objective by itself.

    Args:
        rewards: (B, N), one row per sequence; NaN where an objective does not apply.
        group_size: rows of a group, which stand together; B is a multiple of it.
        group_ids: (B,) integers instead: rows with equal ids are a group. With neither, all rows are one.
        scale: divide by the standard deviation (ddof 1) plus `eps`; else only the mean is taken off.
        eps: at least 0.

    Returns:
        (B, N) in the dtype of `rewards`. NaN rewards are left out of mean and deviation and give 0; so
        does a group of one. An infinite reward makes its group's objective NaN. Computed in float64.

    Source: Shao et al. 2024 (arXiv 2402.03300), per objective; ddof and eps as in TRL.
    """
    check_float("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape (B, N), got {shape_of(rewards)}")
    rows = rewards.shape[0]
    if group_size is not None and group_ids is not None:
        raise ValueError("group_ids: expected None with group_size, got both")
    if group_ids is not None:
        if not isinstance(group_ids, Tensor):
            raise TypeError(f"group_ids: expected a tensor, got {type(group_ids).__name__}")
        if group_ids.is_floating_point() or group_ids.is_complex():
            raise TypeError(f"group_ids: expected integers, got dtype {group_ids.dtype}")
        check_device("group_ids", group_ids, "rewards", rewards)
        if group_ids.shape != (rows,):
            raise ValueError(f"group_ids: expected shape ({rows},), got {shape_of(group_ids)}")
    if group_size is None:
        size: Any = rows
    else:
        if isinstance(group_size, bool) or not isinstance(group_size, Integral):
            raise TypeError(f"group_size: expected an integer, got {type(group_size).__name__}")
        if group_size < 1 or rows % group_size:
            raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size}")
        size = int(group_size)
    eps = check_number("eps", eps, 0.0, float("inf"))
    scale = check_flag("scale", scale)
    result: Tensor = operators.group_normalize(rewards, size, group_ids, scale, eps)
    return result
