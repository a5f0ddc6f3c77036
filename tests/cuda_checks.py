"""The functions of the CUDA backend against the specification; run by test_cuda.py with its kernels on the host."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from problems import EPS32, EPS64, FLOATS, LAYOUTS, Problem, make, poisoned
from torch import Tensor

import pama_kernels as pk
from pama_kernels import _call, reference
from pama_kernels._validate import check_tokens
from pama_kernels.backends import cuda, operators
from pama_kernels.rules import record

STATISTICS = (*_call.FIELDS, *_call.TOTALS, "scores", "gram", "cosines", "advantage_gram", "conflict")
TYPES: tuple[Any, ...] = (*FLOATS, {"advantages": torch.bfloat16}, {"logprobs": torch.float64})
RULES = (
    pk.Fixed(),
    pk.UPGrad(),
    pk.Pama(),
    pk.Pama(regularization=0.0),
    pk.Pama(bound="scores"),
    pk.Pama(bound="scores", regularization=0.0),
)


def found(arguments: dict[str, Any], **options: Any) -> pk.ObjectiveStatistics:
    statistics = pk.objective_statistics(**arguments, pairs=True, **options)
    assert operators.statistics.backend([(arguments["advantages"],)]) is cuda
    return statistics


def agree(given: Problem, what: object, ratio: float, **options: Any) -> None:
    """`ratio`: the largest ratio of probabilities."""
    arguments = given.statistics_arguments()
    sums = found(arguments, **options)
    wanted = reference.objective_statistics(**arguments, **options)
    # Terms of a size up to 9 or 12 (I * logp), 16 roundings each; means and cosines of few tokens divide by as few.
    unit = 16 * 12 * (EPS64 if given.wide() else EPS32) * max(1, given.logprobs.numel())
    sizes = {"surrogate_sum": ratio, "kl_sum": ratio, "gram": 300, "cosines": 300, "advantage_gram": 300, "conflict": 300}
    for name in STATISTICS:
        if name == "conflict" and options["aggregation"] != "token-mean":
            continue  # variances that are 0 up to rounding
        x, y, near = value(sums, name), getattr(wanted, name), unit * sizes.get(name, 1)
        message = f"{what} {name}: {x} is not {y}"
        torch.testing.assert_close(x, y, rtol=0, atol=near, equal_nan=True, msg=message)


def value(sums: pk.ObjectiveStatistics, name: str) -> Tensor:
    n = sums.objectives
    if name in _call.FIELDS:
        return sums.buffer[_call.FIELDS.index(name) * n :][:n]
    if name in _call.TOTALS:
        return sums.buffer[len(_call.FIELDS) * n + _call.TOTALS.index(name)]
    result: Tensor = getattr(sums, name)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_statistics(layout: str, aggregation: str) -> None:
    """Every layout and dtype, with and without each optional tensor."""
    if layout == "flat" and aggregation != "token-mean":
        pytest.skip("no sequences")
    flags = itertools.product((False, True), repeat=4)
    for seed, (noon, weighted, masked, present) in enumerate(flags):
        objectives, dtype = 1 + seed % 6, TYPES[seed % len(TYPES)]
        problem = make(
            layout,
            rows=4,
            width=21,
            objectives=objectives,
            seed=seed,
            dtype=dtype,
            mask=(torch.bool, torch.float32, torch.int64)[seed % 3] if masked else None,
            objective_mask=torch.bool if present and layout != "flat" else None,
            importance_weights=weighted,
            ratio=seed % 3 > 0,
            overflow=seed % 5 == 0,
            offsets=(torch.int32, torch.int64)[seed % 2],
        )
        options = {"noon": noon, "clip_range": (0.2, (0.2, 0.28), (1.0, math.inf))[seed % 3]}
        ratio = math.exp(20 if seed % 5 == 0 else 1.25)
        agree(problem, (seed, dtype), ratio, aggregation=aggregation, **options)


@pytest.mark.parametrize("layout", ["per-sequence", "packed-per-sequence"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("presence", [False, True])
def test_per_sequence_equals_per_token(layout: str, aggregation: str, presence: bool) -> None:
    """Advantages of a sequence repeated for each of its tokens give the same sums."""
    for seed in range(4):
        problem = make(
            layout,
            rows=5,
            width=70,
            objectives=6,
            seed=seed,
            importance_weights=seed % 2 == 1,
            objective_mask=torch.bool if presence else None,
        )
        if seed == 3:
            problem.logprobs[problem.valid().nonzero(as_tuple=True)[0][0]] = math.nan
            problem.advantages[3, 2] = math.nan
        arguments = problem.statistics_arguments()
        if problem.cu_seqlens is None:
            repeated = problem.advantages[:, None].expand(-1, problem.logprobs.shape[1], -1).contiguous()
        else:
            lengths = problem.cu_seqlens.diff()
            repeated = problem.advantages.repeat_interleave(lengths, 0)
        for noon in (False, True):
            options = {"noon": noon, "aggregation": aggregation}
            x = found(arguments, **options).buffer
            y = found({**arguments, "advantages": repeated}, **options).buffer
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence"])
def test_masked_values_are_ignored(layout: str) -> None:
    problem = make(layout, rows=4, width=30, objectives=3, objective_mask=torch.bool, importance_weights=True)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        clean = found(problem.statistics_arguments(), aggregation=aggregation).buffer
        for bad in (math.nan, math.inf):
            other = found(poisoned(problem, bad).statistics_arguments(), aggregation=aggregation).buffer
            assert torch.equal(clean, other)


def test_without_logprobs() -> None:
    """Only the mask is read; without one, only the lengths."""
    for layout, masked in itertools.product(("per-sequence", "packed-per-sequence", "padded", "packed"), (False, True)):
        problem = make(layout, rows=5, width=40, objectives=5, mask=torch.bool if masked else None)
        arguments = problem.combine_arguments(ratio=False)
        if layout in ("per-sequence", "padded") and not masked:
            arguments["mask"] = torch.ones(5, 40)
        for aggregation in ("token-mean", "seq-mean-token-mean"):
            options = {"logprobs": None, "old_logprobs": None, "clip_range": None, "aggregation": aggregation}
            x = pk.objective_statistics(**arguments, **options, pairs=True)
            y = reference.objective_statistics(**arguments, **options)
            for name in STATISTICS:
                torch.testing.assert_close(value(x, name), getattr(y, name), rtol=1e-5, atol=1e-4)


# --- weights of the batch -----------------------------------------------------------------------------


def _preferences(n: int) -> list[list[float] | None]:
    return [None, [1.0 + i for i in range(n)], [0.0] * (n - 1) + [1.0]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7])
def test_weights_of_the_batch(n: int) -> None:
    for seed, noon in ((0, False), (1, True), (2, False)):
        problem = make(rows=4, width=15, objectives=n, seed=seed, objective_mask=torch.bool if seed == 1 else None)
        if seed > 0:
            problem.advantages[..., seed % n] = 0  # no signal
        arguments = problem.statistics_arguments()
        sums = found(arguments, noon=noon).buffer
        spelled = reference.objective_statistics(**arguments, noon=noon)
        for rule, preference in itertools.product(RULES, _preferences(n)):
            p = None if preference is None else torch.tensor(preference, dtype=torch.float64) / sum(preference)
            c, optimum, effective = cuda.solve(sums, record(rule), p, n)
            wanted, wanted_optimum, wanted_effective = reference.batch_weights(spelled, rule, p, n)
            near = {"rtol": 0, "atol": 2e-5}
            torch.testing.assert_close(effective, wanted_effective, **near)
            torch.testing.assert_close(optimum, wanted_optimum, **near)
            assert float(optimum) >= 0 or "scores" in str(rule) or isinstance(rule, pk.Fixed)
            if getattr(rule, "regularization", 1.0) > 0:  # else more than one point may be optimal
                torch.testing.assert_close(c, wanted, **near)
            assert abs(float(c.sum()) - 1) < 1e-12
            assert bool((c >= 0).all())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_signal_and_nan(rule: Any) -> None:
    n, p = 3, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    problem = make("padded", objectives=n)
    problem.advantages.zero_()
    c, optimum, effective = cuda.solve(found(problem.statistics_arguments()).buffer, record(rule), p, n)
    assert torch.equal(c, p)
    assert torch.equal(effective, p)
    assert float(optimum) == 0
    problem.advantages.fill_(math.nan)
    c, optimum, effective = cuda.solve(found(problem.statistics_arguments()).buffer, record(rule), p, n)
    assert torch.equal(effective, p)
    assert bool(optimum.isnan())
    assert isinstance(rule, pk.Fixed) or bool(c.isnan().all())


@pytest.mark.parametrize("rule", [pk.Fixed(), pk.Pama(bound="scores")], ids=str)
def test_one_launch_for_statistics_and_weights(rule: Any) -> None:
    for layout, n in itertools.product(("padded", "per-sequence", "packed"), (1, 2, 3, 4, 6)):
        problem = make(layout, rows=4, width=40, objectives=n)
        problem.advantages[..., 0] = 0
        tokens, _ = check_tokens(
            problem.advantages,
            problem.mask,
            logprobs=problem.logprobs,
            old_logprobs=problem.old_logprobs,
            cu_seqlens=problem.cu_seqlens,
            clip_range=0.2,
            aggregation="token-mean",
            noon=False,
            objective_mask=None,
            importance_weights=None,
            dual_clip=None,
        )
        for preference in _preferences(n):
            p = None if preference is None else torch.tensor(preference, dtype=torch.float64) / sum(preference)
            sums, batch = cuda.statistics_and_scores(tokens, record(rule), p)
            assert torch.equal(sums, cuda.statistics(tokens, False))
            for x, y in zip(batch, cuda.solve(sums, record(rule), p, n), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


# --- many problems ------------------------------------------------------------------------------------


def _grams(n: int, seed: int, count: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, n, n + 2, generator=g, dtype=torch.float64)
    return factors @ factors.transpose(-1, -2)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_solvers(n: int, dtype: torch.dtype) -> None:
    gram = _grams(n, n).to(dtype)
    scores = torch.randn(6, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-6 if dtype != torch.float64 else 1e-9, "check_dtype": False}
    for preference in _preferences(n):
        for views in (gram, gram.transpose(-1, -2), gram[::2]):
            for r in (0.0, 0.1):
                x = pk.min_norm_weights(views, preference=preference, regularization=r)
                y = reference.min_norm_weights(views, preference=preference, regularization=r)
                torch.testing.assert_close(tuple(x), tuple(y), **near)
            x = pk.upgrad_weights(views, preference=preference)
            torch.testing.assert_close(tuple(x), tuple(reference.upgrad_weights(views, preference=preference)), **near)
        for views in (scores, scores[::2], scores.T.contiguous().T):
            for r, scale in ((0.0, None), (0.1, None), (0.1, 2.0)):
                x = pk.pama_weights(views, preference=preference, regularization=r, scale=scale)
                y = reference.pama_weights(views, preference=preference, regularization=r, scale=scale)
                torch.testing.assert_close(tuple(x), tuple(y), **near)


@pytest.mark.parametrize("n", [2, 5])
def test_results_in_given_memory(n: int) -> None:
    gram, scores = _grams(n, 1), torch.randn(5, n, dtype=torch.float64)
    for solver, given in ((pk.min_norm_weights, gram), (pk.upgrad_weights, gram), (pk.pama_weights, scores)):
        out = pk.WeightSolution(torch.empty(5, n, dtype=torch.float64), torch.empty(5, dtype=torch.float64))
        solver(given, out=out)
        for x, y in zip(out, solver(given, preference=[1.0] * n), strict=True):
            assert torch.equal(x, y)


def test_a_nan_stays_in_its_matrix() -> None:
    gram = _grams(3, 2)
    gram[1, 0, 2] = math.nan
    for solver in (pk.min_norm_weights, pk.upgrad_weights):
        c, optimum = solver(gram, preference=[1.0, 1.0, 1.0])
        assert c.isnan().any(-1).tolist() == [False, True, False, False, False]
        assert optimum.isnan().tolist() == [False, True, False, False, False]
