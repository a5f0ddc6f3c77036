"""Masked and absent values are ignored; a NaN affects only the results that depend on it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _sums import ROUNDED, sums
from _tables import RULES, diagonal, fits, loss_of, weighting
from problems import EPS64, LAYOUTS, SUM_ERROR, Problem, copied, make, poisoned, reference_gradient, same
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels.rules import noon_of, resolve_rule

INF, NAN = math.inf, math.nan
SAMPLE = ("cosines", "paper batch", "upgrad", "sequence", "token", "softmin", "softmin token", "given")


def everything(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """All results of all calls by name."""
    output, gradient = loss_of(problem, kl_coef=0.1, **options)
    combined = pk.combine_advantages(**problem.combine_arguments(), clip_range=0.2, **options)
    noon = noon_of(resolve_rule(options.get("rule")))
    s = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, pairs=True)
    found = {f"loss {k}": v for k, v in output._asdict().items() if isinstance(v, Tensor)}
    found |= {k: v for k, v in combined._asdict().items() if isinstance(v, Tensor)}
    return {**found, "gradient": gradient, "statistics": s.buffer, "of the loss": output.statistics.buffer}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLE)
def test_masked_and_absent_values_are_ignored(layout: str, name: str) -> None:
    """Bitwise, for any values; also in float64 and half types."""
    for dtype, bads in (
        (torch.float32, (NAN, INF, -INF, 1e38)),
        (torch.float64, (NAN,)),
        (torch.bfloat16, (INF,)),
    ):
        optional = {"objective_mask": torch.bool, "importance_weights": True, "ref_logprobs": True}
        problem = make(layout, rows=4, width=9, dtype=dtype, **optional)
        if not fits(name, problem):
            return
        clean = everything(problem, **weighting(name, problem))
        assert all(torch.isfinite(x).all() for x in clean.values())
        for bad in bads:
            dirty = everything(poisoned(problem, bad), **weighting(name, problem))
            for key, value in clean.items():
                assert same(value, dirty[key]), (key, bad)


COUNTS = ("count", "positive_count", "clipped_count", "token_count")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("name", "layout"),
    diagonal(
        ["advantages", "logprobs", "old_logprobs", "importance_weights"],
        ["per-sequence", "padded", "packed-per-sequence"],
    ),
)
def test_sums_that_depend_on_a_nan_or_infinity(layout: str, name: str, bad: float) -> None:
    """Those of the reference; the others keep their values, and no other objective's sum changes."""
    for noon in (False, True):
        problem = make(layout, rows=3, width=40, importance_weights=True, mask=None)
        changed = copied(problem)
        x = getattr(changed, name)
        if name == "advantages":
            x[(1, 28, 1) if x.dim() == 3 else (2, 1)] = bad
        else:
            x[(1, 28) if x.dim() == 2 else len(x) - 3] = bad
        options: dict[str, Any] = {"noon": noon}
        before = pk.objective_statistics(**problem.statistics_arguments(), **options, pairs=True)
        after = pk.objective_statistics(**changed.statistics_arguments(), **options, pairs=True)
        wanted = reference.objective_statistics(**changed.statistics_arguments(), **options)
        for field, value in sums(wanted).items():
            found, old = sums(after)[field], sums(before)[field]
            assert torch.equal(found.isnan(), value.isnan()), (field, found, value)
            if field in COUNTS:
                assert torch.equal(found, value), (field, found, value)
                continue
            kept = ~value.isnan()
            # a tile with a NaN may be summed in another precision
            rounding = SUM_ERROR * problem.eps() if field in ROUNDED else 4 * EPS64
            assert torch.allclose(found[kept], old[kept], rtol=rounding, atol=0), field
        for figure in ("scores", "gram", "cosines", "advantage_gram"):
            pattern = getattr(wanted, figure).isnan()
            assert torch.equal(getattr(after, figure).isnan(), pattern), figure
            kept = ~pattern
            assert torch.allclose(getattr(after, figure)[kept], getattr(before, figure)[kept], rtol=1e-14)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("rule", "name"),
    diagonal(SAMPLE, ["advantages", "logprobs", "old_logprobs", "importance_weights", "ref_logprobs"]),
)
def test_results_that_depend_on_a_nan_or_infinity(name: str, bad: float, rule: str) -> None:
    """Loss and gradient are NaN where weights or terms depend on the value; all else keeps its bits."""
    problem = make(rows=4, width=6, importance_weights=True, ref_logprobs=True, seed=1)
    assert problem.mask is not None
    problem.mask[0, 2] = problem.mask[3, 1] = True
    options = {**weighting(rule, problem), "kl_coef": 0.1}
    _, before = loss_of(problem, **options)
    changed = copied(problem)
    getattr(changed, name)[(0, 2, 1) if name == "advantages" else (0, 2)] = bad
    output, gradient = loss_of(changed, **options)
    specified, exact = reference_gradient(changed, **options)
    assert specified.loss.isnan()
    assert output.loss.isnan()
    assert torch.equal(output.weights.isnan(), specified.weights.isnan())
    token = torch.zeros(4, 6, dtype=torch.bool)
    token[0, 2] = True
    row = problem.valid() & (torch.arange(4) == 0)[:, None]
    scope = token if name == "ref_logprobs" or "token" in rule or rule == "given" else row
    if scope is row and rule not in ("sequence", "softmin"):
        scope = problem.valid()
    assert exact[token].isnan().all()
    assert torch.equal(gradient.isnan(), exact.isnan())
    assert (gradient.isnan() <= scope).all()
    assert torch.equal(gradient[~scope], before[~scope])


@pytest.mark.portable
@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
@pytest.mark.parametrize("rule", ["cosines", "gram noon", "paper batch", "upgrad", "callable"])
def test_weights_that_are_nan(rule: str, layout: str) -> None:
    """They make every token NaN at which some objective is present, whatever the sign of its advantage."""
    problem = make(layout, rows=4, width=6, seed=1, objective_mask=torch.bool)
    assert problem.objective_mask is not None
    problem.objective_mask[3] = False
    problem.objective_mask[2] = torch.tensor([True, False, False])
    problem.advantages[2] = -1.0
    problem.logprobs[tuple(problem.valid().nonzero()[0])] = NAN
    reached = problem.valid() & problem.objective_mask.any(1)[:, None]
    output, gradient = loss_of(problem, **weighting(rule, problem))
    combined = pk.combine_advantages(**problem.combine_arguments(), clip_range=0.2, rule=RULES[rule])
    specified, exact = reference_gradient(problem, **weighting(rule, problem))
    assert output.weights.isnan().all()
    assert specified.weights.isnan().all()
    assert torch.equal(gradient.isnan(), reached)
    assert torch.equal(exact.isnan(), reached)
    assert torch.equal(combined.advantages.isnan(), reached if layout == "padded" else reached.any(1))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "rule", ["cosines", "scores", "paper batch", "upgrad", "sequence", "token", "paper token"]
)
def test_advantages_that_depend_on_a_nan_or_infinity(rule: str, bad: float) -> None:
    problem = make(rows=4, width=6, seed=1, mask=None)
    changed = problem.advantages.clone()
    changed[0, 2, 1] = bad
    place = torch.zeros(4, 6, dtype=torch.bool)
    place[0, 2] = True
    scope = {"sequence": (torch.arange(4) == 0)[:, None].expand(4, 6), "token": place, "paper token": place}
    reached = scope.get(rule, torch.ones(4, 6, dtype=torch.bool))
    for solve in (pk.combine_advantages, reference.combine_advantages):
        before, after = solve(problem.advantages, rule=RULES[rule]), solve(changed, rule=RULES[rule])
        assert torch.equal(after.advantages.isnan(), reached), solve
        assert torch.equal(after.advantages[~reached], before.advantages[~reached])
        if rule == "sequence":
            assert after.weights.isnan().any(1).tolist() == [True, False, False, False]
        else:
            assert after.weights.isnan().all()
            assert after.optimum.isnan()


def test_a_nan_in_one_sequence_of_advantages_per_sequence() -> None:
    advantages = torch.tensor([[1.0, 2.0], [0.5, NAN], [3.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    rows = {"sequence": [False, True, False], "cosines": [True] * 3, "token": [False, True, False]}
    for name, wanted in rows.items():
        got = pk.combine_advantages(advantages, mask, rule=RULES[name])
        assert got.advantages.isnan().tolist() == wanted
    mask[1] = 0  # now ignored
    for name in rows:
        got = pk.combine_advantages(advantages, mask, rule=RULES[name])
        assert torch.isfinite(got.advantages).all()
        assert got.advantages[1] == 0


def test_a_non_finite_token_affects_only_objectives_present_there() -> None:
    for layout in ("padded", "per-sequence"):
        problem = make(layout, rows=2, width=4, mask=None)
        problem = replace(problem, objective_mask=torch.tensor([[True, True, False], [False, True, True]]))
        problem.logprobs[0, 2] = NAN
        for call in (pk.objective_statistics, reference.objective_statistics):
            assert call(**problem.statistics_arguments()).scores.isnan().tolist() == [True, True, False]


def test_only_logprobs_have_a_gradient() -> None:
    problem = make(importance_weights=True, ref_logprobs=True)
    leaves = {k: v.clone() for k, v in problem.loss_arguments().items() if v is not None}
    for x in leaves.values():
        if x.is_floating_point():
            x.requires_grad_()
    for name in ("cosines", "sequence", "token", "callable"):
        output = pk.pama_loss(**leaves, rule=RULES[name], kl_coef=0.1)
        output.loss.backward()
        assert [k for k, v in leaves.items() if v.grad is not None] == ["logprobs"]
        results = (output.weights, output.optimum, output.statistics.buffer)
        assert not any(x.requires_grad for x in results)


def test_inputs_are_not_modified_and_results_share_no_memory() -> None:
    problem = make(importance_weights=True, ref_logprobs=True, objective_mask=torch.bool)
    before = copied(problem)
    for name in ("cosines", "sequence", "token", "given"):
        first = everything(problem, **weighting(name, problem))
        kept = {key: value.clone() for key, value in first.items()}
        everything(make(rows=9, width=50, objectives=4, ref_logprobs=True, seed=5), rule=RULES["cosines"])
        everything(problem, **weighting(name, problem))
        assert all(torch.equal(first[key], value) for key, value in kept.items())
    for name, x in vars(problem).items():
        assert x is None or torch.equal(x, getattr(before, name)), name
