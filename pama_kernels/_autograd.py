"""The gradient of `pama_loss`: the forward pass computes it, the backward pass scales it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._call import Outputs, Results, Rule, Tokens
from ._validate import traced
from .backends import arguments, operators


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
attached: Callable[..., Tensor] = super(torch.autograd.Function, _Attached).apply


def differentiable(tokens: Tokens, rule: Rule, problem: arguments.Apply, outputs: Outputs) -> Results:
    logprobs = tokens.logprobs
    assert logprobs is not None
    if type(logprobs) is not Tensor or traced() or forward_mode():
        rest = arguments.flat(tokens._replace(logprobs=None), rule, problem, outputs)
        del rest[_LOGPROBS]
        if torch.compiler.is_compiling():  # the compiler rejects a tensor that is used in two places
            rest = [x.detach() if isinstance(x, Tensor) else x for x in rest]
            return Results(*_Loss.apply(logprobs, *rest))  # type: ignore[no-untyped-call]
        return Results(*_Transformed.apply(logprobs, *rest))  # type: ignore[no-untyped-call]
    results = operators.apply(tokens, rule, problem, outputs)
    return Results(results.advantages, attached(logprobs, results), *results[_GRADIENT:])


def known_to_the_compiler(logprobs: Tensor) -> Tensor:
    """A view of logprobs: of results, but not of arguments, the compiler knows which are differentiated."""
    logprobs, forward = logprobs.view_as(logprobs), torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(logprobs).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(_NO_FORWARD_MODE)
    return logprobs


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active, for which `_Transformed` raises an error."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0
