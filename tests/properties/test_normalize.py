"""`combine_advantages(normalize=True)` and `masked_whiten` with underflow, cancellation and overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import make

import pama_kernels as pk
from pama_kernels import Pama, reference


@pytest.mark.parametrize("rule", ["pama", "upgrad", "fixed", "softmin"])
def test_without_a_valid_token_the_result_is_0(rule: str) -> None:
    for shape in ((4, 2), (4, 5, 2)):
        result = pk.combine_advantages(torch.randn(shape), torch.zeros(4, 5), rule=rule, normalize=True)
        assert (result.advantages == 0).all()


@pytest.mark.parametrize("rule", [pk.UPGrad(), pk.Pama(regularization=0.0)])
def test_rounding_errors_are_not_normalised(rule: pk.UPGrad | pk.Pama) -> None:
    """Three whitened objectives of sum 0: the combination is rounding, 1e-7, and stays so."""
    x = torch.randn(64, 2)
    whitened = pk.masked_whiten(torch.cat([x, -(x[:, :1] + x[:, 1:])], 1))
    for library in (pk, pk.reference):
        result = library.combine_advantages(whitened, rule=rule, normalize=True)
        assert result.advantages.abs().max() < 1e-5


def test_the_root_mean_square_is_1() -> None:
    a, mask = torch.randn(6, 9, 3), torch.rand(6, 9) < 0.7
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        got = pk.combine_advantages(a, mask, rule="fixed", aggregation=aggregation, normalize=True).advantages
        omega = mask.double()
        if aggregation != "token-mean":
            omega = omega / omega.sum(1, keepdim=True).clamp(min=1)
        assert float((omega * got.double().square()).sum() / omega.sum()) == pytest.approx(1, rel=1e-5)


def test_a_nan_gives_a_nan() -> None:
    a = torch.randn(4, 2)
    a[0, 0] = math.nan
    assert pk.combine_advantages(a, rule="fixed", normalize=True).advantages.isnan().any()


@pytest.mark.parametrize(("size", "weight"), [(6e4, 4.0), (6e-8, 0.01)])
def test_half_precision_is_rounded_after_the_division(size: float, weight: float) -> None:
    a = torch.tensor([[1.0], [0.0], [-1.0]]).mul(size).half()
    result = pk.combine_advantages(a, weights=torch.tensor([weight]), normalize=True).advantages
    wanted = torch.tensor([1.0, 0.0, -1.0]) * math.sqrt(1.5)
    torch.testing.assert_close(result.float(), wanted, rtol=1e-3, atol=0)  # two roundings of float16


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1.0, 1e200, 1e300])
def test_whitening_at_any_scale(scale: float) -> None:
    a = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64) * scale
    wanted = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64) * math.sqrt(1.5)
    torch.testing.assert_close(pk.masked_whiten(a), wanted, rtol=1e-14, atol=0)


def test_two_objectives_that_share_one_sequence_do_not_conflict() -> None:
    """No variance over the tokens where both are present; rounding errors do not count."""
    a, mask = torch.randn(6, 2), torch.tensor([[1, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    for seed in range(20):
        a = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        expanded = a[:, None].expand(6, 3, 2)
        combined = pk.combine_advantages(expanded, torch.ones(6, 3), objective_mask=mask)
        conflict = combined.statistics.conflict
        assert conflict is not None
        assert conflict[0, 1] == 0


def test_as_many_tokens_as_packed_sequences() -> None:
    """Where M = B, advantages are per sequence, with and without a mask."""
    a, offsets = torch.tensor([[1.0, -2.0], [3.0, 1.0], [-1.0, 2.0]]), torch.tensor([0, 2, 2, 3])
    with_mask = pk.combine_advantages(a, torch.ones(3), rule="fixed", cu_seqlens=offsets)
    without = pk.combine_advantages(a, rule="fixed", cu_seqlens=offsets)
    assert torch.equal(with_mask.statistics.buffer, without.statistics.buffer)
    torch.testing.assert_close(without.statistics.advantage_mean, torch.tensor([1 / 3, -2 / 3]).double())


def test_freed_weights_of_a_function_are_an_error() -> None:
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^weights of the rule: "):
        pk.combine_advantages(torch.randn(4, 3), rule=lambda statistics: freed)


@pytest.mark.portable
@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence"])
@pytest.mark.parametrize("rule", ["fixed", Pama("sequence")], ids=str)
def test_a_nan_makes_valid_tokens_nan_and_masked_ones_0(layout: str, rule: Any) -> None:
    """Masked tokens were divided by the root mean square of the batch, which is NaN."""
    problem = make(layout, rows=4, width=6, seed=1)
    arguments = problem.combine_arguments(ratio=False)
    problem.advantages[-1] = math.nan
    for combine in (pk.combine_advantages, reference.combine_advantages):
        alone = combine(**arguments, rule=rule).advantages
        found = combine(**arguments, rule=rule, normalize=True).advantages
        assert alone.isnan().any()
        assert torch.equal(found.isnan(), alone != 0)
        assert (found[~found.isnan()] == 0).all()
