"""Rows of the two weight problems."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_kernels import _cuda
from pama_kernels.backends._native import DTYPES, array

from .launch import doubles, processors, stream_of

_WORK_LIMIT = 1 << 24  # doubles of work space of one call, unless one problem needs more


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _work(rows: int, each: int, like: Tensor) -> tuple[Tensor | None, int]:
    """Work space, and how many problems it serves at a time."""
    if each == 0:
        return None, rows
    slots = min(rows, max(1, _WORK_LIMIT // each))
    return doubles(slots * each, like), slots


def weights(
    scores: Tensor, prior: Tensor, uniform: bool, regularization: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    source = _computed(scores)
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
    n = scores.shape[-1]
    source = _computed(scores).reshape(-1, n)
    rows = source.shape[0]
    sizes = None
    if scale is not None:
        scale = scale.double().expand(scores.shape[:-1]).reshape(-1)
        sizes = array(scale, scale.stride(0), 0, 0)
    work, slots = _work(rows, _cuda.weights_work(n), source)
    _cuda.weights(
        rows,
        n,
        (source.data_ptr(), DTYPES[source.dtype], source.stride(0), 0, source.stride(1)),
        prior.data_ptr(),
        regularization,
        sizes,
        result.data_ptr(),
        optimum.data_ptr(),
        0 if work is None else work.data_ptr(),
        slots,
        *stream_of(source),
    )


def min_norm(gram: Tensor, prior: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    source = _computed(gram)
    result, optimum = source.new_empty(source.shape[:-1]), source.new_empty(source.shape[:-2])
    min_norm_out(source, prior, regularization, result, optimum)
    return result, optimum


def min_norm_out(gram: Tensor, prior: Tensor, regularization: float, result: Tensor, optimum: Tensor) -> None:
    n = gram.shape[-1]
    source = _computed(gram).reshape(-1, n, n)
    rows = source.shape[0]
    batch_stride, row_stride, column_stride = source.stride()
    stream = stream_of(source)
    work, slots = _work(rows, _cuda.min_norm_work(n), source)
    _cuda.min_norm(
        rows,
        n,
        source.dtype == torch.float64,
        source.data_ptr(),
        batch_stride,
        row_stride,
        column_stride,
        prior.data_ptr(),
        regularization,
        result.data_ptr(),
        optimum.data_ptr(),
        0 if work is None else work.data_ptr(),
        slots,
        processors(stream[0]),
        *stream,
    )
