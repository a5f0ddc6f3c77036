"""The PAMA loss: weights, clipped surrogate and gradient in one fused pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ._arguments import (
    AGGREGATIONS,
    FLOATS,
    ClipRange,
    Prior,
    check_choice,
    check_device,
    check_flag,
    check_float,
    check_number,
    check_prior_type,
    check_process_group,
    check_regularization,
    check_rule,
    check_weighting,
    check_weights,
    clip_bounds,
    prior_tensor,
    resolve_layout,
    traced,
)
from .advantages import weighting_code, weights_from_statistics
from .backends import operators
from .backends.inputs import TokenInputs
from .statistics import ObjectiveStatistics, objective_statistics, result_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NO_NORMALIZER = float("-inf")


class PamaLossOutput(NamedTuple):
    """What `pama_loss` returns; only `loss` is differentiable."""

    loss: Tensor
    weights: Tensor
    optimum: Tensor
    statistics: ObjectiveStatistics

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Named 0-d tensors for a logger, the loss included."""
        metrics = result_metrics(self.statistics, self.weights, self.optimum, names)
        metrics["pama/loss"] = self.loss.detach()
        return metrics


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient on; to differentiate it again is an error, where it would pass for a constant."""

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


class _Loss(torch.autograd.Function):
    """The forward pass computes the gradient too; the backward pass scales it."""

    @staticmethod
    def forward(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = operators.loss(logprobs, *arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[1], inputs[0])
        ctx.arguments = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, grad_loss), *([None] * (ctx.arguments - 1))


class _Attached(torch.autograd.Function):
    """`_Loss` for eager mode: puts a gradient on results that are there, for a tenth of the cost.

    Most of `_Loss` is the binding of its many arguments, which `setup_context` brings along.
    """

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, results: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(results[1], logprobs)
        ctx.set_materialize_grads(False)
        return results[0]

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
        unchanged = gradient.device.type == "cpu" and grad_loss.item() == 1.0
        scaled = gradient if unchanged else gradient.mul_(grad_loss)
    else:
        scaled = gradient * grad_loss
    return scaled.to(logprobs.dtype)


def _is_last_use(grad_loss: Tensor) -> bool:
    """Whether the saved gradient may be given away: no second backward pass, and no recorder or transform."""
    return not (
        traced()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )


_first_derivative: Callable[..., Tensor] = _FirstDerivative.apply
_attached: Callable[..., Tensor] = _Attached.apply


def _differentiable_loss(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...]
    if (
        type(logprobs) is not Tensor
        or traced()
        or _forward_mode()
        or torch._C._are_functorch_transforms_active()
    ):
        results = _Loss.apply(logprobs, *arguments)  # type: ignore[no-untyped-call]
        return results
    results = operators.loss(logprobs.detach(), *arguments)
    return _attached(logprobs, results), *results[1:]


def _forward_mode() -> bool:
    """Within forward-mode differentiation, which `_Loss` refuses in so many words."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def pama_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    weights_per: str = "batch",
    bound: str = "scores",
    clip_range: ClipRange = 0.2,
    noon: bool = True,
    dual_clip: float | None = None,
    prior: Prior = None,
    regularization: float = 0.1,
    weights: Tensor | None = None,
    objective_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> PamaLossOutput:
    """The clipped surrogate of N objectives under PAMA's weights, with its gradient, in one pass.

    loss = - agg_t sum_i c_i(t) g_{i,t} + kl_coef * agg_t (e^{r_t} - r_t - 1),  r = ref_logprobs - logprobs,
    g_{i,t} = w_t min(min(u_t, dual_clip) A_{i,t}, clip(u_t, 1 - eps_low, 1 + eps_high) A_{i,t}),
    u_t = exp(logprobs_t - old_logprobs_t), A = max(A', 0) with `noon`. The weights c are constants of the
    gradient, which flows to `logprobs` only.

    Args:
        logprobs: (B, T) or (M,). One action per sequence with a sequence-level ratio (GSPO, RLOO) is (M,).
        old_logprobs: of the behaviour policy, the same shape; None means on-policy (ratio 1).
        advantages: raw advantages A', objectives last: (B, T, N), (B, N) or (M, N).
        mask: (B, T) or (M,), non-zero where a token counts.
        weights_per, bound, prior, regularization, weights, objective_mask, cu_seqlens: as in
            `combine_advantages`.
        clip_range: eps, or (eps_low, eps_high), with eps_low in [0, 1] and eps_high in [0, inf].
        noon: keep positive advantages only.
        dual_clip: caps the ratio where the advantage is negative; above 1 + eps_high.
        importance_weights: factors w_t >= 0 (corrections for a rollout engine that differs).
        aggregation: "token-mean" divides by the valid tokens; "seq-mean-token-sum" and
            "seq-mean-token-mean" by the sequences, empty ones included.
        normalizer: a number or 0-d tensor that replaces this denominator.
        ref_logprobs, kl_coef: the k3 estimate of KL to a reference policy, added to the loss.
        process_group: as in `combine_advantages`; the loss keeps its local denominator.

    Returns:
        `.loss`, 0-d float32 (float64 for float64 logprobs); `.weights`, `.optimum`, `.statistics` and
        `.metrics(names)` as `combine_advantages` has them. No valid token: loss and gradient are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Sections 4 and 5; k3: Schulman 2020.
    """
    check_float("logprobs", logprobs)
    layout = resolve_layout(
        advantages,
        mask,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        objective_mask=objective_mask,
        cu_seqlens=cu_seqlens,
    )
    check_weighting(layout, weights_per, bound, process_group, weights)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if aggregation != "token-mean" and not layout.sequences:
        raise ValueError(f"aggregation: {aggregation!r} needs cu_seqlens where tensors are flat, got none")
    clip = list(clip_bounds(clip_range, dual_clip))
    noon = check_flag("noon", noon)
    regularization = check_regularization(regularization)
    kl_coef = check_number("kl_coef", kl_coef, 0.0, float("inf"))
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef={kl_coef:g}, got None")
    fixed, normalizer_tensor = _normalizer(normalizer, logprobs)
    p, uniform = prior_tensor(prior, layout.objectives, logprobs.device)
    if weights is not None:
        check_weights(weights, layout, logprobs.device)
    tokens = TokenInputs(
        *(logprobs, old_logprobs, advantages, mask, objective_mask, importance_weights),
        *(ref_logprobs if kl_coef else None, cu_seqlens, layout.numbers(), clip, noon),
    )
    statistics = optimum = None
    if process_group is not None:
        sums = operators.statistics(*tokens, bound == "gram")
        statistics = ObjectiveStatistics(sums, layout.objectives, bound == "gram").all_reduce(process_group)
        if weights is None:
            wide = logprobs.dtype == torch.float64
            weights, optimum = weights_from_statistics(statistics, bound, p, regularization, wide)
    arguments: tuple[Any, ...] = (
        *tokens[1:],
        weights,
        normalizer_tensor,
        p,
        weighting_code(weights_per, bound, weights),
        uniform,
        regularization,
        AGGREGATIONS.index(aggregation),
        fixed,
        kl_coef,
    )
    if torch.compiler.is_compiling():  # the compiler refuses one tensor in two places
        arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    differentiated = logprobs.requires_grad and torch.is_grad_enabled()
    if differentiated or _forward_mode():
        value, _, solved, local_optimum, sums = _differentiable_loss(logprobs, *arguments, True)
    else:
        value, _, solved, local_optimum, sums = operators.loss(logprobs, *arguments, False)
    if statistics is None:
        has_gram = weights is None and bound == "gram"
        statistics = ObjectiveStatistics(sums, layout.objectives, has_gram)
    elif optimum is None and solved.dim() == 1:
        optimum = (statistics.scores.to(solved.dtype) * solved).sum()
    return PamaLossOutput(value, solved, local_optimum if optimum is None else optimum, statistics)


def _normalizer(normalizer: Any, logprobs: Tensor) -> tuple[float, Tensor | None]:
    if normalizer is None:
        return _NO_NORMALIZER, None
    if not isinstance(normalizer, Tensor):
        positive = check_number("normalizer", normalizer, 0.0, float("inf"), inclusive=False)
        return positive, None
    if normalizer.dim() != 0:
        raise ValueError(
            f"normalizer: expected a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
        )
    if normalizer.dtype not in (*FLOATS, torch.int32, torch.int64):
        raise TypeError(f"normalizer: expected a real number, got dtype {normalizer.dtype}")
    check_device("normalizer", normalizer, "logprobs", logprobs)
    return _NO_NORMALIZER, normalizer.detach().double()


class PamaLoss(nn.Module):
    """`pama_loss` with its settings held, and weights from a running mean of the statistics on request.

    Args:
        weights_per, bound, clip_range, noon, dual_clip, prior, regularization, aggregation, kl_coef,
            process_group: as in `pama_loss`.
        momentum: 0 solves each batch by itself. In (0, 1), with ``weights_per="batch"``, the weights come
            from a bias-corrected running mean of the statistics of all batches so far:
            m <- momentum m + (1 - momentum) s. Batch weights that follow one noisy batch need not
            converge; their running mean does (CR-MOGM, Zhou et al. 2022).

    The running mean is updated in training mode only, never by a batch with a NaN or infinity in it, and
    is part of `state_dict()` once there has been a first batch.

    ``forward(logprobs, old_logprobs, advantages, mask=None, *, weights=None, objective_mask=None,
    importance_weights=None, normalizer=None, ref_logprobs=None, cu_seqlens=None)`` returns a
    `PamaLossOutput`; with momentum its `statistics` are those of the batch.
    """

    running_statistics: Tensor | None
    batches: Tensor | None

    def __init__(
        self,
        *,
        weights_per: str = "batch",
        bound: str = "scores",
        clip_range: ClipRange = 0.2,
        noon: bool = True,
        dual_clip: float | None = None,
        prior: Prior = None,
        regularization: float = 0.1,
        aggregation: str = "token-mean",
        kl_coef: float = 0.0,
        momentum: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        if self.momentum == 1.0:
            raise ValueError("momentum: expected a number in [0, 1), got 1.0")
        if self.momentum and weights_per != "batch":
            raise ValueError(f"momentum: goes with weights_per='batch' only, got weights_per={weights_per!r}")
        clip_bounds(clip_range, dual_clip)
        check_rule(weights_per, bound)
        check_process_group(process_group, weights_per)
        if prior is not None and not isinstance(prior, Tensor):
            check_prior_type(prior)
            prior_tensor(prior, len(prior), torch.device("cpu"))
        self.settings: dict[str, Any] = {
            "weights_per": weights_per,
            "bound": bound,
            "clip_range": clip_range,
            "noon": check_flag("noon", noon),
            "dual_clip": dual_clip,
            "prior": prior,
            "regularization": check_regularization(regularization),
            "aggregation": aggregation,
            "kl_coef": check_number("kl_coef", kl_coef, 0.0, float("inf")),
            "process_group": process_group,
        }
        check_choice("aggregation", aggregation, AGGREGATIONS)
        self.register_buffer("running_statistics", None)
        self.register_buffer("batches", None)

    def extra_repr(self) -> str:
        shown = {key: value for key, value in self.settings.items() if key != "process_group"}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items()) + (f", momentum={self.momentum}")

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
        normalizer: float | Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PamaLossOutput:
        per_token: dict[str, Any] = {
            "objective_mask": objective_mask,
            "importance_weights": importance_weights,
            "cu_seqlens": cu_seqlens,
        }
        rest: dict[str, Any] = {"normalizer": normalizer, "ref_logprobs": ref_logprobs, **per_token}
        settings = self.settings
        if not self.momentum or weights is not None:
            return pama_loss(logprobs, old_logprobs, advantages, mask, weights=weights, **rest, **settings)
        statistics = objective_statistics(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_range=settings["clip_range"],
            noon=settings["noon"],
            dual_clip=settings["dual_clip"],
            gram=settings["bound"] == "gram",
            **per_token,
        )
        if settings["process_group"] is not None:
            statistics = statistics.all_reduce(settings["process_group"])
        prior, _ = prior_tensor(settings["prior"], statistics.objectives, logprobs.device)
        weights, optimum = weights_from_statistics(
            self.update(statistics),
            settings["bound"],
            prior,
            settings["regularization"],
            logprobs.dtype == torch.float64,
        )
        local = {**settings, "process_group": None}
        output = pama_loss(logprobs, old_logprobs, advantages, mask, weights=weights, **rest, **local)
        return PamaLossOutput(output.loss, weights, optimum, statistics)

    def update(self, statistics: ObjectiveStatistics) -> ObjectiveStatistics:
        """Takes a batch into the running mean (training mode) and returns the bias-corrected mean."""
        batch = statistics.buffer
        if self.running_statistics is None or self.batches is None:
            self.running_statistics = torch.zeros_like(batch)
            self.batches = torch.zeros((), dtype=torch.float64, device=batch.device)
        running = self.running_statistics.to(batch.device)
        batches = self.batches.to(batch.device)
        if running.shape != batch.shape:
            raise ValueError(
                "advantages: expected the objectives and the bound of the running mean's batches "
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
        return ObjectiveStatistics(mean, statistics.objectives, statistics.has_gram)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PamaLoss:
        """Statistics follow the module to another device but stay float64: counts don't fit a half type."""
        kept = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, x in kept.items():
            moved = self._buffers[name]
            setattr(self, name, x if moved is None else x.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """The buffers exist from the first batch on; a checkpoint brings them along."""
        for name in ("running_statistics", "batches"):
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else saved.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *arguments)
