"""combine_advantages: one advantage out of N, against the reference, in every layout."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    CLIPS,
    LAYOUTS,
    SEQUENCE_LAYOUTS,
    WEIGHTS_PER,
    Problem,
    batches,
    copied,
    make,
    poisoned,
    solution_error,
    weightings,
)

import pama_kernels as pk
from pama_kernels import reference

INF, NAN = math.inf, math.nan


def assert_matches(problem: Problem, ratio: bool = True, **options: Any) -> pk.CombinedAdvantages:
    arguments = problem.combine_arguments(ratio)
    if ratio and problem.old_logprobs is not None:
        options.setdefault("clip_range", 0.2)
    got = pk.combine_advantages(**arguments, **options)
    wanted = reference.combine_advantages(**arguments, **options)
    dtype = problem.advantages.dtype
    assert got.advantages.dtype == dtype
    assert got.advantages.shape == wanted.advantages.shape
    assert got.weights.shape == wanted.weights.shape
    assert got.optimum.shape == wanted.optimum.shape
    error = solution_error(problem, options, dtype)
    largest = max(1.0, float(options["weights"].abs().max()) if options.get("weights") is not None else 1.0)
    size = float(wanted.statistics.advantage_square_sum.sum() > 0) * 2 * problem.objectives * largest
    assert ((got.weights - wanted.weights).abs() <= error * largest).all()
    assert ((got.optimum - wanted.optimum).abs() <= error * size).all()
    # n products with advantages up to 2, then rounded to the dtype of the advantages
    tolerance = 4 * error * size + torch.finfo(dtype).eps * wanted.advantages.abs()
    assert ((got.advantages.double() - wanted.advantages).abs() <= tolerance).all()
    assert torch.equal(got.statistics.scores, wanted.statistics.scores) or torch.allclose(
        got.statistics.scores, wanted.statistics.scores, rtol=1e-14, atol=0
    )
    return got


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("noon", [True, False])
def test_every_layout(layout: str, weights_per: str, noon: bool) -> None:
    if layout == "flat" and weights_per == "sequence":
        problem = make(layout)
        with pytest.raises(ValueError, match="weights_per"):
            pk.combine_advantages(**problem.combine_arguments(), weights_per="sequence", clip_range=0.2)
        return
    for ratio in (True, False):
        for absent in (None, torch.bool):
            problem = make(layout, rows=4, width=5, objective_mask=absent, seed=3)
            for regularization in (0.0, 0.1):
                options = {"weights_per": weights_per, "noon": noon, "regularization": regularization}
                assert_matches(problem, ratio, **options)


@given(data=st.data(), problem=batches(), ratio=st.booleans(), clip_range=st.sampled_from(CLIPS))
def test_every_option(data: st.DataObject, problem: Problem, ratio: bool, clip_range: Any) -> None:
    assert_matches(problem, ratio, **weightings(data.draw, problem), clip_range=clip_range)


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("form", ["(B, N)", "(B, N) with mask", "(B, T, N)", "packed", "one row"])
def test_without_logprobs(weights_per: str, form: str) -> None:
    g = torch.Generator().manual_seed(0)
    adv = torch.randint(-8, 9, (4, 3), generator=g).float() / 4
    mask, cu, result = None, None, (4,)
    if form == "(B, N) with mask":
        mask = torch.randint(0, 2, (4, 6), generator=g)
        mask[2] = 0
    elif form == "(B, T, N)":
        adv, result = torch.randint(-8, 9, (4, 5, 3), generator=g).float() / 4, (4, 5)
    elif form == "packed":
        cu = torch.tensor([0, 3, 3, 4, 9])
    elif form == "one row":
        adv, result = adv[:1], (1,)
    for noon in (True, False):
        for regularization in (0.0, 0.1):
            options: dict[str, Any] = {
                "weights_per": weights_per,
                "noon": noon,
                "regularization": regularization,
                "cu_seqlens": cu,
            }
            got = pk.combine_advantages(adv, mask, **options)
            wanted = reference.combine_advantages(adv, mask, **options)
            assert got.advantages.shape == result
            # 3 objectives, |A| <= 2, lambda <= 64
            assert torch.allclose(got.advantages.double(), wanted.advantages, rtol=0, atol=3e-5)
            assert torch.allclose(got.weights.double(), wanted.weights, rtol=0, atol=3e-5)
            assert torch.allclose(got.optimum.double(), wanted.optimum, rtol=0, atol=3e-5)


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_given_weights(layout: str) -> None:
    """(N,) and (B, N), contiguous, strided and expanded, are used as they are."""
    problem = make(layout, rows=4, width=6)
    row = torch.tensor([0.5, 0.25, 2.0])
    each = torch.arange(12.0).reshape(4, 3) / 8
    for weights in (row, each, row.expand(4, 3), each.T.contiguous().T, each[:1].expand(4, 3), each.double()):
        for weights_per in WEIGHTS_PER:
            got = assert_matches(problem, weights_per=weights_per, weights=weights)
            assert torch.equal(got.weights, weights.float())


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence"])
@pytest.mark.parametrize("n", [1, 4, 70])
def test_many_tokens(weights_per: str, layout: str, n: int) -> None:
    """Rows longer than a tile, more tokens than a block: 12 x 1000, a few kinds of rows over and over."""
    if weights_per == "token" and n == 70:
        n = 40
    g = torch.Generator().manual_seed(n)
    kinds = torch.randint(-16, 17, (9, n), generator=g).double() / 8
    width = 1000 if n < 40 else 300
    which = torch.randint(0, 9, (12, width), generator=g)
    lengths = torch.randint(0, width + 1, (12,), generator=g)
    lengths[3], lengths[5] = 0, width
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(12, width, generator=g) < 0.9)
    for noon, regularization in ((True, 0.0), (False, 0.1)):
        options: dict[str, Any] = {"weights_per": weights_per, "noon": noon, "regularization": regularization}
        shared: dict[str, Any] = {}
        cu = None
        adv, valid = kinds[which], mask
        if layout.endswith("per-sequence"):
            adv = kinds[which[:, 0]]
        if layout.startswith("packed"):
            inside = torch.arange(width) < lengths[:, None]
            cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
            valid = mask[inside]
            adv = adv if layout.endswith("per-sequence") else adv[inside]
        got = pk.combine_advantages(adv.float(), valid, cu_seqlens=cu, **options, **shared)
        if weights_per != "token":
            wanted = reference.combine_advantages(adv, valid, cu_seqlens=cu, **options).advantages
        else:  # the weights of a token are those of its kind
            tokens = reference.combine_advantages(kinds[:, None], **options).advantages[:, 0]
            by_kind = tokens[which[:, 0]] if adv.dim() == 2 and len(adv) == 12 else tokens[which]
            if by_kind.dim() == 1:
                wanted = by_kind * mask.any(1)
            else:
                wanted = by_kind[inside] * valid if cu is not None else by_kind * valid
        # n products with |A| <= 2 and float32 weights; per token lambda <= 64 with n-term sums
        tolerance = (64 * 8 * n * n if weights_per == "token" else 8 * n) * 1.2e-7 * 2
        assert ((got.advantages - wanted).abs() <= tolerance).all()


def test_instruction_sets_agree(isa: str) -> None:
    for weights_per in WEIGHTS_PER:
        for n in (1, 2, 3, 4, 5):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                problem = make(rows=3, width=11, objectives=n, dtype=dtype, objective_mask=torch.bool)
                assert_matches(problem, weights_per=weights_per)
                problem = make(rows=2, width=5, objectives=n, dtype=dtype, seed=1)
                assert_matches(problem, weights_per=weights_per, regularization=0.1, noon=False)


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("k", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_magnitudes(weights_per: str, k: float) -> None:
    """Scaling all advantages by a power of two scales the result, and changes no weight."""
    for n in (2, 3, 5):
        problem = make(rows=3, width=9, objectives=n, seed=n)
        for noon in (True, False):
            for regularization in (0.0, 0.1):
                options: dict[str, Any] = {
                    "weights_per": weights_per,
                    "noon": noon,
                    "regularization": regularization,
                }
                base = assert_matches(problem, **options)
                arguments = problem.combine_arguments()
                arguments["advantages"] = problem.advantages * k
                pk.combine_advantages(
                    torch.ones(9, 50, 6), **options
                )  # nothing is left over from another call
                got = pk.combine_advantages(**arguments, clip_range=0.2, **options)
                # float32 or float64 sums of exact terms; |A| <= 2
                error = solution_error(problem, options, torch.float32)
                assert torch.allclose(got.weights, base.weights, rtol=0, atol=error)
                assert torch.allclose(got.advantages / k, base.advantages, rtol=0, atol=8 * n * error)
                assert torch.allclose(got.optimum / k, base.optimum, rtol=0, atol=8 * n * error)


@pytest.mark.parametrize("k", [2.0**-100, 2.0**100])
def test_objectives_of_very_different_magnitude(k: float) -> None:
    """One objective whose squares float32 does not hold beside two that it does."""
    for weights_per in WEIGHTS_PER:
        for place in range(3):
            problem = make(rows=2, width=7, seed=4)
            problem.advantages[..., place] *= k
            arguments = problem.combine_arguments()
            for regularization in (0.0, 0.1):
                options = {"weights_per": weights_per, "regularization": regularization, "clip_range": 0.2}
                got = pk.combine_advantages(**arguments, **options)
                wanted = reference.combine_advantages(**arguments, **options)
                # see test_every_layout, relative to the largest |A|
                assert torch.allclose(got.weights.double(), wanted.weights, rtol=0, atol=2e-4)
                size = max(2.0, 2 * k)
                assert ((got.advantages - wanted.advantages).abs() <= 2e-4 * size).all()


# --- properties ------------------------------------------------------------------------------------------


def test_each_sequence_is_solved_alone() -> None:
    problem = make(rows=5, width=300, seed=2)
    for weights_per in ("sequence", "token"):
        for regularization in (0.0, 0.1):
            options: dict[str, Any] = {"weights_per": weights_per, "regularization": regularization}
            whole = pk.combine_advantages(problem.advantages, problem.mask, **options)
            for i in range(5):
                row = slice(i, i + 1)
                assert problem.mask is not None
                one = pk.combine_advantages(problem.advantages[row], problem.mask[row], **options)
                assert torch.equal(one.advantages, whole.advantages[row])
                if weights_per == "sequence":
                    assert torch.equal(one.weights, whole.weights[row])
                    assert torch.equal(one.optimum, whole.optimum[row])


def test_permuting_objectives() -> None:
    problem = make(rows=3, width=8, objectives=4, objective_mask=torch.bool)
    order = [2, 0, 3, 1]
    for weights_per in WEIGHTS_PER:
        for regularization in (0.0, 0.1):
            options: dict[str, Any] = {"weights_per": weights_per, "regularization": regularization}
            arguments = problem.combine_arguments(ratio=False)
            s = pk.combine_advantages(**arguments, **options)
            arguments["advantages"] = problem.advantages[..., order]
            assert problem.objective_mask is not None
            arguments["objective_mask"] = problem.objective_mask[..., order]
            t = pk.combine_advantages(**arguments, **options)
            error = solution_error(problem, options, torch.float32)
            assert torch.allclose(s.weights[..., order], t.weights, rtol=0, atol=error)
            assert torch.allclose(s.advantages, t.advantages, rtol=0, atol=8 * error)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_masked_values_have_no_influence(layout: str, bad: float, weights_per: str) -> None:
    if layout == "flat" and weights_per == "sequence":
        weights_per = "batch"
    problem = make(layout, rows=4, width=9, objective_mask=torch.bool)
    for ratio in (True, False):
        for noon, regularization in ((True, 0.0), (False, 0.1)):
            options: dict[str, Any] = {
                "weights_per": weights_per,
                "noon": noon,
                "regularization": regularization,
                "clip_range": 0.2,
            }
            clean = pk.combine_advantages(**problem.combine_arguments(ratio), **options)
            dirty = pk.combine_advantages(**poisoned(problem, bad).combine_arguments(ratio), **options)
            for name in ("advantages", "weights", "optimum"):
                assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
            assert torch.isfinite(clean.advantages).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_a_nan_or_infinity_reaches_what_depends_on_it(bad: float, noon: bool, regularization: float) -> None:
    problem = make(rows=4, width=6, seed=1)
    assert problem.mask is not None
    problem.mask[0, 2] = problem.mask[3, 1] = True
    changed = copied(problem)
    changed.advantages[0, 2, 1] = bad
    options: dict[str, Any] = {"noon": noon, "regularization": regularization}
    valid = problem.valid()
    place = torch.zeros(4, 6, dtype=torch.bool)
    place[0, 2] = True
    for weights_per, reached in (
        ("token", place),
        ("sequence", valid & (torch.arange(4) == 0)[:, None]),
        ("batch", valid),
    ):
        for solve in (pk.combine_advantages, reference.combine_advantages):
            before = solve(problem.advantages, problem.mask, weights_per=weights_per, **options)
            solve(
                torch.ones(2, 6, 4), weights_per=weights_per, **options
            )  # nothing is left over from another call
            after = solve(changed.advantages, changed.mask, weights_per=weights_per, **options)
            assert torch.equal(after.advantages.isnan(), reached), (weights_per, solve)
            assert torch.equal(after.advantages[~reached], before.advantages[~reached])
            if weights_per == "sequence":
                assert after.weights.isnan().any(1).tolist() == [True, False, False, False]
            else:
                assert after.weights.isnan().all()


def test_a_nan_in_one_sequence_of_per_sequence_advantages() -> None:
    adv = torch.tensor([[1.0, 2.0], [0.5, NAN], [3.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    for weights_per, rows in (("sequence", [False, True, False]), ("batch", [True] * 3)):
        got = pk.combine_advantages(adv, mask, weights_per=weights_per)
        assert got.advantages.isnan().tolist() == rows
    mask[1] = 0  # now without influence
    for weights_per in ("sequence", "batch", "token"):
        got = pk.combine_advantages(adv, mask, weights_per=weights_per)
        assert torch.isfinite(got.advantages).all()
        assert got.advantages[1] == 0


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
def test_nothing_valid(weights_per: str) -> None:
    prior = [1.0, 2.0, 5.0]
    wanted = torch.tensor([0.125, 0.25, 0.625])
    for layout in SEQUENCE_LAYOUTS:
        problem = make(layout, rows=4, width=6)
        assert problem.mask is not None
        problem = replace(problem, mask=torch.zeros_like(problem.mask))
        for regularization in (0.0, 0.1):
            got = pk.combine_advantages(
                **problem.combine_arguments(),
                weights_per=weights_per,
                prior=prior,
                regularization=regularization,
                clip_range=0.2,
            )
            assert (got.advantages == 0).all()
            assert (got.weights == wanted).all()
            assert (got.optimum == 0).all()


@pytest.mark.parametrize("weights_per", WEIGHTS_PER)
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 3), (1, 1, 1), (1, 1, 4), (1, 3), (7, 1)])
def test_small_shapes(weights_per: str, shape: tuple[int, ...]) -> None:
    adv = torch.rand(shape, generator=torch.Generator().manual_seed(1)).double()
    for regularization in (0.0, 0.1):
        got = pk.combine_advantages(adv, weights_per=weights_per, regularization=regularization)
        wanted = reference.combine_advantages(adv, weights_per=weights_per, regularization=regularization)
        for name in ("advantages", "weights", "optimum"):
            x, y = getattr(got, name), getattr(wanted, name)
            assert x.shape == y.shape, name
            # float64 throughout; spread of these random scores above 1e-2
            assert torch.allclose(x, y, rtol=0, atol=1e-11), name
        if 0 not in shape:
            continue
        prior = torch.full((shape[-1],), 1 / shape[-1], dtype=torch.float64)
        assert torch.allclose(got.weights, prior.expand_as(got.weights), rtol=0, atol=1e-15)


def test_packed_without_tokens() -> None:
    for weights_per in WEIGHTS_PER:
        for cu in (torch.tensor([0]), torch.tensor([0, 0, 0], dtype=torch.int32)):
            got = pk.combine_advantages(torch.zeros(0, 2), cu_seqlens=cu, weights_per=weights_per)
            assert got.advantages.shape == (0,)
            assert torch.isfinite(got.weights).all()


def test_same_bits_for_every_number_of_threads() -> None:
    g = torch.Generator().manual_seed(0)
    adv = torch.randn(50, 400, 4, generator=g)
    mask = torch.rand(50, 400, generator=g) < 0.8
    for weights_per in WEIGHTS_PER:
        for regularization in (0.0, 0.1):
            results = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(
                    pk.combine_advantages(adv, mask, weights_per=weights_per, regularization=regularization)
                )
            for other in results[1:]:
                assert torch.equal(other.advantages, results[0].advantages)
                assert torch.equal(other.weights, results[0].weights)
                assert torch.equal(other.optimum, results[0].optimum)
                assert torch.equal(other.statistics.buffer, results[0].statistics.buffer)


def test_statistics_are_those_of_objective_statistics() -> None:
    problem = make(rows=6, width=400, objective_mask=torch.bool)
    for weights_per in WEIGHTS_PER:
        got = pk.combine_advantages(
            **problem.combine_arguments(), weights_per=weights_per, clip_range=(0.2, 0.28)
        ).statistics
        arguments = problem.statistics_arguments()
        wanted = pk.objective_statistics(**arguments, clip_range=(0.2, 0.28), gram=True)
        # exact on the grid except for the surrogate and the divergence, whose tiles may end elsewhere
        assert torch.allclose(got.buffer, wanted.buffer, rtol=3e-5, atol=0)
        assert torch.equal(got.scores, wanted.scores)
        assert torch.equal(got.conflict, wanted.conflict)


# --- defaults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noon", [True, False])
def test_defaults_are_those_that_the_study_chose(noon: bool) -> None:
    advantages = torch.randn(6, 5, 3)
    logprobs = torch.zeros(6, 5)
    chosen = {"weights_per": "batch", "regularization": 0.1}
    for rule in ({}, chosen):
        combined = pk.combine_advantages(advantages, noon=noon, **rule)
        loss = pk.pama_loss(logprobs, None, advantages, noon=noon, **rule)
        module = pk.PamaLoss(noon=noon, **rule)(logprobs, None, advantages)
        if not rule:
            first = (combined.advantages, combined.weights, loss.loss, loss.weights, module.loss)
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            first, (combined.advantages, combined.weights, loss.loss, loss.weights, module.loss), strict=True
        )
    )


@pytest.mark.parametrize("bound", ["scores", "gram"])
def test_an_objective_with_nothing_to_tell_does_not_stop_the_others(bound: str) -> None:
    """All its advantages are 0 (every sample got the same reward): without regularization it takes over."""
    advantages = torch.cat([torch.randn(64, 2), torch.zeros(64, 1)], 1)
    stopped = pk.combine_advantages(advantages, bound=bound, regularization=0.0)
    assert stopped.weights[2] > 1 - 1e-6  # as near to the one optimum as `min_norm_weights` promises
    assert stopped.advantages.max() < 1e-5
    combined = pk.combine_advantages(advantages, bound=bound)
    assert combined.weights[:2].min() > 0.02
    assert (combined.advantages[(advantages > 0).any(1)] > 0).all()
