"""What each rule promises: who takes part, whose weights, and what happens to each objective."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _tables import BATCH, RULES, diagonal, loss_of
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS32, EPS64, FLOATS, loss_scale, make
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference
from pama_kernels._solve import solve_batch
from pama_kernels.rules import resolve_rule

NAN = math.nan
SOLVING = tuple(name for name in BATCH if name != "callable")  # rules per batch that leave objectives out
SIGNED = ("default", "gram", "upgrad", "scores")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whitened(*shape: int, seed: int = 0) -> Tensor:
    return pk.masked_whiten(randn(*shape, seed=seed, dtype=torch.float64))


# --- who takes part --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), diagonal(SOLVING, FLOATS))
def test_a_saturated_objective_takes_no_part(name: str, dtype: torch.dtype) -> None:
    """A constant reward: the others are solved as if it were absent, and keep their whole advantage."""
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
    preference = [0.0, 1.0, 0.0]  # all of its mass on the one that is left out
    got = pk.combine_advantages(saturated, rule=RULES[name], preference=preference)
    wanted = reference.combine_advantages(saturated, rule=RULES[name], preference=preference)
    assert torch.allclose(got.weights.double(), wanted.weights, rtol=0, atol=16 * EPS32)


@pytest.mark.portable
@pytest.mark.parametrize("name", SOLVING)
def test_weights_solved_from_statistics_are_those_of_the_call(name: str) -> None:
    """As many ranks and the running mean solve them: by the same objectives and preference."""
    problem = make(rows=5, width=6, objectives=4, objective_mask=torch.bool, seed=3)
    problem.advantages[..., 2] = 0
    for p in (None, [1.0, 2.0, 3.0, 4.0]):
        for x in (problem, replace(problem, advantages=torch.zeros_like(problem.advantages))):
            got = pk.combine_advantages(**x.combine_arguments(False), rule=RULES[name], preference=p)
            share = None if p is None else torch.tensor(p).double() / 10
            solved = solve_batch(got.statistics, resolve_rule(RULES[name]), share)
            assert torch.allclose(solved.weights, got.weights.double(), rtol=0, atol=2 * EPS32)
            assert float(solved.optimum) == pytest.approx(float(got.optimum), abs=16 * EPS32)
            wanted = reference.combine_advantages(
                **x.combine_arguments(False), rule=RULES[name], preference=p
            ).statistics
            _, _, effective = reference.batch_weights(wanted, RULES[name], p, 4)
            assert torch.allclose(solved.preference, effective, rtol=0, atol=4 * EPS64)


@pytest.mark.parametrize("name", SOLVING)
def test_four_saturated_objectives_do_not_stop_the_fifth(name: str) -> None:
    advantages = torch.cat([torch.zeros(32, 4), randn(32, 1)], 1)
    got = pk.combine_advantages(advantages, rule=RULES[name])
    assert got.weights.tolist() == [0, 0, 0, 0, 1]
    wanted = advantages[:, 4].clamp(min=0) if getattr(RULES[name], "noon", False) else advantages[:, 4]
    assert torch.equal(got.advantages, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tiny_advantages_are_a_signal(dtype: torch.dtype) -> None:
    """1e-30 of either sign, whose squares float32 does not hold; zero sums too; also when merged."""
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
def test_where_nobody_has_a_signal_the_preference_decides(name: str) -> None:
    wanted = torch.tensor([0.125, 0.25, 0.625])
    for shape in ((6, 3), (6, 4, 3)):
        got = pk.combine_advantages(torch.zeros(shape), rule=RULES[name], preference=[1.0, 2.0, 5.0])
        assert torch.equal(got.weights, wanted)
        assert got.optimum == 0
        assert (got.advantages == 0).all()


@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
def test_objectives_without_a_bound_term_take_no_part_in_cosines(layout: str) -> None:
    """All clipped: nothing to take a cosine of; one of them: the others are solved alone."""
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
def test_an_absent_objective_takes_no_part(name: str) -> None:
    """The others are solved as if it were not there; its values have no influence."""
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
    ("name", "layout"), diagonal(["default", "upgrad", "fixed", "scores"], ["per-sequence", "padded"])
)
def test_tasks_that_do_not_meet_keep_their_whole_advantages(name: str, layout: str) -> None:
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


@pytest.mark.parametrize("name", ["default", "upgrad", "fixed", "scores", "sequence", "softmin"])
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


# --- what happens to each objective ----------------------------------------------------------------------


@pytest.mark.portable
@given(n=st.integers(1, 6), seed=st.integers(0, 999), spread=st.sampled_from([0, 2, 6]), tokens=st.booleans())
def test_no_objective_falls(n: int, seed: int, spread: int, tokens: bool) -> None:
    """UPGrad, on any scales: M c >= 0, the covariance of each objective with the combination."""
    x = randn(24, n, seed=seed, dtype=torch.float64)
    x = x - x.mean(0)
    if n > 1:
        x[:, 1] = -x[:, 0] + 0.3 * x[:, 1]  # in conflict
        x = x - x.mean(0)
    x = x * 10.0 ** torch.linspace(0, spread, n).double()
    got = pk.combine_advantages(x.view(6, 4, n) if tokens else x, rule=UPGrad())
    size = x.square().mean(0).sqrt()
    falls = got.statistics.gram @ got.weights
    # KKT residual of 1e-10 of the largest entry of M, three roundings of n products
    assert (falls >= -(1e-10 * size.max().square() + 8 * n * EPS64 * size * size.max())).all()
    covariance = got.statistics.covariance @ got.weights
    assert torch.allclose(covariance, falls, rtol=0, atol=1e-12 * float(size.max() ** 2))
    moved = (x * got.advantages.reshape(-1, 1)).mean(0)
    assert (moved >= -2e-10 * size.max().square()).all()
    assert got.optimum >= 0


@pytest.mark.parametrize("rule", [Pama(regularization=0.0), UPGrad()])
def test_no_whitened_objective_falls_under_the_gram_bound(rule: Any) -> None:
    for seed in range(8):
        x = whitened(40, 5, seed=seed)
        x[:, 1] = -x[:, 0] + 0.2 * x[:, 1]
        x = pk.masked_whiten(x)
        got = pk.combine_advantages(x, rule=rule)
        gap = got.statistics.covariance @ got.weights
        # Wolfe: (Mc)_j >= c'Mc, to the residual that the solver promises
        least = got.optimum if isinstance(rule, Pama) else 0.0
        assert (gap >= least - 1e-10 - 40 * EPS64).all()


@pytest.mark.portable
def test_two_whitened_objectives_weigh_the_same() -> None:
    for seed, correlation in ((0, 0.0), (1, 0.9), (2, -0.9), (3, -1.0), (4, 1.0)):
        x = whitened(64, 2, seed=seed)
        x[:, 1] = correlation * x[:, 0] + math.sqrt(1 - correlation**2) * x[:, 1]
        x = pk.masked_whiten(x)
        for rule in (Pama(), Pama(regularization=0.0)):
            got = pk.combine_advantages(x, rule=rule)
            # the minimiser of [[1, r], [r, 1]]; nearest to the preference to 1e-6 where it is singular
            tolerance = 1e-6 if abs(correlation) == 1 else 1e-12
            assert torch.allclose(got.weights, torch.tensor([0.5, 0.5]).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("k", [1e-6, 1.0, 1e6])
def test_neither_scale_nor_sparsity_decides_under_cosines(k: float) -> None:
    x = randn(200, 3)
    base = pk.combine_advantages(x).weights
    scaled = pk.combine_advantages(x * torch.tensor([1.0, k, 1.0])).weights
    assert torch.allclose(scaled, base, rtol=0, atol=64 * EPS32)  # n-term sums over rho = 0.1, float32 sums
    sparse = x.clone()
    sparse[20:, 1] = 0.0  # nearly solved: nine groups of ten tell nothing
    assert pk.combine_advantages(sparse, rule=Pama(regularization=0.0)).weights.max() < 0.5


# --- the paper's rules and the trainer's own loss --------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_paper_per_token_is_the_least_positive_advantage(dtype: torch.dtype) -> None:
    """max(min_i A_i, 0), Theorem 1 at each token."""
    for n in (1, 2, 3, 5):
        x = randn(7, 30, n, dtype=dtype)
        got = pk.combine_advantages(x, rule=Pama.paper("token"))
        wanted = x.amin(-1).clamp(min=0)
        # a convex combination of n rounded numbers, or 0 by c_i = 0 where A_i > 0
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        tolerance = 8 * n * eps * 4 + torch.finfo(dtype).eps * wanted.abs().double()
        assert ((got.advantages.double() - wanted.double()).abs() <= tolerance).all()
        assert (got.advantages >= 0).all()


def clipped_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    """The clipped surrogate of PPO, token mean, as a trainer has it."""
    ratio = torch.exp(logp - old)
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return -(terms * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("name", "layout"),
    diagonal(
        ["gram noon", "scores noon", "paper batch", "paper sequence", "paper token"],
        ["padded", "per-sequence", "packed", "packed-per-sequence"],
    ),
)
def test_with_noon_the_loss_is_the_trainers_own_on_the_combination(name: str, layout: str) -> None:
    for seed in range(2):
        problem = make(layout, rows=5, width=8, seed=seed, objective_mask=torch.bool if seed else None)
        options: dict[str, Any] = {"rule": RULES[name], "clip_range": (0.2, 0.28)}
        combined = pk.combine_advantages(**problem.combine_arguments(), **options).advantages
        if combined.shape != problem.logprobs.shape:
            if problem.cu_seqlens is None:
                combined = combined[:, None].expand(problem.logprobs.shape)
            else:
                combined = combined.repeat_interleave(problem.cu_seqlens.diff())
        leaf = problem.logprobs.clone().requires_grad_()
        assert problem.mask is not None
        assert problem.old_logprobs is not None
        plain = clipped_loss(leaf, problem.old_logprobs, combined, problem.mask, 0.2, 0.28)
        plain.backward()
        output, gradient = loss_of(problem, **options)
        size, gradient_size = loss_scale(problem, **options)
        # the same weights, up to 3 for one objective of three; 40 terms in float32, 16 roundings each
        assert abs(float(output.loss) - float(plain.detach())) <= 3 * 80 * EPS32 * size
        assert leaf.grad is not None
        assert ((gradient - leaf.grad).abs() <= 3 * 32 * EPS32 * gradient_size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_range", [0.2, (0.2, 0.28), (0.1, 1.0)])
def test_one_objective_is_ppo_whatever_the_rule(dtype: torch.dtype, clip_range: Any) -> None:
    logp = -randn(5, 300, dtype=dtype).abs()
    old = logp - 0.4 * randn(5, 300, seed=1, dtype=dtype)
    advantages, mask = randn(5, 300, seed=2, dtype=dtype), randn(5, 300, seed=3) < 0.5
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    leaf = logp.clone().requires_grad_()
    wanted = clipped_loss(leaf, old, advantages, mask, low, high)
    wanted.backward()
    eps = torch.finfo(dtype).eps
    for name in ("default", "upgrad", "scores", "fixed", "sequence", "token", "softmin", "softmin token"):
        mine = logp.clone().requires_grad_()
        output = pk.pama_loss(mine, old, advantages[..., None], mask, rule=RULES[name], clip_range=clip_range)
        output.loss.backward()
        # both sums have float rounding: 272 eps of terms below 4 e
        assert abs(float(output.loss.detach()) - float(wanted.detach())) <= 2 * 272 * eps * 4
        assert torch.allclose(mine.grad, leaf.grad, rtol=32 * eps, atol=eps / 1000)
        assert (output.weights[mask.any(1)] if output.weights.dim() == 2 else output.weights).eq(1).all()


def test_the_loss_is_the_weighted_sum_of_single_losses() -> None:
    problem = make(rows=4, width=9, dtype=torch.float64)
    for name in ("default", "gram noon", "upgrad", "scores"):
        output, _ = loss_of(problem, rule=RULES[name])
        noon = Pama(noon=getattr(RULES[name], "noon", False))
        total = 0.0
        for i in range(3):
            one = replace(problem, advantages=problem.advantages[..., i : i + 1])
            total += float(output.weights[i]) * float(loss_of(one, rule=noon)[0].loss)
        assert float(output.loss) == pytest.approx(total, abs=36 * 4 * EPS64)  # 36 terms of at most 2.4


@pytest.mark.parametrize(("aggregation", "denominator"), [("token-mean", None), ("seq-mean-token-mean", 4.0)])
def test_the_normalizer_replaces_the_denominator(aggregation: str, denominator: float | None) -> None:
    problem = make(rows=4, width=6, dtype=torch.float64)
    count = denominator or float(problem.valid().sum())
    for name in ("default", "sequence", "token"):
        options: dict[str, Any] = {"rule": RULES[name], "aggregation": aggregation}
        output, gradient = loss_of(problem, **options)
        for normalizer in (2.0 * count, torch.tensor(2.0 * count), torch.tensor(2 * int(count))):
            halved, half = loss_of(problem, **options, normalizer=normalizer)
            assert float(halved.loss) == pytest.approx(float(output.loss) / 2, rel=4 * EPS64)
            assert torch.allclose(half, gradient / 2, rtol=4 * EPS64, atol=0)


def test_the_score_of_an_objective_is_minus_its_own_loss() -> None:
    """At ratio 1, whatever the aggregation (for sums per sequence up to the common denominator)."""
    for layout in ("padded", "per-sequence"):
        problem = make(layout, rows=4, width=9, dtype=torch.float64, ratio=False)
        for aggregation in ("token-mean", "seq-mean-token-mean"):
            options: dict[str, Any] = {"aggregation": aggregation}
            s = pk.objective_statistics(**problem.statistics_arguments(), **options)
            filled = float(problem.valid().any(1).sum()) if aggregation != "token-mean" else None
            for i in range(3):
                one = replace(problem, advantages=problem.advantages[..., i : i + 1])
                loss = loss_of(one, **options, normalizer=filled)[0].loss
                assert float(s.scores[i]) == pytest.approx(-float(loss), abs=36 * 4 * EPS64)


# --- other rules -----------------------------------------------------------------------------------------


def test_fixed_is_the_weighted_sum() -> None:
    """MORLHF; with group-normalised rewards GDPO."""
    for shape in ((9, 3), (4, 5, 3)):
        x = randn(*shape)
        for p in (None, [1.0, 2.0, 5.0]):
            shares = torch.tensor(p or [1.0] * 3) / sum(p or [1.0] * 3)
            got = pk.combine_advantages(x, rule="fixed", preference=p)
            assert torch.equal(got.weights, shares)
            assert torch.allclose(got.advantages, x @ shares, rtol=0, atol=16 * EPS32)
    normal = pk.combine_advantages(pk.group_normalize(x[:, 0], group_size=2), rule="fixed", normalize=True)
    assert float(normal.advantages.square().mean()) == pytest.approx(1.0, rel=16 * EPS32)


@pytest.mark.portable
@pytest.mark.parametrize("weights_per", ["sequence", "token"])
def test_the_limits_of_the_soft_minimum(weights_per: str) -> None:
    """Large temperatures give the preference, small ones all weight to the least advantage."""
    x, p = randn(5, 7, 3), torch.tensor([0.125, 0.25, 0.625])
    means = x.mean(1) if weights_per == "sequence" else x
    hot = pk.combine_advantages(x, rule=SoftMin(1e6, weights_per), preference=[1.0, 2.0, 5.0])
    cold = pk.combine_advantages(x, rule=SoftMin(1e-6, weights_per), preference=[1.0, 2.0, 5.0])
    least = x.gather(
        -1,
        means.argmin(-1, keepdim=True)
        if weights_per == "token"
        else means.argmin(-1, keepdim=True)[:, None].expand(5, 7, 1),
    ).squeeze(-1)
    # exponents of up to 8e-6; at 1e-6 the second least is beyond e^-1000
    assert torch.allclose(hot.advantages, x @ p, rtol=0, atol=1e-4)
    assert torch.allclose(cold.advantages, least, rtol=0, atol=16 * EPS32)
    once = pk.combine_advantages(x, rule=SoftMin(1e-6, weights_per), preference=[1.0, 0.0, 0.0])
    assert torch.allclose(once.advantages, x[..., 0], rtol=0, atol=16 * EPS32)


def test_a_callable_sees_the_statistics_of_the_batch() -> None:
    """Its attributes `noon` and `pairs` are obeyed; its weights are taken as they come."""
    problem = make(rows=4, width=9, objective_mask=torch.bool, seed=1)
    seen: list[pk.ObjectiveStatistics] = []

    class Rule:
        noon = True
        pairs = False

        def __call__(self, s: pk.ObjectiveStatistics) -> Tensor:
            seen.append(s)
            return torch.tensor([0.5, -1.0, 2.5])

    rule = Rule()
    for pairs in (False, True):
        rule.pairs = pairs
        output, _ = loss_of(problem, rule=rule)
        assert seen[-1].has_pairs is pairs
        noon = pk.objective_statistics(**problem.statistics_arguments(), noon=True, pairs=pairs)
        assert torch.equal(seen[-1].buffer, noon.buffer)
        assert torch.equal(output.statistics.buffer, noon.buffer)
        assert output.weights.tolist() == [0.5, -1.0, 2.5]
        assert float(output.optimum) == pytest.approx(
            float(noon.scores @ output.weights.double()), rel=4 * EPS32
        )
    seen.clear()
    combined = pk.combine_advantages(**problem.combine_arguments(False), rule=rule)
    assert len(seen) == 1
    assert combined.weights.tolist() == [0.5, -1.0, 2.5]
    plain = lambda s: s.scores.softmax(0)  # noqa: E731, a function without attributes: signed, with pairs
    output, _ = loss_of(problem, rule=plain)
    signed = pk.objective_statistics(**problem.statistics_arguments(), pairs=True)
    assert torch.equal(output.statistics.buffer, signed.buffer)
    assert torch.equal(output.weights, signed.scores.softmax(0).float())


def test_weightings_of_other_libraries_serve_as_rules() -> None:
    """A callable on a Gram matrix, as TorchJD's weightings are, needs one lambda."""

    class Weighting(torch.nn.Module):
        def forward(self, gram: Tensor) -> Tensor:
            return pk.upgrad_weights(gram).weights

    weighting, x = Weighting(), randn(50, 4, dtype=torch.float64)
    got = pk.combine_advantages(x, rule=lambda s: weighting(s.gram))
    assert torch.allclose(got.weights, pk.combine_advantages(x, rule="upgrad").weights, rtol=0, atol=1e-12)


def test_names_and_defaults() -> None:
    problem = make(rows=4, width=9)
    same = {None: Pama(), "pama": Pama(), "upgrad": UPGrad(), "fixed": Fixed(), "softmin": SoftMin()}
    for name, rule in same.items():
        (one, gradient), (other, also) = loss_of(problem, rule=name), loss_of(problem, rule=rule)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(gradient, also)
        module = pk.PamaLoss(rule=name)
        assert torch.equal(module(**problem.loss_arguments()).loss, other.loss)
    assert (Pama().bound, Pama("token").bound, Pama("sequence").bound) == ("gram", "scores", "scores")
    assert Pama.paper("token") == Pama("token", "scores", True, 0.0)


@pytest.mark.parametrize("name", ["default", "upgrad", "sequence", "paper token", "softmin"])
def test_metrics_name_objectives_and_pairs(name: str) -> None:
    names = ["helpful", "short", "safe"]
    problem = make(rows=4, width=9, seed=4)
    for result in (
        pk.combine_advantages(**problem.combine_arguments(), clip_range=0.2, rule=RULES[name]),
        pk.pama_loss(**problem.loss_arguments(), rule=RULES[name]),
    ):
        metrics, s = result.metrics(names), result.statistics
        mean = result.weights.mean(0) if result.weights.dim() == 2 else result.weights
        assert torch.equal(metrics["pama/optimum"], result.optimum.mean())
        for i, first in enumerate(names):
            assert torch.equal(metrics[f"pama/weight/{first}"], mean[i])
            assert metrics[f"pama/active/{first}"] == float(mean[i] > 0)
            assert torch.equal(metrics[f"pama/score/{first}"], s.scores[i])
            for j in range(i + 1, 3):
                pair = f"{first}~{names[j]}"
                assert (f"pama/conflict/{pair}" in metrics) is s.has_pairs
                if s.has_pairs:
                    assert torch.equal(metrics[f"pama/conflict/{pair}"], s.conflict[i, j])
                    assert torch.equal(metrics[f"pama/cosine/{pair}"], s.cosines[i, j])
        assert all(x.dim() == 0 for x in metrics.values())
        assert all(key.startswith("pama/") for key in metrics)
        assert ("pama/loss" in metrics) is isinstance(result, pk.PamaLossOutput)
    wide = pk.combine_advantages(randn(4, 17), rule="fixed")
    assert not wide.statistics.has_pairs  # pairs for the logs end at 16 objectives
    assert pk.combine_advantages(randn(4, 17), rule="upgrad").statistics.has_pairs
