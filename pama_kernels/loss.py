"""The PAMA loss: weights, clipped surrogate and gradient in one fused pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._call import Number, Outputs, Results, Rule, Tokens
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


class _SecondDerivative(torch.autograd.Function):
    """A 0 that raises an error if it is differentiated with respect to logprobs."""

    generate_vmap_rule = True  # torch.func.jacrev

    @staticmethod
    def forward(logprobs: Tensor) -> Tensor:
        return logprobs.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "pama_loss: the second derivative is not implemented (it cannot be backwarded twice)"
        )


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient through. It depends on logprobs by `second`, the result of `_SecondDerivative`, since
    it would otherwise be treated as a constant. Autograd does not evaluate that for the derivative with
    respect to a factor of the loss, which exists."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, second: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0].new_zeros(())


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


_NO_FORWARD_MODE = (
    "pama_loss: forward-mode differentiation (jvp, jacfwd, dual numbers) is not implemented; "
    "use reverse mode (backward, torch.func.grad, jacrev)"
)


class _Transformed(_Loss):
    """`_Loss` with errors for transforms without a rule; torch.compile rejects a class that has a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise NotImplementedError(
            "pama_loss: torch.vmap over a differentiated loss is not implemented; differentiate one at a time"
        )


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
        return _first_derivative((gradient * grad_loss).to(logprobs.dtype), _second_derivative(logprobs))
    scaled: Tensor
    # The saved gradient may be overwritten where no second backward pass, tracing or transform follows.
    if not (traced() or _keeps_graph() or _is_legacy_batched(grad_loss)):
        unchanged = gradient.is_cpu and grad_loss.item() == 1.0
        scaled = gradient if unchanged else gradient.mul_(grad_loss)
    else:
        scaled = gradient * grad_loss
    return scaled if scaled.dtype is logprobs.dtype else scaled.to(logprobs.dtype)


_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # is_grads_batched=True
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


_first_derivative: Callable[..., Tensor] = _FirstDerivative.apply
_second_derivative: Callable[..., Tensor] = _SecondDerivative.apply
# Function.apply looks for functorch transforms first; none is active where this is called.
_attached: Callable[..., Tensor] = super(torch.autograd.Function, _Attached).apply


def _differentiable(tokens: Tokens, rule: Rule, problem: arguments.Apply, outputs: Outputs) -> Results:
    logprobs = tokens.logprobs
    assert logprobs is not None
    if type(logprobs) is not Tensor or traced() or _forward_mode():
        rest = arguments.flat(tokens._replace(logprobs=None), rule, problem, outputs)
        del rest[_LOGPROBS]
        if torch.compiler.is_compiling():  # the compiler rejects a tensor that is used in two places
            rest = [x.detach() if isinstance(x, Tensor) else x for x in rest]
            return Results(*_Loss.apply(logprobs, *rest))  # type: ignore[no-untyped-call]
        return Results(*_Transformed.apply(logprobs, *rest))  # type: ignore[no-untyped-call]
    results = operators.apply(tokens, rule, problem, outputs)
    return Results(results.advantages, _attached(logprobs, results), *results[_GRADIENT:])


def _known_to_the_compiler(logprobs: Tensor) -> Tensor:
    """A view of logprobs: of results, but not of arguments, the compiler knows which are differentiated."""
    logprobs, forward = logprobs.view_as(logprobs), torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(logprobs).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(_NO_FORWARD_MODE)
    return logprobs


def _forward_mode() -> bool:
    """Whether forward-mode differentiation is active, for which `_Transformed` raises an error."""
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
    affected. `ref_logprobs` are used only with a `kl_coef`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Sections 4 and 5; k3: Schulman 2020.
    """
    if logprobs is None:
        check_float("logprobs", logprobs)
    if torch.compiler.is_compiling() and functorch_is_active():
        logprobs = _known_to_the_compiler(logprobs)
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
        gradient=differentiated or _forward_mode(),
        statistics=statistics and merged is None,
        pairs=pairs and merged is None,
        normalize=False,
        normalizer=None if normalizer is None else _normalizer(normalizer, logprobs),
        kl_coef=kl_coef,
    )
    call = _differentiable if outputs.gradient else operators.apply
    result = call(tokens, asked, arguments.Apply(p, given), outputs)
    found = merged or ObjectiveStatistics(result.sums, layout.objectives, pairs)
    optimum = result.optimum
    if merged is not None and result.weights.dim() == 1:
        optimum = merged_optimum(merged, solved, result.weights)
    return PamaLossOutput(result.loss, result.weights, optimum, found)


def _normalizer(normalizer: object, logprobs: Tensor) -> Number:
    if not isinstance(normalizer, Tensor):
        return check_positive("normalizer", normalizer)
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, "logprobs", logprobs)
    return check_number("normalizer", normalizer, 0.0)  # 0 if a rank has no valid token
