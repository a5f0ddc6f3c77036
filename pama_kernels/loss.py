"""The PAMA loss: weights, clipped surrogate and gradient in one fused pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ._call import Number, Outputs, Results, Rule, Tokens, WeightsPer, statistics_size
from ._solve import AveragedRule, before_the_pass
from ._validate import (
    AGGREGATIONS,
    ClipRange,
    Preference,
    check_choice,
    check_device,
    check_float,
    check_number,
    check_positive,
    check_preference_type,
    check_process_group,
    check_tokens,
    check_weights,
    clip_bounds,
    preference_tensor,
    traced,
)
from .advantages import check_rule_fits, merged_optimum
from .backends import operators
from .rules import RuleLike, needs_pairs, noon_of, record, resolve_rule
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


# --- autograd -----------------------------------------------------------------------------------------


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient through, and raises an error if it is differentiated again, since it would wrongly be
    treated as a constant."""

    @staticmethod
    def forward(gradient: Tensor, logprobs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "pama_loss: the second derivative is not implemented (it cannot be backwarded twice)"
        )


_LOGPROBS, _GRADIENT = Tokens._fields.index("logprobs"), Results._fields.index("gradient")


class _Loss(torch.autograd.Function):
    """The forward pass computes the gradient too; the backward pass scales it."""

    @staticmethod
    def forward(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        arguments = (*rest[:_LOGPROBS], logprobs, *rest[_LOGPROBS:])
        result: tuple[Tensor, ...] = operators.apply.operator(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        results = Results(*output)
        ctx.save_for_backward(results.gradient, inputs[0])
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*(x for x in output if x is not results.loss))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = Results(*grads).loss  # type: ignore[arg-type]
        return _scaled(ctx, grad_loss), *([None] * (ctx.arguments - 1))


class _Attached(torch.autograd.Function):
    """`_Loss` for eager mode: attaches a gradient to finished results, at a tenth of the cost.

    Most of the cost of `_Loss` is the binding of its many arguments, which `setup_context` causes.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, results: Results) -> Tensor:
        ctx.save_for_backward(results.gradient, logprobs)
        ctx.set_materialize_grads(False)
        return results.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
        return _scaled(ctx, grad_loss), None


def _scaled(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    gradient, logprobs = ctx.saved_tensors
    if grad_loss is None:
        return None
    if torch.is_grad_enabled():  # create_graph=True
        return _first_derivative((gradient * grad_loss).to(logprobs.dtype), logprobs)
    scaled: Tensor
    if _is_last_use(grad_loss):
        unchanged = gradient.is_cpu and grad_loss.item() == 1.0
        scaled = gradient if unchanged else gradient.mul_(grad_loss)
    else:
        scaled = gradient * grad_loss
    return scaled if scaled.dtype is logprobs.dtype else scaled.to(logprobs.dtype)


def _is_last_use(grad_loss: Tensor) -> bool:
    """Whether the saved gradient may be overwritten: there is no second backward pass, and no tracing
    or transform."""
    return not (
        traced()
        or torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )


_first_derivative: Callable[..., Tensor] = _FirstDerivative.apply
_attached: Callable[..., Tensor] = _Attached.apply


def _differentiable(tokens: Tokens, rule: Rule, problem: operators.Apply, outputs: Outputs) -> Results:
    logprobs = tokens.logprobs
    assert logprobs is not None
    if type(logprobs) is not Tensor or traced() or _forward_mode():
        arguments = operators.flat(tokens._replace(logprobs=None), rule, problem, outputs)
        del arguments[_LOGPROBS]
        if torch.compiler.is_compiling():  # the compiler rejects a tensor that is used in two places
            arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        return Results(*_Loss.apply(logprobs, *arguments))  # type: ignore[no-untyped-call]
    detached: Any = (*tokens[:_LOGPROBS], logprobs.detach(), *tokens[_LOGPROBS + 1 :])
    results = operators.apply(Tokens(*detached), rule, problem, outputs)
    return Results(results.advantages, _attached(logprobs, results), *results[_GRADIENT:])


def _forward_mode() -> bool:
    """Whether forward-mode differentiation is active, for which `_Loss` raises an error."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


# --- the public function ------------------------------------------------------------------------------


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

    `clip_range`, `dual_clip`, `normalizer`, `kl_coef` and a rule's number may be 0-d tensors if they change
    from step to step: torch.compile then keeps one graph.

    Returns:
        A `PamaLossOutput`. Without a valid token, loss and gradient are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Sections 4 and 5; k3: Schulman 2020.
    """
    if logprobs is None:
        check_float("logprobs", logprobs)
    rule = resolve_rule(rule)
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
    if ref_logprobs is not None and not penalty:
        tokens = tokens._replace(ref_logprobs=None)
    check_rule_fits(rule, layout, process_group, weights)
    p = preference_tensor(preference, layout.objectives, logprobs.device)
    if weights is not None:
        check_weights(weights, layout, logprobs.device)
    pairs = weights is None and needs_pairs(rule)
    asked, given, p, merged, solved = before_the_pass(tokens, rule, p, weights, process_group, pairs)
    differentiated = logprobs.requires_grad and torch.is_grad_enabled()
    outputs = Outputs(
        advantages=False,
        loss=True,
        gradient=differentiated or _forward_mode(),
        pairs=pairs and merged is None,
        normalize=False,
        normalizer=None if normalizer is None else _normalizer(normalizer, logprobs),
        kl_coef=kl_coef,
    )
    call = _differentiable if outputs.gradient else operators.apply
    result = call(tokens, asked, operators.Apply(p, given), outputs)
    statistics = merged or ObjectiveStatistics(result.sums, layout.objectives, pairs)
    optimum = result.optimum
    if merged is not None and result.weights.dim() == 1:
        optimum = merged_optimum(merged, solved, result.weights)
    return PamaLossOutput(result.loss, result.weights, optimum, statistics)


def _normalizer(normalizer: object, logprobs: Tensor) -> Number:
    if not isinstance(normalizer, Tensor):
        return check_positive("normalizer", normalizer)
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, "logprobs", logprobs)
    return check_number("normalizer", normalizer, 0.0)  # 0 if a rank has no valid token


# --- the module ---------------------------------------------------------------------------------------


class PamaLoss(nn.Module):
    """`pama_loss` with stored settings and, optionally, weights from a running mean of the statistics.

    Args:
        rule: as in `pama_loss`.
        preference: as in `pama_loss`.
        clip_range: as in `pama_loss`.
        dual_clip: as in `pama_loss`.
        aggregation: as in `pama_loss`.
        kl_coef: as in `pama_loss`.
        momentum: 0 solves each batch separately. In (0, 1), with a rule per batch, the weights come from a
            bias-corrected running mean of the statistics of all batches so far: m <- momentum m + (1 -
            momentum) s. Weights that are solved on single noisy batches need not converge; weights from a
            running mean do (CR-MOGM, Zhou et al. 2022).
        objectives: N. The running mean then exists from the start, so that a copy made before the first batch
            (an averaged model) has it too. Not needed if `preference` is given.
        process_group: as in `pama_loss`.

    The running mean is updated in training mode only, never by a batch with a NaN or infinity, and is part of
    `state_dict()` once N is known.
    """

    running_statistics: Tensor | None
    batches: Tensor | None

    def __init__(
        self,
        *,
        rule: RuleLike = None,
        preference: Preference = None,
        clip_range: ClipRange = 0.2,
        dual_clip: Number | None = None,
        aggregation: str = "token-mean",
        kl_coef: Number = 0.0,
        momentum: float = 0.0,
        objectives: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.rule = resolve_rule(rule)
        try:
            number = check_number("momentum", momentum, 0.0, 1.0)
        except ValueError:
            number = 1.0
        if isinstance(number, Tensor) or number == 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        self.momentum = number
        batch = record(self.rule).weights_per == WeightsPer.BATCH
        if self.momentum and not batch:
            raise ValueError(f"momentum: needs a rule with one set of weights for the batch, got {self.rule}")
        clip_bounds(clip_range, dual_clip)
        check_process_group(process_group, batch=batch)
        if objectives is not None:
            if isinstance(objectives, bool) or not isinstance(objectives, Integral):
                raise TypeError(f"objectives: expected an integer, got {type(objectives).__name__}")
            if objectives < 1:
                raise ValueError(f"objectives: expected at least 1, got {objectives}")
        if preference is not None:
            device = preference.device if isinstance(preference, Tensor) else torch.device("cpu")
            if not isinstance(preference, Tensor):
                check_preference_type(preference)
            scalar = isinstance(preference, Tensor) and preference.dim() == 0
            objectives = int(objectives or (1 if scalar else len(preference)))
            preference_tensor(preference, objectives, device)
        self.objectives = objectives
        self.preference, self.clip_range, self.dual_clip = preference, clip_range, dual_clip
        self.aggregation, self.kl_coef = aggregation, check_number("kl_coef", kl_coef, 0.0)
        self.process_group = process_group
        check_choice("aggregation", aggregation, AGGREGATIONS)
        known = self.momentum > 0 and objectives is not None
        empty = statistics_size(objectives or 0, needs_pairs(self.rule)) if known else None
        self.register_buffer("running_statistics", None if empty is None else _zeros(empty))
        self.register_buffer("batches", None if empty is None else _zeros(()))

    def extra_repr(self) -> str:
        shown = "rule", "preference", "clip_range", "dual_clip", "aggregation", "kl_coef", "momentum"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        objective_mask: Tensor | None = None,
        importance_weights: Tensor | None = None,
        normalizer: Number | None = None,
        ref_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PamaLossOutput:
        """`pama_loss` of the arguments with the stored settings; with momentum its `statistics` are those of
        the batch."""
        rule = self.rule
        if self.momentum and weights is None:
            rule = AveragedRule(rule, self.update)
        return pama_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            rule=rule,
            preference=self.preference,
            weights=weights,
            clip_range=self.clip_range,
            dual_clip=self.dual_clip,
            objective_mask=objective_mask,
            importance_weights=importance_weights,
            aggregation=self.aggregation,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            kl_coef=self.kl_coef,
            cu_seqlens=cu_seqlens,
            process_group=self.process_group,
        )

    def update(self, statistics: ObjectiveStatistics) -> ObjectiveStatistics:
        """Adds a batch to the running mean (in training mode) and returns the bias-corrected mean."""
        batch = statistics.buffer
        if self.running_statistics is None or self.batches is None:
            self.running_statistics, self.batches = torch.zeros_like(batch), batch.new_zeros(())
        running = self.running_statistics.to(batch.device)
        batches = self.batches.to(batch.device)
        if running.shape != batch.shape:
            raise ValueError(
                "advantages: expected the objectives of the running mean's batches "
                f"({running.numel()} statistics), got {batch.numel()} statistics of {statistics!r}"
            )
        if self.training:
            usable = torch.isfinite(batch).all()
            blended = self.momentum * running + (1 - self.momentum) * batch
            running = torch.where(usable, blended, running)
            batches = batches + usable
            self.running_statistics, self.batches = running, batches
        correction = 1 - self.momentum**batches
        mean = torch.where(batches > 0, running / correction, batch)
        return ObjectiveStatistics(mean, statistics.objectives, statistics.has_pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PamaLoss:
        """The copy uses the same process group, which cannot be copied."""
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PamaLoss:
        """Statistics follow the module to another device but stay float64: counts don't fit a half type."""
        kept = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, x in kept.items():
            moved = self._buffers[name]
            setattr(self, name, x if moved is None else x.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Creates the buffers from a checkpoint, since they otherwise exist only after the first batch."""
        names = ("running_statistics", "batches") if self.momentum else ()
        for name in names:
            saved, kept = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (kept is None or kept.shape == saved.shape or self.objectives is None):
                setattr(self, name, saved.detach().clone())
            elif saved is None and self.objectives is None:
                setattr(self, name, None)
            elif saved is None:  # saved before its first batch
                state_dict[prefix + name] = torch.zeros_like(kept)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _zeros(shape: int | tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
