"""Saturated and absent rewards, hooks of subclasses, schedules, names."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForSequenceClassification, TrainerCallback
from trl_setup import (
    NAMES,
    PROMPTS,
    REWARDS,
    GRPOTrainer,
    PamaGRPOTrainer,
    PamaRLOOTrainer,
    Recorded,
    close,
    constant,
    logged,
    model,
    run,
    short,
    specified,
    tokenizer,
    trainer,
    vowels,
)

import pama_kernels as pk

BATCH_RULES = {
    "pama": {},
    "scores": {"pama_bound": "scores", "pama_noon": True},
    "upgrad": {"pama_rule": "upgrad"},
    "fixed": {"pama_rule": "fixed"},
}


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("rule", BATCH_RULES)
def test_saturated_rewards_do_not_change_the_update(rule: str, momentum: float, tmp_path: Path) -> None:
    """They equal functions that return None and functions left out; beside one varying reward and two."""
    changes = {**BATCH_RULES[rule], "pama_momentum": momentum}
    for live in ([vowels], [vowels, short]):
        alone, expected = run(PamaGRPOTrainer, live, tmp_path, **changes)
        for value in (1.0, -0.3, None):
            saturated = [constant(value, f"constant{i}") for i in range(4)]
            made, gradients = run(PamaGRPOTrainer, [*live, *saturated], tmp_path, **changes)
            close(gradients, expected, 1e-6)
            for name in [reward.__name__ for reward in live]:
                assert logged(made, f"pama/weight/{name}") == pytest.approx(
                    logged(alone, f"pama/weight/{name}"), abs=1e-9
                )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PamaGRPOTrainer, {}),
        (PamaGRPOTrainer, {"pama_rule": "pama"}),
        (PamaGRPOTrainer, {"scale_rewards": "none"}),
        (PamaRLOOTrainer, {"beta": 0.0}),
        (PamaRLOOTrainer, {"beta": 0.0, "normalize_advantages": True}),
    ],
    ids=str,
)
def test_rounding_errors_of_a_saturated_reward_have_no_weight(
    kind: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """A constant that is computed in an order that depends on the completion, against the other reward."""

    def rounded(completions: list[str], **_: Any) -> list[float]:
        return [0.7 * (1 - 6e-7 * x) for x in vowels(completions)]

    rollout: list[Tensor] = []

    class Seen(kind):  # type: ignore[misc]
        def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
            rollout.append(super()._calculate_rewards(*arguments, **named))
            return rollout[-1]

    made, gradients = run(Seen, [vowels, rounded], tmp_path, **options)
    assert len(rollout[0][:, 1].unique()) > 1  # in float32, too
    _, expected = run(kind, [vowels, constant(0.7)], tmp_path, **options)
    close(gradients, expected, 0.0)
    assert logged(made, "pama/signal/rounded") == [1.0, 1.0]


def task(prompt: str) -> Any:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [x if p == prompt else None for p, x in zip(prompts, vowels(completions), strict=True)]

    reward.__name__ = f"task_{prompt.replace(' ', '_')}"
    return reward


@pytest.mark.parametrize(
    "rule", [*BATCH_RULES.values(), {"pama_weights_per": "sequence"}, {"pama_rule": "softmin"}], ids=str
)
def test_disjoint_tasks_keep_full_advantages(rule: dict[str, Any], tmp_path: Path) -> None:
    """Eight tasks, one reward for each: the advantages, and the gradient, are those of one reward for all."""
    _, expected = run(GRPOTrainer, [vowels], tmp_path, max_steps=1, per_device_train_batch_size=32)
    made, gradients = run(
        Recorded,
        [task(prompt) for prompt in PROMPTS],
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=32,
        **rule,
    )
    (rollout,) = made.rollouts
    whole = pk.reference.group_normalize(rollout["rewards"].double().nansum(1, keepdim=True), group_size=4)
    if rule == BATCH_RULES["scores"]:  # which are not alike: the weights are not the preference
        share = made.combination.weights * 8
        tasks = rollout["rewards"].isnan().logical_not().double().argmax(1)
        whole = whole.clamp(min=0) * share[tasks][:, None]
    else:
        close(gradients, expected)
    torch.testing.assert_close(rollout["advantages"].double(), whole[:, 0], rtol=1e-6, atol=1e-7)


def test_absent_rewards(tmp_path: Path) -> None:
    """None and NaN are not 0: such completions count neither in the group's mean nor in the statistics."""

    def even(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(x)) if i % 2 else (None, math.nan)[i // 4] for i, x in enumerate(completions)]

    made = trainer(Recorded, [vowels, even, constant(None, "never")], tmp_path, max_steps=1)
    made.train()
    (rollout,) = made.rollouts
    assert rollout["rewards"].isnan().sum(0).tolist() == [0, 4, 8]
    lengths = rollout["mask"].sum(1)
    counts = made.combination.statistics.count
    assert counts.tolist() == [lengths.sum(), lengths[1::2].sum(), 0]
    expected = specified(rollout, pk.UPGrad())
    torch.testing.assert_close(made.combination.weights, expected.weights)
    torch.testing.assert_close(rollout["advantages"].double(), expected.advantages, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(rollout["advantages"]).all()


def test_infinite_and_missing_rewards(tmp_path: Path) -> None:
    def one(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match="'one' returned 1 rewards, but 8 were expected"):
        trainer(PamaGRPOTrainer, [short, one], tmp_path).train()
    with pytest.raises(ValueError, match="expected finite numbers or None, got inf from constant"):
        trainer(PamaGRPOTrainer, [short, constant(math.inf)], tmp_path).train()


def test_a_rollout_without_any_advantage_warns_once(tmp_path: Path) -> None:
    """Under the paper's rule per completion a constant reward makes all combined advantages 0."""
    rule = {"pama_rule": "paper", "pama_weights_per": "token"}
    with pytest.warns(UserWarning, match="every combined advantage of a rollout is 0 though vowels") as seen:
        made, gradients = run(PamaGRPOTrainer, [vowels, constant(1.0)], tmp_path, **rule)
    assert len([entry for entry in seen if "combined advantage" in str(entry.message)]) == 1
    assert not any(gradient.any() for gradient in gradients)
    assert logged(made, "pama/signal/constant") == [1, 1]


# --- subclasses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", BATCH_RULES)
def test_overridden_rewards_are_used(rule: str, tmp_path: Path) -> None:
    """Post-processing of rewards in an overridden `_calculate_rewards`."""

    class Changed(PamaGRPOTrainer):
        factor: Tensor

        def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
            rewards: Tensor = super()._calculate_rewards(*arguments, **named)
            return rewards * self.factor

    Changed.factor = torch.zeros(3)
    _, gradients = run(Changed, REWARDS, tmp_path, max_steps=1, **BATCH_RULES[rule])
    assert not gradients[0].any()
    Changed.factor = torch.tensor([1.0, 0.0, 1.0])  # as if the second were saturated
    _, gradients = run(Changed, REWARDS, tmp_path, max_steps=1, **BATCH_RULES[rule])
    zeroed = [REWARDS[0], constant(0.0), REWARDS[2]]
    _, expected = run(PamaGRPOTrainer, zeroed, tmp_path, max_steps=1, **BATCH_RULES[rule])
    assert expected[0].any()
    close(gradients, expected)


def test_a_hook_of_the_instance_is_kept(tmp_path: Path) -> None:
    made = trainer(PamaGRPOTrainer, REWARDS, tmp_path, max_steps=2)
    calls: list[None] = []
    calculate = made._calculate_rewards

    def hook(*arguments: Any, **named: Any) -> Tensor:
        calls.append(None)
        return calculate(*arguments, **named) * 0

    made._calculate_rewards = hook
    made.train()
    assert len(calls) == 2
    assert made._calculate_rewards is hook
    assert logged(made, "grad_norm") == [0, 0]


class Meddling(TrainerCallback):
    """Changes the arguments, which TRL reads when the trainer is made."""

    def on_step_begin(self, args: Any, *_: Any, **__: Any) -> None:
        args.pama_normalize = True
        args.pama_rule = "softmin"
        args.pama_noon = True
        args.scale_rewards = "none"
        args.reward_weights = [0.0, 0.0, 1.0]
        args.pama_preference = [0.0, 0.0, 1.0]


def test_arguments_changed_during_training_have_no_effect(tmp_path: Path) -> None:
    """As in TRL: rule, scale and preference are read at construction; `trainer.reward_weights` may change."""
    _, expected = run(PamaGRPOTrainer, REWARDS, tmp_path)
    _, gradients = run(PamaGRPOTrainer, REWARDS, tmp_path, Meddling())
    close(gradients, expected)


# --- preference ---------------------------------------------------------------------------------------------


class Schedule(TrainerCallback):
    """Changes `reward_weights` before every step."""

    made: Any

    def __init__(self, *weights: list[float]) -> None:
        self.weights = list(weights)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.made.reward_weights = torch.tensor(self.weights.pop(0))


def test_reward_weights_are_read_at_every_rollout(tmp_path: Path) -> None:
    schedule = Schedule([0.0, 1.0, 3.0], [2.0, 1.0, 1.0], [1.0, 0.0, 0.0])
    schedule.made = trainer(
        PamaGRPOTrainer, REWARDS, tmp_path, callbacks=[schedule], pama_rule="fixed", max_steps=3
    )
    schedule.made.train()
    first, second, third = schedule.made.state.log_history[:3]
    weights = [[entry.get(f"pama/weight/{name}") for name in NAMES] for entry in (first, second, third)]
    assert weights[0][0] is None  # weight 0: only logged
    assert weights[0][1:] == pytest.approx([0.25, 0.75])
    assert weights[1] == pytest.approx([0.5, 0.25, 0.25])
    assert weights[2][:1] == pytest.approx([1.0])
    assert weights[2][1:] == [None, None]
    for entry in (first, second, third):
        assert all(f"rewards/{name}/mean" in entry for name in NAMES)
    assert not [name for name in first if name.startswith("pama/") and "vowels" in name]


@pytest.mark.parametrize("name", ["reward_weights", "pama_preference"])
def test_preference(name: str, tmp_path: Path) -> None:
    made = trainer(
        Recorded, tuple(REWARDS), tmp_path, **{name: [1.0, 0.0, 3.0]}, pama_regularization=1e9, max_steps=1
    )
    made.train()
    expected = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64)
    torch.testing.assert_close(made.combination.weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [*BATCH_RULES.values(), {"pama_weights_per": "sequence"}], ids=str)
def test_a_reward_of_weight_0_is_excluded(rule: dict[str, Any], tmp_path: Path) -> None:
    _, expected = run(PamaGRPOTrainer, [REWARDS[0], REWARDS[2]], tmp_path, reward_weights=[1, 3], **rule)
    _, gradients = run(PamaGRPOTrainer, REWARDS, tmp_path, reward_weights=[1, 0, 3], **rule)
    close(gradients, expected)


def test_wrong_reward_weights_during_training(tmp_path: Path) -> None:
    schedule = Schedule([1.0, -1.0, 0.0])
    schedule.made = trainer(PamaGRPOTrainer, REWARDS, tmp_path, callbacks=[schedule])
    with pytest.raises(
        ValueError, match=r"reward_weights: expected 3 non-negative .* got \[1.0, -1.0, 0.0\]"
    ):
        schedule.made.train()


# --- names --------------------------------------------------------------------------------------------------


class Length:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [self.factor * len(text) for text in completions]


def times(factor: float, completions: list[str], **_: Any) -> list[float]:
    return [factor * len(text) for text in completions]


def reward_models() -> list[str]:
    paths, config = [], model().config
    config.num_labels = 1
    for name in ("helpful", "harmless"):
        paths.append(str(Path(tempfile.mkdtemp()) / name / "checkpoint-100"))
        Qwen2ForSequenceClassification(config).save_pretrained(paths[-1])
        tokenizer().save_pretrained(paths[-1])
    return paths


REPEATED = {
    "functions": (lambda: [constant(1.0, "short"), short], ["short", "short_2"]),
    "instances": (lambda: [Length(1.0), Length(-1.0), vowels], ["Length", "Length_2", "vowels"]),
    "partials": (
        lambda: [functools.partial(times, 1.0), functools.partial(times, 2.0)],
        ["times", "times_2"],
    ),
    "taken": (
        lambda: [constant(1.0, name) for name in ("a", "a", "a_2", "a")],
        ["a", "a_3", "a_2", "a_4"],
    ),
    "models": (reward_models, ["checkpoint-100", "checkpoint-100_2"]),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_rewards_of_one_name_get_a_suffix(kind: str, tmp_path: Path) -> None:
    """In TRL's own logs too, where one would otherwise overwrite the other."""
    rewards, expected = REPEATED[kind]
    with pytest.warns(UserWarning, match=f"reward_funcs: expected different names.*logged as.*{expected[1]}"):
        made = trainer(PamaGRPOTrainer, rewards(), tmp_path, max_steps=1)
    made.train()
    assert made.objective_names == made.reward_func_names == expected
    entry = made.state.log_history[0]
    assert all(f"pama/weight/{name}" in entry and f"rewards/{name}/mean" in entry for name in expected)
    assert {len(made._logs["rewards"][name]) for name in expected} == {8}
