"""Every call over tokens equals the reference: any rule, layout, dtype and option."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _tables import (
    BATCH,
    GIVEN,
    RULES,
    WHERE,
    assert_agrees,
    assert_combined,
    assert_loss,
    diagonal,
    fits,
    weighting,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    AGGREGATIONS,
    EPS32,
    FLOATS,
    LAYOUTS,
    MASKS,
    Problem,
    batches,
    clippings,
    make,
    poisoned,
    reference_gradient,
)

import pama_kernels as pk
from pama_kernels import reference

INF = math.inf
ALL = (*RULES, *GIVEN)


@pytest.mark.parametrize(("name", "where"), diagonal(ALL, WHERE), ids=str)
def test_every_rule_and_layout(name: str, where: tuple[str, int, int]) -> None:
    """With everything that is optional."""
    layout, rows, width = where
    problem = make(
        layout,
        rows=rows,
        width=width,
        seed=len(name),
        objective_mask=torch.bool,
        importance_weights=True,
        ref_logprobs=True,
        overflow=True,
    )
    if not fits(name, problem):
        with pytest.raises(ValueError, match=r"^rule: .*cu_seqlens"):
            pk.combine_advantages(**problem.combine_arguments(False), rule=RULES[name])
        with pytest.raises(ValueError, match=r"^rule: .*cu_seqlens"):
            pk.pama_loss(**problem.loss_arguments(), rule=RULES[name])
        return
    aggregation = "token-mean" if problem.flat else AGGREGATIONS[len(name) % 3]
    options = {"clip_range": (0.2, 0.28), "dual_clip": 3.0, "kl_coef": 0.05, "aggregation": aggregation}
    assert_agrees(problem, **weighting(name, problem), **options, preference=[1.0, 2.0, 1.0])


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_rule_and_layout_without_options(name: str, where: tuple[str, int, int]) -> None:
    layout, rows, width = where
    problem = make(layout, rows=rows, width=width, seed=len(name), mask=None, ratio=False)
    if fits(name, problem):
        assert_agrees(problem, **weighting(name, problem))


@pytest.mark.portable
@given(
    data=st.data(),
    problem=batches(shapes=((3, 5), (1, 1), (2, 9)), objectives=(1, 2, 3, 4, 6)),
    clipping=clippings(),
    aggregation=st.sampled_from(AGGREGATIONS),
    normalizer=st.sampled_from([None, None, 7.5, torch.tensor(3.0), torch.tensor(12)]),
    kl_coef=st.sampled_from([0.0, 0.1, torch.tensor(2.0)]),
)
def test_every_option(
    data: st.DataObject,
    problem: Problem,
    clipping: dict[str, Any],
    aggregation: str,
    normalizer: Any,
    kl_coef: Any,
) -> None:
    name = data.draw(st.sampled_from([name for name in ALL if fits(name, problem)]))
    n = problem.objectives
    preference = data.draw(st.sampled_from([None, [1.0 + i % 3 for i in range(n)], [0.0] * (n - 1) + [2.0]]))
    assert_agrees(
        problem,
        **weighting(name, problem),
        **clipping,
        preference=preference,
        aggregation="token-mean" if problem.flat else aggregation,
        normalizer=normalizer,
        kl_coef=kl_coef,
    )


@given(
    kinds=st.tuples(*[st.sampled_from(FLOATS)] * 5),
    name=st.sampled_from(["cosines", "scores noon", "sequence", "token", "given"]),
    layout=st.sampled_from(["padded", "per-sequence", "packed-per-sequence", "flat"]),
    offsets=st.sampled_from([torch.int32, torch.int64]),
)
def test_every_mix_of_dtypes(
    kinds: tuple[torch.dtype, ...], name: str, layout: str, offsets: torch.dtype
) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "importance_weights", "ref_logprobs")
    dtype = dict(zip(names, kinds, strict=True))
    problem = make(layout, width=6, dtype=dtype, importance_weights=True, ref_logprobs=True, offsets=offsets)
    assert_agrees(problem, **weighting("scores" if not fits(name, problem) else name, problem), kl_coef=0.1)


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence", "flat"])
@pytest.mark.parametrize("n", [1, 3, 8, 70])
def test_many_tokens(n: int, layout: str) -> None:
    """Rows longer than a tile, rows that end within one, and more tokens than one block."""
    width = 700 if n < 70 else 150
    problem = make(layout, rows=14, width=width, objectives=n, importance_weights=True, seed=1)
    for aggregation in AGGREGATIONS[:: 1 if layout == "packed-per-sequence" else 3]:
        assert_agrees(problem, rule=RULES["cosines" if n < 70 else "scores"], aggregation=aggregation)
    absent = make(layout, rows=5, width=300, objectives=n, objective_mask=torch.bool, ref_logprobs=True)
    name = ("upgrad", "scores", "paper batch", "cosines")[n % 4]
    assert_agrees(absent, **weighting(name, absent), kl_coef=0.1, dual_clip=3.0)


@pytest.mark.parametrize("name", ["sequence", "softmin", "given rows", "token", "paper token"])
def test_many_tokens_by_row_and_token(name: str) -> None:
    for layout in ("padded", "packed-per-sequence"):
        rows, width = (12, 300) if "token" not in name else (5, 60)
        problem = make(layout, rows=rows, width=width, objectives=3, ref_logprobs=True, seed=1)
        assert_agrees(
            problem,
            **weighting(name, problem),
            kl_coef=0.1,
            aggregation="seq-mean-token-mean",
            clip_range=0.5,
        )


@pytest.mark.parametrize("regularized", [False, True])
def test_more_than_a_block_with_weights_per_token(regularized: bool) -> None:
    """9,000 tokens of nine kinds, over and over: the gradient is that of the nine."""
    kinds = make("flat", rows=1, width=9, objectives=4, mask=None, ref_logprobs=True, seed=6)
    which = torch.randint(0, 9, (9, 1000), generator=torch.Generator().manual_seed(0))
    problem = Problem(**{k: v[which] for k, v in vars(kinds).items() if v is not None})
    options: dict[str, Any] = {"rule": RULES["token" if regularized else "paper token"], "kl_coef": 0.1}
    one, wanted = reference_gradient(kinds, **options)
    leaf = problem.logprobs.clone().requires_grad_()
    output = pk.pama_loss(**{**problem.loss_arguments(), "logprobs": leaf}, **options)
    output.loss.backward()
    assert leaf.grad is not None
    # 9 tokens in the denominator against 9,000; weights per token to 64 * 8 * n eps (`solution_error`)
    error = 64 * 8 * 4 * 16 * EPS32
    assert torch.allclose(leaf.grad.double() * 1000, wanted[which], rtol=error, atol=error / 9)
    combined = pk.combine_advantages(problem.advantages, rule=options["rule"]).advantages
    by_kind = reference.combine_advantages(kinds.advantages, torch.ones(9), rule=options["rule"]).advantages
    assert ((combined - by_kind[which]).abs() <= error).all()
    assert one.weights.shape == output.weights.shape


@pytest.mark.parametrize("dtype", MASKS)
def test_mask_values(dtype: torch.dtype) -> None:
    """Zero of either sign masks; anything else is valid, however small or wide. In every layout."""
    small = {torch.float64: 1e-300, torch.float32: 1e-40, torch.float16: 1e-7, torch.bfloat16: 1e-39}
    wide = {torch.int64: 2**32, torch.int32: 2**24, torch.int16: 256, torch.uint8: 128}
    mask = torch.tensor([[0, 0, 1, wide.get(dtype, small.get(dtype, 1))]], dtype=torch.float64).to(dtype)
    if dtype.is_floating_point:
        mask[0, 1] = -0.0
    if dtype not in (torch.bool, torch.uint8):
        mask[0, 2] = -1
    values = torch.tensor([[5.0, 7.0, 1.0, 2.0]])
    for advantages in (values[..., None], torch.ones(1, 1)):
        s = pk.objective_statistics(values, None, advantages, mask)
        assert float(s.token_count) == 2
        assert float(s.logprob_sum) == (5.0 if advantages.dim() == 3 else 3.0)
    objectives = pk.objective_statistics(None, None, torch.ones(1, 4), objective_mask=mask)
    assert objectives.count.tolist() == [0, 0, 1, 1]


# --- forms without log-probabilities -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosines", "upgrad", "paper batch", "sequence", "token", "softmin"])
@pytest.mark.parametrize("form", ["(B, N)", "(B, N) with mask", "(B, T, N)", "packed", "one row"])
def test_without_logprobs(name: str, form: str) -> None:
    g = torch.Generator().manual_seed(0)
    advantages = torch.randint(-8, 9, (4, 3), generator=g).float() / 4
    arguments: dict[str, Any] = {"advantages": advantages}
    if form == "(B, N) with mask":
        arguments["mask"] = torch.randint(0, 2, (4, 6), generator=g)
        arguments["mask"][2] = 0
    elif form == "(B, T, N)":
        arguments["advantages"] = torch.randint(-8, 9, (4, 5, 3), generator=g).float() / 4
    elif form == "packed":
        arguments["cu_seqlens"] = torch.tensor([0, 3, 3, 4, 9])
    elif form == "one row":
        arguments["advantages"] = advantages[:1]
        name = "fixed" if name == "upgrad" else name  # of rank 1: its weights are not unique
    for aggregation in AGGREGATIONS[::2]:
        got = pk.combine_advantages(**arguments, rule=RULES[name], aggregation=aggregation)
        wanted = reference.combine_advantages(**arguments, rule=RULES[name], aggregation=aggregation)
        assert got.advantages.shape == wanted.advantages.shape
        # 3 objectives, |A| <= 2; at most 64 * 8 * n eps of the weights (`solution_error`)
        for x, y in zip(got[:3], wanted[:3], strict=True):
            assert torch.allclose(x.double(), y, rtol=0, atol=64 * 8 * 3 * 2 * EPS32)
        assert torch.allclose(got.statistics.gram, wanted.statistics.gram, rtol=16 * EPS32)


@pytest.mark.parametrize("name", ["cosines", "upgrad", "sequence", "token"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_normalize_divides_by_the_root_mean_square(name: str, aggregation: str) -> None:
    for dtype in FLOATS:
        for layout in ("padded", "per-sequence", "packed"):
            problem = make(layout, rows=5, width=6, dtype=dtype, objective_mask=torch.bool, seed=2)
            options: dict[str, Any] = {"rule": RULES[name], "aggregation": aggregation}
            arguments = problem.combine_arguments(ratio=False)
            got = pk.combine_advantages(**arguments, **options, normalize=True)
            plain = pk.combine_advantages(**arguments, **options)
            wanted = reference.combine_advantages(**arguments, **options, normalize=True)
            assert got.advantages.dtype == dtype
            assert torch.equal(got.weights, plain.weights)
            root = reference.combine_advantages(**arguments, **options).advantages.square().max().sqrt()
            assert root > 0.1  # so that nothing below is divided by a sum that cancels
            # weights to 64 * 8 * n eps where they are per token; products of 3, the quotient, two roundings
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            error = 64 * 8 * 3 * 16 * max(eps, 4 * 2.3e-16) if name in ("token", "upgrad") else 272 * 8 * eps
            tolerance = 20 * error + 2 * torch.finfo(dtype).eps * wanted.advantages.abs()
            assert ((got.advantages.double() - wanted.advantages).abs() <= tolerance).all()
    nothing = pk.combine_advantages(torch.zeros(3, 2), normalize=True)
    assert (nothing.advantages == 0).all()


# --- degenerate shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BATCH, "sequence", "token", "softmin", "softmin token"])
def test_small_and_empty_shapes(name: str) -> None:
    for shape in ((0, 5), (4, 0), (0, 0), (1, 1), (1, 7), (7, 1)):
        for n in (1, 3):
            if name == "callable" and n == 1:
                continue
            logp = -torch.rand(shape).double()
            for advantages in (torch.rand(*shape, n), torch.rand(shape[0], n)):
                problem = Problem(logp, logp - 0.125, advantages.double())
                for aggregation in AGGREGATIONS:
                    options: dict[str, Any] = {"rule": RULES[name], "aggregation": aggregation}
                    output, _ = assert_loss(problem, grid=False, **options)
                    combined = assert_combined(problem, grid=False, **options, clip_range=0.2)
                    if 0 in shape and name != "callable":
                        assert output.loss == 0
                        assert (combined.statistics.buffer == 0).all()
                        uniform = torch.full((n,), 1 / n, dtype=torch.float64).expand(combined.weights.shape)
                        assert torch.allclose(combined.weights, uniform, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", [*BATCH, "sequence", "token"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_without_tokens(name: str, aggregation: str) -> None:
    empty = torch.zeros(0)
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0], dtype=torch.int32)):
        for advantages in (torch.zeros(0, 2), torch.ones(len(cu) - 1, 2)):
            problem = Problem(empty, empty, advantages, cu_seqlens=cu)
            output, gradient = assert_loss(problem, rule=RULES[name], aggregation=aggregation)
            assert output.loss == 0
            assert gradient.shape == (0,)
            got = pk.combine_advantages(**problem.combine_arguments(False), rule=RULES[name])
            assert got.advantages.shape == advantages.shape[:1]
            assert (got.advantages == 0).all()


@pytest.mark.parametrize("name", [*BATCH, "sequence", "token", "softmin", "softmin token"])
def test_without_a_valid_token(name: str) -> None:
    preference = [1.0, 2.0, 5.0]
    for layout in ("padded", "per-sequence", "packed-per-sequence"):
        problem = make(layout, rows=4, width=6, ref_logprobs=True)
        assert problem.mask is not None
        problem = poisoned(replace(problem, mask=torch.zeros_like(problem.mask)), math.nan)
        problem.advantages.fill_(math.nan)
        for normalizer in (None, 3.0, torch.tensor(0)):
            leaf = problem.logprobs.clone().requires_grad_()
            arguments = {**problem.loss_arguments(), "logprobs": leaf}
            options: dict[str, Any] = {"rule": RULES[name], "preference": preference}
            output = pk.pama_loss(**arguments, **options, normalizer=normalizer, kl_coef=0.1)
            output.loss.backward()
            combined = pk.combine_advantages(**problem.combine_arguments(), clip_range=0.2, **options)
            assert output.loss == 0
            assert (leaf.grad == 0).all()
            assert (combined.advantages == 0).all()
            for result in (output, combined):
                assert (result.statistics.buffer == 0).all()
                assert (result.optimum == 0).all()
                if name != "callable":
                    assert (result.weights == torch.tensor([0.125, 0.25, 0.625])).all()
    s = pk.objective_statistics(**problem.statistics_arguments(), pairs=True)
    for figure in ("scores", "second_moments", "clip_fraction", "conflict", "gram", "cosines", "approx_kl"):
        assert (getattr(s, figure) == 0).all()
    assert not s.signal.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_weights_are_used_unchanged(layout: str) -> None:
    """(N,) and (B, N), contiguous, strided and expanded, of any dtype, without division by presence."""
    problem = make(layout, rows=4, width=6, objective_mask=torch.bool)
    row, each = torch.tensor([0.5, 0.25, -2.0]), torch.arange(12.0).reshape(4, 3) / 8
    weights = [row, row.double(), row.bfloat16()]
    if not problem.flat:
        weights += [each, row.expand(4, 3), each.T.contiguous().T, each[:1].expand(4, 3), each.half()]
    for given_weights in weights:
        output, _ = assert_loss(problem, weights=given_weights)
        combined = assert_combined(problem, weights=given_weights, clip_range=0.2)
        assert torch.equal(output.weights, given_weights.float())
        assert torch.equal(combined.weights, given_weights.float())


@pytest.mark.parametrize("rows", [3, 5])
def test_equal_sizes_do_not_change_the_layout(rows: int) -> None:
    """N == T, N == B, B == T: 2-D advantages beside 2-D tensors are always per sequence."""
    for width in (3, 5):
        for layout in ("per-sequence", "padded", "packed", "packed-per-sequence"):
            problem = make(layout, rows=rows, width=width, objective_mask=torch.bool, seed=rows + width)
            for name in ("cosines", "sequence", "token"):
                assert_agrees(problem, rule=RULES[name])
    advantages, mask = torch.randn(3, 3), torch.ones(3, 3)
    assert pk.combine_advantages(advantages, mask).advantages.shape == (3,)
    assert pk.combine_advantages(advantages[..., None], mask).advantages.shape == (3, 3)
    # one token in each of three packed sequences: per token and per sequence are the same
    cu = torch.tensor([0, 1, 2, 3])
    s = pk.objective_statistics(None, None, advantages, torch.ones(3), cu_seqlens=cu, pairs=True)
    alone = pk.objective_statistics(None, None, advantages, pairs=True)
    assert torch.allclose(s.buffer, alone.buffer, rtol=8 * EPS32, atol=8 * EPS32)
    # as many tokens as sequences, one of them empty: per sequence
    cu = torch.tensor([0, 0, 1, 3])
    combined = pk.combine_advantages(advantages, torch.ones(3), rule="fixed", cu_seqlens=cu).advantages
    assert combined[0] == 0
    torch.testing.assert_close(combined[1:], advantages[1:].mean(1))
