"""Which objectives get weight: those that are present, and have a signal and a bound term."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _inputs import randn, whitened
from _tables import BATCH, RULES, diagonal, loss_of
from problems import DEVICE, EPS32, EPS64, FLOATS, make

import pama_kernels as pk
from pama_kernels import Fixed, Pama, UPGrad, reference
from pama_kernels._solve import solve_batch
from pama_kernels.rules import resolve_rule

NAN = math.nan
SOLVING = tuple(name for name in BATCH if name != "callable")  # rules per batch that exclude objectives
SIGNED = ("cosines", "gram", "upgrad", "scores")


@pytest.mark.parametrize(("name", "dtype"), diagonal(SOLVING, FLOATS))
def test_a_saturated_objective_is_excluded(name: str, dtype: torch.dtype) -> None:
    """A constant reward: the others are solved as if it were absent, and keep their full advantage."""
    saturated = randn(16, 3, dtype=dtype)
    saturated[:, 1] = 0.0
    saturated[:8, 1] = -0.0
    kept = saturated[:, [0, 2]]
    for forms in ((saturated, kept), (saturated[:, None].expand(16, 5, 3), kept[:, None].expand(16, 5, 2))):
        got, alone = (pk.combine_advantages(x, rule=RULES[name]) for x in forms)
        eps = EPS64 if dtype == torch.float64 else EPS32
        assert got.weights[1] == 0
        assert got.statistics.signal.tolist() == [True, False, True]
        # the same problem, gathered; unregularized scores have a condition of max a / spread
        assert torch.allclose(got.weights[[0, 2]], alone.weights, rtol=0, atol=16 * eps)
        error = 64 * eps + 2 * torch.finfo(dtype).eps
        assert torch.allclose(got.advantages, alone.advantages, rtol=error, atol=error)
    preference = [0.0, 1.0, 0.0]  # only on the objective that is excluded
    got = pk.combine_advantages(saturated, rule=RULES[name], preference=preference)
    wanted = reference.combine_advantages(saturated, rule=RULES[name], preference=preference)
    assert torch.allclose(got.weights.double(), wanted.weights, rtol=0, atol=16 * EPS32)


@pytest.mark.portable
@pytest.mark.parametrize("name", SOLVING)
def test_weights_from_statistics_equal_those_of_the_call(name: str) -> None:
    """As solved for merged ranks and the running mean: over the same objectives and preference."""
    problem = make(rows=5, width=6, objectives=4, objective_mask=torch.bool, seed=3)
    problem.advantages[..., 2] = 0
    for p in (None, [1.0, 2.0, 3.0, 4.0]):
        for x in (problem, replace(problem, advantages=torch.zeros_like(problem.advantages))):
            got = pk.combine_advantages(**x.combine_arguments(False), rule=RULES[name], preference=p)
            share = None if p is None else torch.tensor(p).double().to(DEVICE) / 10
            s = pk.ObjectiveStatistics(got.statistics.buffer.to(DEVICE), 4, got.statistics.has_pairs)
            solved = solve_batch(s, resolve_rule(RULES[name]), share)
            assert torch.allclose(solved.weights.cpu(), got.weights.double(), rtol=0, atol=2 * EPS32)
            assert float(solved.optimum) == pytest.approx(float(got.optimum), abs=16 * EPS32)
            wanted = reference.combine_advantages(
                **x.combine_arguments(False), rule=RULES[name], preference=p
            ).statistics
            _, _, effective = reference.batch_weights(wanted, RULES[name], p, 4)
            assert torch.allclose(solved.preference.cpu(), effective, rtol=0, atol=4 * EPS64)


@pytest.mark.parametrize("name", SOLVING)
def test_four_saturated_objectives_do_not_affect_the_fifth(name: str) -> None:
    advantages = torch.cat([torch.zeros(32, 4), randn(32, 1)], 1)
    got = pk.combine_advantages(advantages, rule=RULES[name])
    assert got.weights.tolist() == [0, 0, 0, 0, 1]
    wanted = advantages[:, 4].clamp(min=0) if getattr(RULES[name], "noon", False) else advantages[:, 4]
    assert torch.equal(got.advantages, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tiny_advantages_are_a_signal(dtype: torch.dtype) -> None:
    """1e-30 of either sign, whose squares underflow in float32; with zero sums; merged statistics too."""
    tiny = max(1e-30, torch.finfo(dtype).smallest_normal)
    advantages = randn(12, 4, dtype=dtype)
    advantages[:, 1] = 0
    advantages[:, 2] = 0
    advantages[3, 1], advantages[5, 1] = tiny, -tiny
    advantages[7, 2] = -tiny
    for x in (advantages, advantages[:, None].expand(12, 3, 4)):
        for noon in (True, False):
            s = pk.objective_statistics(None, None, x, noon=noon, pairs=True)
            assert s.signal.tolist() == [True] * 4
            parts = [
                pk.objective_statistics(None, None, x[r], noon=noon, pairs=True)
                for r in (slice(6), slice(6, 12))
            ]
            assert parts[0].signal.tolist() == [True, True, False, True]
            assert parts[1].signal.tolist() == [True, False, True, True]
            assert sum(parts).signal.all()
        if dtype in (torch.float32, torch.float64):
            wanted = reference.combine_advantages(x).weights
            found = pk.combine_advantages(x).weights.double()
            assert torch.allclose(found, wanted, rtol=0, atol=16 * EPS32)
            assert (found > 0).any()


@pytest.mark.parametrize("name", SOLVING)
def test_without_a_signal_weights_are_the_preference(name: str) -> None:
    wanted = torch.tensor([0.125, 0.25, 0.625])
    for shape in ((6, 3), (6, 4, 3)):
        got = pk.combine_advantages(torch.zeros(shape), rule=RULES[name], preference=[1.0, 2.0, 5.0])
        assert torch.equal(got.weights, wanted)
        assert got.optimum == 0
        assert (got.advantages == 0).all()


@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
def test_objectives_without_a_bound_term_are_excluded_from_cosines(layout: str) -> None:
    """If all are clipped there are no cosines; if one is, the others are solved without it."""
    problem = make(layout, rows=4, width=6, mask=None)
    up = replace(problem, old_logprobs=problem.logprobs - 2.0, advantages=problem.advantages.abs() + 0.125)
    p = [1.0, 2.0, 5.0]
    for rule in (Pama(), Pama(noon=True), Pama(regularization=0.0)):
        output, gradient = loss_of(up, rule=rule, preference=p)
        assert torch.equal(output.weights, torch.tensor([0.125, 0.25, 0.625]))
        assert output.optimum == 0
        assert (gradient == 0).all()
        assert (output.statistics.clip_fraction == 1).all()
        one = replace(up, advantages=up.advantages * torch.tensor([-1.0, 1.0, -1.0]))
        if not rule.noon:
            output, _ = loss_of(one, rule=rule, preference=p)
            rest = replace(one, advantages=one.advantages[..., [0, 2]])
            alone, _ = loss_of(rest, rule=rule, preference=[1.0, 5.0])
            assert output.weights[1] == 0
            assert torch.allclose(output.weights[[0, 2]], alone.weights, rtol=0, atol=16 * EPS32)
            assert float(output.loss) == pytest.approx(float(alone.loss), rel=64 * EPS32)
    output, _ = loss_of(up, rule=UPGrad(), preference=p)  # a zero matrix: the preference
    assert torch.equal(output.weights, torch.tensor([0.125, 0.25, 0.625]))


@pytest.mark.parametrize("name", [name for name in RULES if name != "callable"])
def test_an_absent_objective_is_excluded(name: str) -> None:
    """The others are solved as if it did not exist; its values are ignored."""
    problem = make(rows=5, width=9, objectives=4, seed=2, dtype=torch.float64)
    here = torch.ones(5, 4, dtype=torch.bool)
    here[:, 2] = False
    advantages = problem.advantages.clone()
    advantages[..., 2] = NAN
    for p in ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        s = pk.combine_advantages(
            advantages, problem.mask, objective_mask=here, rule=RULES[name], preference=p
        )
        kept = [0, 1, 3]
        t = pk.combine_advantages(
            advantages[..., kept], problem.mask, rule=RULES[name], preference=[p[i] for i in kept]
        )
        error = 64 * 8 * 4 * 2 * EPS64  # `solution_error`
        # rows without a valid token report the preference, which is over all four
        rows = problem.valid().any(1) if s.weights.dim() == 2 else slice(None)
        assert (s.weights[rows][..., 2] == 0).all()
        if "token" not in name or name == "softmin":
            assert torch.allclose(s.weights[rows][..., kept], t.weights[rows], rtol=0, atol=error)
        assert torch.allclose(s.advantages, t.advantages, rtol=0, atol=16 * error)


@pytest.mark.parametrize(
    ("name", "layout"), diagonal(["cosines", "upgrad", "fixed", "scores"], ["per-sequence", "padded"])
)
def test_disjoint_tasks_keep_their_full_advantages(name: str, layout: str) -> None:
    """Each completion has one reward: with equal weights its combined advantage is that reward's."""
    here = torch.eye(3).repeat(4, 1)
    rewards = whitened(12, 3)
    rewards = pk.masked_whiten(rewards, objective_mask=here)
    shape = (12, 3) if layout == "per-sequence" else (12, 5, 3)
    advantages = rewards if layout == "per-sequence" else rewards[:, None].expand(shape)
    for p in (None, [1.0, 2.0, 5.0]):
        got = pk.combine_advantages(advantages, objective_mask=here, rule=RULES[name], preference=p)
        own = (rewards * here).sum(1)
        if name == "fixed":
            assert torch.equal(got.weights, torch.tensor(p or [1.0] * 3).double() / (8 if p else 3))
        if name == "fixed" or p is None:
            scale = got.weights / (torch.tensor(p or [1.0] * 3).double() / (8 if p else 3))
            own = own * (here * scale).sum(1)  # of whitened rewards in thirds of a batch
            wanted = own if layout == "per-sequence" else own[:, None].expand(12, 5)
            assert torch.allclose(got.advantages, wanted, rtol=0, atol=64 * 8 * 3 * EPS64)
    if name == "fixed":
        assert torch.equal(pk.combine_advantages(rewards, objective_mask=here, rule=Fixed()).advantages, own)


@pytest.mark.parametrize("name", ["cosines", "upgrad", "fixed", "scores", "sequence", "softmin"])
def test_preferences_with_zeros(name: str) -> None:
    """Allowed; a token at which only objectives of preference 0 are present has no advantage (per batch)."""
    problem = make(rows=6, width=5, objective_mask=torch.bool, seed=3)
    for p in ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0]):
        options: dict[str, Any] = {"rule": RULES[name], "preference": p}
        got = pk.combine_advantages(**problem.combine_arguments(False), **options)
        wanted = reference.combine_advantages(**problem.combine_arguments(False), **options)
        assert torch.isfinite(got.advantages).all()
        assert torch.allclose(got.weights.double(), wanted.weights, rtol=0, atol=64 * 8 * 3 * EPS32)
        assert torch.allclose(got.advantages.double(), wanted.advantages, rtol=0, atol=64 * 64 * 3 * EPS32)
    if name in ("fixed", "upgrad"):
        got = pk.combine_advantages(randn(8, 3), rule=RULES[name], preference=[0.0, 0.0, 1.0])
        assert got.weights.argmax() == 2
