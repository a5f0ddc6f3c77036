"""pama_loss: value and gradient against float64 autograd of the reference, and against plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    AGGREGATIONS,
    EPS32,
    EPS64,
    FLOATS,
    LAYOUTS,
    SEQUENCE_LAYOUTS,
    SUM_ERROR,
    WEIGHTS_PER,
    Problem,
    batches,
    clippings,
    copied,
    loss_scale,
    make,
    poisoned,
    reference_gradient,
    solution_error,
    weightings,
)
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

INF, NAN = math.inf, math.nan


def solve(problem: Problem, **options: Any) -> tuple[pk.PamaLossOutput, Tensor]:
    """The output and the gradient with respect to logprobs."""
    leaf = problem.logprobs.detach().requires_grad_()
    output = pk.pama_loss(**{**problem.loss_arguments(), "logprobs": leaf}, **options)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output._replace(loss=output.loss.detach()), gradient


def assert_matches(problem: Problem, **options: Any) -> pk.PamaLossOutput:
    output, gradient = solve(problem, **options)
    wanted, exact = reference_gradient(problem, **options)
    dtype = problem.logprobs.dtype
    result = torch.float64 if dtype == torch.float64 else torch.float32
    assert output.loss.dtype == output.weights.dtype == output.optimum.dtype == result
    assert output.loss.shape == ()
    assert output.weights.shape == wanted.weights.shape
    assert output.optimum.shape == wanted.optimum.shape
    assert gradient.dtype == dtype
    assert gradient.shape == problem.logprobs.shape

    error = solution_error(problem, options, result)
    given_weights = options.get("weights")
    largest = 1.0 if given_weights is None else max(1.0, float(given_weights.abs().max()))
    score = 3 * problem.objectives * largest  # importance weights up to 1.5, advantages up to 2
    assert ((output.weights - wanted.weights).abs() <= error * largest).all()
    assert ((output.optimum - wanted.optimum).abs() <= error * score).all()
    value_size, gradient_size = loss_scale(problem, **options)
    # sums over a tile in the type of the computation; weights with their error; the result rounded
    rounding = SUM_ERROR * problem.eps() + error + torch.finfo(result).eps
    assert abs(float(output.loss) - float(wanted.loss)) <= rounding * value_size
    # per token: 16 roundings, the error of the weights, and the rounding to the dtype of the gradient
    tolerance = (16 * problem.eps() + error) * gradient_size
    tolerance += torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    if dtype == torch.float16:
        tolerance += 2.0**-24
    assert ((gradient - exact).abs() <= tolerance).all()
    assert (gradient[~problem.valid()] == 0).all()
    with torch.no_grad():
        silent = pk.pama_loss(**problem.loss_arguments(), **options)
    assert not silent.loss.requires_grad
    assert torch.equal(silent.loss, output.loss)
    return output


# --- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("noon", [True, False])
def test_every_layout(layout: str, weights_per: str, noon: bool) -> None:
    for aggregation in AGGREGATIONS:
        options: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "aggregation": aggregation}
        if layout == "flat" and (weights_per == "sequence" or aggregation != "token-mean"):
            problem = make(layout)
            with pytest.raises(ValueError, match="cu_seqlens"):
                pk.pama_loss(**problem.loss_arguments(), **options)
            continue
        for absent in (None, torch.bool):
            problem = make(layout, rows=4, width=5, objective_mask=absent, ref_logprobs=True, seed=7)
            assert_matches(problem, **options)
            assert_matches(problem, **options, regularization=0.1, kl_coef=0.05)


@given(
    data=st.data(),
    problem=batches(),
    clipping=clippings(),
    aggregation=st.sampled_from(AGGREGATIONS),
    normalizer=st.sampled_from([None, None, 7.5, torch.tensor(3.0), torch.tensor(12)]),
    kl_coef=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_every_option(
    data: st.DataObject,
    problem: Problem,
    clipping: dict[str, Any],
    aggregation: str,
    normalizer: Any,
    kl_coef: float,
) -> None:
    assert_matches(
        problem,
        **weightings(data.draw, problem),
        **clipping,
        aggregation="token-mean" if problem.flat else aggregation,
        normalizer=normalizer,
        kl_coef=kl_coef,
    )


@given(
    kinds=st.tuples(*[st.sampled_from(FLOATS)] * 5),
    weights_per=st.sampled_from(WEIGHTS_PER),
    layout=st.sampled_from(["padded", "packed-per-sequence"]),
)
def test_every_mix_of_dtypes(kinds: tuple[torch.dtype, ...], weights_per: str, layout: str) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "importance_weights", "ref_logprobs")
    dtype = dict(zip(names, kinds, strict=True))
    problem = make(layout, rows=3, width=6, dtype=dtype, importance_weights=True, ref_logprobs=True)
    assert_matches(problem, weights_per=weights_per, noon=False, kl_coef=0.1)


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_many_tokens(layout: str, aggregation: str, weights_per: str) -> None:
    """Rows longer than a tile, more tokens than a block; per token Noon, where the weights are exact."""
    problem = make(
        layout, rows=13, width=900, objectives=3, importance_weights=True, ref_logprobs=True, seed=1
    )
    options: dict[str, Any] = {"weights_per": weights_per, "aggregation": aggregation}
    if weights_per == "token":
        problem = make(layout, rows=12, width=310, objectives=2, ref_logprobs=True, seed=1)
        assert_matches(problem, **options, kl_coef=0.1)
        return
    assert_matches(problem, **options, kl_coef=0.1)
    assert_matches(problem, **options, noon=False, regularization=0.1, dual_clip=3.0)
    if weights_per == "sequence":
        given_weights = torch.rand(13, 3, generator=torch.Generator().manual_seed(0))
        assert_matches(problem, **options, weights=given_weights)


def test_more_than_a_block_per_token() -> None:
    """Weights per token in 9,000 tokens: those of nine kinds of tokens, over and over."""
    kinds = make("flat", rows=1, width=9, objectives=4, mask=None, ref_logprobs=True, seed=6)
    which = torch.randint(0, 9, (9, 1000), generator=torch.Generator().manual_seed(0))
    tensors = {k: v[which] for k, v in vars(kinds).items() if v is not None}
    for options in ({"noon": True}, {"noon": False, "regularization": 0.1, "kl_coef": 0.1}):
        one, gradient = reference_gradient(replace(kinds), weights_per="token", **options)
        output, got = solve(Problem(**tensors), weights_per="token", **options)
        # 9 in the small loss's denominator, 9,000 in the large one's
        assert torch.allclose(got.double() * 1000, gradient[which], rtol=2e-4, atol=1e-6)
        counts = which.flatten().bincount(minlength=9).double() / 9000
        terms = []
        for k in range(9):
            token = {name: x[k : k + 1] for name, x in vars(kinds).items() if x is not None}
            terms.append(reference.pama_loss(**token, weights_per="token", **options).loss.detach())
        wanted = (torch.stack(terms) * counts).sum()
        size = (torch.stack(terms).abs() * counts).sum()
        # float32 over a tile; per-token weights with lambda <= 64
        assert abs(float(output.loss) - float(wanted)) <= (SUM_ERROR + 64 * 32) * EPS32 * float(size)
        assert one.weights.shape == output.weights.shape


def test_instruction_sets_agree(isa: str) -> None:
    for weights_per in WEIGHTS_PER:
        for n in (1, 2, 3, 4, 5):
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                problem = make(
                    rows=2,
                    width=9,
                    objectives=n,
                    dtype=dtype,
                    ref_logprobs=True,
                    importance_weights=True,
                    seed=n,
                )
                assert_matches(problem, weights_per=weights_per, kl_coef=0.1)
                assert_matches(problem, weights_per=weights_per, noon=False, dual_clip=3.0)
        problem = make("packed", rows=7, width=150, objective_mask=torch.bool, overflow=True)
        assert_matches(problem, weights_per=weights_per)


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("layout", ["padded", "packed-per-sequence"])
def test_gradcheck(weights_per: str, layout: str) -> None:
    """Finite differences: the weights are constant where no token crosses a clip threshold."""
    problem = make(
        layout,
        rows=4,
        width=4,
        dtype=torch.float64,
        importance_weights=True,
        ref_logprobs=True,
        objective_mask=torch.bool,
        overflow=True,
    )
    arguments = problem.loss_arguments()
    del arguments["logprobs"]
    for options in (
        {"noon": True},
        {"noon": False, "dual_clip": 2.5, "regularization": 0.1},
        {"noon": True, "kl_coef": 0.3, "aggregation": "seq-mean-token-mean"},
    ):
        leaf = problem.logprobs.clone().requires_grad_()

        def loss(x: Tensor, options: dict[str, Any] = options) -> Tensor:
            return pk.pama_loss(x, weights_per=weights_per, **arguments, **options).loss

        assert torch.autograd.gradcheck(loss, leaf)


def test_kl_of_distant_policies() -> None:
    """r is not clamped: e^r - r - 1 is -r - 1 far below 0."""
    for dtype in (torch.float32, torch.float64):
        for r in (-300.0, -100.0, -90.0, -30.0, -1e-3, 1e-4, 0.3, 5.0, 30.0, 80.0):
            logp = torch.tensor([[-1.0, -1.0]], dtype=dtype)
            problem = Problem(logp, None, torch.zeros(1, 2, 2, dtype=dtype), ref_logprobs=logp + r)
            output, gradient = solve(problem, weights_per="batch", kl_coef=1.0)
            wanted, exact = reference_gradient(problem, weights_per="batch", kl_coef=1.0)
            eps = torch.finfo(dtype).eps
            # 32 roundings of the result; above |r| = log(2)/2 of e^r, r and 1; the reference cancels
            size = float(wanted.loss) + (1 + abs(r) if abs(r) > 0.34 else 0.0)
            tolerance = 32 * eps * size + 4 * EPS64 * (1 + abs(r))
            assert abs(float(output.loss) - float(wanted.loss)) <= tolerance, r
            assert torch.allclose(gradient.double(), exact, rtol=64 * eps, atol=4 * eps), r


@pytest.mark.parametrize("k", [2.0**-100, 2.0**-60, 2.0**60, 2.0**90])
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_magnitudes(k: float, weights_per: str) -> None:
    """Scaling all advantages by a power of two scales loss and gradient, and changes no weight."""
    for noon, regularization in ((True, 0.0), (True, 0.1), (False, 0.0), (False, 0.1)):
        problem = make(rows=3, width=9, seed=11)
        options: dict[str, Any] = {
            "weights_per": weights_per,
            "noon": noon,
            "regularization": regularization,
        }
        base, gradient = solve(problem, **options)
        solve(
            make(rows=9, width=50, objectives=4, seed=5), **options
        )  # nothing is left over from another call
        output, scaled = solve(replace(problem, advantages=problem.advantages * k), **options)
        error = solution_error(problem, options, torch.float32)
        size, gradient_size = loss_scale(problem, **options)
        # float32 or float64 sums of the same terms
        assert torch.allclose(output.weights, base.weights, rtol=0, atol=error)
        assert abs(float(output.loss) / k - float(base.loss)) <= (SUM_ERROR * EPS32 + 2 * error) * size
        assert ((scaled.double() / k - gradient).abs() <= (32 * EPS32 + 2 * error) * gradient_size).all()


# --- against plain PyTorch -------------------------------------------------------------------------------


def clipped_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    """The clipped surrogate of PPO, token mean."""
    ratio = torch.exp(logp - old)
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return -(terms * mask).sum() / mask.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_range", [0.2, (0.2, 0.28), (0.1, 1.0)])
def test_one_objective_is_ppo(dtype: torch.dtype, clip_range: Any) -> None:
    g = torch.Generator().manual_seed(0)
    shape = (5, 300)
    logp = -torch.rand(shape, generator=g, dtype=dtype) * 4
    old = logp - 0.4 * torch.randn(shape, generator=g, dtype=dtype)
    adv = torch.randn(shape, generator=g, dtype=dtype)
    mask = torch.rand(shape, generator=g) < 0.7
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    leaf = logp.clone().requires_grad_()
    wanted = clipped_loss(leaf, old, adv, mask, low, high)
    wanted.backward()
    problem = Problem(logp, old, adv.unsqueeze(-1), mask)
    for weights_per in WEIGHTS_PER:
        output, gradient = solve(problem, weights_per=weights_per, noon=False, clip_range=clip_range)
        size, _ = loss_scale(problem, weights_per=weights_per, clip_range=clip_range)
        eps = torch.finfo(dtype).eps
        # both sums have float rounding
        assert abs(float(output.loss) - float(wanted.detach())) <= 2 * SUM_ERROR * eps * size
        assert leaf.grad is not None
        assert torch.allclose(gradient, leaf.grad, rtol=32 * eps, atol=eps / 1000)
        assert (output.weights == 1).all()


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize(
    "layout", ["padded", "per-sequence", "packed", "packed-per-sequence", "objectives-first"]
)
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_with_noon_the_ordinary_loss_on_combined_advantages(
    weights_per: str, layout: str, regularization: float
) -> None:
    for seed in range(3):
        problem = make(layout, rows=5, width=8, seed=seed, objective_mask=torch.bool if seed else None)
        options: dict[str, Any] = {
            "weights_per": weights_per,
            "regularization": regularization,
            "clip_range": (0.2, 0.28),
        }
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
        output, gradient = solve(problem, **options)
        size, gradient_size = loss_scale(problem, **options)
        # the same weights; up to 40 terms summed in float32 on both sides, 16 roundings each
        assert abs(float(output.loss) - float(plain.detach())) <= 80 * EPS32 * size
        assert leaf.grad is not None
        assert ((gradient - leaf.grad).abs() <= 32 * EPS32 * gradient_size).all()


def test_loss_is_the_weighted_sum_of_single_losses() -> None:
    """Noon or not: sum_i c_i L_i with the weights that are reported."""
    problem = make(rows=4, width=9, dtype=torch.float64)
    for noon in (True, False):
        output = pk.pama_loss(**problem.loss_arguments(), weights_per="batch", noon=noon, regularization=0.3)
        total = 0.0
        for i in range(3):
            arguments = problem.loss_arguments()
            arguments["advantages"] = problem.advantages[..., i : i + 1]
            total += float(output.weights[i]) * float(
                pk.pama_loss(**arguments, weights_per="batch", noon=noon).loss
            )
        # 36 float64 terms of at most 2.4
        assert float(output.loss) == pytest.approx(total, abs=36 * 4 * EPS64)


# --- bounds of the ratio ----------------------------------------------------------------------------------


def test_ratios_that_overflow() -> None:
    """|d| > 20: the ratio is clamped, its gradient is 0; the result is finite."""
    d = torch.tensor([[-1e4, -100.0, -20.5, -19.5, 19.5, 20.5, 100.0, 1e4, 3e38]])
    adv = torch.tensor([1.0, -1.0])[None, None].expand(1, 9, 2)
    for options in ({"noon": True}, {"noon": False}, {"noon": False, "clip_range": (1.0, INF)}):
        problem = Problem(d, torch.zeros_like(d), adv)
        output, gradient = solve(problem, weights_per="token", weights=torch.tensor([1.0, 0.5]), **options)
        wanted, exact = reference_gradient(
            problem, weights_per="token", weights=torch.tensor([1.0, 0.5]), **options
        )
        assert torch.isfinite(gradient).all()
        # one exponential: 20 eps of its argument
        assert float(output.loss) == pytest.approx(float(wanted.loss), rel=32 * EPS32, abs=EPS32)
        assert torch.allclose(gradient.double(), exact, rtol=32 * EPS32, atol=0)
        assert (gradient[d.abs() > 20] == 0).all()


def test_the_gradient_stops_beyond_the_clip_range() -> None:
    d = torch.tensor([[-0.5, -0.1, 0.0, 0.1, 0.5, 2.0]])
    adv = torch.stack([torch.ones_like(d), -torch.ones_like(d)], -1)
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for weights, dual_clip, moving in (
        (first, None, [True, True, True, True, False, False]),
        (second, None, [False, True, True, True, True, True]),
        (second, 3.0, [False, True, True, True, True, False]),
    ):
        _, gradient = solve(
            Problem(d, torch.zeros_like(d), adv),
            weights_per="batch",
            weights=weights,
            noon=False,
            dual_clip=dual_clip,
        )
        assert (gradient != 0)[0].tolist() == moving


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_the_normalizer_replaces_the_denominator(aggregation: str, weights_per: str) -> None:
    problem = make(rows=4, width=6, dtype=torch.float64)
    options: dict[str, Any] = {"weights_per": weights_per, "aggregation": aggregation}
    output, gradient = solve(problem, **options)
    denominator = float(problem.valid().sum()) if aggregation == "token-mean" else 4.0
    for normalizer in (
        2.0 * denominator,
        torch.tensor(2.0 * denominator),
        torch.tensor(2 * int(denominator)),
    ):
        halved, half = solve(problem, **options, normalizer=normalizer)
        # one rounding of each
        assert float(halved.loss) == pytest.approx(float(output.loss) / 2, rel=4 * EPS64)
        assert torch.allclose(half, gradient / 2, rtol=4 * EPS64, atol=0)


def test_the_upstream_gradient_scales_the_gradient() -> None:
    for dtype in FLOATS:
        problem = make(dtype=dtype)
        leaf = problem.logprobs.clone().requires_grad_()
        arguments = {**problem.loss_arguments(), "logprobs": leaf}
        loss = pk.pama_loss(**arguments, weights_per="batch").loss
        (loss * 4).backward()
        _, gradient = solve(problem, weights_per="batch")
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert torch.equal(leaf.grad, gradient * 4)


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_given_weights(layout: str) -> None:
    problem = make(layout, rows=4, width=6)
    row = torch.tensor([0.5, 0.25, 2.0])
    each = torch.arange(12.0).reshape(4, 3) / 8
    for weights in (row, each, row.expand(4, 3), each.T.contiguous().T, each.double(), row.bfloat16()):
        for weights_per in WEIGHTS_PER:
            output = assert_matches(problem, weights_per=weights_per, weights=weights)
            assert torch.equal(output.weights, weights.float())


def test_only_logprobs_have_a_gradient() -> None:
    problem = make(importance_weights=True, ref_logprobs=True)
    leaves = {k: v.clone() for k, v in problem.loss_arguments().items() if v is not None}
    for name in ("logprobs", "old_logprobs", "advantages", "importance_weights", "ref_logprobs"):
        leaves[name].requires_grad_()
    output = pk.pama_loss(**leaves, weights_per="batch", kl_coef=0.1)
    output.loss.backward()
    assert [k for k, v in leaves.items() if v.grad is not None] == ["logprobs"]
    assert not output.weights.requires_grad
    assert not output.optimum.requires_grad


# --- what has influence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_values_have_no_influence(layout: str, bad: float) -> None:
    problem = make(
        layout, rows=4, width=9, objective_mask=torch.bool, importance_weights=True, ref_logprobs=True
    )
    for weights_per in ("batch", "token") if layout == "flat" else WEIGHTS_PER:
        for noon, kl_coef in ((True, 0.0), (False, 0.1)):
            options: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "kl_coef": kl_coef}
            clean, gradient = solve(problem, **options)
            dirty, other = solve(poisoned(problem, bad), **options)
            for name in ("loss", "weights", "optimum"):
                assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
            assert torch.equal(gradient, other)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["advantages", "logprobs", "old_logprobs", "importance_weights", "ref_logprobs"]
)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("noon", [True, False])
def test_a_nan_or_infinity_reaches_what_depends_on_it(
    name: str, bad: float, weights_per: str, noon: bool
) -> None:
    """The loss is NaN, and the gradient of the tokens whose weights or terms depend on the value."""
    problem = make(rows=4, width=6, importance_weights=True, ref_logprobs=True, seed=1)
    assert problem.mask is not None
    problem.mask[0, 2] = problem.mask[3, 1] = True
    options: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "kl_coef": 0.1}
    _, before = solve(problem, **options)
    changed = copied(problem)
    getattr(changed, name)[(0, 2, 1) if name == "advantages" else (0, 2)] = bad
    solve(
        make(rows=9, width=50, objectives=4, ref_logprobs=True, seed=5), **options
    )  # nothing is left over from another call
    output, gradient = solve(changed, **options)
    valid = problem.valid()
    reached = torch.zeros(4, 6, dtype=torch.bool)
    reached[0, 2] = True
    if name != "ref_logprobs":
        reached = {
            "token": reached,
            "sequence": valid & (torch.arange(4) == 0)[:, None],
            "batch": valid,
        }[weights_per]
    specified, exact = reference_gradient(changed, **options)
    assert specified.loss.isnan()
    assert output.loss.isnan()
    # where a token's own ratio is clipped, its gradient may be 0
    assert (exact.isnan() <= gradient.isnan()).all()
    assert (gradient.isnan() <= reached).all()
    assert torch.equal(gradient[~reached], before[~reached])


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_valid(weights_per: str, aggregation: str) -> None:
    prior = [1.0, 2.0, 5.0]
    for layout in SEQUENCE_LAYOUTS:
        problem = make(layout, rows=4, width=6, ref_logprobs=True)
        assert problem.mask is not None
        problem = poisoned(replace(problem, mask=torch.zeros_like(problem.mask)), NAN)
        for normalizer in (None, 3.0, torch.tensor(0), torch.tensor(2.0)):
            output, gradient = solve(
                problem,
                weights_per=weights_per,
                aggregation=aggregation,
                prior=prior,
                normalizer=normalizer,
                kl_coef=0.1,
            )
            assert output.loss == 0
            assert (gradient == 0).all()
            assert (output.weights == torch.tensor([0.125, 0.25, 0.625])).all()
            assert (output.optimum == 0).all()


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("n", [1, 3])
def test_small_shapes(weights_per: str, shape: tuple[int, int], n: int) -> None:
    g = torch.Generator().manual_seed(1)
    logp = -torch.rand(shape, generator=g).double()
    advantages = torch.rand(*shape, n, generator=g).double()
    for aggregation in AGGREGATIONS:
        problem = Problem(logp, logp - 0.1, advantages)
        options: dict[str, Any] = {"weights_per": weights_per, "aggregation": aggregation}
        output, gradient = solve(problem, **options)
        wanted, exact = reference_gradient(problem, **options)
        # a few float64 terms below 2
        assert float(output.loss) == pytest.approx(float(wanted.loss), abs=64 * EPS64)
        assert torch.allclose(gradient, exact, rtol=0, atol=64 * EPS64)
        assert torch.allclose(output.weights, wanted.weights, rtol=0, atol=64 * EPS64)


def test_packed_without_tokens() -> None:
    empty = torch.zeros(0)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0], dtype=torch.int32)):
        for weights_per in WEIGHTS_PER:
            for aggregation in AGGREGATIONS:
                problem = Problem(empty, empty, torch.zeros(0, 2), cu_seqlens=cu)
                output, gradient = solve(problem, weights_per=weights_per, aggregation=aggregation)
                assert output.loss == 0
                assert gradient.shape == (0,)


# --- bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed"])
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_same_bits_for_every_number_of_threads(layout: str, weights_per: str) -> None:
    problem = make(layout, rows=45, width=500, objectives=4, importance_weights=True, ref_logprobs=True)
    noise = torch.randn(problem.advantages.shape, generator=torch.Generator().manual_seed(0))
    problem = replace(problem, advantages=problem.advantages + 0.01 * noise)
    for aggregation in AGGREGATIONS[::2]:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(
                solve(
                    problem,
                    weights_per=weights_per,
                    aggregation=aggregation,
                    regularization=0.1,
                    kl_coef=0.1,
                )
            )
        for output, gradient in results[1:]:
            assert torch.equal(gradient, results[0][1])
            for name in ("loss", "weights", "optimum"):
                assert torch.equal(getattr(output, name), getattr(results[0][0], name)), name
            assert torch.equal(output.statistics.buffer, results[0][0].statistics.buffer)


def test_statistics_and_weights_are_those_of_the_pieces() -> None:
    """batch: pama_weights of objective_statistics' scores, whatever the aggregation."""
    problem = make(rows=6, width=400, objective_mask=torch.bool, importance_weights=True)
    for noon in (True, False):
        s = pk.objective_statistics(**problem.statistics_arguments(), noon=noon)
        for regularization in (0.0, 0.1):
            wanted = pk.pama_weights(s.scores, regularization=regularization, scale=s.second_moments.max())
            for aggregation in AGGREGATIONS:
                output = pk.pama_loss(
                    **problem.loss_arguments(),
                    weights_per="batch",
                    noon=noon,
                    regularization=regularization,
                    aggregation=aggregation,
                )
                assert torch.equal(output.statistics.buffer, s.buffer)
                assert torch.equal(output.weights, wanted.weights.float())
                assert torch.equal(output.optimum, wanted.optimum.float())
