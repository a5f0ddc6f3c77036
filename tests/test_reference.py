"""The reference itself: against the formulas written as loops over plain numbers, and against cvxpy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import LAYOUTS, WEIGHTS_PER, Problem, make

from pama_kernels import reference

INF = math.inf


# --- the scalar problem ----------------------------------------------------------------------------------


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=7))
def test_projection_on_the_simplex(values: list[int]) -> None:
    """The nearest point: v - c is largest, and equal, on the support (the optimality condition)."""
    v = torch.tensor(values).double() / 4
    c = reference.project_on_simplex(v)
    assert float(c.sum()) == pytest.approx(1, abs=1e-14)
    assert (c >= 0).all()
    slack = v - c
    assert (slack <= slack[c > 0].min() + 1e-14).all()


@given(
    values=st.lists(st.integers(-8, 8), min_size=1, max_size=6),
    regularization=st.sampled_from([0.05, 1.0]),
    shift=st.integers(0, 5),
)
def test_regularized_weights_satisfy_the_closed_form(
    values: list[int], regularization: float, shift: int
) -> None:
    """The formulas of the design on the support that was found, with multipliers of the right sign."""
    a = torch.tensor(values).double() / 4
    p = torch.tensor([1.0 + (i + shift) % 3 for i in range(len(values))]).double()
    p = p / p.sum()
    c, optimum = reference.pama_weights(a, prior=p.tolist(), regularization=regularization)
    rho = regularization * float(a.square().max())
    if rho == 0:
        assert torch.allclose(c, p, rtol=0, atol=1e-15)
        return
    on = c > 1e-12
    m, e, mean = int(on.sum()), p[on].sum() - 1, a[on].mean()
    s = (a[on] @ p[on] - mean * e) / (1 + (a[on].square().sum() - m * mean**2) / rho)
    tau = (rho * e - s * a[on].sum()) / m
    # rho >= 0.05 max a^2, six float64 terms; the bisection stops at 1e-15
    assert torch.allclose(c[on], p[on] - (s * a[on] + tau) / rho, rtol=0, atol=1e-12)
    assert float(optimum) == pytest.approx(float(s), abs=1e-12)
    assert (s * a + rho * (c - p) + tau >= -1e-12).all()


@pytest.mark.parametrize("bound", ["scores", "gram"])
@pytest.mark.parametrize("regularization", [0.1, 1.0])
def test_cvxpy_agrees(bound: str, regularization: float) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    g = torch.Generator().manual_seed(3)
    for n in (2, 4):
        p = torch.arange(1, n + 1).double()
        p = p / p.sum()
        x = cvxpy.Variable(n, nonneg=True)
        factor = torch.randint(-4, 5, (1 if bound == "scores" else n, n), generator=g).double() / 2
        matrix = factor.T @ factor
        if bound == "scores":
            c = reference.pama_weights(factor[0], prior=p, regularization=regularization).weights
        else:
            c = reference.min_norm_weights(matrix, prior=p, regularization=regularization).weights
        rho = regularization * float(matrix.diagonal().max())
        objective = cvxpy.sum_squares(factor.numpy() @ x) / 2 + rho / 2 * cvxpy.sum_squares(x - p.numpy())
        options = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
        cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(x) == 1]).solve(solver="CLARABEL", **options)
        # a gap of 1e-12 moves x by at most sqrt(2 gap / rho)
        assert abs(c.numpy() - x.value).max() < 1e-5


def test_the_limit_of_no_regularization() -> None:
    for values in ([1.0, -2.0, 3.0], [1.0, 1.0, 2.0], [-1.0, -1.0, -3.0], [0.0, 0.0, 1.0], [0.0, -2.0, 1.0]):
        a = torch.tensor(values).double()
        for prior in (None, [1.0, 2.0, 0.0]):
            exact = reference.pama_weights(a, prior=prior).weights
            near = reference.pama_weights(a, prior=prior, regularization=1e-9).weights
            # the path is Lipschitz in rho, with a constant of some units here
            assert torch.allclose(exact, near, rtol=0, atol=1e-7)


# --- statistics and loss, as loops -------------------------------------------------------------------------


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
    aggregation=st.sampled_from(["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]),
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
    problem = make(
        layout,
        rows=3,
        width=4,
        seed=seed,
        objective_mask=torch.bool if absent else None,
        importance_weights=True,
        ref_logprobs=True,
        overflow=True,
    )
    tokens, lengths = tokens_of(problem)
    options: dict[str, Any] = {"clip_range": clip, "dual_clip": dual_clip, "noon": noon}
    dual = INF if dual_clip is None else dual_clip
    s = reference.objective_statistics(**problem.statistics_arguments(), **options)
    for i in range(3):
        mine = [t for t in tokens if t.here[i]]
        found = [terms(t, i, *clip, dual, noon) for t in mine]
        wanted = {
            "present_count": len(mine),
            "bound_sum": sum(x[1] for x in found),
            "bound_square_sum": sum(x[1] ** 2 for x in found),
            "bound_logprob_sum": sum(x[1] * t.logp for x, t in zip(found, mine, strict=True)),
            "surrogate_sum": sum(x[0] for x in found),
            "advantage_sum": sum(t.raw[i] for t in mine),
            "advantage_square_sum": sum(t.raw[i] ** 2 for t in mine),
            "positive_count": sum(t.raw[i] > 0 for t in mine),
            "clipped_count": sum(x[2] for x in found),
            "scores": sum(x[1] for x in found) / max(len(mine), 1),
            "second_moments": sum(x[1] ** 2 for x in found) / max(len(mine), 1),
        }
        for name, value in wanted.items():
            assert float(getattr(s, name)[i]) == pytest.approx(value, rel=1e-12, abs=1e-9), name
        for j in range(3):
            both = [t for t in tokens if t.here[i] and t.here[j]]
            product = sum(terms(t, i, *clip, dual, noon)[1] * terms(t, j, *clip, dual, noon)[1] for t in both)
            counts = wanted["present_count"] * sum(t.here[j] for t in tokens)
            assert float(s.gram[i, j]) == pytest.approx(product / math.sqrt(max(counts, 1)), abs=1e-9)
            assert float(s.conflict[i, j]) == pytest.approx(
                correlation([t.raw[i] for t in both], [t.raw[j] for t in both]), abs=1e-9
            )
    assert float(s.token_count) == len(tokens)

    if layout == "flat":
        aggregation = "token-mean"
    c = torch.tensor([0.5, 0.25, 0.75])
    output = reference.pama_loss(
        **problem.loss_arguments(),
        weights_per="batch",
        weights=c,
        aggregation=aggregation,
        kl_coef=kl_coef,
        **options,
    )
    total = 0.0
    for t in tokens:
        value = -sum(float(c[i]) * terms(t, i, *clip, dual, noon)[0] for i in range(3) if t.here[i])
        assert t.ref is not None
        r = t.ref - t.logp
        value += kl_coef * (math.exp(r) - r - 1)
        share = 1 / lengths[t.row] if aggregation == "seq-mean-token-mean" else 1.0
        total += value * share
    denominator = len(tokens) if aggregation == "token-mean" else len(lengths)
    assert float(output.loss) == pytest.approx(total / max(denominator, 1), rel=1e-12, abs=1e-9)


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's, 0 where one of them does not vary."""
    n = len(x)
    if n == 0 or len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    mx, my = sum(x) / n, sum(y) / n
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


@pytest.mark.parametrize("noon", [True, False])
def test_the_bound_term_is_the_gradient_of_the_surrogate(noon: bool) -> None:
    """I = (dg / dlogp) / u: what autograd finds is where the indicator says."""
    problem = make(rows=6, width=9, objectives=1, importance_weights=True, overflow=True, mask=None)
    leaf = problem.logprobs.double().requires_grad_()
    arguments = {**problem.loss_arguments(), "logprobs": leaf}
    loss = reference.pama_loss(
        **arguments, weights_per="batch", weights=torch.ones(1), noon=noon, dual_clip=2.5, normalizer=1.0
    ).loss
    loss.backward()
    assert leaf.grad is not None
    assert problem.old_logprobs is not None
    d = problem.logprobs.double() - problem.old_logprobs.double()
    bound = -leaf.grad / d.clamp(-20, 20).exp()
    s = reference.objective_statistics(**problem.statistics_arguments(), noon=noon, dual_clip=2.5)
    assert float(bound.sum()) == pytest.approx(float(s.bound_sum[0]), abs=1e-10)
    assert float(bound.square().sum()) == pytest.approx(float(s.bound_square_sum[0]), abs=1e-10)


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("regularization", [0.0, 0.2])
def test_whose_weights(weights_per: str, regularization: float) -> None:
    """Scores and scales of each reading, from loops over the valid tokens."""
    problem = make(rows=3, width=4, objective_mask=torch.bool, importance_weights=True, seed=8)
    tokens, lengths = tokens_of(problem)
    options: dict[str, Any] = {"weights_per": weights_per, "regularization": regularization}
    output = reference.pama_loss(**problem.loss_arguments(), **options)
    if weights_per == "batch":
        groups = [tokens]
    elif weights_per == "sequence":
        groups = [[t for t in tokens if t.row == b] for b in range(len(lengths))]
    else:
        groups = [[t] for t in tokens]
    solutions, total = [], 0.0
    for group in groups:
        present = torch.tensor([any(t.here[i] for t in group) for i in range(3)])
        means, squares = torch.zeros(3).double(), torch.zeros(3).double()
        for i in range(3):
            bounds = [terms(t, i, 0.2, 0.2, INF, True)[1] for t in group if t.here[i]]
            if bounds:
                means[i] = sum(bounds) / len(bounds)
                squares[i] = sum(b**2 for b in bounds) / len(bounds)
        solution = reference.pama_weights(
            means, regularization=regularization, scale=squares.max(), present=present
        )
        solutions.append(solution)
        for t in group:
            total -= sum(
                float(solution.weights[i]) * terms(t, i, 0.2, 0.2, INF, True)[0]
                for i in range(3)
                if t.here[i]
            )
    weights = torch.stack([s.weights for s in solutions])
    optimum = torch.stack([s.optimum for s in solutions])
    if weights_per != "sequence":
        weights, optimum = weights.mean(0), optimum.mean()
    assert torch.allclose(output.weights, weights, rtol=0, atol=1e-10)
    assert torch.allclose(output.optimum, optimum, rtol=0, atol=1e-10)
    assert float(output.loss) == pytest.approx(total / len(tokens), abs=1e-10)


def test_every_layout_of_the_same_tokens() -> None:
    """Padded, packed, flat and per sequence: the same loss and statistics."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 5, 1])
    inside = torch.arange(5) < lengths[:, None]
    logp = -torch.rand(4, 5, generator=g)
    old = logp - 0.3 * torch.randn(4, 5, generator=g)
    adv = torch.randn(4, 2, generator=g)
    wide = adv[:, None].expand(4, 5, 2)
    cu = torch.tensor([0, 3, 3, 8, 9])
    for weights_per in WEIGHTS_PER:
        losses = [
            reference.pama_loss(
                logp, old, a, inside, weights_per=weights_per, aggregation="seq-mean-token-mean"
            )
            for a in (adv, wide)
        ]
        losses += [
            reference.pama_loss(
                logp[inside],
                old[inside],
                a,
                weights_per=weights_per,
                aggregation="seq-mean-token-mean",
                cu_seqlens=cu,
            )
            for a in (adv, wide[inside])
        ]
        for other in losses[1:]:
            assert float(other.loss) == pytest.approx(float(losses[0].loss), abs=1e-15)
            assert torch.allclose(other.weights, losses[0].weights, rtol=0, atol=1e-15)
            assert torch.allclose(other.statistics.scores, losses[0].statistics.scores, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 3)])
def test_empty_results_have_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    for weights_per in WEIGHTS_PER:
        result = reference.combine_advantages(torch.zeros(shape), weights_per=weights_per)
        assert result.advantages.shape == shape[:-1]


# --- advantages --------------------------------------------------------------------------------------


def test_advantage_estimation_is_the_discounted_sum_of_errors() -> None:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, within an episode."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 2, generator=g).double(), torch.randn(2, 6, 2, generator=g).double()
    last = torch.randn(2, 2, generator=g).double()
    dones = torch.zeros(2, 6)
    dones[0, 2] = 1
    gamma, lam = 0.9, 0.8
    advantages, returns = reference.multi_objective_gae(
        rewards, values, gamma=gamma, lam=lam, dones=dones, last_values=last
    )
    for b in range(2):
        for t in range(6):
            wanted = torch.zeros(2).double()
            for k in range(t, 6):
                following = last[b] if k == 5 else values[b, k + 1]
                delta = rewards[b, k] + gamma * following * (1 - dones[b, k]) - values[b, k]
                wanted += (gamma * lam) ** (k - t) * delta
                if dones[b, k]:
                    break
            assert torch.allclose(advantages[b, t], wanted, rtol=0, atol=1e-13)
    assert torch.equal(returns, advantages + values)


def test_masked_steps_are_skipped_over() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(1, 7, 2, generator=g).double(), torch.randn(1, 7, 2, generator=g).double()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    kept = mask[0] != 0
    advantages, _ = reference.multi_objective_gae(rewards, values, mask, gamma=0.9, lam=0.7)
    short, _ = reference.multi_objective_gae(rewards[:, kept], values[:, kept], gamma=0.9, lam=0.7)
    assert torch.equal(advantages[:, kept], short)
    assert (advantages[:, ~kept] == 0).all()


def test_group_normalization() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, 5.0], [3.0, nan], [2.0, 7.0], [4.0, 1.0], [4.0, nan], [4.0, nan]]).double()
    got = reference.group_normalize(rewards, group_size=3, eps=0.0)
    root = math.sqrt(2.0)
    assert torch.allclose(got[:3, 0], torch.tensor([-1.0, 1.0, 0.0]).double())
    assert torch.allclose(got[:3, 1], torch.tensor([-1 / root, 0.0, 1 / root]).double())
    assert got[3, 1] == got[4, 1] == got[5, 1] == 0
    ids = torch.tensor([7, 9, 7, 7, 9, 9])
    by_id = reference.group_normalize(rewards, group_ids=ids, scale=False)
    assert torch.allclose(by_id[[0, 2, 3], 0], torch.tensor([1.0, 2.0, 4.0]).double() - 7 / 3)
    assert torch.allclose(by_id[[1, 4, 5], 0], torch.tensor([3.0, 4.0, 4.0]).double() - 11 / 3)
    constant = reference.group_normalize(torch.full((4, 1), 0.3).double())
    assert (constant.abs() < 1e-11).all()
