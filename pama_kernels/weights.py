"""Weights of the objectives from their scores (Theorem 1) or their Gram matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import Number, result_dtype
from ._validate import (
    Preference,
    check_device,
    check_float,
    check_memory,
    check_number,
    check_positive,
    preference_tensor,
    shape_of,
    traced,
)
from .backends import arguments, operators
from .backends.registry import Functions, find


class WeightSolution(NamedTuple):
    """The result of a solver.

    Attributes:
        weights: (..., N), on the simplex.
        optimum: (...), a.c or c'Mc; the latter is never negative.
    """

    weights: Tensor
    optimum: Tensor


def pama_weights(
    scores: Tensor,
    *,
    preference: Preference = None,
    regularization: Number = 0.0,
    scale: float | Tensor | None = None,
    out: WeightSolution | None = None,
) -> WeightSolution:
    """The convex weights that minimise PAMA's bound, exactly, for one row of scores or many.

        minimise over c in the simplex  1/2 (a.c)^2 + rho/2 ||c - p||^2,  rho = regularization * scale

    Args:
        scores: a, one score per objective (..., N); float32, float64, or a half type (solved in float32).
        preference: p, N non-negative numbers with a positive sum (normalised); uniform by default. On an
            accelerator it is not validated: an invalid one gives NaN or weights outside the simplex.
        regularization: penalty on the distance from the preference, relative to `scale`; at least 0.
        scale: one positive number, or one per row (...); max_i a_i^2 by default.
        out: a solution to write into: contiguous tensors of the result's shapes and dtype.

    Returns:
        `weights` (..., N) and `optimum` (...) = a.c. With regularization 0 the optimum is exactly the
        projection of 0 on [min a, max a], and among the optimal weights those nearest to the preference are
        returned. Scores that are all 0 give the preference; a NaN or infinity makes its own row NaN.

    Equal scores with equal preference get equal weights; permuting objectives permutes the weights;
    scaling all scores (and `scale` by the square) by a power of two changes nothing.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Theorem 1.
    """
    default = preference is None and scale is None and out is None
    if default and type(regularization) is float and regularization >= 0.0:
        solution = operators.quick_weights(scores, regularization)
        if solution is not None:
            return WeightSolution(*solution)
    regularization = check_number("regularization", regularization, 0.0)
    check_float("scores", scores)
    check_memory("scores", scores)
    shape = scores.shape
    if not shape or shape[-1] < 1:
        raise ValueError(f"scores: expected shape (..., N) with N >= 1, got {shape_of(scores)}")
    p = preference_tensor(preference, shape[-1], scores.device)
    sizes = None if scale is None else _scale(scale, scores)
    if out is None:
        return WeightSolution(*operators.weights(arguments.Weights(scores, p, regularization, sizes)))
    _check_out(out, scores.shape, scores.shape[:-1], scores)
    _backend(scores, "weights").weights(scores.detach().resolve_neg(), p, regularization, sizes, *out)
    return out


def _scale(scale: Any, scores: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        check_float("scale", scale)
        check_memory("scale", scale)
        check_device("scale", scale, "scores", scores)
        if scale.dim() and scale.shape != scores.shape[:-1]:
            raise ValueError(
                f"scale: expected one number or shape {tuple(scores.shape[:-1])}, got {shape_of(scale)}"
            )
        return scale
    value = check_positive("scale", scale)
    assert not isinstance(value, Tensor)
    return scores.new_full((), value, dtype=torch.float64)


def _check_out(out: Any, shape: torch.Size, optimum_shape: torch.Size, like: Tensor) -> None:
    if not isinstance(out, WeightSolution):
        raise TypeError(f"out: expected a WeightSolution, got {type(out).__name__}")
    for name, x in zip(("weights", "optimum"), out, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"out.{name}: expected a tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError(f"out.{name}: expected a tensor without requires_grad, got one with it")
    storages = {x.untyped_storage().data_ptr() for x in (like, *out)}
    if len(storages) < 3 and like.numel():
        raise ValueError("out: expected three tensors with memory of their own, got some that share it")
    for x in out:
        torch.autograd.graph.increment_version(x)
    dtype = result_dtype(like)
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
    preference: Preference = None,
    regularization: Number = 0.0,
    out: WeightSolution | None = None,
) -> WeightSolution:
    """The min-norm point of the simplex for a Gram matrix, exactly.

        minimise over c in the simplex  1/2 c'Mc + rho/2 ||c - p||^2,  rho = regularization * max_i M_ii

    Args:
        gram: M, symmetric positive semidefinite (..., N, N); any strides; float32 is solved in float64. M may
            be the inner products of N gradients (MGDA) or `ObjectiveStatistics.gram`.
        preference: as in `pama_weights`.
        regularization: penalty on the distance from the preference, relative to max_i M_ii; at least 0.
        out: as in `pama_weights`.

    Returns:
        `weights` (..., N) and `optimum` (...) = c'Mc, never negative. An active-set method, with Wolfe's
        certificate (Mc)_j >= c'Mc to 1e-10 of max_i M_ii in float64. Where the minimiser is not unique by
        construction (duplicated or opposite objectives, zero rows, rank 1) it is the one nearest to the
        preference to 1e-6; otherwise some point within 1e-12 max_i M_ii of the optimum. A zero matrix gives
        the preference; a NaN or infinity makes the result of its matrix NaN.

    Raises:
        ValueError: on the CPU, a matrix that is clearly not symmetric or not positive semidefinite (by more
            than a few percent of its largest diagonal entry). On other devices such a matrix gives some point
            of the simplex, computed from (M + M')/2.

    Source: the minimum-norm problem of MGDA (Désidéri 2012); certificate: Wolfe 1976.
    """
    if preference is None and out is None and type(regularization) is float and regularization >= 0.0:
        solution = operators.quick_min_norm(gram, regularization)
        if solution is not None:
            return WeightSolution(*solution)
    regularization = check_number("regularization", regularization, 0.0)
    n = _check_gram(gram)
    p = preference_tensor(preference, n, gram.device)
    if out is None:
        return WeightSolution(*operators.min_norm(arguments.MinNorm(gram, p, regularization)))
    _check_out(out, gram.shape[:-1], gram.shape[:-2], gram)
    _backend(gram, "min_norm").min_norm(gram.detach().resolve_neg(), p, regularization, *out)
    return out


def upgrad_weights(
    gram: Tensor, *, preference: Preference = None, out: WeightSolution | None = None
) -> WeightSolution:
    """UPGrad's weights for a Gram matrix, exactly.

    c = sum_i c^(i), c^(i) the minimiser of c'Mc over c >= p_i e_i (objective i keeps at least its preference,
    no weight is negative), divided by its sum. With M = JJ', Mc = J(J'c) >= 0: no objective decreases to
    first order.

    Args:
        gram: M, symmetric positive semidefinite (..., N, N); any strides; float32 is solved in float64.
        preference: as in `pama_weights`.
        out: as in `pama_weights`.

    Returns:
        `weights` (..., N) on the simplex and `optimum` (...) = c'Mc of them, never negative. Each projection
        has a KKT residual of at most 1e-10 max_i M_ii. Where a projection is not unique, the result is the
        one nearest to p_i e_i if the gradients' norms lie within a factor of 1000, else one of them. A zero
        matrix gives the preference; a NaN or infinity makes the result of its matrix NaN.

    Raises:
        ValueError: on the CPU, a matrix that is clearly not symmetric or not positive semidefinite.

    Source: Quinton & Rey 2024 (arXiv 2406.16232), Section 3.
    """
    if preference is None and out is None:
        solution = operators.quick_upgrad(gram, 0.0)
        if solution is not None:
            return WeightSolution(*solution)
    n = _check_gram(gram)
    p = preference_tensor(preference, n, gram.device)
    if out is None:
        return WeightSolution(*operators.upgrad(arguments.UPGrad(gram, p)))
    _check_out(out, gram.shape[:-1], gram.shape[:-2], gram)
    _backend(gram, "upgrad").upgrad(gram.detach().resolve_neg(), p, *out)
    return out


def _check_gram(gram: Tensor) -> int:
    check_float("gram", gram)
    check_memory("gram", gram)
    shape = gram.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ValueError(f"gram: expected shape (..., N, N) with N >= 1, got {shape_of(gram)}")
    return shape[-1]


def _backend(x: Tensor, function: str) -> Functions:
    """The backend function that writes into given memory, for which there is no operator."""
    if traced():
        raise RuntimeError("out: expected None while a graph is recorded, got tensors to write into")
    return find(x.device.type, function)


def pareto_gap(gram: Tensor, weights: Tensor) -> Tensor:
    """Wolfe's gap c'Mc - min_j (Mc)_j of given weights: 0 exactly where c is a min-norm point.

    With M the Gram matrix of the objectives' gradients, c'Mc is the squared norm of the combined gradient,
    and the gap bounds how much other weights can reduce it.

    Args:
        gram: M, (..., N, N).
        weights: c, (..., N) on the simplex.

    Returns:
        (...), in the promoted dtype; at least 0 up to rounding.

    Source: Wolfe 1976.
    """
    check_float("gram", gram)
    check_float("weights", weights)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram: expected shape (..., N, N), got {shape_of(gram)}")
    if weights.shape != gram.shape[:-1]:
        raise ValueError(f"weights: expected shape {tuple(gram.shape[:-1])}, got {shape_of(weights)}")
    check_device("weights", weights, "gram", gram)
    check_memory("gram", gram)
    check_memory("weights", weights)
    dtype = torch.promote_types(gram.dtype, weights.dtype)
    m, c = gram.detach().to(dtype), weights.detach().to(dtype)
    product = (m * c.unsqueeze(-2)).sum(-1)  # autocast would run a matmul in bfloat16
    return (product * c).sum(-1) - product.amin(-1)
