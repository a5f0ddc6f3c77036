"""From rewards to advantages: multi_objective_gae, group_normalize and masked_whiten, by the textbook."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from _tables import diagonal
from hypothesis import given
from hypothesis import strategies as st
from problems import FLOATS, MASKS
from torch import Tensor

import pama_kernels as pk

NAN, INF = math.nan, math.inf


def episodes(rows: int, width: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "rewards": normal(rows, width, n),
        "values": normal(rows, width, n),
        "mask": torch.rand(rows, width, generator=g) < 0.7,
        "dones": torch.rand(rows, width, generator=g) < 0.2,
        "truncated": torch.rand(rows, width, generator=g) < 0.2,
        "final_values": normal(rows, width, n),
        "last_values": normal(rows, n),
    }


OPTIONAL = ("mask", "dones", "truncated", "last_values")


def chosen(x: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    names += ("final_values",) if "truncated" in names else ()
    return {name: x[name] for name in ("rewards", "values", *names)}


def textbook(x: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    """Equation 16 of Schulman et al. 2016 by itself: A_t = sum over l of (gamma lam)^l delta_(t+l), forward
    over the valid steps of the episode."""
    rewards, values = x["rewards"].double(), x["values"].double()
    rows, width, n = rewards.shape
    result = torch.zeros(rows, width, n, dtype=torch.float64)
    for b in range(rows):
        steps = [t for t in range(width) if "mask" not in x or x["mask"][b, t]]
        for first in range(len(steps)):
            decay = 1.0
            for place, t in enumerate(steps[first:], first):
                done = "dones" in x and bool(x["dones"][b, t])
                cut = not done and "truncated" in x and bool(x["truncated"][b, t])
                following = torch.zeros(n, dtype=torch.float64)
                if cut:
                    following = x["final_values"][b, t].double()
                elif not done and place + 1 < len(steps):
                    following = values[b, steps[place + 1]]
                elif not done and "last_values" in x:
                    following = x["last_values"][b].double()
                result[b, steps[first]] += decay * (rewards[b, t] + gamma * following - values[b, t])
                if done or cut:
                    break
                decay *= gamma * lam
    return result


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """Computed in float64 and rounded to float32 and to the result's dtype: half an ulp each."""
    info = torch.finfo(dtype)
    narrow = 0.0 if dtype == torch.float64 else 2**-24
    # float64 itself: sums of up to 130 terms of either sign
    return {"rtol": info.eps / 2 + narrow + 1e-13, "atol": 1e-12 + info.smallest_normal * info.eps}


def equal(found: Any, wanted: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


# --- generalised advantage estimation --------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [tuple(n for n, k in zip(OPTIONAL, ks, strict=True) if k) for ks in product((0, 1), repeat=4)],
    ids=str,
)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 0.95), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_textbook(names: tuple[str, ...], gamma: float, lam: float) -> None:
    x = chosen(episodes(3, 9, 2, seed=len(names)), names)
    if "truncated" in x:  # what is not truncated has no final value
        x["final_values"][~x["truncated"]] = NAN
    for call in (pk.multi_objective_gae, pk.reference.multi_objective_gae):
        advantages, returns = call(**x, gamma=gamma, lam=lam)
        torch.testing.assert_close(advantages, textbook(x, gamma, lam), rtol=1e-12, atol=1e-13)
        valid = x["mask"] if "mask" in x else torch.ones(3, 9, dtype=torch.bool)
        torch.testing.assert_close(
            returns, (advantages + x["values"]) * valid[..., None], rtol=1e-14, atol=1e-14
        )


@pytest.mark.portable
@given(
    shape=st.sampled_from([(3, 17, 4), (1, 130, 1), (9, 5, 19), (64, 2, 2), (2, 1, 1)]),
    kinds=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    names=st.sets(st.sampled_from(OPTIONAL)),
    seed=st.integers(0, 99),
    as_tensors=st.booleans(),
)
def test_gae_is_the_reference(
    shape: tuple[int, int, int], kinds: tuple[torch.dtype, ...], names: set[str], seed: int, as_tensors: bool
) -> None:
    x = chosen(episodes(*shape, seed=seed), tuple(sorted(names)))
    dtypes = dict(zip(("rewards", "values", "last_values"), kinds, strict=True))
    x = {k: v.to(dtypes.get(k, torch.float32)) if v.is_floating_point() else v for k, v in x.items()}
    wanted = pk.reference.multi_objective_gae(**x, gamma=0.97, lam=0.875)
    gamma = torch.tensor(0.97, dtype=torch.float64) if as_tensors else 0.97
    found = pk.multi_objective_gae(**x, gamma=gamma, lam=torch.tensor(0.875) if as_tensors else 0.875)
    promoted = torch.promote_types(*kinds[:2])
    for y, z in zip(found, wanted, strict=True):
        assert y.dtype == promoted
        torch.testing.assert_close(y.double(), z, **rounding(promoted))


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    x = episodes(2, 9, 3)
    advantages, returns = pk.multi_objective_gae(x["rewards"], x["values"], gamma=0.9, lam=1.0)
    discounted = torch.zeros(2, 3, dtype=torch.float64)
    for t in reversed(range(9)):
        discounted = x["rewards"][:, t] + 0.9 * discounted
        torch.testing.assert_close(returns[:, t], discounted)
    torch.testing.assert_close(advantages, returns - x["values"])


@pytest.mark.portable
def test_gae_skips_masked_steps() -> None:
    """The same as if the masked steps were not there, whatever they hold."""
    x = episodes(1, 12, 3)
    x["mask"] = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]])
    masked = x["mask"][0] == 0
    short = {k: v[:, ~masked] for k, v in x.items() if k not in ("mask", "last_values")}
    wanted = pk.multi_objective_gae(**short, last_values=x["last_values"], gamma=0.9)
    for poison in (0.0, NAN, INF, -INF, 1e300):
        y = {name: value.clone() for name, value in x.items()}
        for name in ("rewards", "values", "final_values"):
            y[name][0, masked] = poison
        y["dones"][0, masked] = y["truncated"][0, masked] = True
        for a, b in zip(pk.multi_objective_gae(**y, gamma=0.9), wanted, strict=True):
            assert torch.equal(a[:, ~masked], b)
            assert not a[0, masked].any()


@pytest.mark.portable
def test_gae_of_several_episodes_in_a_row_is_that_of_several_rows() -> None:
    """One that is done, one that is cut off; the value of its last state counts where it is not done."""
    x = episodes(1, 10, 2)
    rewards, values, final, last = x["rewards"], x["values"], x["final_values"], x["last_values"]
    ends = torch.arange(10) == 3
    first = pk.multi_objective_gae(rewards[:, :4], values[:, :4], gamma=0.9)
    cut = pk.multi_objective_gae(rewards[:, :4], values[:, :4], gamma=0.9, last_values=final[:, 3])
    second = pk.multi_objective_gae(rewards[:, 4:], values[:, 4:], last_values=last, gamma=0.9)
    done = pk.multi_objective_gae(rewards, values, dones=ends[None], last_values=last, gamma=0.9)
    assert equal(done, [torch.cat(pair, 1) for pair in zip(first, second, strict=True)])
    over = {"truncated": ends[None], "final_values": final}
    truncated = pk.multi_objective_gae(rewards, values, **over, last_values=last, gamma=0.9)
    assert equal(truncated, [torch.cat(pair, 1) for pair in zip(cut, second, strict=True)])
    both = pk.multi_objective_gae(rewards, values, dones=ends[None], **over, last_values=last, gamma=0.9)
    assert equal(both, done)
    ends = ends | (torch.arange(10) == 9)  # nothing follows: the last value is not read
    without = pk.multi_objective_gae(rewards, values, dones=ends[None], gamma=0.9)
    bad = torch.full_like(last, NAN)
    assert equal(
        pk.multi_objective_gae(rewards, values, dones=ends[None], last_values=bad, gamma=0.9), without
    )


@pytest.mark.portable
@pytest.mark.parametrize("name", ["rewards", "values", "last_values", "final_values"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_gae_shows_what_is_not_finite(name: str, value: float) -> None:
    """It reaches the steps before it, of its own episode, row and objective; no others."""
    x = chosen(episodes(3, 8, 3), ("truncated", "last_values"))
    x["truncated"] = (torch.arange(8) == 2).expand(3, 8)
    wanted = pk.multi_objective_gae(**x)
    place = {"last_values": (1, 2), "final_values": (1, 2, 2)}.get(name, (1, 5, 2))
    x[name][place] = value
    found = pk.multi_objective_gae(**x)
    touched = torch.zeros(3, 8, 3, dtype=torch.bool)
    touched[1, {"last_values": slice(3, 8), "final_values": slice(0, 3)}.get(name, slice(3, 6)), 2] = True
    for y, z in zip(found, wanted, strict=True):
        assert not torch.isfinite(y[touched]).any()
        assert torch.equal(y[~touched], z[~touched])


def test_gae_in_any_strides_and_mask_types() -> None:
    x = episodes(4, 9, 3)
    wanted = pk.multi_objective_gae(**x)
    strided = {
        "rewards": x["rewards"].movedim(-1, 0).contiguous().movedim(0, -1),
        "values": x["values"].repeat(1, 2, 2)[:, :9, :3],
        "final_values": x["final_values"].flip(1).flip(1),
        "mask": x["mask"].T.contiguous().T,
        "dones": x["dones"].repeat_interleave(2, 1)[:, ::2],
        "truncated": x["truncated"].T.contiguous().T,
        "last_values": x["last_values"].T.contiguous().T,
    }
    for dtype in MASKS:
        for name in ("mask", "dones", "truncated"):
            strided[name] = strided[name].to(dtype)
        found = pk.multi_objective_gae(**strided)
        assert equal(found, wanted)
        assert all(y.is_contiguous() for y in found)
    one = x["rewards"][:1].expand(4, 9, 3)
    assert equal(
        pk.multi_objective_gae(one, x["values"]), pk.multi_objective_gae(one.contiguous(), x["values"])
    )


@pytest.mark.portable
@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 3), (3, 5, 0), (0, 0, 0)], ids=str)
def test_gae_of_nothing(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape)
    for y in pk.multi_objective_gae(x, x, torch.zeros(shape[:2])):
        assert y.shape == shape
    x = episodes(3, 5, 2)
    x["mask"] = torch.zeros(3, 5)
    assert not any(y.any() for y in pk.multi_objective_gae(**x))


def test_gae_rows_are_independent() -> None:
    x = episodes(300, 40, 5)
    wanted = pk.multi_objective_gae(**x)
    part = pk.multi_objective_gae(**{name: value[7:8] for name, value in x.items()})
    assert equal(part, [z[7:8] for z in wanted])


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


def test_normalize_is_the_textbook() -> None:
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
def test_normalize_is_the_reference(eps: float, scale: bool, dtype: torch.dtype) -> None:
    for shape in ((12, 3), (96, 1), (6, 40)):
        x = rewards_of(*shape, dtype)
        x[1], x[4] = INF, x[5]
        for size in (None, 6, 3):
            like_reference(x, group_size=size, scale=scale, eps=eps)
        ids = torch.randint(-5, 5, shape[:1])
        like_reference(x, group_ids=ids, scale=scale, eps=eps)


@pytest.mark.parametrize(("dtype", "value"), diagonal(FLOATS, [0.7, 0.1, 1e-30, 3e4, -1 / 3]))
def test_equal_rewards_give_exactly_0(dtype: torch.dtype, value: float) -> None:
    """Whatever eps, dtype, size and scale, so that a saturated reward can be seen; NaN rewards beside too."""
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
def test_rewards_that_do_not_apply_are_left_out() -> None:
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
def test_an_infinite_reward_shows_in_its_own_group_and_objective(value: float) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    wanted = pk.group_normalize(x, group_size=4)
    x[1, 2], x[6, 0] = value, NAN
    found = like_reference(x, group_size=4)
    assert found[:4, 2].isnan().all()
    assert torch.equal(found[:4, :2], wanted[:4, :2])
    assert torch.isfinite(found[4:]).all()
    assert pk.group_normalize(torch.tensor([[value, 1.0]])).isnan().tolist() == [[True, False]]


def test_large_offsets_do_not_cancel() -> None:
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


def test_inputs_are_not_modified() -> None:
    x = episodes(2, 5, 2)
    before = {name: value.clone() for name, value in x.items()}
    pk.multi_objective_gae(**x)
    pk.group_normalize(x["last_values"])
    pk.masked_whiten(x["rewards"], x["mask"])
    assert all(torch.equal(x[name], before[name]) for name in x)
