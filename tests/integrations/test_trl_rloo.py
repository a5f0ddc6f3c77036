"""RLOO: with one objective equal to TRL's, with several the weighted sum; KL is part of the rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_setup import (
    NAMES,
    REWARDS,
    PamaGRPOConfig,
    PamaGRPOTrainer,
    PamaRLOOTrainer,
    RecordedRLOO,
    RLOOTrainer,
    close,
    constant,
    copies,
    late,
    logged,
    run,
    saved_model,
    settings,
    short,
    trainer,
    vowels,
)

import pama_kernels as pk
from pama_kernels.integrations._rollout import Advantages
from pama_kernels.integrations.trl import PamaRLOOConfig


def first_two(statistics: pk.ObjectiveStatistics) -> Tensor:
    """A rule of one's own: at module level, since checkpoints pickle the configuration."""
    return torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)


RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "pama": {"pama_rule": "pama"},
    "fixed": {"pama_rule": "fixed"},
    "softmin": {"pama_rule": "softmin"},
    "paper": {"pama_rule": "paper", "pama_weights_per": "batch"},
    "function": {"pama_rule": first_two},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"beta": 0.5},
    "whitened": {"beta": 0.0, "normalize_advantages": True},
    "whitened kl": {"beta": 0.5, "normalize_advantages": True},
    "clipped": {"beta": 0.5, "reward_clip_range": (-4.0, 0.5)},
}
# Four steps on one rollout: from the second one on the ratio is not 1, and clipping binds.
OFF_POLICY = {
    "num_iterations": 2,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.2,
}


@pytest.mark.parametrize("reward", [short, late], ids=["short", "late"])  # late: None for some
@pytest.mark.parametrize("option", OPTIONS)
def test_one_reward_is_rloo(option: str, reward: Any, tmp_path: Path) -> None:
    """One objective, or the same three times: RLOO's losses, gradients, parameters and logs."""
    changes = {**OPTIONS[option], **OFF_POLICY}
    plain, expected = run(RLOOTrainer, [reward], tmp_path, policy=saved_model(tmp_path / "policy"), **changes)
    assert max(logged(plain, "clip_ratio/region_mean")) > 0.05
    for number in (1, 3):
        ours, gradients = run(
            PamaRLOOTrainer,
            copies(reward, number),
            tmp_path,
            policy=saved_model(tmp_path / "policy"),
            **changes,
        )
        close(gradients, expected)
        for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert ours._logs["advantages"] == pytest.approx(plain._logs["advantages"], abs=1e-5)
        names = ["loss", "entropy", "num_tokens"]
        if not changes.get("normalize_advantages"):  # TRL then makes advantages of 0 some of 1e-8
            names += ["clip_ratio/region_mean", "clip_ratio/low_mean"]
        for name in names:
            assert logged(ours, name) == pytest.approx(logged(plain, name), rel=0, abs=2e-6)
        assert len(logged(ours, "loss")) == 4


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_fixed_weights_are_the_sum_of_trl(beta: float, tmp_path: Path) -> None:
    """TRL adds rewards up with weights; without normalisation that is the sum of their advantages."""
    weights, rewards = [0.5, 0.25, 0.25], [vowels, short, constant(0.7)]
    _, expected = run(
        RLOOTrainer,
        rewards,
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        beta=beta,
        reward_weights=weights,
    )
    # Among the objectives with a signal the preference is renormalised: without the constant one 2/3, 1/3.
    _, gradients = run(
        PamaRLOOTrainer,
        rewards[:2],
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        beta=beta / 0.75,
        reward_weights=weights[:2],
        pama_rule="fixed",
    )
    close([0.75 * gradient for gradient in gradients[:1]], expected[:1])
    _, gradients = run(
        PamaRLOOTrainer,
        [vowels, short],
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        beta=beta,
        pama_rule="fixed",
    )
    _, expected = run(
        RLOOTrainer,
        [vowels, short],
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        beta=beta,
        reward_weights=[0.5, 0.5],
    )
    close(gradients, expected)


# --- several objectives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_is_logged_as_in_grpo(rule: str, tmp_path: Path) -> None:
    """Weights are the specification's: of leave-one-out advantages, every completion counting the same."""
    made = trainer(RecordedRLOO, REWARDS, tmp_path, beta=0.0, **RULES[rule])
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    grpo, _ = run(PamaGRPOTrainer, REWARDS, tmp_path, **RULES[rule])
    for ours, theirs in zip(made.state.log_history[:2], grpo.state.log_history[:2], strict=True):
        assert {x for x in ours if x.startswith("pama/")} == {x for x in theirs if x.startswith("pama/")}
        assert sum(ours[f"pama/weight/{name}"] for name in NAMES) == pytest.approx(1)
    given = {
        "default": pk.UPGrad(),
        "pama": pk.Pama(),
        "fixed": pk.Fixed(),
        "softmin": pk.SoftMin(),
        "paper": pk.Pama.paper("batch"),
        "function": first_two,
    }
    for rollout in made.rollouts:
        expected = pk.reference.combine_advantages(
            leave_one_out(rollout["rewards"].double()),
            rollout["mask"],
            rule=given[rule],
            objective_mask=~rollout["rewards"].isnan(),
            aggregation="seq-mean-token-mean",
        )
        weights = rollout["combination"].weights
        torch.testing.assert_close(weights, expected.weights, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rollout["advantages"].double(), expected.advantages, rtol=1e-5, atol=1e-6)
        assert rollout["logged"] == rollout["combination"].advantages.tolist()


def leave_one_out(rewards: Tensor) -> Tensor:
    """By definition, for groups of 4: a reward minus the mean of the other rewards that apply."""
    advantages = torch.zeros_like(rewards)
    for row, column in (~rewards.isnan()).nonzero().tolist():
        group = slice(row // 4 * 4, row // 4 * 4 + 4)
        others = torch.cat([rewards[group.start : row, column], rewards[row + 1 : group.stop, column]])
        if not others.isnan().all():
            advantages[row, column] = rewards[row, column] - others.nanmean()
    return advantages


@pytest.mark.parametrize("rule", ["default", "pama", "fixed"])
@pytest.mark.parametrize("whiten", [False, True])
def test_kl_penalty_is_not_an_objective(rule: str, whiten: bool, tmp_path: Path) -> None:
    """A saturated reward is excluded although KL is subtracted from it; weights are those without KL."""
    shared = {"normalize_advantages": whiten, "max_steps": 2, **RULES[rule]}
    rewards = [vowels, constant(1.0), short]
    made, gradients = run(
        RecordedRLOO, rewards, tmp_path, policy=saved_model(tmp_path / "policy"), beta=0.7, **shared
    )
    _, expected = run(
        PamaRLOOTrainer,
        [vowels, short],
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        beta=0.7,
        **shared,
    )
    close(gradients, expected)
    assert logged(made, "pama/weight/constant") == [0, 0]
    assert logged(made, "pama/signal/constant") == [1, 1]
    if not whiten:
        rollout = made.rollouts[1]  # in the first one the policy still is the reference
        advantages = leave_one_out(rollout["rewards"].double())
        rule_of = {"default": pk.UPGrad(), "pama": pk.Pama(), "fixed": pk.Fixed()}[rule]
        without = pk.reference.combine_advantages(
            advantages, rollout["mask"], rule=rule_of, aggregation="seq-mean-token-mean"
        )
        torch.testing.assert_close(rollout["combination"].weights, without.weights, rtol=1e-6, atol=1e-6)
        difference = without.advantages - rollout["combination"].advantages  # that of the penalty
        assert float(difference.abs().max()) > 1e-3
        torch.testing.assert_close(difference.view(-1, 4).sum(1), torch.zeros(2).double(), rtol=0, atol=1e-6)


class Audited(PamaRLOOTrainer):
    """Compares each loss with sum_i L(c_i A_i) - (N - 1) L(0), by TRL's own loss L."""

    differences: list[float]

    def _objective_advantages(self, *arguments: Any) -> Advantages:
        self.objectives = super()._objective_advantages(*arguments)
        return self.objectives

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        assert self.combination is not None
        output["weighted"] = (self.combination.weights * self.objectives.applied).float()
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        losses = [
            RLOOTrainer._compute_loss(self, model, {**inputs, "advantages": term})
            for term in inputs["weighted"].unbind(1)
        ]
        together = RLOOTrainer._compute_loss(self, model, inputs)
        self.differences.append(abs((sum(losses) - loss).item()))
        self.of_the_sum.append(abs((together - loss).item()))
        return loss


def test_sum_of_losses(tmp_path: Path) -> None:
    """Each objective is clipped according to its own sign, which RLOO's loss of the combination is not."""
    Audited.differences, Audited.of_the_sum = [], []
    run(
        Audited,
        [vowels, short, *copies(vowels, 1)],
        tmp_path,
        policy=saved_model(tmp_path / "policy"),
        **{**OFF_POLICY, "beta": 0.5, "epsilon": 0.05},
    )
    assert len(Audited.differences) == 4
    assert max(Audited.differences) < 2e-6  # sums of some 8 float32 terms
    assert max(Audited.of_the_sum) > 1e-4


def test_on_policy_passes_one_advantage(tmp_path: Path) -> None:
    made = trainer(RecordedRLOO, REWARDS, tmp_path, beta=0.0, gradient_accumulation_steps=2)
    made.train()
    assert not any("pama_positive" in rollout["keys"] for rollout in made.rollouts)
    made = trainer(RecordedRLOO, REWARDS, tmp_path, beta=0.0, num_iterations=2)
    made.train()
    assert "pama_positive" in made.rollouts[0]["keys"]


def test_configuration(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: expected a PamaRLOOConfig, got PamaGRPOConfig"):
        PamaRLOOTrainer("model", REWARDS, settings(PamaGRPOConfig, tmp_path))
    with pytest.raises(ValueError, match="pama_preference: expected None with reward_weights"):
        trainer(PamaRLOOTrainer, [short], tmp_path, pama_preference=[1.0], reward_weights=[1.0])
    with pytest.raises(ValueError, match="pama_rule: expected one of"):
        settings(PamaRLOOConfig, tmp_path, pama_rule="magic")
