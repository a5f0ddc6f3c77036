"""The operators `torch.ops.pama.*`: one schema, one fake kernel and one dispatch each.

In eager mode a call on plain tensors goes straight to the backend; while compiling, and for tensor
subclasses, it goes through the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pama_kernels._arguments import traced
from pama_kernels._codes import GRAM, SEQUENCE, statistics_size

from . import find, implementation, inputs
from .inputs import TokenInputs

_LIBRARY: Any = torch.library.Library("pama", "DEF")  # type: ignore[no-untyped-call]

SCHEMAS = {
    "statistics": f"({inputs.SCHEMA}, bool gram) -> Tensor",
    "batch_weights": (
        "(Tensor sums, SymInt objectives, bool gram, Tensor prior, float regularization, bool wide) "
        "-> (Tensor, Tensor)"
    ),
    "combine": (
        f"({inputs.SCHEMA}, Tensor? weights, Tensor prior, int weights_per, bool uniform, "
        "float regularization, SymInt[]? token_shape, bool pairs) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "loss": (
        f"({inputs.SCHEMA}, Tensor? weights, Tensor? normalizer, Tensor prior, int weights_per, "
        "bool uniform, float regularization, int aggregation, float fixed_normalizer, float kl_coef, "
        "bool need_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "weights": (
        "(Tensor scores, Tensor prior, bool uniform, float regularization, Tensor? scale) -> (Tensor, Tensor)"
    ),
    "min_norm": "(Tensor gram, Tensor prior, float regularization) -> (Tensor, Tensor)",
    "gae": (
        "(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? last_values, "
        "float gamma, float lam) -> (Tensor, Tensor)"
    ),
    "group_normalize": (
        "(Tensor rewards, SymInt group_size, Tensor? group_ids, bool scale, float eps) -> Tensor"
    ),
}


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_statistics(tokens: TokenInputs, gram: bool) -> Tensor:
    return tokens.advantages.new_empty(statistics_size(tokens.objectives, gram), dtype=torch.float64)


def _fake_batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    return sums.new_empty(objectives, dtype=dtype), sums.new_empty((), dtype=dtype)


def _fake_solution(
    like: Tensor, tokens: TokenInputs, weights_per: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype, n = _result_dtype(like), tokens.objectives
    if weights_per == SEQUENCE or (weights is not None and weights.dim() == 2):
        rows = tokens.layout[0]
        return like.new_empty((rows, n), dtype=dtype), like.new_empty((rows,), dtype=dtype)
    return like.new_empty(n, dtype=dtype), like.new_empty((), dtype=dtype)


def _fake_combine(
    tokens: TokenInputs, weights: Tensor | None, prior: Tensor, weights_per: int, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, token_shape, pairs = rest
    advantages = tokens.advantages
    shape = advantages.shape[:-1] if token_shape is None else token_shape
    solution = _fake_solution(advantages, tokens, weights_per, weights)
    return advantages.new_empty(shape), *solution, _fake_statistics(tokens, pairs)


def _fake_loss(
    tokens: TokenInputs,
    weights: Tensor | None,
    normalizer: Tensor | None,
    prior: Tensor,
    weights_per: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    logprobs, need_gradient = tokens.logprobs, rest[-1]
    assert logprobs is not None
    value = logprobs.new_empty((), dtype=_result_dtype(logprobs))
    gradient = value.new_empty(logprobs.shape if need_gradient else (0,))
    solution = _fake_solution(logprobs, tokens, weights_per, weights)
    return value, gradient, *solution, _fake_statistics(tokens, weights_per == GRAM)


def _fake_weights(
    scores: Tensor, prior: Tensor, uniform: bool, regularization: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(scores)
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)


def _fake_min_norm(gram: Tensor, prior: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(gram)
    return gram.new_empty(gram.shape[:-1], dtype=dtype), gram.new_empty(gram.shape[:-2], dtype=dtype)


def _fake_gae(rewards: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _fake_group_normalize(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "statistics": _fake_statistics,
    "batch_weights": _fake_batch_weights,
    "combine": _fake_combine,
    "loss": _fake_loss,
    "weights": _fake_weights,
    "min_norm": _fake_min_norm,
    "gae": _fake_gae,
    "group_normalize": _fake_group_normalize,
}

_OVER_TOKENS = ("statistics", "combine", "loss")
_ADVANTAGES = TokenInputs._fields.index("advantages")
_PLAIN = (Tensor, torch.nn.Parameter)


def _no_quick_path(x: Tensor, regularization: float, threads: int) -> None:
    return None


def _quick(name: str) -> Callable[[Tensor, float], tuple[Tensor, Tensor] | None]:
    """The backend's whole call for a plain tensor and default options, or None where that does not serve."""
    on_cpu: Any = None

    def call(x: Tensor, regularization: float) -> tuple[Tensor, Tensor] | None:
        nonlocal on_cpu
        if type(x) is not Tensor or not x.is_cpu or traced():
            return None
        if on_cpu is None:
            on_cpu = find("cpu", name) or _no_quick_path
        solution: tuple[Tensor, Tensor] | None = on_cpu(x, regularization, torch.get_num_threads())
        return solution

    return call


quick_weights = _quick("quick_weights")
quick_min_norm = _quick("quick_min_norm")


def _with_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of `TokenInputs` as one of the operator's arguments."""
    count = inputs.COUNT
    return lambda *args: function(TokenInputs(*args[:count]), *args[count:])


def _define(name: str) -> Callable[..., Any]:
    over_tokens = name in _OVER_TOKENS
    place = _ADVANTAGES if over_tokens else 0  # the argument that tells the device

    def found(x: Tensor) -> Callable[..., Any]:
        function = implementation(x, name)
        return _with_inputs(function) if over_tokens else function

    def run(*args: Any) -> Any:
        return found(args[place])(*args)

    fake = _with_inputs(_FAKES[name]) if over_tokens else _FAKES[name]
    _LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    # No result has a gradient: that of the loss is put on by `loss._Loss`.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"pama::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.pama, name).default
    on_cpu: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal on_cpu
        x = args[place]
        if type(x) not in _PLAIN or traced():
            return operator(*args)
        try:
            if not x.is_cpu:
                return run(*args)
            if on_cpu is None:
                on_cpu = found(x)
            return on_cpu(*args)
        except RuntimeError as error:
            if "data pointer" not in str(error) and "access storage" not in str(error):
                raise
            return operator(*args)  # a wrapped tensor, as torch.vmap has: torch takes it apart

    return call


statistics = _define("statistics")
batch_weights = _define("batch_weights")
combine = _define("combine")
loss = _define("loss")
weights = _define("weights")
min_norm = _define("min_norm")
gae = _define("gae")
group_normalize = _define("group_normalize")
