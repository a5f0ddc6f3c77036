"""Calls that must agree: other orders, scales, strides and layouts of the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _rough import UNIQUE, close, results, rough
from _sums import sizes, sums
from _tables import BATCH, RULES, diagonal, loss_of, weighting
from hypothesis import given
from hypothesis import strategies as st
from problems import AGGREGATIONS, EPS32, EPS64, FLOATS, ON_GPU, SUM_ERROR, Problem, make, solution_error
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels._call import FIELDS

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
    """One objective whose squares are out of float32's range beside two in range."""
    for k in (2.0**-100, 2.0**100):
        for place in range(3):
            problem = make(rows=2, width=7, seed=4)
            problem.advantages[..., place] *= k
            for name in ("cosines", "upgrad", "scores", "paper batch", "sequence", "token"):
                arguments = problem.combine_arguments()
                got = pk.combine_advantages(**arguments, rule=RULES[name], clip_range=0.2)
                wanted = reference.combine_advantages(**arguments, rule=RULES[name], clip_range=0.2)
                if name != "upgrad":
                    error = 64 * 8 * 3 * EPS32  # `solution_error`
                    close(got.weights.double(), wanted.weights, error)
                    close(got.advantages.double(), wanted.advantages, error * max(2.0, 2 * k))
                assert (got.weights >= 0).all()


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Bit for bit on a CPU; on a GPU other layouts are summed by other kernels, in another order."""
    for x, y in zip(found, wanted, strict=True):
        if ON_GPU:
            largest = float(y.abs().max()) if y.dim() else 1.0  # loss and optimum are sums that cancel
            torch.testing.assert_close(x, y, rtol=0, atol=16 * EPS32 * largest, equal_nan=True)
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["cosines", "upgrad", "scores", "token"])
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
        same(results(form, **options), wanted)


@pytest.mark.parametrize("name", ["cosines", "sequence", "token"])
def test_broadcast_inputs(name: str) -> None:
    problem = make(rows=4, width=6)
    arguments = {k: v for k, v in problem.loss_arguments().items() if v is not None}
    arguments["mask"] = torch.tensor([1, 0, 1, 1, 1, 0])[None].expand(4, 6)
    arguments["importance_weights"] = torch.tensor(0.5).expand(4, 6)
    arguments["advantages"] = arguments["advantages"][:1].expand(4, 6, 3)
    arguments["old_logprobs"] = arguments["old_logprobs"][:, :1].expand(4, 6)
    copies = {k: v.contiguous() for k, v in arguments.items()}
    same(results(arguments, rule=RULES[name]), results(copies, rule=RULES[name]))


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
