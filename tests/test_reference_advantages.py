"""The reference's advantage estimation and group normalization against the formulas."""

from __future__ import annotations

import math

import torch

from pama_kernels import reference


def test_advantage_estimation_is_the_discounted_sum_of_errors() -> None:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, within an episode."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 2, generator=g).double(), torch.randn(2, 6, 2, generator=g).double()
    last = torch.randn(2, 2, generator=g).double()
    dones = torch.zeros(2, 6)
    dones[0, 2] = 1
    gamma, lam = 0.9, 0.8
    advantages, returns = reference.multi_objective_gae(
        rewards, values, gamma=gamma, lam=lam, dones=dones, last_values=last
    )
    for b in range(2):
        for t in range(6):
            wanted = torch.zeros(2).double()
            for k in range(t, 6):
                following = last[b] if k == 5 else values[b, k + 1]
                delta = rewards[b, k] + gamma * following * (1 - dones[b, k]) - values[b, k]
                wanted += (gamma * lam) ** (k - t) * delta
                if dones[b, k]:
                    break
            assert torch.allclose(advantages[b, t], wanted, rtol=0, atol=1e-13)
    assert torch.equal(returns, advantages + values)


def test_masked_steps_are_skipped() -> None:
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(1, 7, 2, generator=g).double(), torch.randn(1, 7, 2, generator=g).double()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    kept = mask[0] != 0
    advantages, _ = reference.multi_objective_gae(rewards, values, mask, gamma=0.9, lam=0.7)
    short, _ = reference.multi_objective_gae(rewards[:, kept], values[:, kept], gamma=0.9, lam=0.7)
    assert torch.equal(advantages[:, kept], short)
    assert (advantages[:, ~kept] == 0).all()


def test_a_truncated_episode_counts_the_value_that_was_reached() -> None:
    g = torch.Generator().manual_seed(2)
    rewards, values, reached = torch.randn(3, 1, 6, 2, generator=g).double()
    truncated = torch.tensor([[0, 0, 1, 0, 0, 0]])
    whole, _ = reference.multi_objective_gae(
        rewards, values, gamma=0.9, lam=0.7, truncated=truncated, final_values=reached
    )
    first, _ = reference.multi_objective_gae(
        rewards[:, :3], values[:, :3], gamma=0.9, lam=0.7, last_values=reached[:, 2]
    )
    rest, _ = reference.multi_objective_gae(rewards[:, 3:], values[:, 3:], gamma=0.9, lam=0.7)
    assert torch.equal(whole, torch.cat([first, rest], 1))


def test_group_normalization() -> None:
    nan, root = math.nan, math.sqrt(2.0)
    rewards = torch.tensor([[1.0, 5.0], [3.0, nan], [2.0, 7.0], [4.0, 1.0], [4.0, nan], [4.0, nan]]).double()
    got = reference.group_normalize(rewards, group_size=3, eps=0.0)
    assert torch.allclose(got[:3, 0], torch.tensor([-1.0, 1.0, 0.0]).double())
    assert torch.allclose(got[:3, 1], torch.tensor([-1 / root, 0.0, 1 / root]).double())
    assert not got[3:].any()
    by_id = reference.group_normalize(rewards, group_ids=torch.tensor([7, 9, 7, 7, 9, 9]), scale=False)
    assert torch.allclose(by_id[[0, 2, 3], 0], torch.tensor([1.0, 2.0, 4.0]).double() - 7 / 3)
    assert torch.allclose(by_id[[1, 4, 5], 0], torch.tensor([3.0, 4.0, 4.0]).double() - 11 / 3)
    for eps in (0.0, 1e-4):  # exactly, whatever the mean rounds to
        assert not reference.group_normalize(torch.full((7, 1), 0.3).double(), eps=eps).any()
