"""multi_objective_gae: equation 16 of Schulman et al. 2016, masks, ends of episodes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from _rewards import INF, NAN, episodes, equal, rounding
from hypothesis import given
from hypothesis import strategies as st
from problems import FLOATS, MASKS
from torch import Tensor

import pama_kernels as pk

OPTIONAL = ("mask", "dones", "truncated", "last_values")


def chosen(x: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    names += ("final_values",) if "truncated" in names else ()
    return {name: x[name] for name in ("rewards", "values", *names)}


def textbook(x: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    """Equation 16 of Schulman et al. 2016: A_t = sum over l of (gamma lam)^l delta_(t+l), forward
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


@pytest.mark.parametrize(
    "names",
    [tuple(n for n, k in zip(OPTIONAL, ks, strict=True) if k) for ks in product((0, 1), repeat=4)],
    ids=str,
)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 0.95), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_formula(names: tuple[str, ...], gamma: float, lam: float) -> None:
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
def test_gae_equals_the_reference(
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
    """Equal to the result without the masked steps, for any masked values."""
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
    """One ends in a terminal state, one is truncated; the last value counts where it is not terminal."""
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
def test_gae_propagates_non_finite_values(name: str, value: float) -> None:
    """It affects only the steps before it in its episode, row and objective."""
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
def test_gae_of_empty_batches(shape: tuple[int, int, int]) -> None:
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
