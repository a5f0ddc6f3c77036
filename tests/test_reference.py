"""The reference's passes over tokens against the formulas, written as loops over plain numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import AGGREGATIONS, INF, LAYOUTS, RULES, Problem, make

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference

# --- statistics and loss -------------------------------------------------------------------------


class Token:
    """One valid token as plain numbers."""

    def __init__(self, problem: Problem, row: int, at: int, index: tuple[int, ...]) -> None:
        n = problem.objectives
        per_token = problem.advantages.shape[:-1] == problem.logprobs.shape
        self.row, self.index = row, index
        self.logp = float(problem.logprobs[index])
        self.d = 0.0 if problem.old_logprobs is None else self.logp - float(problem.old_logprobs[index])
        self.w = 1.0 if problem.importance_weights is None else float(problem.importance_weights[index])
        self.ref = None if problem.ref_logprobs is None else float(problem.ref_logprobs[index])
        source = problem.advantages[index] if per_token else problem.advantages[row]
        self.raw = [float(x) for x in source]
        self.here = [True] * n
        if problem.objective_mask is not None:
            flat = problem.logprobs.dim() == 1 and problem.cu_seqlens is None
            self.here = [bool(x) for x in problem.objective_mask[at if flat else row]]


def tokens_of(problem: Problem) -> tuple[list[Token], list[int]]:
    """The valid tokens, and how many each sequence has."""
    if problem.logprobs.dim() == 2:
        rows, width = problem.logprobs.shape
        places = [(b, t, (b, t)) for b in range(rows) for t in range(width)]
    elif problem.cu_seqlens is not None:
        offsets = problem.cu_seqlens.tolist()
        rows = len(offsets) - 1
        places = [(b, t, (t,)) for b in range(rows) for t in range(offsets[b], offsets[b + 1])]
    else:
        rows = 1
        places = [(0, t, (t,)) for t in range(len(problem.logprobs))]
    tokens = [
        Token(problem, *place) for place in places if problem.mask is None or problem.mask[place[2]] != 0
    ]
    return tokens, [sum(token.row == b for token in tokens) for b in range(rows)]


def terms(
    token: Token, i: int, low: float, high: float, dual: float, noon: bool
) -> tuple[float, float, bool]:
    """g, I and whether the gradient is clipped away, of one objective at one token."""
    a = max(token.raw[i], 0.0) if noon else token.raw[i]
    u = math.exp(min(max(token.d, -20.0), 20.0))
    g = token.w * min(min(u, dual) * a, min(max(u, 1 - low), 1 + high) * a)
    stopped = (a > 0 and u > 1 + high) or (a < 0 and (u < 1 - low or u > dual)) or abs(token.d) > 20
    return g, 0.0 if stopped else token.w * a, stopped and a != 0


@given(
    layout=st.sampled_from(LAYOUTS),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (1.0, INF), (0.0, 0.0)]),
    dual_clip=st.sampled_from([None, 3.0]),
    noon=st.booleans(),
    absent=st.booleans(),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl_coef=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_statistics_and_loss_are_the_formulas(
    layout: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    noon: bool,
    absent: bool,
    aggregation: str,
    kl_coef: float,
    seed: int,
) -> None:
    if math.isinf(clip[1]):
        dual_clip = None
    if layout == "flat":
        aggregation = "token-mean"
    here = torch.bool if absent else None
    extra = {"importance_weights": True, "ref_logprobs": True, "overflow": True}
    problem = make(layout, rows=3, width=4, seed=seed, objective_mask=here, **extra)
    tokens, lengths = tokens_of(problem)
    options: dict[str, Any] = {"clip_range": clip, "dual_clip": dual_clip, "aggregation": aggregation}
    dual = INF if dual_clip is None else dual_clip

    def omega(t: Token) -> float:
        return 1 / lengths[t.row] if aggregation == "seq-mean-token-mean" else 1.0

    s = reference.objective_statistics(**problem.statistics_arguments(), **options, noon=noon)
    for i in range(3):
        found = [(omega(t), t, *terms(t, i, *clip, dual, noon)) for t in tokens if t.here[i]]
        count = sum(o for o, *_ in found)
        wanted = {
            "count": count,
            "bound_sum": sum(o * bound for o, _, _, bound, _ in found),
            "bound_square_sum": sum(o * bound**2 for o, _, _, bound, _ in found),
            "logprob_sum": sum(o * bound * t.logp for o, t, _, bound, _ in found),
            "surrogate_sum": sum(o * g for o, _, g, _, _ in found),
            "advantage_sum": sum(o * t.raw[i] for o, t, *_ in found),
            "advantage_square_sum": sum(o * t.raw[i] ** 2 for o, t, *_ in found),
            "positive_count": sum(o * (t.raw[i] > 0) for o, t, *_ in found),
            "clipped_count": sum(o * stopped for o, *_, stopped in found),
            "scores": sum(o * bound for o, _, _, bound, _ in found) / (count or 1),
            "second_moments": sum(o * bound**2 for o, _, _, bound, _ in found) / (count or 1),
        }
        for name, value in wanted.items():
            assert float(getattr(s, name)[i]) == pytest.approx(value, rel=1e-12, abs=1e-9), name
        assert bool(s.signal[i]) == any(t.raw[i] for _, t, *_ in found)
        for j in range(3):
            both = [t for t in tokens if t.here[i] and t.here[j]]
            bounds = [[terms(t, k, *clip, dual, noon)[1] for t in both] for k in (i, j)]
            product = sum(omega(t) * x * y for t, x, y in zip(both, *bounds, strict=True))
            counts = count * sum(omega(t) for t in tokens if t.here[j])
            assert float(s.gram[i, j]) == pytest.approx(product / math.sqrt(counts or 1), abs=1e-9)
            assert float(s.conflict[i, j]) == pytest.approx(
                correlation(*([t.raw[k] for t in both] for k in (i, j)), [omega(t) for t in both]), abs=1e-9
            )
    assert float(s.token_count) == pytest.approx(sum(map(omega, tokens)), abs=1e-12)
    kl = sum(omega(t) * (math.exp(d) - 1 - d) for t in tokens for d in [min(max(t.d, -20), 20)])
    assert float(s.kl_sum) == pytest.approx(kl, rel=1e-12, abs=1e-9)

    c = torch.tensor([0.5, 0.25, 0.75])
    rule = Pama(bound="scores", noon=noon)
    output = reference.pama_loss(**problem.loss_arguments(), rule=rule, weights=c, kl_coef=kl_coef, **options)
    total = 0.0
    for t in tokens:
        value = -sum(float(c[i]) * terms(t, i, *clip, dual, noon)[0] for i in range(3) if t.here[i])
        assert t.ref is not None
        r = min(max(t.ref - t.logp, -20.0), 20.0)
        total += omega(t) * (value + kl_coef * (math.exp(r) - r - 1))
    denominator = len(tokens) if aggregation == "token-mean" else len(lengths)
    assert float(output.loss) == pytest.approx(total / max(denominator, 1), rel=1e-12, abs=1e-9)


def correlation(x: list[float], y: list[float], omega: list[float]) -> float:
    """Pearson's under token weights, 0 where one of them does not vary."""
    if len(set(x)) <= 1 or len(set(y)) <= 1:
        return 0.0
    n = sum(omega)
    mx, my = (sum(o * a for o, a in zip(omega, v, strict=True)) / n for v in (x, y))
    triples = list(zip(omega, x, y, strict=True))
    variances = sum(o * (a - mx) ** 2 for o, a, _ in triples) * sum(o * (b - my) ** 2 for o, _, b in triples)
    return sum(o * (a - mx) * (b - my) for o, a, b in triples) / math.sqrt(variances)


@pytest.mark.parametrize("noon", [True, False])
def test_the_bound_term_is_the_gradient_of_the_surrogate(noon: bool) -> None:
    """I = (dg / dlogp) / u: autograd's gradient agrees with the indicator."""
    problem = make(rows=6, width=9, objectives=1, importance_weights=True, overflow=True, mask=None)
    leaf = problem.logprobs.double().requires_grad_()
    arguments = {**problem.loss_arguments(), "logprobs": leaf, "dual_clip": 2.5, "normalizer": 1.0}
    rule = Pama(bound="scores", noon=noon)
    reference.pama_loss(**arguments, rule=rule, weights=torch.ones(1)).loss.backward()
    assert leaf.grad is not None
    assert problem.old_logprobs is not None
    d = problem.logprobs.double() - problem.old_logprobs.double()
    bound = -leaf.grad / d.clamp(-20, 20).exp()
    s = reference.objective_statistics(**problem.statistics_arguments(), noon=noon, dual_clip=2.5)
    assert float(bound.sum()) == pytest.approx(float(s.bound_sum[0]), abs=1e-10)
    assert float(bound.square().sum()) == pytest.approx(float(s.bound_square_sum[0]), abs=1e-10)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != Pama(regularization=0.0)], ids=repr)
def test_every_rule(rule: Any) -> None:
    """Weights of each reading, their division by presence, and the loss, from loops over the valid tokens."""
    problem = make(rows=3, width=4, objective_mask=torch.bool, importance_weights=True, seed=5)
    tokens, lengths = tokens_of(problem)
    noon, per = getattr(rule, "noon", False), getattr(rule, "weights_per", "batch")
    p = torch.tensor([1.0, 2.0, 3.0]).double() / 6
    output = reference.pama_loss(**problem.loss_arguments(), rule=rule, preference=[1, 2, 3])
    if per == "batch":
        groups = [tokens]
    elif per == "sequence":
        groups = [[t for t in tokens if t.row == b] for b in range(len(lengths))]
    else:
        groups = [[t] for t in tokens]
    solutions, total = [], 0.0
    for group in groups:
        bounds = torch.tensor(
            [[terms(t, i, 0.2, 0.2, INF, noon)[1] for i in range(3)] for t in group]
        ).double()
        raw = torch.tensor([t.raw for t in group]).double().reshape(-1, 3)
        here = torch.tensor([t.here for t in group]).double().reshape(-1, 3)
        count, bounds = here.sum(0), bounds.reshape(-1, 3) * here
        present = count > 0
        means, gram = bounds.sum(0) / count.clamp(min=1), bounds.T @ bounds
        norm = torch.outer(gram.diagonal(), gram.diagonal()).sqrt()
        if isinstance(rule, Fixed):
            solution = reference.Solution(p, means @ p)
        elif isinstance(rule, UPGrad):
            solution = reference.upgrad_weights(gram / torch.outer(count, count).sqrt(), preference=p)
        elif isinstance(rule, SoftMin):
            a = (raw * here).sum(0) / count.clamp(min=1)
            options = {"temperature": rule.temperature, "present": present}
            solution = reference.softmin_weights(a, preference=p, **options)
        elif rule.bound == "gram":
            solution = reference.min_norm_weights(gram / norm, preference=p, regularization=0.1)
        else:
            scale = (gram.diagonal() / count.clamp(min=1)).max()
            options = {"regularization": rule.regularization, "scale": scale, "present": present}
            solution = reference.pama_weights(means, preference=p, **options)
        solutions.append(solution)
        inside = torch.where(present, p, 0.0)
        inside = inside / inside.sum() if present.any() else p
        for t in group:
            g = [terms(t, i, 0.2, 0.2, INF, noon)[0] * t.here[i] for i in range(3)]
            share = sum(float(inside[i]) for i in range(3) if t.here[i]) if per != "token" else 1.0
            total -= sum(float(solution.weights[i]) * g[i] for i in range(3)) / (share or 1.0)
    weights, optimum = (torch.stack(parts) for parts in zip(*solutions, strict=True))
    if per != "sequence":
        weights, optimum = weights.mean(0), optimum.mean()
    assert torch.allclose(output.weights, weights, rtol=0, atol=1e-10)
    assert torch.allclose(output.optimum, optimum, rtol=0, atol=1e-10)
    assert float(output.loss) == pytest.approx(total / len(tokens), abs=1e-10)


def test_an_objective_without_a_signal_is_excluded() -> None:
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(4, 5, 3, generator=g)
    advantages[..., 1] = 0
    for rule in ("pama", "upgrad", "fixed", Pama(bound="scores")):
        whole = reference.combine_advantages(advantages, rule=rule, preference=[1, 2, 3])
        part = reference.combine_advantages(advantages[..., [0, 2]], rule=rule, preference=[1, 3])
        assert torch.allclose(whole.weights[[0, 2]], part.weights, rtol=0, atol=1e-15)
        assert whole.weights[1] == 0
        nothing = reference.combine_advantages(0 * advantages, rule=rule, preference=[1, 2, 3])
        assert torch.allclose(nothing.weights, torch.tensor([1.0, 2, 3]).double() / 6)


def test_every_layout_of_the_same_tokens() -> None:
    """Padded, packed, per sequence and not: the same loss and statistics."""
    g = torch.Generator().manual_seed(0)
    inside = torch.arange(5) < torch.tensor([3, 0, 5, 1])[:, None]
    logp = -torch.rand(4, 5, generator=g)
    old = logp - 0.3 * torch.randn(4, 5, generator=g)
    adv = torch.randn(4, 2, generator=g)
    wide, cu = adv[:, None].expand(4, 5, 2), torch.tensor([0, 3, 3, 8, 9])
    for rule in RULES:
        options: dict[str, Any] = {"rule": rule, "aggregation": "seq-mean-token-mean"}
        padded = [reference.pama_loss(logp, old, a, inside, **options) for a in (adv, wide)]
        packed = [
            reference.pama_loss(logp[inside], old[inside], a, cu_seqlens=cu, **options)
            for a in (adv, wide[inside])
        ]
        for other in (*padded[1:], *packed):
            assert float(other.loss) == pytest.approx(float(padded[0].loss), abs=1e-14)
            assert torch.allclose(other.weights, padded[0].weights, rtol=0, atol=1e-13)
            assert torch.allclose(other.statistics.scores, padded[0].statistics.scores, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 3)])
def test_empty_results_have_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    for rule in RULES:
        assert reference.combine_advantages(torch.zeros(shape), rule=rule).advantages.shape == shape[:-1]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_the_loss_of_no_tokens_is_differentiable(shape: tuple[int, ...]) -> None:
    for module in (pk, reference):
        logprobs = torch.zeros(shape, requires_grad=True)
        loss = module.pama_loss(logprobs, None, torch.zeros(*shape, 2)).loss
        loss.backward()
        assert loss == 0
        assert logprobs.grad is not None


# --- what is undefined ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pk, reference], ids=["kernels", "reference"])
def test_flat_tokens_have_no_sequences(module: Any) -> None:
    """Without `cu_seqlens` weights per sequence and means over sequences are undefined: an error, in the
    kernels' functions and in the specification."""
    advantages, logprobs, offsets = torch.ones(6, 2), torch.zeros(6), torch.tensor([0, 2, 6])
    for rule in (Pama("sequence"), Pama.paper("sequence"), SoftMin()):
        with pytest.raises(ValueError, match="rule: weights per sequence need cu_seqlens"):
            module.pama_loss(logprobs, None, advantages, rule=rule)
        with pytest.raises(ValueError, match="rule: weights per sequence need cu_seqlens"):
            module.combine_advantages(advantages, torch.ones(6), rule=rule)
        assert module.pama_loss(logprobs, None, advantages, rule=rule, cu_seqlens=offsets).loss.dim() == 0
    for aggregation in AGGREGATIONS[1:]:
        with pytest.raises(ValueError, match=r"aggregation: .* needs cu_seqlens"):
            module.pama_loss(logprobs, None, advantages, aggregation=aggregation)
        with pytest.raises(ValueError, match=r"aggregation: .* needs cu_seqlens"):
            module.objective_statistics(logprobs, None, advantages, aggregation=aggregation)
    for rows in (1, 6):
        with pytest.raises(ValueError, match=r"weights: expected shape \(2,\)"):
            module.pama_loss(logprobs, None, advantages, weights=torch.ones(rows, 2))
