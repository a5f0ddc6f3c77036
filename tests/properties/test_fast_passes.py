"""The passes of the CPU backend that leave something out give the results of those that do not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import ON_GPU, copied, make
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

INF, NAN = math.inf, math.nan
ROWS, WIDTH = 5, 611  # a last chunk that fills no vector
RULES: dict[str, Any] = {
    "cosines": pk.Pama(),
    "UPGrad": pk.UPGrad(),
    "token": pk.Pama.paper("token"),
    "token, regularized": pk.Pama("token"),
    "sequence": pk.Pama("sequence"),
    "softmin": pk.SoftMin(),
}


def _problem(n: int, per_sequence: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    old = torch.randn(ROWS, WIDTH, generator=g) - 2
    logprobs = old + 0.3 * torch.randn(ROWS, WIDTH, generator=g)
    logprobs[:, :12] += torch.linspace(-30, 30, 12)  # some beyond the clamp of the log ratio
    mask = torch.rand(ROWS, WIDTH, generator=g) < 0.8
    logprobs[~mask] = NAN
    shape = (ROWS, n) if per_sequence else (ROWS, WIDTH, n)
    advantages = torch.randn(shape, generator=g)
    return logprobs.to(dtype), old.to(dtype), advantages.to(dtype), mask


def _loss(function: Any, logprobs: Tensor, *rest: Tensor, **settings: Any) -> tuple[Any, Tensor]:
    leaf = logprobs.detach().requires_grad_()
    output = function(leaf, *rest, **settings)
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [3, 8])
def test_the_loss_without_statistics_is_that_with_them(
    n: int, dtype: torch.dtype, per_sequence: bool
) -> None:
    problem = _problem(n, per_sequence, dtype)
    cases: dict[str, dict[str, Any]] = {name: {"rule": rule} for name, rule in RULES.items()}
    cases["given"] = {"weights": torch.arange(1.0, n + 1) / n}
    cases["given per sequence"] = {"weights": torch.rand(ROWS, n, generator=torch.Generator().manual_seed(0))}
    for name, case in cases.items():
        given = name.startswith("given")
        for aggregation in ("token-mean", "seq-mean-token-mean") if given else ("token-mean",):
            settings = {**case, "aggregation": aggregation, "clip_range": (0.2, 0.3), "dual_clip": 3.0}
            whole, gradient = _loss(pk.pama_loss, *problem, **settings)
            less, same = _loss(pk.pama_loss, *problem, **settings, statistics=False)
            # one rounding of the gradient, or eight float32 operations in another order
            error = 8 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else 2.0**-8)
            assert torch.allclose(less.loss, whole.loss, rtol=1e-5, atol=1e-6), name
            assert torch.allclose(same, gradient, rtol=error, atol=1e-9), name
            assert torch.allclose(less.weights, whole.weights, rtol=1e-5, atol=1e-6), name
            if not given:
                continue
            exact, wanted = _loss(reference.pama_loss, *problem, **settings)
            assert torch.allclose(less.loss.double(), exact.loss.double(), rtol=1e-4, atol=1e-5), name
            assert torch.allclose(same.double(), wanted.double(), rtol=2 * error + 1e-5, atol=1e-7), name
            if name == "given" and not per_sequence and not ON_GPU:  # where they cost nothing extra
                assert less.optimum.isnan(), name
                assert less.statistics.buffer.isnan().all(), name


def _with_stretch(x: Tensor, row: int, at: int, value: float) -> Tensor:
    """With 200 more tokens of `value` in each row: from `at` on in one row, at its end in the others."""
    wide = torch.full((x.shape[0], x.shape[1] + 200, *x.shape[2:]), value, dtype=torch.float32).to(x.dtype)
    wide[:, : x.shape[1]] = x
    wide[row, at : at + 200] = torch.tensor(value).to(x.dtype)
    wide[row, at + 200 :] = x[row, at:]
    return wide


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 3, 8, 16, 32])
def test_long_masked_stretches_change_nothing(n: int, mask_dtype: torch.dtype) -> None:
    """Such as padding on either side, with NaN in it. Sums in another order differ by rounding."""
    problem = _problem(n, False, torch.float32)
    for at in (0, 300, WIDTH):
        wide = [_with_stretch(x, 1, at, NAN) for x in problem[:3]]
        mask = _with_stretch(problem[3], 1, at, 0.0)
        for name in ("UPGrad", "token", "token, regularized", "sequence", "given"):
            how: dict[str, Any] = {"weights": torch.full((n,), 1 / n)} if name == "given" else {}
            how = how or {"rule": RULES[name]}
            for settings in (how, how | {"aggregation": "seq-mean-token-mean"}):
                plain, gradient = _loss(pk.pama_loss, *problem, **settings)
                output, found = _loss(pk.pama_loss, *wide, mask.to(mask_dtype), **settings)
                assert (found[~mask] == 0).all(), name
                wanted = _with_stretch(gradient, 1, at, 0.0)
                assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7), name
                assert torch.allclose(output.loss, plain.loss, rtol=1e-4, atol=1e-5), name
                assert torch.allclose(output.weights, plain.weights, rtol=1e-4, atol=1e-5), name
                assert torch.equal(output.statistics.token_count, plain.statistics.token_count), name
            if name == "given":
                continue
            combined = pk.combine_advantages(wide[2], mask.to(mask_dtype), **how).advantages
            expected = pk.combine_advantages(problem[2], problem[3], **how).advantages
            assert (combined[~mask] == 0).all(), name
            assert torch.allclose(combined, _with_stretch(expected, 1, at, 0.0), rtol=1e-4, atol=1e-5), name


@pytest.mark.cpu
@pytest.mark.parametrize("regularization", [1e-3, 0.1, 100.0])
@pytest.mark.parametrize("n", [2, 5, 8, 9, 16])
def test_regularized_weights_of_tokens_of_any_scale(isa: str, n: int, regularization: float) -> None:
    logprobs, old, advantages, mask = (x[:2, :100] for x in _problem(n, False, torch.float32))
    scales = torch.rand(2, 60, 1, generator=torch.Generator().manual_seed(n))
    advantages[:, 40:] *= torch.where(scales < 0.1, 1e8, torch.where(scales < 0.2, 1e-6, 1.0))
    advantages[:, 20:] = advantages[:, 20:].abs()  # no bound term is 0 by its sign
    advantages[0, :20] = advantages[0, :20, :1]  # equal scores
    how: dict[str, Any] = {"logprobs": logprobs, "old_logprobs": old, "clip_range": 0.2}
    how["rule"] = pk.Pama("token", noon=True, regularization=regularization)
    found = pk.combine_advantages(advantages, mask, **how)
    exact = reference.combine_advantages(advantages, mask, **how)
    size = advantages.abs().amax(-1).double()
    error = (found.advantages.double() - exact.advantages.double()).abs()
    # two rounded supports differ by the rounding of a score over the regularization
    assert (error <= (1e-6 + 1e-7 / regularization) * size)[mask].all()
    assert torch.allclose(found.weights.double(), exact.weights.double(), rtol=0, atol=1e-5)
    assert abs(float(found.optimum - exact.optimum)) <= 1e-5 * float(exact.optimum)


@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("place", ["logprobs", "old", "advantages"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_value_affects_no_other_row(value: float, place: str, noon: bool) -> None:
    """Such a chunk is computed by the general pass: the gradient is NaN where the reference has NaN, and else
    that of the same weights without the value."""
    for per_sequence in (True, False):
        logprobs, old, advantages, mask = _problem(4, per_sequence, torch.float32)
        mask[2, 40] = True
        logprobs[2, 40] = old[2, 40]
        clean = logprobs, old, advantages, mask
        spoiled = [x.clone() for x in clean]
        by_row = per_sequence and place == "advantages"
        spoiled[("logprobs", "old", "advantages").index(place)][2, 0 if by_row else 40] = value
        for weights in (torch.full((4,), 0.25), torch.full((ROWS, 4), 0.25)):
            settings = {"weights": weights, "rule": pk.Pama(bound="scores", noon=noon), "statistics": False}
            _, gradient = _loss(pk.pama_loss, *spoiled, **settings)
            _, expected = _loss(pk.pama_loss, *clean, **settings)
            other = [row for row in range(ROWS) if row != 2]  # in its chunk rounded in another order
            assert torch.allclose(
                gradient[other], expected[other], rtol=8 * torch.finfo(torch.float32).eps, atol=0
            )
            nan = gradient[2].isnan()
            assert nan[40]
            assert nan[mask[2]].all() if by_row else nan.sum() == 1


def test_one_row_that_is_not_finite_leaves_the_gradient_of_the_others_with_solved_weights() -> None:
    """The second pass takes the ratios that the first one has kept, except for such rows."""
    logprobs, old, advantages, mask = _problem(3, True, torch.float32)
    rule = pk.Pama("sequence")
    spoiled = logprobs.clone()
    mask[1, 7], spoiled[1, 7] = True, NAN
    _, gradient = _loss(pk.pama_loss, spoiled, old, advantages, mask, rule=rule, normalizer=float(mask.sum()))
    _, expected = _loss(
        pk.pama_loss, logprobs, old, advantages, mask, rule=rule, normalizer=float(mask.sum())
    )
    other = [0, 2, 3, 4]
    assert torch.equal(gradient[other], expected[other])
    assert gradient[1][mask[1]].isnan().all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_sequences_of_one_token(masked: bool, dtype: torch.dtype, name: str) -> None:
    """Processed as tokens; the results are those of two tokens for each sequence, which are not."""
    g = torch.Generator().manual_seed(7)
    advantages = torch.randn(301, 3, generator=g, dtype=torch.float64).to(dtype)
    here = (torch.rand(301, 3, generator=g) < 0.6) if masked else None
    found = pk.combine_advantages(advantages, objective_mask=here, rule=RULES[name])
    two = torch.ones(301, 2, dtype=torch.bool)
    wanted = pk.combine_advantages(advantages, two, objective_mask=here, rule=RULES[name])
    eps = torch.finfo(dtype).eps
    for a, b in zip(found[:3], wanted[:3], strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(found.statistics.scores, wanted.statistics.scores, rtol=1e-12, atol=1e-14)
    assert found.statistics.token_count * 2 == wanted.statistics.token_count


@pytest.mark.cpu
@pytest.mark.parametrize("absent", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("n", [1, 2, 6, 13, 21, 37])
def test_pairs_of_more_sequences_than_one_group(isa: str, n: int, absent: bool) -> None:
    """Equal to those of the same advantages at every token, since sums on the grid are exact. Sums over 32
    sequences with a valid token stay in registers, of 4 objectives and a few vectors of objectives."""
    presence = torch.bool if absent else None
    problem = make("per-sequence", rows=50 + n, width=4, objectives=n, objective_mask=presence, seed=n)
    spoiled = copied(problem)
    assert problem.mask is not None
    filled = problem.mask.any(1).nonzero().flatten()
    assert 32 < len(filled) < len(problem.mask)
    for row in filled[[3, 32]]:
        spoiled.logprobs[row, problem.mask[row]] = NAN
    for given in (problem, spoiled):
        whole = replace(given, advantages=given.advantages[:, None].expand(-1, 4, -1).contiguous())
        for noon in (False, True):
            one, other = (
                pk.objective_statistics(**x.statistics_arguments(), noon=noon, pairs=True).buffer
                for x in (given, whole)
            )
            pairs = slice(-5 * n * n, None)
            assert torch.equal(one[pairs].isnan(), other[pairs].isnan())
            assert torch.equal(one[pairs].nan_to_num(), other[pairs].nan_to_num())
            assert bool(one[pairs].isnan().any()) is (given is spoiled)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [5, 6, 11, 12, 16, 19])
def test_tokens_without_a_gradient_for_one_sign_are_few_or_many(isa: str, n: int, dtype: torch.dtype) -> None:
    """If they are few, all other tokens are summed once for the products of advantages and of bound terms.
    Their own advantages are a thousand times as large, so that each of them counts."""
    g = torch.Generator().manual_seed(n)
    width = 512 if n <= 16 else 256  # one tile
    advantages = torch.randn(1, width, n, generator=g).to(dtype)
    old = -torch.rand(1, width, generator=g).to(dtype)
    mask = torch.rand(1, width, generator=g) < 0.9
    # clipped for positive advantages, for negative ones, below the dual clip and above it
    shifts = torch.tensor([0.5, -0.5, 0.5, 1.25])
    for count in (0, 1, 7, width // 32, width // 32 + 1, width // 8, width // 8 + 1, width):
        tokens = torch.randperm(width, generator=g)[:count]
        logprobs = old.clone()
        logprobs[0, tokens] = (old[0, tokens].float() + shifts[tokens % 4]).to(dtype)
        scaled = advantages.clone()
        scaled[0, tokens] *= 1000
        present = (torch.rand(1, n, generator=g) < 0.7) if count % 2 else None
        settings: dict[str, Any] = {"clip_range": (0.2, 0.3), "dual_clip": 3.0, "objective_mask": present}
        found = pk.objective_statistics(logprobs, old, scaled, mask, pairs=True, **settings)
        exact = reference.objective_statistics(logprobs, old, scaled, mask, **settings)
        assert found.gram is not None
        assert found.conflict is not None
        size = exact.gram.diagonal().sqrt()
        assert ((found.gram - exact.gram).abs() <= 1e-6 * torch.outer(size, size)).all(), count
        assert torch.allclose(found.conflict, exact.conflict, rtol=0, atol=2e-6), count
        largest = float(scaled.abs().sum((0, 1)).max()) / width
        for name in ("scores", "logprob_sum", "surrogate_sum"):
            a, b = getattr(found, name), getattr(exact, name)
            per_token = width if name.endswith("sum") else 1
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * largest * per_token), (name, count)
        for name in ("positive_count", "clipped_count", "count"):
            assert torch.equal(found._field(name), getattr(exact, name)), (name, count)


@pytest.mark.cpu
@pytest.mark.parametrize("clipped", [0, 10])
@pytest.mark.parametrize("n", [6, 8, 13, 16])
def test_equal_objectives_get_equal_weights(isa: str, n: int, clipped: int) -> None:
    """Their products are equal to their squares, to the last bit: without regularization the weights of a
    singular matrix would follow its rounding."""
    g = torch.Generator().manual_seed(n)
    advantages = torch.randn(1, 512, n, generator=g)
    advantages[..., -1] = advantages[..., 0]
    advantages[..., -2] = advantages[..., 3]
    old = -torch.rand(1, 512, generator=g)
    logprobs = old + 0.1 * torch.rand(1, 512, generator=g)
    logprobs[0, torch.randperm(512, generator=g)[:clipped]] += 0.6
    gram = pk.objective_statistics(logprobs, old, advantages, pairs=True).gram
    assert gram is not None
    for rule in (pk.Pama(regularization=0.0), pk.UPGrad()):
        weights = pk.pama_loss(logprobs, old, advantages, rule=rule).weights
        for one, other in ((0, n - 1), (3, n - 2)):
            assert gram[one, other] == gram[one, one] == gram[other, other]
            assert abs(float(weights[one] - weights[other])) < 1e-6, rule  # what the solvers promise
