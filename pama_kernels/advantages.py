"""Computes per-objective advantages from rewards, and combines them into the single advantage that a
trainer uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _call
from ._call import Number, Outputs, WeightsPer
from ._layout import Layout, check_tokens, check_weights
from ._solve import Solved, before_the_pass
from ._validate import (
    INTEGERS,
    ClipRange,
    Preference,
    check_device,
    check_flag,
    check_float,
    check_float_like,
    check_group_size,
    check_mask_like,
    check_memory,
    check_number,
    check_process_group,
    check_shape,
    check_tensor,
    preference_tensor,
    shape_of,
)
from .backends import arguments, operators
from .backends.normalize import divided, root_mean_square
from .rules import RuleLike, needs_pairs, noon_of, record, resolve_rule
from .statistics import ObjectiveStatistics, result_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# `combine_advantages` computes the N x N statistics, for its metrics, up to this number of objectives.
PAIRS_UP_TO = 16


class CombinedAdvantages(NamedTuple):
    """The result of `combine_advantages`.

    Attributes:
        advantages: the combined advantage, in the dtype of the input and its shape without the last axis:
            (B, T), (B,) or (M,); 0 where masked.
        weights: (N,) per batch, (B, N) per sequence; with weights per token their mean (N,).
        optimum: a.c, or c'Cc or c'Mc for rules on pairs of objectives; 0-d, or (B,) per sequence.
        statistics: the `ObjectiveStatistics` of the batch, with the N x N ones for up to 16 objectives.
    """

    advantages: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: ObjectiveStatistics

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Named 0-d tensors for a logger, per objective and pair of objectives."""
        return result_metrics(self.statistics, self.weights, self.optimum, names)


def check_rule_fits(asked: _call.Rule, layout: Layout, process_group: object, weights: Tensor | None) -> None:
    per = asked.weights_per
    check_process_group(process_group, batch=per == WeightsPer.BATCH)
    if per == WeightsPer.SEQUENCE and not layout.sequences and weights is None:
        raise ValueError("rule: weights per sequence need cu_seqlens where tensors are flat, got none")


def combine_advantages(
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    rule: RuleLike = None,
    preference: Preference = None,
    weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: ClipRange | None = None,
    aggregation: str = "token-mean",
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> CombinedAdvantages:
    """Combines N advantages per token (or sequence) into the single advantage that a trainer takes.

    The combined advantage is sum_i c_i A_i with the rule's weights c. An objective whose raw advantages are
    all 0 in the batch (a saturated or constant reward) gets no weight from rules with weights per batch.
    Whiten or group-normalise advantages first: differences of scale that remain act as preferences.

    Args:
        advantages: raw advantages A', objectives last: (B, T, N) per token, (B, N) per sequence, or (M, N)
            flat. Any strides: an (N, B, T) array is passed as ``x.movedim(0, -1)``. With advantages per
            sequence, the cost per token does not depend on N.
        mask: (B, T) or (M,), non-zero at valid tokens; None: all are valid. Masked values are ignored,
            including NaN.
        rule: how the weights are chosen: `Pama`, `UPGrad`, `Fixed`, `SoftMin`, their names in lower case, or
            a function of `ObjectiveStatistics` that returns weights (N,). None: `UPGrad()`.
        preference: p in the formulas of the rules: N non-negative numbers, normalised; with "fixed" they are
            the weights. None: uniform.
        weights: given weights (N,) or (B, N), used unchanged instead of the rule's.
        objective_mask: (B, N), or (M, N) where flat: zero where an objective does not apply. A token's
            weights are divided by the sum of the preferences of the objectives present there, so that a
            completion to which one objective applies keeps its whole advantage. None: all apply.
        logprobs: (B, T) or (M,), of the current policy. With log-probabilities, the bound term is 0 where the
            policy has already left the clip range; without them the ratio is 1.
        old_logprobs: (B, T) or (M,), of the policy that sampled the batch. The log ratio is clamped to
            [-20, 20].
        clip_range: eps, or (eps_low, eps_high), of the loss that follows; required with `old_logprobs`.
        aggregation: of the loss that follows: "token-mean", "seq-mean-token-sum" or "seq-mean-token-mean".
            The last one weights every token in the statistics by one over the valid tokens of its sequence.
        normalize: divide the result by its root mean square over the batch, as GDPO does.
        cu_seqlens: (B + 1,) int32 or int64, the offsets of packed sequences in flat tensors. Where B = M,
            tensors of either size are read as per sequence.
        process_group: solve one set of weights over all ranks of the group, by one all-reduce (rules per
            batch only). All ranks get bitwise equal weights. `normalize` needs a second all-reduce if the
            rule has `noon=True` or an `objective_mask` is given: on all ranks or on none.

    Returns:
        A `CombinedAdvantages`. Its `.advantages` replace the trainer's own. With advantages (B, N) they are
        (B,), except where weights per token depend on `logprobs`: then they are (B, T), or (M,) if packed.

    A sequence or batch without a valid token gets the preference as weights and 0 as advantage. A NaN or
    infinity at a valid token makes the weights and advantages that depend on it NaN, without an error, since
    a check would have to wait for the device: with weights per batch this is the whole batch. Where an
    objective has no value (a reward function returned None), set its `objective_mask` to 0.

    With `noon=True`, the trainer's own clipped loss on the result is exactly the PAMA loss. Otherwise the two
    differ only at tokens where objectives have advantages of different sign and clipping is active, so not in
    the first optimisation step on a rollout. `pama_loss` is exact in all cases.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Section 4 and Algorithm 1.
    """
    rule = resolve_rule(rule)
    tokens, layout = check_tokens(
        advantages,
        mask,
        objective_mask=objective_mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        cu_seqlens=cu_seqlens,
        clip_range=clip_range,
        aggregation=aggregation,
        noon=noon_of(rule),
    )
    asked = record(rule)
    check_rule_fits(asked, layout, process_group, weights)
    normalize = check_flag("normalize", normalize)
    if objective_mask is not None and layout.per_sequence and not layout.mask_per_sequence:
        raise ValueError(
            f"objective_mask: expected shape ({layout.rows}, {layout.objectives}) with advantages per "
            f"sequence, got {shape_of(objective_mask)}"
        )
    p = preference_tensor(preference, layout.objectives, advantages.device)
    pairs = (weights is None and needs_pairs(rule)) or layout.objectives <= PAIRS_UP_TO
    if weights is not None:
        check_weights(weights, layout, advantages.device)
    asked, given, p, merged, solved = before_the_pass(tokens, rule, asked, p, weights, process_group, pairs)
    separately = normalize and merged is not None  # the root mean square is over all ranks
    if normalize and advantages.dtype in (torch.float16, torch.bfloat16):
        check_memory("advantages", advantages)
        if separately:
            tokens = tokens._replace(advantages=advantages.float())  # rounded once, after the division
    outputs = Outputs(
        advantages=True,
        loss=False,
        gradient=False,
        statistics=merged is None,
        pairs=pairs and merged is None,
        normalize=normalize and not separately,
        normalizer=None,
        kl_coef=0.0,
    )
    result = operators.apply(tokens, asked, arguments.Apply(p, given), outputs)
    statistics = merged or ObjectiveStatistics(result.sums, layout.objectives, pairs)
    combined = result.advantages
    if separately:
        local = tokens.noon or objective_mask is not None
        square = _merged_square(statistics, solved, local, result.square_sum, process_group)
        root = root_mean_square(square, statistics.buffer, layout.objectives, result.weights)
        combined = divided(combined, root, advantages.dtype)
    optimum = result.optimum
    if merged is not None and result.weights.dim() == 1:
        optimum = merged_optimum(merged, solved, result.weights)
    return CombinedAdvantages(combined, result.weights, optimum, statistics)


def merged_optimum(merged: ObjectiveStatistics, solved: Solved | None, weights: Tensor) -> Tensor:
    """The solver's optimum, or a.c for given weights and the merged scores."""
    value = (merged.scores * weights).sum() if solved is None else solved.optimum
    return value.to(weights.dtype)


def _merged_square(
    statistics: ObjectiveStatistics,
    solved: Solved | None,
    local: bool,
    square: Tensor,
    group: ProcessGroup | None,
) -> Tensor:
    """The sum of squares of the combined advantages over all ranks: c'Mc on the merged raw advantages if that
    is equal to it, else by a separate collective."""
    if group is None:
        return square
    gram = statistics.advantage_gram
    if gram is not None and solved is not None and not local:
        return (solved.weights @ gram @ solved.weights).clamp(min=0) * statistics.token_count
    square = square.clone()
    torch.distributed.all_reduce(square, group=group)
    return square


def multi_objective_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation for N value heads at once.

    Args:
        rewards: (B, T, N).
        values: (B, T, N), of the state in which the action was taken.
        mask: (B, T), non-zero where a step counts; masked steps are skipped: the next value of a step is that
            of the next valid step.
        gamma: discount factor in [0, 1].
        lam: GAE's lambda in [0, 1].
        dones: (B, T), non-zero where the episode ends after the step in a terminal state, whose value is 0;
            ignored where masked.
        truncated: (B, T), non-zero where the episode is cut off after the step: the value of the state that
            was reached is used, but the advantages of the next episode are not. A step that is both done and
            truncated counts as done.
        last_values: (B, N), the value of the state after the last valid step (0 by default, and where
            that step is done or truncated).
        final_values: (B, T, N), the value of the state after the step where it is truncated; ignored
            elsewhere. Needed with `truncated`.

    Returns:
        (advantages, returns), both (B, T, N) in the promoted dtype of the inputs, 0 at masked steps;
        returns = advantages + values. Computed in float64.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16, for each objective.
    """
    check_float("rewards", rewards)
    if rewards.dim() != 3:
        raise ValueError(f"rewards: expected shape (B, T, N), got {shape_of(rewards)}")
    rows, width, n = rewards.shape
    check_float_like("values", values, "rewards", rewards, rewards.shape)
    for name, x in (("mask", mask), ("dones", dones), ("truncated", truncated)):
        if x is not None:
            check_mask_like(name, x, "rewards", rewards, (rows, width))
    if last_values is not None:
        check_float_like("last_values", last_values, "rewards", rewards, (rows, n))
    if (truncated is None) != (final_values is None):
        raise ValueError(
            "final_values: expected a tensor with truncated, and None without, got "
            f"{'None' if final_values is None else 'a tensor'}"
        )
    if final_values is not None:
        check_float_like("final_values", final_values, "rewards", rewards, rewards.shape)
    gamma = check_number("gamma", gamma, 0.0, 1.0)
    lam = check_number("lam", lam, 0.0, 1.0)
    return operators.gae(
        arguments.Gae(rewards, values, mask, dones, truncated, last_values, final_values, gamma, lam)
    )


def group_normalize(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Group-relative advantages (GRPO), computed separately for each objective.

    Args:
        rewards: (B, N), one row per sequence; NaN where an objective does not apply.
        group_size: number of rows per group; the rows of a group are adjacent, and B is a multiple of it.
            With neither `group_size` nor `group_ids`, all rows form one group.
        group_ids: (B,) integers, instead of `group_size`: rows with equal ids form a group.
        scale: divide by the standard deviation (ddof 1) plus `eps`; otherwise only the mean is subtracted.
        eps: at least 0; added to the standard deviation.

    Returns:
        (B, N) in the dtype of `rewards`. NaN rewards are ignored in mean and deviation and give 0. A group of
        one row, and a group whose rewards are equal up to rounding (eight units in the last place), gives
        exactly 0. An infinite reward makes the objective NaN in its group. Computed in float64.

    Source: Shao et al. 2024 (arXiv 2402.03300), per objective; ddof and eps as in TRL.
    """
    check_float("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape (B, N), got {shape_of(rewards)}")
    rows = rewards.shape[0]
    if group_size is not None and group_ids is not None:
        raise ValueError("group_ids: expected None with group_size, got both")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, INTEGERS, "one-dimensional integer")
        check_memory("group_ids", group_ids)
        check_device("group_ids", group_ids, "rewards", rewards)
        check_shape("group_ids", group_ids, (rows,))
    size = rows
    if group_size is not None:
        check_group_size(group_size)
        if rows % group_size:
            raise ValueError(f"group_size: expected a positive divisor of the {rows} rows, got {group_size}")
        size = int(group_size)
    number = check_number("eps", eps, 0.0)  # a tensor is not accepted, since its value would have to be read
    if isinstance(number, Tensor):
        raise TypeError("eps: expected a number, got Tensor")
    scale = check_flag("scale", scale)
    return operators.group_normalize(arguments.GroupNormalize(rewards, size, group_ids, scale, number))
