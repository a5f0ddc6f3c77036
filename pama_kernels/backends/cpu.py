"""The CPU backend: tensors become pointers and strides for the native module `pama_kernels._cpu`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pama_kernels import _cpu
from pama_kernels._codes import GRAM, SEQUENCE, statistics_size

from ._native import DTYPES, Array, array, objectives, token_problem, tokens
from .inputs import TokenInputs

_COMPUTED = (torch.float32, torch.float64)
_SCALARS = {
    dtype: torch.empty((), device="cpu", dtype=dtype) for dtype in _COMPUTED
}  # the quickest way to a scalar


def _empty_statistics(n: int, gram: bool) -> Tensor:
    return torch.empty(statistics_size(n, gram), device="cpu", dtype=torch.float64)


def statistics(given: TokenInputs, gram: bool) -> Tensor:
    sums = _empty_statistics(given.objectives, gram)
    _cpu.statistics(token_problem(given), gram, sums.data_ptr(), torch.get_num_threads())
    return sums


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    weights, optimum = (
        torch.empty(objectives, device="cpu", dtype=dtype),
        torch.empty((), device="cpu", dtype=dtype),
    )
    _cpu.batch_weights(
        sums.data_ptr(),
        objectives,
        gram,
        prior.data_ptr(),
        regularization,
        wide,
        weights.data_ptr(),
        optimum.data_ptr(),
    )
    return weights, optimum


def _scalar(x: Tensor) -> Array:
    return array(x, 0, 0, 0)


def _solved(
    rows: int, n: int, weights_per: int, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Array | None, Tensor, Tensor]:
    """Given weights in a dtype that the kernels read (to be kept), and where weights and optimum go."""
    fixed = None
    by_row = weights_per == SEQUENCE or (weights is not None and weights.dim() == 2)
    if weights is not None:
        weights = weights.detach()
        if weights.dtype not in (torch.float32, torch.float64):
            weights = weights.float()
        stride = weights.stride()
        fixed = array(weights, stride[0] if by_row else 0, 0, stride[-1])
    if by_row:
        return (
            weights,
            fixed,
            torch.empty(rows, n, device="cpu", dtype=dtype),
            torch.empty(rows, device="cpu", dtype=dtype),
        )
    return (
        weights,
        fixed,
        torch.empty(n, device="cpu", dtype=dtype),
        torch.empty((), device="cpu", dtype=dtype),
    )


def combine(
    given: TokenInputs,
    weights: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    token_shape: Sequence[int] | None,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, n = given.advantages, given.objectives
    dtype = torch.float64 if advantages.dtype == torch.float64 else torch.float32
    sums = _empty_statistics(n, pairs)
    weights, fixed, solved, optimum = _solved(given.layout[0], n, weights_per, weights, dtype)
    shape = advantages.shape[:-1] if token_shape is None else token_shape
    combined = torch.empty(shape, device="cpu", dtype=advantages.dtype)
    _cpu.apply(
        token_problem(given),
        weights_per,
        prior.data_ptr(),
        uniform,
        regularization,
        fixed,
        weights is not None and weights.dim() == 2,
        0,
        -math.inf,
        0.0,
        _scalar(combined),
        bool(given.layout[2]) and token_shape is None,
        None,
        None,
        _scalar_row(solved),
        _scalar(optimum),
        sums.data_ptr(),
        pairs,
        torch.get_num_threads(),
    )
    return combined, solved, optimum, sums


def _scalar_row(x: Tensor) -> Array:
    return array(x, 0, 0, 1)


def loss(
    given: TokenInputs,
    weights: Tensor | None,
    normalizer: Tensor | None,
    prior: Tensor,
    weights_per: int,
    uniform: bool,
    regularization: float,
    aggregation: int,
    fixed_normalizer: float,
    kl_coef: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, n = given.logprobs, given.objectives
    assert logprobs is not None
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    gram = weights_per == GRAM
    sums = _empty_statistics(n, gram)
    weights, fixed, solved, optimum = _solved(given.layout[0], n, weights_per, weights, dtype)
    value = torch.empty((), device="cpu", dtype=dtype)
    gradient = torch.empty(logprobs.shape if need_gradient else (0,), device="cpu", dtype=dtype)
    _cpu.apply(
        token_problem(given),
        weights_per,
        prior.data_ptr(),
        uniform,
        regularization,
        fixed,
        weights is not None and weights.dim() == 2,
        aggregation,
        fixed_normalizer if normalizer is None else float(normalizer),
        kl_coef,
        None,
        False,
        _scalar(gradient) if need_gradient else None,
        _scalar(value),
        _scalar_row(solved),
        _scalar(optimum),
        sums.data_ptr(),
        gram,
        torch.get_num_threads(),
    )
    return value, gradient, solved, optimum, sums


# Whole calls in C for the common case: a plain tensor and the uniform prior. None for anything else.
if hasattr(Tensor, "__dlpack_c_exchange_api__"):
    _cpu.use_exchange(Tensor.__dlpack_c_exchange_api__)
quick_weights, quick_min_norm = _cpu.quick_weights, _cpu.quick_min_norm


def weights(
    scores: Tensor, prior: Tensor, uniform: bool, regularization: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    source = scores if scores.dtype in _COMPUTED else scores.float()
    if source.dim() == 1:
        result, optimum = torch.empty_like(source), torch.empty_like(_SCALARS[source.dtype])
    else:
        result, optimum = source.new_empty(source.shape), source.new_empty(source.shape[:-1])
    weights_out(source, prior, uniform, regularization, scale, result, optimum)
    return result, optimum


def weights_out(
    scores: Tensor,
    prior: Tensor,
    uniform: bool,
    regularization: float,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    source = scores if scores.dtype in _COMPUTED else scores.float()
    shape, rows = source.shape, 1
    if len(shape) > 1:
        if len(shape) > 2:
            source = source.reshape(-1, shape[-1])
        rows = source.shape[0]
    strides = source.stride()
    sizes = None
    if scale is not None:
        scale = scale.double().expand(scores.shape[:-1]).reshape(-1)
        sizes = array(scale, scale.stride(0), 0, 0)
    _cpu.weights(
        rows,
        shape[-1],
        (source.data_ptr(), DTYPES[source.dtype], strides[0], 0, strides[-1]),
        prior.data_ptr(),
        uniform,
        regularization,
        sizes,
        result.data_ptr(),
        optimum.data_ptr(),
        torch.get_num_threads(),
    )


def min_norm(gram: Tensor, prior: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    source = gram if gram.dtype in _COMPUTED else gram.float()
    if source.dim() == 2:
        result, optimum = source.new_empty(source.shape[0]), torch.empty_like(_SCALARS[source.dtype])
    else:
        result, optimum = source.new_empty(source.shape[:-1]), source.new_empty(source.shape[:-2])
    min_norm_out(source, prior, regularization, result, optimum)
    return result, optimum


def min_norm_out(gram: Tensor, prior: Tensor, regularization: float, result: Tensor, optimum: Tensor) -> None:
    source = gram if gram.dtype in _COMPUTED else gram.float()
    shape = source.shape
    n, rows, batch_stride = shape[-1], 1, 0
    if len(shape) > 2:
        if len(shape) > 3:
            source = source.reshape(-1, n, n)
        rows, batch_stride = source.shape[0], source.stride(0)
    strides = source.stride()
    bad = _cpu.min_norm(
        rows,
        n,
        source.dtype == torch.float64,
        source.data_ptr(),
        batch_stride,
        strides[-2],
        strides[-1],
        prior.data_ptr(),
        regularization,
        result.data_ptr(),
        optimum.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        which = f" at batch index {bad}" if len(shape) > 2 else ""
        raise ValueError(
            f"gram: expected a symmetric positive semidefinite matrix, got one that is clearly not{which}"
        )


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    rows, width, n = rewards.shape
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    advantages = torch.empty(rewards.shape, device="cpu", dtype=compute)
    returns = torch.empty(rewards.shape, device="cpu", dtype=compute)
    _cpu.multi_objective_gae(
        rows,
        width,
        n,
        gamma,
        lam,
        objectives(rewards, False),
        objectives(values, False),
        tokens(mask),
        tokens(dones),
        objectives(last_values, True),
        objectives(advantages, False),
        objectives(returns, False),
        torch.get_num_threads(),
    )
    return advantages.to(dtype), returns.to(dtype)


def group_normalize(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float
) -> Tensor:
    rows, n = rewards.shape
    compute = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if group_ids is not None:
        _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    else:
        order = torch.arange(rows, device="cpu")
        groups = rows // group_size if group_size else 0
        begin = torch.arange(groups + 1, device="cpu") * group_size
    result = torch.empty(rows, n, device="cpu", dtype=compute)
    _cpu.group_normalize(
        len(begin) - 1,
        begin.data_ptr(),
        order.data_ptr(),
        n,
        objectives(rewards, True),
        scale,
        eps,
        objectives(result, True),
        torch.get_num_threads(),
    )
    return result.to(rewards.dtype)
