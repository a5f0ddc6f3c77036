"""group_normalize and masked_whiten."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _rewards import INF, NAN, episodes, rounding
from _tables import diagonal
from problems import FLOATS
from torch import Tensor

import pama_kernels as pk
from pama_kernels import whiten

# --- group_normalize -------------------------------------------------------------------------------------


def rewards_of(rows: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=g, dtype=torch.float64).to(dtype)
    x[torch.rand(rows, n, generator=g) < 0.2] = NAN
    return x


def like_reference(x: Tensor, **settings: Any) -> Tensor:
    found, wanted = pk.group_normalize(x, **settings), pk.reference.group_normalize(x, **settings)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), wanted, **rounding(x.dtype), equal_nan=True)
    return found


def test_normalize_equals_the_formula() -> None:
    x = torch.randn(12, 3, dtype=torch.float64)
    groups = x.view(3, 4, 3)
    centred = groups - groups.mean(1, keepdim=True)
    scaled = centred / (groups.std(1, keepdim=True, correction=1) + 1e-4)
    for settings, wanted in (({}, scaled), ({"scale": False}, centred)):
        found = pk.group_normalize(x, group_size=4, **settings)
        torch.testing.assert_close(found, wanted.view(12, 3), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1.0])
def test_normalize_equals_the_reference(eps: float, scale: bool, dtype: torch.dtype) -> None:
    for shape in ((12, 3), (96, 1), (6, 40)):
        x = rewards_of(*shape, dtype)
        x[1], x[4] = INF, x[5]
        for size in (None, 6, 3):
            like_reference(x, group_size=size, scale=scale, eps=eps)
        ids = torch.randint(-5, 5, shape[:1])
        like_reference(x, group_ids=ids, scale=scale, eps=eps)


@pytest.mark.parametrize(("dtype", "value"), diagonal(FLOATS, [0.7, 0.1, 1e-30, 3e4, -1 / 3]))
def test_equal_rewards_give_exactly_0(dtype: torch.dtype, value: float) -> None:
    """For any eps, dtype, size and scale, so that a saturated reward is recognised; also beside NaN."""
    for rows in (2, 3, 7, 64):
        x = torch.full((rows, 3), value, dtype=torch.float64).to(dtype)
        x[0, 1] = NAN
        x[:, 2] = torch.arange(rows)
        for eps in (0.0, 1e-4):
            for settings in (
                {},
                {"scale": False},
                {"group_size": rows},
                {"group_ids": torch.zeros(rows).long()},
            ):
                found = pk.group_normalize(x, eps=eps, **settings)
                assert (found[:, :2] == 0).all()
                assert (found[:, 2] != 0).any()
                assert torch.isfinite(found).all()
    assert not pk.combine_advantages(found).statistics.signal[:2].any()


@pytest.mark.portable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_of_equal_rewards_give_exactly_0(dtype: torch.dtype) -> None:
    """At any scale, also beside NaN; a difference beyond rounding is kept, in half precision any."""
    eps = torch.finfo(dtype).eps
    noise = torch.tensor([0.0, 1.5, 3.0, -1.0], dtype=torch.float64)[:, None] * eps
    x = torch.cat([0.7 + noise, -3e20 * (1 + noise), 5e-30 * (1 + noise), 0.7 + 100 * noise], 1).to(dtype)
    x = torch.cat([x, x + 0.1])
    x[2, 0] = NAN
    assert (x[:2] != x[:1])[1].all()
    for scale in (True, False):
        for groups in ({"group_size": 4}, {"group_ids": torch.arange(8) // 4}):
            for function in (pk.group_normalize, pk.reference.group_normalize):
                found = function(x, scale=scale, eps=0.0, **groups)
                assert not found[:4, :3].any()
                assert found[:, 3].count_nonzero() == 8
    half = torch.tensor([[1.0], [1.0 + 2**-10]], dtype=torch.float16)
    assert pk.group_normalize(half).all()


def test_rewards_that_are_equal_up_to_rounding_get_no_weight() -> None:
    x = torch.randn(16, 2)
    x[:, 1] = 0.7 + 1e-7 * (torch.rand(16) - x[:, 0])
    weights = pk.combine_advantages(pk.group_normalize(x, group_size=8)).weights
    assert weights.tolist() == [1.0, 0.0]


def test_a_small_difference_is_not_rounding() -> None:
    """A group with one reward beyond rounding keeps all of them; absent rewards do not matter."""
    rewards = torch.tensor([[0.7, 0.7 + 4e-6], [NAN, 0.7], [0.7 + 1e-7, 0.7 + 1e-7], [5.0, 5.0]]).double()
    groups = torch.tensor([4, 4, 4, 9])
    found = whiten.without_rounding(rewards, groups)
    assert torch.equal(found[:, 1], rewards[:, 1])
    assert found[0, 0] == found[2, 0]
    assert found[1, 0].isnan()
    assert whiten.without_rounding(rewards[:0], groups[:0]).shape == (0, 2)
    infinite = torch.tensor([[INF], [1.0], [-INF], [2.0]])
    assert torch.equal(whiten.without_rounding(infinite, groups * 0), infinite)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_group_ids_are_any_integers(dtype: torch.dtype) -> None:
    x = rewards_of(12, 3)
    wanted = pk.group_normalize(x, group_size=6)
    ids = torch.tensor([200, 0]).repeat_interleave(6).to(dtype)
    assert torch.equal(pk.group_normalize(x, group_ids=ids), wanted)
    order = torch.randperm(12)
    permuted = pk.group_normalize(x[order], group_ids=ids[order])
    # the members of a group are summed in the order of the rows
    torch.testing.assert_close(permuted, wanted[order], rtol=1e-12, atol=1e-13)
    far = torch.tensor([-(2**62), 2**62]).repeat(6)
    found = pk.group_normalize(x, group_ids=far)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert torch.equal(found[half], pk.group_normalize(x[half]))


@pytest.mark.portable
def test_nan_rewards_are_ignored() -> None:
    x = torch.tensor([[1.0, NAN, NAN], [2.0, 5.0, NAN], [NAN, 7.0, NAN], [6.0, NAN, 3.0]])
    found = pk.group_normalize(x, eps=0.0)
    for i in range(3):
        here = ~x[:, i].isnan()
        assert not found[~here, i].any()
        if here.sum() > 1:
            assert torch.equal(found[here, i : i + 1], pk.group_normalize(x[here, i : i + 1], eps=0.0))
    assert found[3, 2] == 0  # the only one of its group
    torch.testing.assert_close(found[1:3, 1], torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)]))
    x = torch.randn(5, 3)
    assert not pk.group_normalize(x, group_size=1).any()
    assert not pk.group_normalize(x, group_ids=torch.arange(5)).any()
    assert not pk.group_normalize(torch.full((4, 2), NAN)).any()


@pytest.mark.portable
@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_reward_affects_only_its_group_and_objective(value: float) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    wanted = pk.group_normalize(x, group_size=4)
    x[1, 2], x[6, 0] = value, NAN
    found = like_reference(x, group_size=4)
    assert found[:4, 2].isnan().all()
    assert torch.equal(found[:4, :2], wanted[:4, :2])
    assert torch.isfinite(found[4:]).all()
    assert pk.group_normalize(torch.tensor([[value, 1.0]])).isnan().tolist() == [[True, False]]


def test_large_offsets_lose_no_precision() -> None:
    """Mean first, then squares: 1e6 + {0, 1} in float64 keeps ten digits."""
    x = (torch.arange(8) % 2).double().unsqueeze(1)
    for call in (lambda y: pk.group_normalize(y, eps=0.0), pk.masked_whiten):
        torch.testing.assert_close(call(x + 1e6), call(x), rtol=1e-9, atol=0)


def test_normalize_in_any_shape_and_strides() -> None:
    for shape in ((0, 3), (4, 0), (0, 0)):
        x = torch.zeros(shape)
        assert pk.group_normalize(x).shape == pk.group_normalize(x, group_size=2).shape == shape
        assert pk.group_normalize(x, group_ids=torch.zeros(shape[0], dtype=torch.int64)).shape == shape
    x = rewards_of(12, 3)
    wanted = pk.group_normalize(x, group_size=4)
    for strided in (x.T.contiguous().T, x.repeat(1, 2)[:, :3], x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(pk.group_normalize(strided, group_size=4), wanted)


# --- masked_whiten ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_whitened_objectives_have_mean_0_and_deviation_1(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(6, 9, 3, generator=g) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([3.0, 0.0, -1.0])
    ).to(dtype)
    mask = torch.rand(6, 9, generator=g) < 0.6
    here = torch.rand(6, 3, generator=g) < 0.7
    here[0] = True
    for present in (None, here):
        found = pk.masked_whiten(x, mask, objective_mask=present)
        valid = mask[..., None].expand(x.shape)
        if present is not None:
            valid = valid & present[:, None]
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert (found[~valid] == 0).all()
        for i in range(3):
            y, values = found[..., i][valid[..., i]].double(), x[..., i][valid[..., i]].double()
            wanted = (values - values.mean()) / values.std(correction=0)
            torch.testing.assert_close(y, wanted, **rounding(dtype))
    flat = pk.masked_whiten(x.flatten(0, 1), mask.flatten())
    assert torch.equal(flat.view(6, 9, 3), pk.masked_whiten(x, mask))


def test_whitening_counts_sequences_by_their_tokens() -> None:
    """(B, N) beside a (B, T) mask is what the expanded tokens give; a sequence without tokens is left out."""
    x = torch.randn(5, 3, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [1], [0], [3], [5]])
    here = torch.tensor([[1, 1, 0]] * 2 + [[1, 0, 1]] * 3)
    for present in (None, here):
        found = pk.masked_whiten(x, mask, objective_mask=present)
        tokens = pk.masked_whiten(x[:, None].expand(5, 7, 3), mask, objective_mask=present)
        torch.testing.assert_close(found, tokens[:, 0] * mask.any(1)[:, None], rtol=1e-13, atol=1e-14)
        assert (found[2] == 0).all()
    square = torch.randn(3, 3)
    assert pk.masked_whiten(square, torch.ones(3, 3)).shape == (3, 3)


def test_whitening_of_tiny_values_beside_an_empty_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty rank's unit divided by that of the others was squared: 0 times infinity."""
    x = torch.randn(5, 3, dtype=torch.float64) * 1e-200

    def gather(parts: list[Tensor], mine: Tensor, group: object) -> None:
        nothing = mine.new_zeros(4, 3)
        parts[0].copy_(mine)
        parts[1].copy_(torch.stack(whiten._moments(nothing, nothing)))

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    found = pk.masked_whiten(x, process_group=torch.distributed.ProcessGroup(0, 2))
    torch.testing.assert_close(found, pk.masked_whiten(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_whitening_gives_exactly_0_where_constant_and_nan_where_not_finite(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 4).to(dtype)
    mask = torch.ones(6, 5)
    mask[4] = 0
    x[..., 1] = 0.1
    x[4] = NAN  # masked
    x[2, 3, 2] = INF
    x[1, 1, 3] = NAN
    found = pk.masked_whiten(x, mask)
    assert (found[..., 1] == 0).all()
    assert torch.isfinite(found[..., 0]).all()
    assert found[..., 2:][mask != 0].isnan().all()
    assert (found[4] == 0).all()
    constant = torch.full((3, 2), INF)
    assert pk.masked_whiten(constant).isnan().all()
    for empty in (torch.zeros(0, 3), torch.zeros(0, 4, 3), torch.zeros(4, 0, 3)):
        assert pk.masked_whiten(empty).shape == empty.shape
    assert (pk.masked_whiten(torch.full((3, 2), NAN), torch.zeros(3, 5)) == 0).all()
    assert (pk.masked_whiten(torch.randn(1, 2)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_does_not_amplify_rounding_errors(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    noise = torch.tensor([0.0, 0.5, 1.0, -0.5], dtype=dtype)[:, None] * eps
    x = torch.cat([0.7 + noise, -3e20 * (1 + noise), 0.7 + 100 * noise], 1).to(dtype)
    assert (x != x[:1]).any(0).all()
    found = pk.masked_whiten(x)
    assert (found[:, :2] == 0).all()
    torch.testing.assert_close(found[:, 2].double().std(correction=0).item(), 1.0, rtol=0, atol=0.01)


def test_inputs_are_not_modified() -> None:
    x = episodes(2, 5, 2)
    before = {name: value.clone() for name, value in x.items()}
    pk.multi_objective_gae(**x)
    pk.group_normalize(x["last_values"])
    pk.masked_whiten(x["rewards"], x["mask"])
    assert all(torch.equal(x[name], before[name]) for name in x)
