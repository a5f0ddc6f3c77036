"""What each rule guarantees, and how the combined advantage is related to the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _inputs import randn, whitened
from _tables import RULES, diagonal, loss_of
from hypothesis import given
from hypothesis import strategies as st
from problems import EPS32, EPS64, FLOATS, loss_scale, make
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad

# --- what happens to each objective ----------------------------------------------------------------------


@pytest.mark.portable
@given(n=st.integers(1, 6), seed=st.integers(0, 999), spread=st.sampled_from([0, 2, 6]), tokens=st.booleans())
def test_upgrad_decreases_no_objective(n: int, seed: int, spread: int, tokens: bool) -> None:
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
def test_gram_bound_decreases_no_whitened_objective(rule: Any) -> None:
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
def test_two_whitened_objectives_get_equal_weights() -> None:
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
def test_cosines_are_invariant_to_scale_and_sparsity(k: float) -> None:
    x = randn(200, 3)
    base = pk.combine_advantages(x, rule=Pama()).weights
    scaled = pk.combine_advantages(x * torch.tensor([1.0, k, 1.0]), rule=Pama()).weights
    assert torch.allclose(scaled, base, rtol=0, atol=64 * EPS32)  # n-term sums over rho = 0.1, float32 sums
    sparse = x.clone()
    sparse[20:, 1] = 0.0  # nearly solved: nine groups of ten are constant
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
def test_with_noon_the_loss_is_ppos_on_the_combined_advantage(name: str, layout: str) -> None:
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
    for name in ("cosines", "upgrad", "scores", "fixed", "sequence", "token", "softmin", "softmin token"):
        mine = logp.clone().requires_grad_()
        output = pk.pama_loss(mine, old, advantages[..., None], mask, rule=RULES[name], clip_range=clip_range)
        output.loss.backward()
        # both sums have float rounding: 272 eps of terms below 4 e
        assert abs(float(output.loss.detach()) - float(wanted.detach())) <= 2 * 272 * eps * 4
        assert torch.allclose(mine.grad, leaf.grad, rtol=32 * eps, atol=eps / 1000)
        assert (output.weights[mask.any(1)] if output.weights.dim() == 2 else output.weights).eq(1).all()


def test_the_loss_is_the_weighted_sum_of_single_losses() -> None:
    problem = make(rows=4, width=9, dtype=torch.float64)
    for name in ("cosines", "gram noon", "upgrad", "scores"):
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
    for name in ("cosines", "sequence", "token"):
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


def test_a_callable_gets_the_statistics_of_the_batch() -> None:
    """Its attributes `noon` and `pairs` are respected; its weights are used unchanged."""
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


def test_a_weighting_of_a_gram_matrix_is_a_rule() -> None:
    """A callable on a Gram matrix, as TorchJD's weightings are, needs one lambda."""

    class Weighting(torch.nn.Module):
        def forward(self, gram: Tensor) -> Tensor:
            return pk.upgrad_weights(gram).weights

    weighting, x = Weighting(), randn(50, 4, dtype=torch.float64)
    got = pk.combine_advantages(x, rule=lambda s: weighting(s.gram))
    assert torch.allclose(got.weights, pk.combine_advantages(x, rule="upgrad").weights, rtol=0, atol=1e-12)


def test_names_and_defaults() -> None:
    problem = make(rows=4, width=9)
    same = {None: UPGrad(), "pama": Pama(), "upgrad": UPGrad(), "fixed": Fixed(), "softmin": SoftMin()}
    for name, rule in same.items():
        (one, gradient), (other, also) = loss_of(problem, rule=name), loss_of(problem, rule=rule)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(gradient, also)
        module = pk.PamaLoss(rule=name)
        assert torch.equal(module(**problem.loss_arguments()).loss, other.loss)
    assert (Pama().bound, Pama("token").bound, Pama("sequence").bound) == ("gram", "scores", "scores")
    assert Pama.paper("token") == Pama("token", "scores", True, 0.0)
    with pytest.raises(ValueError, match=r"rule: .* Pama.paper\(weights_per\), got 'paper'"):
        pk.combine_advantages(problem.advantages, problem.mask, rule="paper")


@pytest.mark.parametrize("name", ["cosines", "upgrad", "sequence", "paper token", "softmin"])
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
