"""The policy loss for verl, and the estimator in its older trainer."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from verl_setup import KEYS, RULES, Batch, actor_config, data_proto, needs_verl, section

import pama_kernels as pk

GLOBAL = {
    "alone": {},
    "ranks": {"dp_size": 4, "batch_num_tokens": 321, "global_batch_size": 77, "loss_scale_factor": 50},
}
CLIPS: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.2},
}
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@needs_verl
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("world", GLOBAL)
@pytest.mark.parametrize("corrected", [False, True])
def test_policy_loss_is_vanilla_for_one_objective(
    verl: ModuleType, aggregation: str, clip: str, world: str, corrected: bool
) -> None:
    """One objective, both as (bs, T) and in parts: verl's own loss, its gradient and its metrics."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    batch = Batch()
    advantages = torch.randn(24, 7) * batch.mask
    config = actor_config(**CLIPS[clip])
    config.global_batch_info.update(GLOBAL[world])
    results = []
    for name, given in (
        ("vanilla", advantages),
        ("pama", advantages),
        ("pama", torch.stack([advantages.clamp(min=0), advantages.clamp(max=0)], -1).flatten(1)),
    ):
        logprobs = batch.logprobs.clone().requires_grad_()
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=batch.old,
            log_prob=logprobs,
            advantages=given,
            response_mask=batch.mask,
            loss_agg_mode=aggregation,
            config=config,
            rollout_is_weights=batch.old.exp() if corrected else None,
        )
        loss.backward()
        results.append((loss, logprobs.grad, metrics))
    (loss, gradient, metrics), *others = results
    assert gradient.any()
    assert metrics["actor/pg_clipfrac"] > 0
    for other in others:
        assert torch.equal(other[0], loss)
        # At ties verl's gradient is half of each side of the maximum: one rounding.
        torch.testing.assert_close(other[1], gradient, rtol=3 * torch.finfo(torch.float32).eps, atol=0)
        assert other[2] == pytest.approx(metrics, abs=1e-7)


@needs_verl
@pytest.mark.parametrize("dual", [3.0, 1.25])
def test_policy_loss_of_objectives_that_disagree(verl: ModuleType, dual: float) -> None:
    """The loss on two parts is sum_i c_i L_i, which the trainer's loss on sum_i c_i A_i is not."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    batch = Batch(absent=False)
    raw, _, combined = batch.reference(section(), pk.Pama("batch", "scores", regularization=0.5))
    weights = combined.weights
    parts = torch.stack([(weights * raw.clamp(min=0)).sum(-1), (weights * raw.clamp(max=0)).sum(-1)], -1)
    arguments: dict[str, Any] = {
        "response_mask": batch.mask,
        "loss_agg_mode": "token-mean",
        "config": actor_config(clip_ratio_c=dual),
    }
    logprobs = batch.logprobs.double().requires_grad_()
    loss, _ = get_policy_loss_fn("pama")(batch.old.double(), logprobs, parts.repeat(1, 7), **arguments)
    loss.backward()
    wanted = batch.logprobs.double().requires_grad_()
    output = pk.reference.pama_loss(
        wanted, batch.old, raw, batch.mask, weights=weights, clip_range=0.2, dual_clip=dual,
    )  # fmt: skip
    output.loss.backward()
    torch.testing.assert_close(loss, output.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logprobs.grad, wanted.grad, rtol=1e-12, atol=1e-15)
    vanilla, _ = get_policy_loss_fn("vanilla")(
        batch.old.double(), logprobs, parts.sum(-1)[:, None].expand(-1, 7), **arguments
    )
    assert abs(float((vanilla - loss).detach() / loss.detach())) > 1e-3


@needs_verl
def test_policy_loss_wrong_shapes(verl: ModuleType) -> None:
    batch = Batch()
    arguments = (batch.old, batch.logprobs, torch.zeros(24, 7, 3), batch.mask, "token-mean")
    with pytest.raises(ValueError, match=r"^advantages: expected shape \(24, 7\) or \(24, 14\), got"):
        verl.compute_pama_policy_loss(*arguments, actor_config())
    with pytest.raises(ValueError, match=r"^config: expected verl's actor configuration"):
        verl.compute_pama_policy_loss(*arguments)


@needs_verl
def test_loss_ignores_masked_values(verl: ModuleType) -> None:
    batch = Batch()
    advantages = torch.randn(24, 7)
    first, _ = verl.compute_pama_policy_loss(
        batch.old, batch.logprobs, advantages, batch.mask, "token-mean", actor_config()
    )
    poisoned = [torch.where(batch.mask, x, math.nan) for x in (batch.old, batch.logprobs, advantages)]
    second, _ = verl.compute_pama_policy_loss(*poisoned, batch.mask, "token-mean", actor_config())
    assert torch.equal(first, second)


@needs_verl
@pytest.mark.parametrize("rule", ["default", "sequence", "noon"])
def test_older_trainer(verl: ModuleType, rule: str) -> None:
    """Through verl's own `compute_advantage`, which otherwise passes no components to estimators."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch, config = Batch(), section(**RULES[rule][0])
    data = compute_advantage(
        data_proto(batch, **batch.components()), adv_estimator="pama", config=OmegaConf.create(config)
    )
    assert torch.equal(data.batch["advantages"], batch.estimate(config))
    assert data.batch["returns"] is data.batch["advantages"] or torch.equal(
        data.batch["returns"], data.batch["advantages"]
    )
    with pytest.raises(ValueError, match=r"got 'correct'; it has \['uid'\]"):
        compute_advantage(data_proto(batch), adv_estimator="pama", config=OmegaConf.create(config))


@needs_verl
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_objective_is_verls_grpo(verl: ModuleType, scale: bool, copies: int) -> None:
    """One reward, or the same one three times."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch = Batch(absent=False, objectives=1)
    data = data_proto(batch, **{key: batch.components()["correct"] for key in KEYS[:copies]})
    data.batch["token_level_rewards"][:, 0] = batch.rewards[:, 0]
    config = section(KEYS[:copies], scale)
    arguments: dict[str, Any] = {"norm_adv_by_std_in_grpo": scale, "config": config}
    wanted = compute_advantage(data, adv_estimator="grpo", **arguments).batch["advantages"].clone()
    found = compute_advantage(data, adv_estimator="pama", **arguments).batch["advantages"]
    # verl subtracts and divides in float32: a few roundings of the rewards, over deviations of 0.4 and more.
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
