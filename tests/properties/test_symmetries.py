"""Calls over tokens that must agree with one another: other orders, scales, strides, parts and layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _tables import BATCH, RULES, diagonal, fits, loss_of, sizes, sums, weighting
from hypothesis import given
from hypothesis import strategies as st
from problems import AGGREGATIONS, EPS32, EPS64, FLOATS, SUM_ERROR, Problem, make, solution_error
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Pama, reference
from pama_kernels._call import FIELDS

UNIQUE = ("default", "gram noon", "scores", "paper batch", "fixed", "sequence", "token", "softmin")


def rough(
    layout: str = "padded", rows: int = 6, width: int = 40, n: int = 4, seed: int = 0, **optional: Any
) -> Problem:
    """Normally distributed float32 inputs, off the grid."""
    g = torch.Generator().manual_seed(seed)
    problem = make(layout, rows=rows, width=width, objectives=n, seed=seed, **optional)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=g)

    logp = problem.logprobs + 0.3 * noise(problem.logprobs)
    old = problem.old_logprobs
    return replace(
        problem,
        logprobs=logp,
        old_logprobs=None if old is None else old + 0.3 * noise(old),
        advantages=problem.advantages + noise(problem.advantages),
    )


def close(x: Tensor, y: Tensor, error: Any) -> None:
    assert ((x - y).abs() <= error).all(), (x, y)


# --- off the grid, where every sum is rounded ------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("noon", [True, False])
def test_sums_off_the_grid(layout: str, aggregation: str, noon: bool) -> None:
    problem = rough(layout, width=400, importance_weights=True, objective_mask=torch.bool)
    arguments, options = problem.statistics_arguments(), {"aggregation": aggregation}
    found = sums(pk.objective_statistics(**arguments, noon=noon, **options))
    wanted = sums(reference.objective_statistics(**arguments, noon=noon, **options))
    size, _ = sizes(problem, **options)
    for name, value in wanted.items():
        # float32 over 256 tokens; d is rounded too, which 5 eps |logp| relative to u covers
        close(found[name], value, SUM_ERROR * EPS32 * size[name])


@pytest.mark.parametrize("k", [1e-38, 1e-30, 1e-22, 1e-10, 1e10, 1e22, 1e30, 1e37])
@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
def test_sums_of_any_magnitude(layout: str, k: float) -> None:
    """Advantages whose squares float32 does not hold, all of them or one objective's."""
    base = rough(layout, rows=2, width=120, n=3, seed=2)
    for scale in ([k, k, k], [1.0, k, 1.0], [k, 1.0, k]):
        problem = replace(base, advantages=base.advantages * torch.tensor(scale))
        for noon in (True, False):
            got = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, pairs=True)
            wanted = reference.objective_statistics(**problem.statistics_arguments(), noon=noon)
            size, pair_size = sizes(problem)
            # a product may be subnormal in float32: half of 1.4e-45 each, 240 tokens
            subnormal = 240 * 1.5e-45 * (k < 1e-20)
            for name, value in sums(wanted).items():
                squared = name in ("bound_square_sum", "advantage_square_sum")
                tolerance = SUM_ERROR * EPS32 * size[name] + subnormal * (not squared)
                close(sums(got)[name], value, tolerance)
            root = wanted.second_moments.sqrt()
            close(
                got.gram, wanted.gram, SUM_ERROR * EPS32 * torch.maximum(pair_size, torch.outer(root, root))
            )
            assert torch.equal(got.signal, wanted.signal)


def test_small_log_ratios_keep_the_digits_of_the_divergence() -> None:
    """e^d - 1 - d does not cancel: to the behaviour policy, and in the penalty of the loss."""
    for d in (1e-3, 1e-5, 1e-8, -1e-5, -0.25, 0.3, 0.4, 1.0, -3.0, 19.9, -19.9):
        for dtype in (torch.float32, torch.float64):
            logp, zero = torch.full((1, 5), d, dtype=dtype), torch.zeros(1, 5, dtype=dtype)
            kl = pk.objective_statistics(logp, zero, torch.ones(1, 5, 2, dtype=dtype)).approx_kl
            penalty = pk.pama_loss(zero, None, torch.zeros(1, 5, 2).to(dtype), ref_logprobs=logp, kl_coef=1.0)
            x = float(logp[0, 0])
            # Taylor series below 1/8, where the difference of the reference cancels
            wanted = math.expm1(x) - x
            if abs(x) <= 0.125:
                wanted = sum(x**k / math.factorial(k) for k in range(2, 14))
            # 16 roundings of the term, of u where that is larger: above |d| = log(2)/2
            size = wanted if abs(x) < 0.34 else wanted + math.exp(x) + 1 + abs(x)
            for found in (kl, penalty.loss):
                assert abs(float(found) - wanted) <= 16 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_are_clamped_without_a_gradient(dtype: torch.dtype) -> None:
    """Beyond 20, in the ratio and in the penalty; differences that overflow are no exception."""
    d = torch.tensor([[-1e4, -100.0, -20.5, -19.5, 19.5, 20.5, 100.0, 1e4, 3e38]], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0]).to(dtype).expand(1, 9, 2)
    zero = torch.zeros_like(d)
    for options in ({}, {"clip_range": (1.0, math.inf)}, {"kl_coef": 1.0, "ref_logprobs": zero}):
        ref = options.pop("ref_logprobs", None)
        for weights in (torch.tensor([1.0, 0.5]), torch.zeros(2)):
            problem = Problem(d, zero, advantages, ref_logprobs=ref)
            output, gradient = loss_of(problem, weights=weights, **options)
            leaf = d.double().requires_grad_()
            wide = {**problem.loss_arguments(), "logprobs": leaf}
            wanted = reference.pama_loss(**wide, weights=weights, **options).loss
            (exact,) = torch.autograd.grad(wanted, leaf)
            # exponentials of up to 20: 20 eps of each, 9 terms
            eps = torch.finfo(dtype).eps
            assert abs(float(output.loss) - float(wanted.detach())) <= 64 * eps * 9 * 3 * math.exp(20)
            assert torch.allclose(gradient.double(), exact, rtol=64 * eps, atol=eps)
            assert (gradient[d.abs() > 20] == 0).all()
    far = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    s = pk.objective_statistics(far, -far, torch.ones(1, 4, 2))
    assert torch.equal(s.clip_fraction, torch.tensor([0.75, 0.75]).double())
    assert torch.isfinite(s.approx_kl)


# --- orders and scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIQUE)
def test_permuting_objectives(name: str) -> None:
    order = [2, 0, 3, 1]
    for layout in ("padded", "per-sequence"):
        problem = rough(layout, n=4, objective_mask=torch.bool, width=8)
        assert problem.objective_mask is not None
        moved = replace(
            problem,
            advantages=problem.advantages[..., order],
            objective_mask=problem.objective_mask[..., order],
        )
        p = [1.0, 2.0, 3.0, 4.0]
        one, gradient = loss_of(problem, rule=RULES[name], preference=p)
        other, same = loss_of(moved, rule=RULES[name], preference=[p[i] for i in order])
        error = 16 * solution_error(problem, {"rule": RULES[name]}, torch.float32)
        close(one.weights[..., order], other.weights, error)
        close(one.optimum, other.optimum, 8 * error)
        close(gradient, same, 8 * error)  # ratios up to e, |A| below 8, over at least 10 tokens


@pytest.mark.parametrize(
    ("name", "k"),
    diagonal(
        [*BATCH, "sequence", "paper sequence", "token", "paper token"],
        [2.0**-100, 2.0**-60, 2.0**60, 2.0**90],
    ),
)
def test_scaling_by_a_power_of_two_scales_the_result(name: str, k: float) -> None:
    """And changes no weight."""
    if name in ("upgrad", "callable"):
        k = {2.0**-100: 2.0**-10, 2.0**90: 2.0**10}.get(k, k) if name == "upgrad" else 1.0
    problem = make(rows=3, width=9, seed=11)
    scaled = replace(problem, advantages=problem.advantages * k)
    options = {"rule": RULES[name]}
    (base, gradient), (output, larger) = loss_of(problem, **options), loss_of(scaled, **options)
    first = pk.combine_advantages(problem.advantages, problem.mask, **options)
    second = pk.combine_advantages(scaled.advantages, problem.mask, **options)
    error = solution_error(problem, options, torch.float32)
    square = k if "gram" not in str(RULES[name] or "gram") else 1.0
    for one, other in ((base, output), (first, second)):
        close(one.weights, other.weights, error)
        close(one.optimum, other.optimum / (k * k if name == "upgrad" else square), 16 * error)
    # float32 or float64 sums of the same terms; at most 27 tokens of size 2 e^1.25
    close(base.loss, output.loss / k, 32 * (SUM_ERROR * EPS32 + error))
    close(gradient, larger.double() / k, 8 * (32 * EPS32 + error))
    close(first.advantages, second.advantages / k, 8 * (4 * EPS32 + error))


def test_one_objective_of_another_magnitude() -> None:
    """One whose squares float32 does not hold beside two that it does."""
    for k in (2.0**-100, 2.0**100):
        for place in range(3):
            problem = make(rows=2, width=7, seed=4)
            problem.advantages[..., place] *= k
            for name in ("default", "upgrad", "scores", "paper batch", "sequence", "token"):
                arguments = problem.combine_arguments()
                got = pk.combine_advantages(**arguments, rule=RULES[name], clip_range=0.2)
                wanted = reference.combine_advantages(**arguments, rule=RULES[name], clip_range=0.2)
                if name != "upgrad":
                    error = 64 * 8 * 3 * EPS32  # `solution_error`
                    close(got.weights.double(), wanted.weights, error)
                    close(got.advantages.double(), wanted.advantages, error * max(2.0, 2 * k))
                assert (got.weights >= 0).all()


# --- strides and layouts ---------------------------------------------------------------------------------


def results(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    leaf = arguments["logprobs"].detach().requires_grad_()
    output = pk.pama_loss(**{**arguments, "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    without = {k: v for k, v in arguments.items() if k not in ("importance_weights", "ref_logprobs")}
    combined = pk.combine_advantages(**without, clip_range=0.2, rule=options["rule"])
    flat = [output.loss.detach(), output.weights, output.optimum, output.statistics.buffer]
    return [*flat, gradient.flatten(), combined.advantages.flatten()]


@pytest.mark.parametrize("name", ["default", "upgrad", "scores", "token"])
def test_views_and_layouts_of_the_same_tokens_give_the_same_bits(name: str) -> None:
    problem = rough(rows=5, width=60, importance_weights=True, ref_logprobs=True)
    arguments, options = problem.loss_arguments(), {"rule": RULES[name], "kl_coef": 0.1}
    arguments = {k: v for k, v in arguments.items() if v is not None}
    wanted = results(arguments, **options)

    def inside(x: Tensor) -> Tensor:
        """In every second place of a larger array, with an offset."""
        host = torch.zeros([2 * size + 1 for size in x.shape], dtype=x.dtype)
        view = host[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view

    flat = {k: v.flatten(0, 1) for k, v in arguments.items()}
    cu = torch.arange(0, 301, 60, dtype=torch.int32)
    forms = (
        {k: inside(v) for k, v in arguments.items()},
        {k: v.transpose(0, 1).contiguous().transpose(0, 1) for k, v in arguments.items()},
        {**arguments, "advantages": problem.advantages.movedim(-1, 0).contiguous().movedim(0, -1)},
        {k: v.flip(0).flip(0) for k, v in arguments.items()},
        flat,
        {**flat, "cu_seqlens": cu},
        {**flat, "cu_seqlens": torch.stack([cu, cu - 7], 1)[:, 0].long()},
    )
    for form in forms:
        for x, y in zip(results(form, **options), wanted, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["default", "sequence", "token"])
def test_broadcast_inputs(name: str) -> None:
    problem = make(rows=4, width=6)
    arguments = {k: v for k, v in problem.loss_arguments().items() if v is not None}
    arguments["mask"] = torch.tensor([1, 0, 1, 1, 1, 0])[None].expand(4, 6)
    arguments["importance_weights"] = torch.tensor(0.5).expand(4, 6)
    arguments["advantages"] = arguments["advantages"][:1].expand(4, 6, 3)
    arguments["old_logprobs"] = arguments["old_logprobs"][:, :1].expand(4, 6)
    copies = {k: v.contiguous() for k, v in arguments.items()}
    for x, y in zip(results(arguments, rule=RULES[name]), results(copies, rule=RULES[name]), strict=True):
        assert torch.equal(x, y)


def expanded(problem: Problem) -> Problem:
    """The same with advantages for every token."""
    advantages = problem.advantages
    if problem.cu_seqlens is not None:
        return replace(problem, advantages=advantages.repeat_interleave(problem.cu_seqlens.diff(), 0))
    shape = (*problem.logprobs.shape, problem.objectives)
    return replace(problem, advantages=advantages[:, None].expand(shape).contiguous())


@pytest.mark.portable
@given(
    layout=st.sampled_from(["per-sequence", "packed-per-sequence"]),
    name=st.sampled_from([*UNIQUE, "paper sequence", "softmin token", "callable", "given", "given rows"]),
    optional=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from(FLOATS),
    dual_clip=st.sampled_from([None, 3.0]),
    aggregation=st.sampled_from(AGGREGATIONS),
    seed=st.integers(0, 99),
)
def test_advantages_per_sequence_are_those_of_its_tokens(
    layout: str,
    name: str,
    optional: tuple[bool, ...],
    dtype: torch.dtype,
    dual_clip: float | None,
    aggregation: str,
    seed: int,
) -> None:
    """Statistics, pairs, weights, loss and gradient of (B, N) are those of (B, T, N)."""
    absent, weighted, ratio, overflow = optional
    problem = make(
        layout,
        rows=4,
        width=7,
        seed=seed,
        dtype=dtype,
        objective_mask=torch.bool if absent else None,
        importance_weights=weighted,
        ratio=ratio,
        overflow=overflow,
    )
    whole = expanded(problem)
    options: dict[str, Any] = {"aggregation": aggregation, "dual_clip": dual_clip}
    noon = name in ("gram noon", "paper batch", "paper sequence", "callable")
    one = pk.objective_statistics(**problem.statistics_arguments(), **options, noon=noon, pairs=True)
    other = pk.objective_statistics(**whole.statistics_arguments(), **options, noon=noon, pairs=True)
    # ratios up to e^20 within the clip range's far side are clipped at dual_clip or have terms of that size
    size, pair_size = sizes(problem, **options)
    for field in FIELDS:
        close(sums(one)[field], sums(other)[field], SUM_ERROR * problem.eps() * size[field])
    assert one.gram is not None
    close(one.gram, other.gram, SUM_ERROR * problem.eps() * pair_size)
    for figure in ("conflict", "covariance"):
        close(getattr(one, figure), getattr(other, figure), 64 * SUM_ERROR * problem.eps() * 16)
    options |= weighting(name, problem)
    (first, gradient), (second, same) = loss_of(problem, **options), loss_of(whole, **options)
    # weights of the same sums to their rounding, which regularization 0.1 and n = 3 raise at most 64 * 8 * n
    error = 64 * 8 * 3 * 2 * max(problem.eps(), EPS32 if dtype != torch.float64 else EPS64)
    size_of_gradient = gradient.double().abs().max() + 8
    close(first.weights.double(), second.weights.double(), error)
    close(first.loss.double(), second.loss.double(), error * (float(first.loss.abs()) + size_of_gradient * 4))
    rounding = 2 * torch.finfo(dtype).eps * gradient.double().abs()
    close(gradient.double(), same.double(), error * size_of_gradient + rounding)


# --- parts -----------------------------------------------------------------------------------------------


@pytest.mark.portable
@given(
    cut=st.integers(0, 6),
    seed=st.integers(0, 99),
    pairs=st.booleans(),
    absent=st.booleans(),
    layout=st.sampled_from(["padded", "per-sequence"]),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_micro_batches_add_up(
    cut: int, seed: int, pairs: bool, absent: bool, layout: str, aggregation: str
) -> None:
    problem = make(layout, rows=6, width=11, seed=seed, objective_mask=torch.bool if absent else None)
    options: dict[str, Any] = {"pairs": pairs, "aggregation": aggregation}
    arguments = problem.statistics_arguments()
    whole = pk.objective_statistics(**arguments, **options)
    parts = []
    for rows in (slice(0, cut), slice(cut, 6)):
        part = {k: None if v is None else v[rows] for k, v in arguments.items()}
        parts.append(pk.objective_statistics(**part, **options))
    merged = sum(parts)
    assert merged.has_pairs is pairs
    size, _ = sizes(problem, aggregation=aggregation)
    exact = aggregation != "seq-mean-token-mean"
    for name, value in sums(whole).items():
        rounded = not exact or name in ("surrogate_sum", "kl_sum")
        close(sums(merged)[name], value, (SUM_ERROR * EPS32 if rounded else 0.0) * size[name])
    if pairs and exact:
        assert torch.equal(merged.gram, whole.gram)
        assert torch.equal(merged.conflict, whole.conflict)
        solved = pk.min_norm_weights(merged.cosines, regularization=0.1)
        combined = pk.combine_advantages(**problem.combine_arguments(), clip_range=0.2)
        if merged.signal.all() and (merged.second_moments > 0).all():
            close(combined.weights.double(), solved.weights, 3 * EPS32)


def test_each_sequence_is_solved_alone() -> None:
    problem = rough(rows=5, width=300, seed=2)
    assert problem.mask is not None
    for name in ("sequence", "paper sequence", "softmin", "token", "paper token", "softmin token"):
        whole = pk.combine_advantages(problem.advantages, problem.mask, rule=RULES[name])
        for i in range(5):
            row = slice(i, i + 1)
            one = pk.combine_advantages(problem.advantages[row], problem.mask[row], rule=RULES[name])
            assert torch.equal(one.advantages, whole.advantages[row])
            if "token" not in name:
                assert torch.equal(one.weights, whole.weights[row])
                assert torch.equal(one.optimum, whole.optimum[row])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["default", "upgrad", "scores", "paper batch", "fixed"])
def test_weights_of_the_batch_are_those_of_its_statistics(name: str, aggregation: str) -> None:
    """The pieces give what the whole gives: statistics, then the solvers, then given weights."""
    problem = make(rows=6, width=100, objective_mask=torch.bool, importance_weights=True)
    rule = RULES[name] or Pama()
    noon = bool(getattr(rule, "noon", False))
    options = {"aggregation": aggregation}
    s = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, pairs=True, **options)
    wanted = {
        "default": lambda: pk.min_norm_weights(s.cosines, regularization=0.1),
        "upgrad": lambda: pk.upgrad_weights(s.gram),
        "scores": lambda: pk.pama_weights(s.scores, regularization=0.1, scale=s.second_moments.max()),
        "paper batch": lambda: pk.pama_weights(s.scores),
        "fixed": lambda: (torch.full((3,), 1 / 3).double(), s.scores.mean()),
    }[name]()
    output, _ = loss_of(problem, rule=rule, **options)
    assert torch.equal(output.statistics.scores, s.scores)
    # the same float64 problem, stored in float32
    close(output.weights.double(), wanted[0], 2 * EPS32)
    close(output.optimum.double(), wanted[1], 8 * EPS32)
    combined = pk.combine_advantages(**problem.combine_arguments(), rule=rule, clip_range=0.2, **options)
    assert torch.equal(combined.statistics.count, s.count)


def test_conflict_covariance_and_cosines_are_what_numpy_says() -> None:
    import numpy as np

    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(7, 30, 4, generator=g, dtype=torch.float64)
    advantages[..., 1] -= advantages[..., 0]
    advantages[..., 3] = -2 * advantages[..., 0]
    mask = torch.rand(7, 30, generator=g) < 0.7
    raw = advantages[mask].numpy()
    close_to: dict[str, float] = {"rtol": 150 * EPS64, "atol": 150 * EPS64}  # sums over 150 tokens
    for noon in (True, False):
        s = pk.objective_statistics(None, None, advantages, mask, noon=noon, pairs=True)
        bound = np.maximum(raw, 0) if noon else raw
        length = np.linalg.norm(bound, axis=0)
        np.testing.assert_allclose(s.gram, bound.T @ bound / len(raw), **close_to)
        np.testing.assert_allclose(s.cosines, bound.T @ bound / np.outer(length, length), **close_to)
        np.testing.assert_allclose(s.advantage_gram, raw.T @ raw / len(raw), **close_to)
        np.testing.assert_allclose(s.covariance, np.cov(raw.T, ddof=0), **close_to)
        np.testing.assert_allclose(s.conflict, np.corrcoef(raw.T), **close_to)
        np.testing.assert_allclose(s.advantage_mean, raw.mean(0), **close_to)
        np.testing.assert_allclose(s.advantage_std, raw.std(0), **close_to)
        # opposite objectives are always in conflict, and do not meet after the clamp
        assert s.conflict[0, 3] == pytest.approx(-1, abs=150 * EPS64)
        assert s.cosines[0, 3] == pytest.approx(0 if noon else -1, abs=150 * EPS64)
        for matrix in (s.conflict, s.cosines, s.gram, s.covariance):
            assert torch.equal(matrix, matrix.T)
        assert torch.linalg.eigvalsh(s.gram).min() >= -1e-12
    plain = pk.objective_statistics(None, None, advantages, mask)
    assert plain.gram is plain.conflict is plain.cosines is plain.covariance is plain.advantage_gram is None
    assert torch.equal(
        plain.buffer, pk.objective_statistics(None, None, advantages, mask, pairs=True).buffer[:38]
    )
    # over the tokens where both are present
    present = torch.rand(7, 30, 4, generator=g) < 0.6
    flat = {"mask": mask.flatten(), "objective_mask": present.flatten(0, 1)}
    s = pk.objective_statistics(None, None, advantages.flatten(0, 1), **flat, pairs=True)
    both = mask & present[..., 0] & present[..., 1]
    pair = advantages[both][:, :2].numpy()
    np.testing.assert_allclose(s.covariance[:2, :2][0, 1], np.cov(pair.T, ddof=0)[0, 1], **close_to)
    np.testing.assert_allclose(s.conflict[0, 1], np.corrcoef(pair.T)[0, 1], **close_to)


@pytest.mark.parametrize("name", [name for name in RULES if fits(name, make())])
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    problem = rough(rows=7, width=90, importance_weights=True, ref_logprobs=True)
    arguments = problem.loss_arguments()
    wanted = results(arguments, rule=RULES[name], kl_coef=0.1)
    for _ in range(2):
        results(make(rows=2, width=17, seed=9).loss_arguments(), rule=RULES[name])
        for x, y in zip(results(arguments, rule=RULES[name], kl_coef=0.1), wanted, strict=True):
            assert torch.equal(x, y)
