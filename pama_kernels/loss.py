"""The PAMA loss: weights, clipped surrogate and gradient in one fused pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._autograd import attached, differentiable, forward_mode, known_to_the_compiler
from ._call import Kind, Number, Outputs
from ._layout import check_tokens, check_weights
from ._solve import before_the_pass
from ._validate import (
    ClipRange,
    Preference,
    check_device,
    check_flag,
    check_float,
    check_number,
    check_positive,
    functorch_is_active,
    preference_tensor,
    traced,
)
from .advantages import check_rule_fits, merged_optimum
from .backends import arguments, operators
from .rules import Rule, RuleLike, needs_pairs, noon_of, record, resolve_rule
from .statistics import ObjectiveStatistics, result_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PamaLossOutput(NamedTuple):
    """The result of `pama_loss`; only `loss` is differentiable.

    Attributes:
        loss: 0-d, float64 for float64 `logprobs`, else float32.
        weights: (N,) per batch, (B, N) per sequence; with weights per token their mean (N,).
        optimum: a.c, or c'Cc or c'Mc for rules on pairs of objectives; 0-d, or (B,) per sequence.
        statistics: the `ObjectiveStatistics` of the batch, with the N x N ones if the rule needs them.
    """

    loss: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: ObjectiveStatistics

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Named 0-d tensors for a logger, the loss included."""
        metrics = result_metrics(self.statistics, self.weights, self.optimum, names)
        metrics["pama/loss"] = self.loss.detach()
        return metrics


def pama_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    rule: RuleLike = None,
    preference: Preference = None,
    weights: Tensor | None = None,
    clip_range: ClipRange = 0.2,
    dual_clip: Number | None = None,
    objective_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: Number | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: Number = 0.0,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    statistics: bool = True,
) -> PamaLossOutput:
    """The clipped surrogate of N objectives, weighted by a rule, with its gradient, in one fused call.

        loss    = - agg_t sum_i c_i(t) g_{i,t} + kl_coef agg_t (exp(r_t) - r_t - 1)
        g_{i,t} = w_t min(min(u_t, dual_clip) A_{i,t}, clip(u_t, 1 - eps_low, 1 + eps_high) A_{i,t})
        u_t     = exp(logprobs_t - old_logprobs_t)
        r_t     = ref_logprobs_t - logprobs_t

    A = A', or max(A', 0) if the rule has `noon=True`. The gradient flows to `logprobs` only and has their
    dtype; the weights c are constants. Both log ratios are clamped to [-20, 20]; where the clamp binds there
    is no gradient.

    Args:
        logprobs: (B, T) or (M,). One action per sequence with a sequence-level ratio (GSPO, RLOO) is (M,).
        old_logprobs: (B, T) or (M,), of the policy that sampled the batch; None: on-policy (ratio 1).
        advantages: raw advantages A', objectives last: (B, T, N), (B, N) or (M, N).
        mask: (B, T) or (M,), non-zero at valid tokens; None: all are valid. Masked values are ignored,
            including NaN.
        rule: as in `combine_advantages`.
        preference: as in `combine_advantages`.
        weights: as in `combine_advantages`.
        clip_range: eps, or (eps_low, eps_high), with eps_low in [0, 1] and eps_high in [0, inf].
        dual_clip: caps the ratio where the advantage is negative; above 1 + eps_high. None: no cap.
        objective_mask: as in `combine_advantages`.
        importance_weights: (B, T) or (M,), factors w_t >= 0, for example corrections for a rollout engine
            with other probabilities. None: 1.
        aggregation: agg: "token-mean" divides the sum over tokens by the number of valid tokens;
            "seq-mean-token-sum" and "seq-mean-token-mean" average the sums or means of the sequences, empty
            sequences included.
        normalizer: replaces the denominator of `aggregation`; a positive number, or a 0-d tensor.
        ref_logprobs: (B, T) or (M,), of the reference policy.
        kl_coef: coefficient of the k3 estimate of KL to the reference policy; at least 0.
        cu_seqlens: as in `combine_advantages`.
        process_group: as in `combine_advantages`; the loss keeps its local denominator.
        statistics: False leaves the statistics out where the weights do not need them. With given weights and
            advantages per token, this is about twice as fast on a CPU. What is left out is NaN.

    `clip_range`, `dual_clip`, `normalizer`, `kl_coef` and a rule's number may be 0-d tensors if they change
    from step to step: torch.compile then keeps one graph.

    Returns:
        A `PamaLossOutput`. Without a valid token, loss and gradient are 0.

    A NaN or infinity at a valid token (in `advantages`, where the objective is present) makes the loss NaN,
    without an error. The gradient is NaN at that token, and at the tokens whose weights depend on it: with
    weights per batch at all valid tokens, with weights per sequence in that sequence. No other token is
    affected beyond rounding. `ref_logprobs` are used only with a `kl_coef`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Sections 4 and 5; k3: Schulman 2020.
    """
    if logprobs is None:
        check_float("logprobs", logprobs)
    if torch.compiler.is_compiling() and functorch_is_active():
        logprobs = known_to_the_compiler(logprobs)
    rule = resolve_rule(rule)
    if (
        preference is weights is dual_clip is objective_mask is importance_weights is normalizer is None
        and ref_logprobs is cu_seqlens is None
        and process_group is None
        and aggregation == "token-mean"
        and type(kl_coef) is type(clip_range) is float
        and kl_coef == 0.0
    ):
        quick = _quick(logprobs, old_logprobs, advantages, mask, rule, clip_range, statistics)
        if quick is not None:
            return quick
    kl_coef = check_number("kl_coef", kl_coef, 0.0)
    penalty = isinstance(kl_coef, Tensor) or kl_coef != 0
    if penalty and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef={kl_coef}, got None")
    tokens, layout = check_tokens(
        advantages,
        mask,
        objective_mask=objective_mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        cu_seqlens=cu_seqlens,
        clip_range=clip_range,
        dual_clip=dual_clip,
        aggregation=aggregation,
        noon=noon_of(rule),
    )
    statistics = check_flag("statistics", statistics)
    if ref_logprobs is not None and not penalty:
        tokens = tokens._replace(ref_logprobs=None)
    asked = record(rule)
    check_rule_fits(asked, layout, process_group, weights)
    p = preference_tensor(preference, layout.objectives, logprobs.device)
    if weights is not None:
        check_weights(weights, layout, logprobs.device)
    pairs = weights is None and needs_pairs(rule)
    asked, given, p, merged, solved = before_the_pass(tokens, rule, asked, p, weights, process_group, pairs)
    differentiated = logprobs.requires_grad and torch.is_grad_enabled()
    outputs = Outputs(
        advantages=False,
        loss=True,
        gradient=differentiated or forward_mode(),
        statistics=statistics and merged is None,
        pairs=pairs and merged is None,
        normalize=False,
        normalizer=None if normalizer is None else _normalizer(normalizer, logprobs),
        kl_coef=kl_coef,
    )
    call = differentiable if outputs.gradient else operators.apply
    result = call(tokens, asked, arguments.Apply(p, given), outputs)
    found = merged or ObjectiveStatistics(result.sums, layout.objectives, pairs)
    optimum = result.optimum
    if merged is not None and result.weights.dim() == 1:
        optimum = merged_optimum(merged, solved, result.weights)
    return PamaLossOutput(result.loss, result.weights, optimum, found)


_OUTPUTS = {
    (gradient, statistics, pairs): Outputs(False, True, gradient, statistics, pairs, False, None, 0.0)
    for gradient, statistics, pairs in itertools.product((False, True), repeat=3)
}


def _quick(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    rule: Rule,
    clip_range: float,
    statistics: bool,
) -> PamaLossOutput | None:
    """The loss of plain tensors on the CPU by one native call, which checks them too: in a small batch, the
    checks in Python take longer than the computation. None for anything else, also for invalid arguments."""
    asked = record(rule)
    if (
        traced()
        or forward_mode()
        or type(logprobs) is not Tensor
        or type(advantages) is not Tensor
        or not logprobs.is_cpu
        or type(statistics) is not bool
        or type(asked.number) is not float
        or asked.kind == Kind.SOLVED
    ):
        return None
    pairs, gradient = needs_pairs(rule), logprobs.requires_grad and torch.is_grad_enabled()
    outputs, tensors = _OUTPUTS[gradient, statistics, pairs], (logprobs, old_logprobs, advantages, mask)
    results = operators.quick_loss(tensors, asked, clip_range, noon_of(rule), outputs)
    if results is None:
        return None
    loss = attached(logprobs, results) if gradient else results.loss
    found = ObjectiveStatistics(results.sums, advantages.shape[-1], pairs)
    return PamaLossOutput(loss, results.weights, results.optimum, found)


def _normalizer(normalizer: object, logprobs: Tensor) -> Number:
    if not isinstance(normalizer, Tensor):
        return check_positive("normalizer", normalizer)
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, "logprobs", logprobs)
    return check_number("normalizer", normalizer, 0.0)  # 0 if a rank has no valid token
