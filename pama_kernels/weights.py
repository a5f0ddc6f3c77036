"""Weights of the objectives from their scores (Theorem 1) or their Gram matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import (
    FLOATS,
    Prior,
    check_device,
    check_float,
    check_number,
    check_regularization,
    prior_tensor,
    shape_of,
)
from .backends import backend_for, operators


class WeightSolution(NamedTuple):
    """weights (..., N) on the simplex, and the optimum (...): a.c, or c'Mc."""

    weights: Tensor
    optimum: Tensor


def pama_weights(
    scores: Tensor,
    *,
    prior: Prior = None,
    regularization: float = 0.0,
    scale: float | Tensor | None = None,
    out: WeightSolution | None = None,
) -> WeightSolution:
    """The convex weights that minimise PAMA's bound, exactly, for one row of scores or many.

    minimise over c in the simplex  1/2 (a.c)^2 + rho/2 ||c - p||^2,  rho = regularization * scale

    Args:
        scores: a, one score per objective (..., N); float32, float64, or a half type (solved in float32).
        prior: p, N non-negative numbers with a positive sum (normalised); uniform by default. A prior on
            an accelerator is not inspected: an invalid one gives NaN or points outside the simplex.
        regularization: pull towards the prior, relative to `scale`; at least 0.
        scale: one positive number, or one per row (...); max_i a_i^2 by default.
        out: a solution to write into: contiguous tensors of the result's shapes and dtype.

    Returns:
        `weights` (..., N) and `optimum` (...) = a.c. With regularization 0 the optimum is exactly the
        projection of 0 on [min a, max a], and of the many optimal weights the ones nearest to the prior
        are returned. Scores that are all 0 give the prior; a NaN or infinity makes its own row NaN.

    Equal scores with equal prior get equal weights; permuting objectives permutes the weights;
    scaling all scores (and `scale` by the square) by a power of two changes nothing.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Theorem 1.
    """
    check_float("scores", scores)
    if scores.dim() < 1 or scores.shape[-1] < 1:
        raise ValueError(f"scores: expected shape (..., N) with N >= 1, got {shape_of(scores)}")
    if regularization:
        regularization = check_regularization(regularization)
    p, uniform = prior_tensor(prior, scores.shape[-1], scores.device)
    sizes = None if scale is None else _scale(scale, scores)
    if out is None:
        return WeightSolution(*operators.weights(scores, p, uniform, float(regularization), sizes))
    _check_out(out, scores.shape, scores.shape[:-1], scores)
    backend_for(scores).weights_out(scores, p, uniform, float(regularization), sizes, *out)
    return out


def _scale(scale: Any, scores: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        if scale.dtype not in FLOATS:
            raise TypeError(f"scale: expected a floating-point tensor, got dtype {scale.dtype}")
        check_device("scale", scale, "scores", scores)
        if scale.dim() and scale.shape != scores.shape[:-1]:
            raise ValueError(
                f"scale: expected one number or shape {tuple(scores.shape[:-1])}, got {shape_of(scale)}"
            )
        return scale
    value = check_number("scale", scale, 0.0, float("inf"), inclusive=False)
    return scores.new_full((), value, dtype=torch.float64)


def _check_out(out: Any, shape: torch.Size, optimum_shape: torch.Size, like: Tensor) -> None:
    if not isinstance(out, WeightSolution):
        raise TypeError(f"out: expected a WeightSolution, got {type(out).__name__}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, x, wanted in (
        ("weights", out.weights, shape),
        ("optimum", out.optimum, optimum_shape),
    ):
        if x.shape != wanted or x.dtype != dtype or x.device != like.device or not x.is_contiguous():
            raise ValueError(
                f"out.{name}: expected a contiguous {dtype} tensor of shape {tuple(wanted)} on "
                f"{like.device}, got {x.dtype}, {tuple(x.shape)} on {x.device}"
            )


def min_norm_weights(
    gram: Tensor,
    *,
    prior: Prior = None,
    regularization: float = 0.0,
    out: WeightSolution | None = None,
) -> WeightSolution:
    """The min-norm point of the simplex for a Gram matrix (..., N, N). Not built yet."""
    raise NotImplementedError("min_norm_weights: the min-norm solver is not part of this release")


def pareto_gap(gram: Tensor, weights: Tensor) -> Tensor:
    """The Wolfe gap c'Mc - min_j (Mc)_j of given weights (...). Not built yet."""
    raise NotImplementedError("pareto_gap: the min-norm solver is not part of this release")
