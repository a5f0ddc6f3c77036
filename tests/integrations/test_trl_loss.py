"""The loss equals TRL's own: for one objective, the weighted sum of several, and changed advantages."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_setup import (
    REWARDS,
    GRPOConfig,
    GRPOTrainer,
    PamaGRPOTrainer,
    Recorded,
    close,
    copies,
    late,
    logged,
    run,
    saved_model,
    short,
    trainer,
)

from pama_kernels.integrations._rollout import Advantages
from pama_kernels.integrations.trl import LOSS_TYPES


def late_whole(completions: list[str], **_: Any) -> list[float]:
    """Applies to every completion."""
    return [value or 0.0 for value in late(completions)]


# Beside the default: given weights per completion, Noon, and one weight for each
RULES: dict[str, dict[str, Any]] = {
    "pama": {},
    "upgrad": {"pama_rule": "upgrad"},
    "fixed": {"pama_rule": "fixed", "pama_normalize": True},
    "softmin": {"pama_rule": "softmin"},
    "noon": {"pama_noon": True, "pama_bound": "scores"},
    "sequence": {"pama_weights_per": "sequence"},
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_reward_is_grpo(loss_type: str, tmp_path: Path) -> None:
    """One objective, or the same three times: GRPO's loss, gradients and logs.

    Four steps on one rollout: from the second one on the ratio is not 1, and clipping binds.
    """
    changes = {
        "loss_type": loss_type,
        "num_iterations": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.5,
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token",
    }
    plain, expected = run(GRPOTrainer, [short], tmp_path, **changes)
    if loss_type in CLIPPED:
        assert max(logged(plain, "clip_ratio/region_mean")) > 0.05
    for number in (1, 3):
        ours, gradients = run(PamaGRPOTrainer, copies(short, number), tmp_path, **changes)
        assert len(logged(ours, "loss")) == 4
        assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0, abs=1e-6)
        close(gradients, expected)
        for name in ("clip_ratio/region_mean", "clip_ratio/low_mean", "entropy", "num_tokens"):
            assert logged(ours, name) == pytest.approx(logged(plain, name), rel=0, abs=1e-6)


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_scale_rewards(scale_rewards: str, tmp_path: Path) -> None:
    plain, expected = run(GRPOTrainer, [late], tmp_path, scale_rewards=scale_rewards)
    ours, gradients = run(PamaGRPOTrainer, [late], tmp_path, scale_rewards=scale_rewards)
    close(gradients, expected)
    assert ours._logs["advantages"] == pytest.approx(plain._logs["advantages"], abs=1e-5)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0]], ids=str)
def test_fixed_is_gdpo(weights: list[float], tmp_path: Path) -> None:
    """TRL's normalize_then_sum divides by the deviation (ddof 1) plus 1e-4, and with the sum of the weights
    unnormalised; here it is the root mean square. Up to that factor the gradients are equal."""
    gdpo = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    plain, expected = run(GRPOTrainer, [late_whole, short], tmp_path, loss_type="grpo", max_steps=1, **gdpo)
    ours, gradients = run(
        PamaGRPOTrainer,
        [late_whole, short],
        tmp_path,
        loss_type="grpo",
        max_steps=1,
        pama_rule="fixed",
        pama_normalize=True,
        **gdpo,
    )
    theirs = torch.tensor(plain._logs["advantages"], dtype=torch.float64)
    deviation = 1e-4 / (1 / theirs.std() - 1)  # theirs are x / (std(x) + 1e-4)
    factor = (deviation + 1e-4) / (deviation * (7 / 8) ** 0.5)
    assert 1.06 < factor < 1.08
    close(gradients, [factor * expected[0]], 2e-6)
    mine = torch.tensor(ours._logs["advantages"], dtype=torch.float64)
    torch.testing.assert_close(mine, factor * theirs, rtol=1e-6, atol=1e-6)


# --- several objectives -------------------------------------------------------------------------------------


class Audited(PamaGRPOTrainer):
    """Compares each loss and gradient with sum_i L(c_i A_i) - (N - 1) L(0), by TRL's own loss L."""

    differences: list[tuple[float, float]]
    shipped: list[bool]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        seen: list[Tensor] = []
        own = self._objective_advantages

        def recorded(rewards: Tensor, *arguments: Any) -> Advantages:
            made = own(rewards, *arguments)
            seen.extend((~rewards.isnan(), made.applied))
            return made

        self._objective_advantages = recorded
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            del self._objective_advantages
        assert self.combination is not None
        present, advantages = seen
        weights = self.combination.weights * present
        if self.combination.weights.dim() == 1:
            weights = weights / (present / present.shape[1]).sum(1, keepdim=True)
        if self.args.pama_noon:
            advantages = advantages.clamp(min=0)
        terms = weights * advantages
        size = self.combination.advantages.abs().max() / terms.sum(1).abs().max()  # pama_normalize
        output["weighted"] = (terms * size).float()
        self.shipped.append("pama_positive" in output)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        parameters = list(self.model.parameters())
        terms = inputs["weighted"].unbind(1)
        loss = super()._compute_loss(model, inputs)
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        expected = sum(
            GRPOTrainer._compute_loss(self, model, {**inputs, "advantages": term}) for term in terms
        )
        zero = {**inputs, "advantages": torch.zeros_like(terms[0])}
        expected = expected - (len(terms) - 1) * GRPOTrainer._compute_loss(self, model, zero)
        self._metrics["train"] = metrics
        gradients = [
            torch.cat([x.flatten() for x in torch.autograd.grad(total, parameters, retain_graph=True)])
            for total in (loss, expected)
        ]
        error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
        self.differences.append((abs(loss.item() - expected.item()), float(error)))
        return loss


def audit(where: Path, **changes: Any) -> Any:
    extra = {"entropy_coef": 0.01} if "entropy_coef" in GRPOConfig.__dataclass_fields__ else {}
    Audited.differences, Audited.shipped = [], []
    off_policy = {"beta": 0.1, "epsilon": 0.1, "delta": 1.5, "off_policy_mask_threshold": 0.01}
    trained, _ = run(
        Audited,
        REWARDS,
        where,
        policy=saved_model(where / "policy"),
        max_steps=3,
        learning_rate=0.5,
        **off_policy,
        **extra,
        **changes,
    )
    assert len(Audited.differences) == 3
    # A few sums of 48 float32 terms in another order
    assert max(loss for loss, _ in Audited.differences) < 2e-6
    assert max(gradient for _, gradient in Audited.differences) < 2e-5
    for name in ("kl", "entropy", "loss"):
        assert len(logged(trained, name)) == 3  # one value per step, as ever
    return trained


@pytest.mark.parametrize("rule", ["pama", "noon"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sum_of_losses(loss_type: str, rule: str, tmp_path: Path) -> None:
    """Three objectives that disagree: the loss is sum_i c_i L_i, with clipping, KL and entropy bonus."""
    trained = audit(tmp_path, loss_type=loss_type, num_iterations=3, **RULES[rule])
    assert Audited.shipped == [rule == "pama"]
    if loss_type in CLIPPED:
        assert max(logged(trained, "clip_ratio/high_mean")) > 0.02
        assert (max(logged(trained, "clip_ratio/low_mean")) > 0.02) == (rule == "pama")


@pytest.mark.parametrize("rule", ["upgrad", "fixed", "softmin", "sequence"])
def test_sum_of_losses_of_every_rule(rule: str, tmp_path: Path) -> None:
    audit(tmp_path, num_iterations=3, **RULES[rule])
    assert Audited.shipped == [True]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_one_advantage_is_enough(loss_type: str, tmp_path: Path) -> None:
    """Where TRL takes one step for each rollout the losses are linear in the advantage."""
    audit(tmp_path, loss_type=loss_type)
    assert Audited.shipped == [loss_type == "sapo"] * 3


def test_clipping_the_combination_differs_from_clipping_its_terms(tmp_path: Path) -> None:
    """Where signs disagree and clipping binds, GRPO's loss of the combination is different."""
    made = trainer(PamaGRPOTrainer, REWARDS, tmp_path, num_iterations=2, epsilon=0.01)
    seen = []
    passes: list[None] = []
    made.model.model.register_forward_hook(lambda *_: passes.append(None))
    compute = made._compute_loss

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        passes.clear()
        loss = compute(model, inputs)
        assert len(passes) == 1  # the model runs once for all parts of the loss
        seen.append((loss.item(), GRPOTrainer._compute_loss(made, model, inputs).item()))
        return loss

    made._compute_loss = both
    made.train()
    (first, same), (second, other) = seen
    assert first == pytest.approx(same, abs=1e-6)  # on-policy
    assert abs(second - other) > 1e-4


@pytest.mark.skipif(
    "use_adaptive_entropy" not in GRPOConfig.__dataclass_fields__, reason="this TRL has no adaptive entropy"
)
def test_adaptive_entropy_counts_each_step_once(tmp_path: Path) -> None:
    """Its controller is updated once per step, although the loss has three parts."""
    changes = {
        "num_iterations": 2,
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "use_adaptive_entropy": True,
        "entropy_coef_delta": 0.01,
        "entropy_target": 10.0,
    }
    plain, expected = run(GRPOTrainer, [short], tmp_path, **changes)
    ours, gradients = run(Shipping, copies(short, 2), tmp_path, **changes)
    assert len(set(logged(plain, "entropy_coef"))) == 4
    assert logged(ours, "entropy_coef") == pytest.approx(logged(plain, "entropy_coef"))
    close(gradients, expected)


class Shipping(PamaGRPOTrainer):
    """Computes the loss in several parts, also where objectives agree."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        advantages = output["advantages"]
        output["pama_positive"] = advantages.clamp(min=0)
        output["pama_negative"] = -advantages.clamp(max=0)
        return output


# --- advantages that a subclass changes ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_token", [False, True])
def test_changed_advantages_are_used(rule: str, per_token: bool, tmp_path: Path) -> None:
    """By every rule, in every step over the rollout: the loss is GRPO's on the changed advantages."""
    changed: list[Tensor] = []

    def change(output: dict[str, Any]) -> dict[str, Any]:
        advantages = output["advantages"]
        if not changed:
            changed.append(torch.randn(len(advantages)))
        if per_token:
            mask = output["completion_mask"]
            output["advantages"] = (changed[0][:, None] * torch.linspace(0, 1, mask.shape[1])).to(advantages)
        else:
            output["advantages"] = changed[0].to(advantages)
        return output

    class Ours(PamaGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return change(super()._generate_and_score_completions(inputs))

    class Theirs(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return change(super()._generate_and_score_completions(inputs))

    changes = {"num_iterations": 2, "epsilon": 0.05, "learning_rate": 0.5}
    ours, gradients = run(Ours, REWARDS, tmp_path, **changes, **RULES[rule])
    theirs, expected = run(Theirs, REWARDS, tmp_path, **changes)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
    close(gradients, expected)


def test_unchanged_advantages_keep_both_parts(tmp_path: Path) -> None:
    """A subclass that drops some completions leaves the loss of the others exact."""

    class Dropping(Recorded):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            output["advantages"][::2] = 0.0
            assert self.combination is not None
            output["first"] = self.combination.positive.float()
            output["second"] = self.combination.negative.float()
            output["kept"] = torch.arange(8) % 2
            return output

    made = trainer(Dropping, REWARDS, tmp_path, num_iterations=2, epsilon=0.01)
    compute, differences = made._compute_loss, []

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = compute(model, inputs)
        kept = inputs["kept"]
        sides = (inputs["first"] * kept, -inputs["second"] * kept, torch.zeros_like(inputs["first"]))
        losses = [GRPOTrainer._compute_loss(made, model, {**inputs, "advantages": side}) for side in sides]
        differences.append(abs((losses[0] + losses[1] - losses[2] - loss).item()))
        return loss

    made._compute_loss = both
    made.train()
    assert len(differences) == 2
    assert max(differences) < 1e-6
