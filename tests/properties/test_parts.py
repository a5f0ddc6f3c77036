"""Batches and their parts: micro-batches, single sequences, statistics of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _rough import close, results, rough
from _sums import sizes, sums
from _tables import RULES, fits, loss_of
from hypothesis import given
from hypothesis import strategies as st
from problems import AGGREGATIONS, EPS32, EPS64, ON_GPU, SUM_ERROR, make, same

import pama_kernels as pk
from pama_kernels import Pama


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
        combined = pk.combine_advantages(**problem.combine_arguments(), rule=pk.Pama(), clip_range=0.2)
        if merged.signal.all() and (merged.second_moments > 0).all():
            close(combined.weights.double(), solved.weights, 3 * EPS32)


def test_sequences_are_independent() -> None:
    problem = rough(rows=5, width=300, seed=2)
    assert problem.mask is not None
    for name in ("sequence", "paper sequence", "softmin", "token", "paper token", "softmin token"):
        whole = pk.combine_advantages(problem.advantages, problem.mask, rule=RULES[name])
        for i in range(5):
            row = slice(i, i + 1)
            one = pk.combine_advantages(problem.advantages[row], problem.mask[row], rule=RULES[name])
            assert same(one.advantages, whole.advantages[row])
            if "token" not in name:
                assert same(one.weights, whole.weights[row])
                assert same(one.optimum, whole.optimum[row])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", ["cosines", "upgrad", "scores", "paper batch", "fixed"])
def test_weights_of_the_batch_are_those_of_its_statistics(name: str, aggregation: str) -> None:
    """The pieces give what the whole gives: statistics, then the solvers, then given weights."""
    problem = make(rows=6, width=100, objective_mask=torch.bool, importance_weights=True)
    rule = RULES[name] or Pama()
    noon = bool(getattr(rule, "noon", False))
    options = {"aggregation": aggregation}
    s = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, pairs=True, **options)
    wanted = {
        "cosines": lambda: pk.min_norm_weights(s.cosines, regularization=0.1),
        "upgrad": lambda: pk.upgrad_weights(s.gram),
        "scores": lambda: pk.pama_weights(s.scores, regularization=0.1, scale=s.second_moments.max()),
        "paper batch": lambda: pk.pama_weights(s.scores),
        "fixed": lambda: (torch.full((3,), 1 / 3).double(), s.scores.mean()),
    }[name]()
    output, _ = loss_of(problem, rule=rule, **options)
    # on a GPU the sums with pairs are another kernel's, in another order
    close(output.statistics.scores, s.scores, 4 * EPS32 if ON_GPU else 0)
    # the same float64 problem, stored in float32
    close(output.weights.double(), wanted[0], 2 * EPS32)
    close(output.optimum.double(), wanted[1], 8 * EPS32)
    combined = pk.combine_advantages(**problem.combine_arguments(), rule=rule, clip_range=0.2, **options)
    assert torch.equal(combined.statistics.count, s.count)


def test_conflict_covariance_and_cosines_equal_numpys() -> None:
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
        # opposite objectives always conflict, and have no common token after the clamp
        assert s.conflict[0, 3] == pytest.approx(-1, abs=150 * EPS64)
        assert s.cosines[0, 3] == pytest.approx(0 if noon else -1, abs=150 * EPS64)
        for matrix in (s.conflict, s.cosines, s.gram, s.covariance):
            assert torch.equal(matrix, matrix.T)
        assert torch.linalg.eigvalsh(s.gram).min() >= -1e-12
    plain = pk.objective_statistics(None, None, advantages, mask)
    assert plain.gram is plain.conflict is plain.cosines is plain.covariance is plain.advantage_gram is None
    assert same(plain.buffer, pk.objective_statistics(None, None, advantages, mask, pairs=True).buffer[:38])
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
