"""multi_objective_gae and group_normalize against the reference and against the textbook."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf


def _episodes(rows: int, width: int, n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "rewards": normal(rows, width, n),
        "values": normal(rows, width, n),
        "mask": torch.rand(rows, width, generator=generator) < 0.7,
        "dones": torch.rand(rows, width, generator=generator) < 0.2,
        "last_values": normal(rows, n),
    }


def _cast(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in x.items()}


def _textbook(
    rewards: Tensor, values: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_(t+l), as equation 16 has it, for one row without gaps."""
    steps = len(rewards)
    end = torch.zeros_like(values[:1]) if last_values is None else last_values[None]
    following = torch.cat([values[1:], end])
    deltas = rewards + gamma * following - values
    return torch.stack(
        [
            torch.stack([(gamma * lam) ** step * deltas[t + step] for step in range(steps - t)]).sum(0)
            for t in range(steps)
        ]
    )


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Computed in float64 and rounded to float32 and to the result's dtype: half an ulp each."""
    info = torch.finfo(dtype)
    narrow = 0.0 if dtype == torch.float64 else 2**-24
    # float64 itself: sums of up to 130 terms of either sign
    return info.eps / 2 + narrow + 1e-13, 1e-12 + info.smallest_normal * info.eps


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.0, 0.95), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_is_the_textbook(gamma: float, lam: float, bootstrap: bool) -> None:
    x = _episodes(3, 11, 4)
    last = x["last_values"] if bootstrap else None
    advantages, returns = pk.multi_objective_gae(
        x["rewards"], x["values"], gamma=gamma, lam=lam, last_values=last
    )
    for b in range(3):
        wanted = _textbook(x["rewards"][b], x["values"][b], None if last is None else last[b], gamma, lam)
        torch.testing.assert_close(advantages[b], wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(returns, advantages + x["values"], rtol=0, atol=0)


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    x = _episodes(2, 9, 3)
    advantages, returns = pk.multi_objective_gae(x["rewards"], x["values"], gamma=0.9, lam=1.0)
    discounted = torch.zeros(2, 3, dtype=torch.float64)
    for t in reversed(range(9)):
        discounted = x["rewards"][:, t] + 0.9 * discounted
        torch.testing.assert_close(returns[:, t], discounted)
    torch.testing.assert_close(advantages, returns - x["values"])


@pytest.mark.parametrize("names", list(product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 17, 4), (1, 130, 1), (9, 5, 19), (64, 2, 2)], ids=str)
def test_gae_is_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, names: tuple[bool, bool, bool]
) -> None:
    x = _cast(_episodes(*shape), dtype)
    kept = [name for name, keep in zip(("mask", "dones", "last_values"), names, strict=True) if keep]
    x = {name: x[name] for name in ("rewards", "values", *kept)}
    found = pk.multi_objective_gae(**x, gamma=0.97, lam=0.9)
    wanted = pk.reference.multi_objective_gae(**x, gamma=0.97, lam=0.9)
    rtol, atol = _rounding(dtype)
    for y, z in zip(found, wanted, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), z, rtol=rtol, atol=atol)


def test_gae_skips_masked_steps() -> None:
    """The same as if the masked steps were not there, whatever stands in them."""
    x = _episodes(1, 12, 3)
    x["mask"] = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]])
    kept = x["mask"][0].nonzero().squeeze(1)
    short = {name: value[:, kept] for name, value in x.items() if name in ("rewards", "values", "dones")}
    wanted = pk.multi_objective_gae(**short, last_values=x["last_values"], gamma=0.9)
    for poison in (0.0, NAN, INF, -INF, 1e300):
        y = {name: value.clone() for name, value in x.items()}
        for name in ("rewards", "values"):
            y[name][0, x["mask"][0] == 0] = poison
        y["dones"][0, x["mask"][0] == 0] = True
        found = pk.multi_objective_gae(**y, gamma=0.9)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a[:, kept], b)
            assert not a[0, x["mask"][0] == 0].any()


def test_gae_episode_ends() -> None:
    """Two episodes in one row are two rows; the bootstrap value counts where the last step is not done."""
    x = _episodes(1, 10, 2)
    dones = torch.zeros(1, 10, dtype=torch.bool)
    dones[0, 3] = True
    both = pk.multi_objective_gae(
        x["rewards"], x["values"], dones=dones, last_values=x["last_values"], gamma=0.9
    )
    first = pk.multi_objective_gae(x["rewards"][:, :4], x["values"][:, :4], gamma=0.9)
    second = pk.multi_objective_gae(
        x["rewards"][:, 4:], x["values"][:, 4:], last_values=x["last_values"], gamma=0.9
    )
    for found, one, two in zip(both, first, second, strict=True):
        assert torch.equal(found, torch.cat([one, two], 1))
    dones[0, 9] = True
    ended = pk.multi_objective_gae(
        x["rewards"], x["values"], dones=dones, last_values=torch.full((1, 2), NAN).double(), gamma=0.9
    )
    wanted = pk.multi_objective_gae(x["rewards"], x["values"], dones=dones, gamma=0.9)
    for found, z in zip(ended, wanted, strict=True):
        assert torch.equal(found, z)


@pytest.mark.parametrize("name", ["rewards", "values", "last_values"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_gae_shows_what_is_not_finite(name: str, value: float) -> None:
    """It reaches the steps before it, of its own row and objective; no others."""
    x = _episodes(3, 8, 3)
    del x["mask"], x["dones"]
    wanted = pk.multi_objective_gae(**x)
    place = (1, 2) if name == "last_values" else (1, 5, 2)
    x[name][place] = value
    found = pk.multi_objective_gae(**x)
    touched = torch.zeros(3, 8, 3, dtype=torch.bool)
    touched[1, : 8 if name == "last_values" else 6, 2] = True
    for y, z in zip(found, wanted, strict=True):
        assert not torch.isfinite(y[touched]).any()
        assert torch.equal(y[~touched], z[~touched])


def test_gae_in_any_strides_and_mask_types() -> None:
    x = _episodes(4, 9, 3)
    wanted = pk.multi_objective_gae(**x)
    strided = {
        "rewards": x["rewards"].movedim(-1, 0).contiguous().movedim(0, -1),
        "values": x["values"].repeat(1, 2, 2)[:, :9, :3],
        "mask": x["mask"].T.contiguous().T,
        "dones": x["dones"].repeat_interleave(2, 1)[:, ::2],
        "last_values": x["last_values"].T.contiguous().T,
    }
    for mask_type in (torch.bool, torch.uint8, torch.int8, torch.int64, torch.float32, torch.bfloat16):
        for name in ("mask", "dones"):
            strided[name] = strided[name].to(mask_type)
        for found, z in zip(pk.multi_objective_gae(**strided), wanted, strict=True):
            assert torch.equal(found, z)
            assert found.is_contiguous()
    expanded = x["rewards"][:1].expand(4, 9, 3)
    for found, z in zip(
        pk.multi_objective_gae(expanded, x["values"]),
        pk.multi_objective_gae(expanded.contiguous(), x["values"]),
        strict=True,
    ):
        assert torch.equal(found, z)


@pytest.mark.parametrize("dtypes", list(product(FLOATS, repeat=2)), ids=str)
def test_gae_of_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x = _episodes(3, 6, 2)
    rewards, values = x["rewards"].to(dtypes[0]), x["values"].to(dtypes[1])
    last = x["last_values"].bfloat16()
    found = pk.multi_objective_gae(rewards, values, last_values=last)
    wanted = pk.reference.multi_objective_gae(rewards, values, last_values=last)
    promoted = torch.promote_types(*dtypes)
    rtol, atol = _rounding(promoted)
    for y, z in zip(found, wanted, strict=True):
        assert y.dtype == promoted
        torch.testing.assert_close(y.double(), z, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 3), (3, 5, 0), (0, 0, 0)], ids=str)
def test_gae_of_nothing(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape)
    advantages, returns = pk.multi_objective_gae(x, x, torch.zeros(shape[:2]))
    assert advantages.shape == returns.shape == shape


def test_gae_without_a_valid_step_is_0() -> None:
    x = _episodes(3, 5, 2)
    x["mask"] = torch.zeros(3, 5)
    for y in pk.multi_objective_gae(**x):
        assert not y.any()


def test_gae_is_deterministic_and_rows_are_independent() -> None:
    x = _episodes(300, 40, 5)
    wanted = pk.multi_objective_gae(**x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for y, z in zip(pk.multi_objective_gae(**x), wanted, strict=True):
            assert torch.equal(y, z)
    torch.set_num_threads(1)
    part = pk.multi_objective_gae(**{name: value[7:8] for name, value in x.items()})
    for y, z in zip(part, wanted, strict=True):
        assert torch.equal(y[0], z[7])


# --- group_normalize ---------------------------------------------------------------------------------


def _rewards(rows: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype)
    x[torch.rand(rows, n, generator=generator) < 0.2] = NAN
    return x


def _like_reference(x: Tensor, **settings: object) -> None:
    found = pk.group_normalize(x, **settings)
    wanted = pk.reference.group_normalize(x, **settings)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    rtol, atol = _rounding(x.dtype)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=atol, equal_nan=True)


def test_normalize_is_the_textbook() -> None:
    x = torch.randn(12, 3, dtype=torch.float64)
    groups = x.view(3, 4, 3)
    wanted = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True, correction=1) + 1e-4)
    found = pk.group_normalize(x, group_size=4)
    torch.testing.assert_close(found, wanted.view(12, 3), rtol=1e-12, atol=1e-13)
    plain = pk.group_normalize(x, group_size=4, scale=False)
    torch.testing.assert_close(
        plain, (groups - groups.mean(1, keepdim=True)).view(12, 3), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("shape", [(12, 3), (96, 1), (6, 40)], ids=str)
def test_normalize_is_the_reference(
    shape: tuple[int, int], eps: float, scale: bool, dtype: torch.dtype
) -> None:
    x = _rewards(*shape, dtype)
    for size in (None, 6, 3):
        _like_reference(x, group_size=size, scale=scale, eps=eps)
    _like_reference(x, group_ids=torch.randint(-5, 5, shape[:1]), scale=scale, eps=eps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_group_ids_are_any_integers(dtype: torch.dtype) -> None:
    x = _rewards(12, 3)
    wanted = pk.group_normalize(x, group_size=4)
    ids = torch.tensor([200, 3, 77]).repeat_interleave(4).to(dtype)
    assert torch.equal(pk.group_normalize(x, group_ids=ids), wanted)
    order = torch.randperm(12)
    permuted = pk.group_normalize(x[order], group_ids=ids[order])
    # The members of a group are summed in the order of the rows.
    torch.testing.assert_close(permuted, wanted[order], rtol=1e-12, atol=1e-13)


def test_negative_and_huge_group_ids() -> None:
    x = _rewards(8, 2)
    ids = torch.tensor([-(2**62), 2**62]).repeat(4)
    found = pk.group_normalize(x, group_ids=ids)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert torch.equal(found[half], pk.group_normalize(x[half]))
    assert torch.equal(pk.group_normalize(x, group_ids=ids.repeat_interleave(2)[::2]), found)


def test_objectives_that_do_not_apply_are_left_out() -> None:
    x = torch.tensor([[1.0, NAN, NAN], [2.0, 5.0, NAN], [NAN, 7.0, NAN], [6.0, NAN, 3.0]])
    found = pk.group_normalize(x, eps=0.0)
    for i in range(3):
        here = ~x[:, i].isnan()
        assert not found[~here, i].any()
        if here.sum() > 1:
            alone = pk.group_normalize(x[here, i : i + 1], eps=0.0)
            assert torch.equal(found[here, i : i + 1], alone)
    assert found[3, 2] == 0  # the only one of its group
    half = math.sqrt(0.5)
    torch.testing.assert_close(found[1:3, 1], torch.tensor([-half, half]))


def test_groups_of_one_and_equal_rewards_give_0() -> None:
    x = torch.randn(5, 3)
    assert not pk.group_normalize(x, group_size=1).any()
    assert not pk.group_normalize(x, group_ids=torch.arange(5)).any()
    assert not pk.group_normalize(torch.full((6, 2), 0.7), group_size=3).any()
    assert not pk.group_normalize(torch.full((6, 2), 0.1), scale=False).any()
    assert not pk.group_normalize(torch.full((4, 2), NAN)).any()


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_reward_is_shown_in_its_own_group_and_objective(value: float) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    wanted = pk.group_normalize(x, group_size=4)
    x[1, 2] = value
    x[6, 0] = NAN
    found = pk.group_normalize(x, group_size=4)
    assert found[:4, 2].isnan().all()
    assert torch.equal(found[:4, :2], wanted[:4, :2])
    assert torch.isfinite(found[4:]).all()
    _like_reference(x, group_size=4)
    alone = torch.tensor([[value, 1.0]])
    assert pk.group_normalize(alone).isnan().tolist() == [[True, False]]


def test_large_offsets_do_not_cancel() -> None:
    """Mean first, then squares: 1e6 + {0, 1} in float64 keeps ten digits."""
    x = (torch.arange(8) % 2).double().unsqueeze(1)
    torch.testing.assert_close(
        pk.group_normalize(x + 1e6, eps=0.0), pk.group_normalize(x, eps=0.0), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_normalize_nothing(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    assert pk.group_normalize(x).shape == shape
    assert pk.group_normalize(x, group_size=2).shape == shape
    assert pk.group_normalize(x, group_ids=torch.zeros(shape[0], dtype=torch.int64)).shape == shape


def test_normalize_in_any_strides() -> None:
    x = _rewards(12, 3)
    wanted = pk.group_normalize(x, group_size=4)
    for strided in (x.T.contiguous().T, x.repeat(1, 2)[:, :3], x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(pk.group_normalize(strided, group_size=4), wanted)


def test_normalize_is_deterministic() -> None:
    x = _rewards(4096, 7, torch.float32)
    wanted = pk.group_normalize(x, group_size=8)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(pk.group_normalize(x, group_size=8), wanted)
    torch.set_num_threads(1)


def test_inputs_are_not_modified() -> None:
    x = _episodes(2, 5, 2)
    before = {name: value.clone() for name, value in x.items()}
    pk.multi_objective_gae(**x)
    pk.group_normalize(x["last_values"])
    assert all(torch.equal(x[name], before[name]) for name in x)
