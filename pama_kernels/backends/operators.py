"""The operators `torch.ops.pama.*`: one schema, one fake kernel and one dispatch each.

In eager mode a call on plain tensors goes straight to the backend; while compiling, and for tensor
subclasses, it goes through the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_kernels._arguments import traced
from pama_kernels._codes import GRAM, SEQUENCE, statistics_size

from . import find, implementation

_LIBRARY: Any = torch.library.Library("pama", "DEF")  # type: ignore[no-untyped-call]

_SURROGATE = "SymInt[] layout, float[] clip, bool noon"

SCHEMAS = {
    "statistics": (
        "(Tensor? logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, "
        "Tensor? objective_mask, Tensor? importance_weights, Tensor? cu_seqlens, "
        f"{_SURROGATE}, bool gram) -> Tensor"
    ),
    "batch_weights": (
        "(Tensor sums, SymInt objectives, bool gram, Tensor prior, float regularization, bool wide) "
        "-> (Tensor, Tensor)"
    ),
    "combine": (
        "(Tensor? logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, "
        "Tensor? objective_mask, Tensor? cu_seqlens, Tensor? weights, Tensor prior, "
        f"{_SURROGATE}, int weights_per, bool uniform, float regularization, SymInt[]? token_shape, "
        "bool pairs) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "loss": (
        "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, "
        "Tensor? objective_mask, Tensor? importance_weights, Tensor? ref_logprobs, "
        "Tensor? cu_seqlens, Tensor? weights, Tensor? normalizer, Tensor prior, "
        f"{_SURROGATE}, int weights_per, bool uniform, float regularization, int aggregation, "
        "float fixed_normalizer, float kl_coef, bool need_gradient) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
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


def _fake_statistics(*args: Any) -> Tensor:
    advantages: Tensor = args[2]
    gram: bool = args[-1]
    return advantages.new_empty(statistics_size(advantages.shape[-1], gram), dtype=torch.float64)


def _fake_batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    return sums.new_empty(objectives, dtype=dtype), sums.new_empty((), dtype=dtype)


def _fake_solution(
    like: Tensor, layout: Sequence[int], n: int, weights_per: int, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(like)
    if weights_per == SEQUENCE or (weights is not None and weights.dim() == 2):
        rows = layout[0]
        return like.new_empty((rows, n), dtype=dtype), like.new_empty((rows,), dtype=dtype)
    return like.new_empty(n, dtype=dtype), like.new_empty((), dtype=dtype)


def _fake_combine(*args: Any) -> tuple[Tensor, ...]:
    advantages, weights, layout = args[2], args[6], args[8]
    weights_per, token_shape, pairs = args[11], args[14], args[15]
    n = advantages.shape[-1]
    shape = advantages.shape[:-1] if token_shape is None else token_shape
    sums = advantages.new_empty(statistics_size(n, pairs), dtype=torch.float64)
    solution = _fake_solution(advantages, layout, n, weights_per, weights)
    return advantages.new_empty(shape), *solution, sums


def _fake_loss(*args: Any) -> tuple[Tensor, ...]:
    logprobs, advantages, weights, layout = args[0], args[2], args[8], args[11]
    weights_per, need_gradient = args[14], args[20]
    n = advantages.shape[-1]
    sums = advantages.new_empty(statistics_size(n, weights_per == GRAM), dtype=torch.float64)
    value = logprobs.new_empty((), dtype=_result_dtype(logprobs))
    gradient = value.new_empty(logprobs.shape if need_gradient else (0,))
    return value, gradient, *_fake_solution(logprobs, layout, n, weights_per, weights), sums


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

# Which argument tells the device.
_DEVICE_ARGUMENT = {"statistics": 2, "combine": 2, "loss": 2}
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


def _define(name: str) -> Callable[..., Any]:
    place = _DEVICE_ARGUMENT.get(name, 0)

    def run(*args: Any) -> Any:
        return implementation(args[place], name)(*args)

    _LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    # No result has a gradient: that of the loss is put on by `loss._Loss`.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"pama::{name}", _FAKES[name], lib=_LIBRARY)
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
                on_cpu = implementation(x, name)
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
