"""The calls over tokens as one table, and their agreement with the reference.

Statistics are compared as they are. Weights per batch are certified on the library's own statistics, and the
rest of the call is compared under these weights, so that no tolerance depends on the condition of a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _sums import assert_statistics, sums
from problems import EPS32, EPS64, LAYOUTS, SUM_ERROR, Problem, loss_scale, reference_gradient, solution_error
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference
from pama_kernels.rules import noon_of, resolve_rule

KKT = 1e-10  # of the largest diagonal entry, as the solvers promise
OBJECTIVE = 1e-12  # of the same: how far c'Mc may be above the optimum
RIDGE = 3.2e-7  # root of the reference's ridge of 1e-13, by which its projections may be off where singular

# Layout, sequences, tokens of a row; rows of one token are the sequence-level ratio of GSPO.
WHERE = (*((layout, 4, 5) for layout in LAYOUTS), ("padded", 6, 1), ("per-sequence", 6, 1))


def diagonal(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Parameters of a test: all pairs, of which each of `first` with one of `second` is portable."""
    return [
        pytest.param(x, y, marks=pytest.mark.portable if i % len(second) == j else ())
        for i, x in enumerate(first)
        for j, y in enumerate(second)
    ]


def tilted(statistics: Any) -> Tensor:
    """A user's rule: on means only, with negative weights."""
    return statistics.scores.softmax(0) - 0.125


tilted.noon = True  # type: ignore[attr-defined]
tilted.pairs = False  # type: ignore[attr-defined]

BATCH = {
    "cosines": Pama(),
    "gram": Pama(regularization=0.0),
    "gram noon": Pama(noon=True),
    "scores": Pama(bound="scores"),
    "scores noon": Pama(bound="scores", noon=True, regularization=1.0),
    "paper batch": Pama.paper("batch"),
    "upgrad": "upgrad",
    "fixed": Fixed(),
    "callable": tilted,
}
BY_SEQUENCE = {"sequence": Pama("sequence"), "paper sequence": Pama.paper("sequence"), "softmin": "softmin"}
BY_TOKEN = {
    "token": Pama("token"),
    "paper token": Pama.paper("token"),
    "softmin token": SoftMin(0.5, "token"),
}
RULES: dict[str, Any] = {**BATCH, **BY_SEQUENCE, **BY_TOKEN}
GIVEN = ("given", "given rows")


def weighting(name: str, problem: Problem) -> dict[str, Any]:
    """The arguments of a row of the table: a rule of `RULES`, or given weights."""
    n = problem.objectives
    if name == "given" or (name == "given rows" and problem.flat):
        return {"weights": torch.arange(1, n + 1).double() / 8}
    if name == "given rows":
        return {"weights": torch.arange(problem.rows * n).reshape(problem.rows, n).float() % 5 / 4}
    return {"rule": RULES[name]}


def fits(name: str, problem: Problem) -> bool:
    return name not in BY_SEQUENCE or not problem.flat


def per(options: dict[str, Any]) -> str:
    if options.get("weights") is not None:
        return "given"
    return getattr(resolve_rule(options.get("rule")), "weights_per", "batch")


# --- weights -----------------------------------------------------------------------------------------


def assert_batch_weights(result: Any, options: dict[str, Any], stored: float) -> tuple[Tensor, Tensor]:
    """On the result's own statistics; returns the weights, and the preference by which presence divides."""
    s, rule = result.statistics, resolve_rule(options.get("rule"))
    n, c, optimum = s.objectives, result.weights.double(), result.optimum.double()
    if not isinstance(rule, (Pama, UPGrad, Fixed, SoftMin)):
        wanted, value = rule(s).double(), None
        assert ((c - wanted).abs() <= stored * (1 + wanted.abs())).all()
        _, _, effective = reference.batch_weights(view(s), Fixed(), options.get("preference"), n)
        assert (optimum - s.scores @ c).abs() <= 2 * n * stored * s.scores.abs().max()
        return c, effective
    wanted, value, effective = reference.batch_weights(view(s), rule, options.get("preference"), n)
    part = s.signal & (s.count > 0)
    if getattr(rule, "bound", None) == "gram":
        part &= s.second_moments != 0
    assert (c >= 0).all()
    assert abs(float(c.sum()) - 1) <= 2 * n * stored
    if not part.any():
        assert ((c - wanted).abs() <= stored).all()
        assert optimum == 0
        return c, effective
    assert (c[~part] == 0).all()
    assert optimum >= 0 or not isinstance(rule, UPGrad)
    if isinstance(rule, Fixed) or (isinstance(rule, Pama) and rule.bound == "scores"):
        a = s.scores[part]
        spread, largest = float(a.max() - a.min()), float(a.abs().max())
        regular = 0.0 if isinstance(rule, Fixed) else float(rule.regularization)
        # c moves by da / spread (regularization 0: a.c = 0 is a cut of the simplex), else by da a / rho
        condition = 1 / regular if regular else (largest / spread) ** 2 if spread > 0 else 1.0
        error = 16 * n * EPS64 * max(condition, 1.0) + stored
        assert ((c - wanted).abs() <= error).all()
        assert (optimum - value).abs() <= 4 * n * error * largest
        return c, effective
    m = (s.gram if isinstance(rule, UPGrad) else s.cosines)[part][:, part]
    found, largest = c[part], float(m.diagonal().max())
    product = m @ found
    if isinstance(rule, Pama):
        regular = float(rule.regularization)
        p = effective[part] if effective[part].sum() > 0 else torch.full_like(found, 1 / len(found))
        slope = product + regular * (found - p)
        assert found @ slope - slope.min() <= KKT * (1 + regular) + 8 * n * stored
        if regular:
            assert ((c - wanted).abs() <= n * KKT / regular + stored).all()
        assert (optimum - value).abs() <= OBJECTIVE + 8 * n * stored
        return c, effective
    # UPGrad: no objective decreases; the direction of Mc is unique, the weights where M is well-conditioned.
    assert (product >= -(KKT + 2 * n * stored) * largest).all()
    assert (optimum - (found @ m @ found).clamp(min=0)).abs() <= 8 * n * stored * largest
    direction = m @ wanted[part]
    length, reach = float(product.norm()), float(direction.norm())
    if min(length, reach) > 0:
        error = n * (KKT + RIDGE + 4 * stored) * largest * (1 / length + 1 / reach)
        assert ((product / length - direction / reach).abs() <= error).all()
    least = float(torch.linalg.eigvalsh(m)[0]) / largest if largest > 0 else 0.0
    if least > 1e-3:
        assert ((c - wanted).abs() <= n * KKT / least + stored).all()
    return c, effective


def view(s: pk.ObjectiveStatistics) -> Any:
    """The library's statistics as `reference.batch_weights` reads them."""
    names = ("signal", "count", "scores", "second_moments", "gram", "cosines")
    square = sums(s)["bound_square_sum"]
    return SimpleNamespace(**{name: getattr(s, name) for name in names}, bound_square_sum=square)


@contextmanager
def under(weights: Tensor, optimum: Tensor, effective: Tensor) -> Iterator[None]:
    """The reference with these weights of the batch."""
    solve = reference.loss.batch_weights
    reference.loss.batch_weights = lambda *_: (weights, optimum, effective)
    try:
        yield
    finally:
        reference.loss.batch_weights = solve


# --- whole calls -------------------------------------------------------------------------------------


def loss_of(problem: Problem, **options: Any) -> tuple[pk.PamaLossOutput, Tensor]:
    """The output and the gradient with respect to logprobs."""
    leaf = problem.logprobs.detach().requires_grad_()
    output = pk.pama_loss(**{**problem.loss_arguments(), "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output._replace(loss=output.loss.detach()), gradient


def share(problem: Problem, options: dict[str, Any], effective: Tensor | None) -> float:
    """Largest weight of an objective at a token: presence divides by the preference that is there."""
    given = options.get("weights")
    if given is not None:
        return max(1.0, float(given.abs().max()))
    if problem.objective_mask is None:
        return 1.0
    p = effective if effective is not None else preference_of(options, problem.objectives)
    return max(1.0, 1 / float(p[p > 0].min()))


def preference_of(options: dict[str, Any], n: int) -> Tensor:
    p = torch.as_tensor(options.get("preference") or [1.0] * n, dtype=torch.float64)
    return p / p.sum()


@contextmanager
def certified(result: Any, problem: Problem, options: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Checks the weights of a call. Within, the reference uses them if they are the batch's; yields how
    far weights may be from the reference's, and the largest weight of a token."""
    dtype = result.weights.dtype
    stored = EPS64 if dtype == torch.float64 else EPS32
    if per(options) == "batch":
        c, effective = assert_batch_weights(result, options, 2 * stored)
        with under(c, result.optimum.double(), effective):
            yield 4 * stored, share(problem, options, effective)
        return
    yield solution_error(problem, options, dtype), share(problem, options, None)


def assert_combined(
    problem: Problem, ratio: bool = True, grid: bool = True, **options: Any
) -> pk.CombinedAdvantages:
    arguments = problem.combine_arguments(ratio)
    got = pk.combine_advantages(**arguments, **options)
    problem = replace(problem, importance_weights=None, ref_logprobs=None)
    if not ratio:
        alone = problem.mask is None and problem.cu_seqlens is None and problem.advantages.dim() == 2
        shape = (len(problem.advantages), 1) if alone else problem.logprobs.shape
        problem = replace(problem, logprobs=torch.zeros(shape), old_logprobs=None)
    dtype, n = problem.advantages.dtype, problem.objectives
    assert got.advantages.dtype == dtype
    assert got.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got.statistics.gram is not None) == (n <= 16 or "gram" in str(options.get("rule")))
    with certified(got, problem, options) as (error, largest):
        wanted = reference.combine_advantages(**arguments, **options)
    for name in ("advantages", "weights", "optimum"):
        assert getattr(got, name).shape == getattr(wanted, name).shape, name
    size = 2 * n * largest  # n products with advantages up to 2
    assert ((got.weights - wanted.weights).abs() <= error * largest).all()
    assert ((got.optimum - wanted.optimum).abs() <= error * size).all()
    tolerance = (4 * error + 4 * problem.eps()) * size + torch.finfo(dtype).eps * wanted.advantages.abs()
    assert ((got.advantages.double() - wanted.advantages).abs() <= tolerance).all()
    clip_range = options.get("clip_range") or (1.0, float("inf"))
    noon = noon_of(resolve_rule(options.get("rule")))
    aggregation = options.get("aggregation", "token-mean")
    assert_statistics(
        got.statistics, problem, grid, clip_range=clip_range, noon=noon, aggregation=aggregation
    )
    return got


def assert_loss(problem: Problem, grid: bool = True, **options: Any) -> tuple[pk.PamaLossOutput, Tensor]:
    if not options.get("kl_coef"):
        problem = replace(problem, ref_logprobs=None)
    output, gradient = loss_of(problem, **options)
    dtype, n = problem.logprobs.dtype, problem.objectives
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert output.loss.dtype == output.weights.dtype == output.optimum.dtype == result
    assert output.loss.shape == ()
    assert gradient.dtype == dtype
    assert gradient.shape == problem.logprobs.shape
    with certified(output, problem, options) as (error, largest):
        wanted, exact = reference_gradient(problem, **options)
    assert output.weights.shape == wanted.weights.shape
    assert output.optimum.shape == wanted.optimum.shape
    assert ((output.weights - wanted.weights).abs() <= error * largest).all()
    score = 3 * n * largest  # importance weights up to 1.5, advantages up to 2
    assert ((output.optimum - wanted.optimum).abs() <= error * score).all()
    value_size, gradient_size = loss_scale(problem, **options)
    if options.get("weights") is None:
        value_size, gradient_size = largest * value_size, largest * gradient_size
    # sums over a tile in the type of the computation; weights with their error; the result rounded
    rounding = SUM_ERROR * problem.eps() + error + torch.finfo(result).eps
    assert abs(float(output.loss) - float(wanted.loss)) <= rounding * value_size
    # per token: 16 roundings, the error of the weights, and the rounding to the dtype of the gradient
    tolerance = (16 * problem.eps() + error) * gradient_size + torch.finfo(dtype).eps * exact.abs()
    tolerance += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gradient - exact).abs() <= tolerance).all()
    assert (gradient[~problem.valid()] == 0).all()
    with torch.no_grad():
        silent = pk.pama_loss(**problem.loss_arguments(), **options)
    assert not silent.loss.requires_grad
    assert torch.equal(silent.loss, output.loss)
    noon = noon_of(resolve_rule(options.get("rule")))
    names = ("clip_range", "dual_clip", "aggregation")
    asked = {name: options[name] for name in names if name in options}
    assert_statistics(output.statistics, problem, grid, noon=noon, **asked)
    return output, gradient


def assert_agrees(problem: Problem, grid: bool = True, **options: Any) -> None:
    """All three calls over tokens; options that a call does not have are left out."""
    assert_loss(problem, grid, **options)
    names = ("rule", "preference", "weights", "aggregation")
    combine = {name: options[name] for name in names if name in options}
    ratio = problem.old_logprobs is not None
    clip = {"clip_range": options.get("clip_range", 0.2)} if ratio else {}
    assert_combined(problem, ratio, grid, **combine, **clip)
    noon = noon_of(resolve_rule(options.get("rule")))
    asked = {k: options[k] for k in ("clip_range", "dual_clip", "aggregation") if k in options}
    problem = replace(problem, ref_logprobs=None)
    got = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, **asked, pairs=True)
    assert_statistics(got, problem, grid, noon=noon, **asked)
