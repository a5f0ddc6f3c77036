"""Weights are those of the specification, solved once per rollout, under the loss's own token weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_setup import (
    NAMES,
    REWARDS,
    GRPOTrainer,
    PamaGRPOTrainer,
    Recorded,
    constant,
    dataset,
    logged,
    model,
    short,
    specified,
    trainer,
    vowels,
)

import pama_kernels as pk


def by_deviation(statistics: pk.ObjectiveStatistics) -> Tensor:
    """A rule of one's own: at module level, since checkpoints pickle the configuration."""
    return statistics.second_moments / statistics.second_moments.sum()


# Settings, and the rule that the specification gets
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "default": ({}, pk.UPGrad(), {}),
    "pama": (
        {"rule": "pama", "regularization": 0.3, "preference": [1.0, 2.0, 3.0]},
        pk.Pama(regularization=0.3),
        {"preference": [1.0, 2.0, 3.0]},
    ),
    "noon": ({"noon": True}, pk.Pama(noon=True), {}),
    "scores": ({"bound": "scores", "noon": True}, pk.Pama(bound="scores", noon=True), {}),
    "sequence": (
        {"weights_per": "sequence", "regularization": 0.3},
        pk.Pama("sequence", regularization=0.3),
        {},
    ),
    "token": ({"weights_per": "token"}, pk.Pama("sequence"), {}),
    "upgrad": (
        {"rule": "upgrad", "preference": [1.0, 2.0, 3.0]},
        pk.UPGrad(),
        {"preference": [1.0, 2.0, 3.0]},
    ),
    "fixed": ({"rule": "fixed", "normalize": True}, pk.Fixed(), {"normalize": True}),
    "softmin": ({"rule": "softmin", "temperature": 0.4}, pk.SoftMin(0.4), {}),
    "paper": ({"rule": "paper", "weights_per": "sequence"}, pk.Pama.paper("sequence"), {}),
    "object": ({"rule": pk.Pama(regularization=1.0)}, pk.Pama(regularization=1.0), {}),
    "function": ({"rule": by_deviation}, by_deviation, {}),
}


@pytest.mark.filterwarnings("ignore:every combined advantage")  # the paper's rule, of 8 completions
@pytest.mark.parametrize("length", [3, 6])  # 3: as many tokens as objectives
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_settings(case: str, length: int, tmp_path: Path) -> None:
    settings, rule, arguments = CASES[case]
    pama = {f"pama_{name}": value for name, value in settings.items()}
    made = trainer(Recorded, REWARDS, tmp_path, max_completion_length=length, loss_type="dapo", **pama)
    made.train()
    assert len(made.rollouts) == 2
    for rollout in made.rollouts:
        assert rollout["mask"].shape == (8, length)
        expected = specified(rollout, rule, **arguments)
        combination = rollout["combination"]
        torch.testing.assert_close(combination.weights, expected.weights, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rollout["advantages"].double(), expected.advantages, rtol=1e-5, atol=1e-6)
        assert rollout["logged"] == combination.advantages.tolist()


# --- the loss's own token weights ---------------------------------------------------------------------------


class Lengths(Recorded):
    """Completions of 1, 2, ... tokens."""

    def _generate(self, prompts: Any, *arguments: Any) -> Any:
        generated = list(super()._generate(prompts, *arguments))
        generated[1] = [[2 + i] * (1 + i % 5) for i in range(len(prompts))]
        return tuple(generated)


def alternating(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 3) * len(text) ** 2 for i, text in enumerate(completions)]


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("grpo", "seq-mean-token-mean"),
        ("sapo", "seq-mean-token-mean"),
        *((name, "token-mean") for name in ("bnpo", "dr_grpo", "dapo", "luspo", "cispo", "vespo")),
    ],
)
def test_token_weights_of_the_loss(loss_type: str, aggregation: str, tmp_path: Path) -> None:
    """Rewards whose losses are equal by completion differ by token, and the other way round. LUSPO adds the
    tokens of a completion up."""
    made = trainer(
        Lengths,
        [short, alternating, vowels],
        tmp_path,
        loss_type=loss_type,
        max_steps=1,
        importance_sampling_level="sequence" if loss_type == "luspo" else "token",
    )
    made.train()
    (rollout,) = made.rollouts
    assert len(set(rollout["mask"].sum(1).tolist())) > 3
    expected = {
        name: specified(rollout, pk.UPGrad(), aggregation=name)
        for name in ("token-mean", "seq-mean-token-mean")
    }
    weights = rollout["combination"].weights
    torch.testing.assert_close(weights, expected[aggregation].weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout["scores"], expected[aggregation].statistics.scores)
    first, second = (solution.weights for solution in expected.values())
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "luspo", "sapo", "cispo"])
def test_scores_are_the_objectives_losses(loss_type: str, tmp_path: Path) -> None:
    """Up to one factor for all: the gradient of each objective's own loss at ratio 1, in a model whose
    log-probabilities are one number."""
    made = trainer(
        Lengths, [short, alternating], tmp_path, loss_type=loss_type, max_steps=1, num_iterations=2,
        pama_bound="scores", pama_noon=True,
        importance_sampling_level="sequence" if loss_type == "luspo" else "token",
    )  # fmt: skip
    losses: list[float] = []
    compute = made._compute_loss

    def each(model: Any, inputs: dict[str, Any]) -> Tensor:
        if not losses:
            number = torch.zeros((), requires_grad=True)

            def shifted(*_: Any, **__: Any) -> Any:
                logps = inputs["old_per_token_logps"] + number
                return logps, torch.zeros_like(logps), None

            made._get_per_token_logps_and_entropies = shifted
            for advantages in inputs["each"].T:
                loss = GRPOTrainer._compute_loss(made, model, {**inputs, "advantages": advantages})
                (gradient,) = torch.autograd.grad(loss, number)
                losses.append(-gradient.item())
            del made._get_per_token_logps_and_entropies
        return compute(model, inputs)

    score = made._generate_and_score_completions

    def with_each(inputs: Any) -> dict[str, Any]:
        output = score(inputs)
        rewards = made.rollouts[-1]["rewards"].double()
        output["each"] = pk.reference.group_normalize(rewards, group_size=4).clamp(min=0).float()
        return output

    made._compute_loss, made._generate_and_score_completions = each, with_each
    made.train()
    scores = made.rollouts[0]["scores"]
    assert losses[0] / losses[1] == pytest.approx(float(scores[0] / scores[1]), rel=1e-4)


def test_tool_mask_and_importance_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a tool wrote do not count; corrections for the rollout engine weigh the statistics."""
    score = GRPOTrainer._generate_and_score_completions

    def corrected(self: Any, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = score(self, inputs)
        rows = output["completion_ids"].shape[0]
        output["importance_sampling_ratio"] = 0.5 + torch.arange(rows, dtype=torch.float32)[:, None] / rows
        return output

    class WithTools(Recorded):
        def _generate(self, *arguments: Any) -> Any:
            generated = list(super()._generate(*arguments))
            assert generated[2] is None
            generated[2] = [[0] + [1] * (len(ids) - 1) for ids in generated[1]]
            return tuple(generated)

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", corrected)
    made = trainer(WithTools, REWARDS, tmp_path, max_steps=1, loss_type="dapo")
    made.train()
    (rollout,) = made.rollouts
    assert "tool_mask" in rollout["keys"]
    assert float(made.combination.statistics.token_count) == rollout["mask"].sum()
    rewards = rollout["rewards"].double()
    expected = pk.reference.objective_statistics(
        None,
        None,
        pk.reference.group_normalize(rewards, group_size=4),
        rollout["mask"],
        objective_mask=~rewards.isnan(),
        importance_weights=(0.5 + torch.arange(8) / 8)[:, None].expand(rollout["mask"].shape),
    )
    torch.testing.assert_close(rollout["scores"], expected.scores)
    solution = pk.reference.upgrad_weights(expected.gram)
    torch.testing.assert_close(made.combination.weights, solution.weights, rtol=1e-6, atol=1e-6)


# --- once per rollout ---------------------------------------------------------------------------------------


def test_once_per_rollout_and_evaluation(tmp_path: Path) -> None:
    """Accumulation, several iterations and evaluation: solved once per rollout; no evaluation in the mean."""
    made = trainer(
        Recorded,
        REWARDS,
        tmp_path,
        loss_type="dapo",
        max_steps=4,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_dataset=dataset().select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
        pama_momentum=0.5,
    )
    made.train()
    modes = [rollout["mode"] for rollout in made.rollouts]
    assert modes == ["train", "eval", "eval", "train", "eval", "eval"]
    assert float(made._pama.batches) == 2
    used: list[float] = []  # of the latest 8 completions, training's and evaluation's
    for rollout in made.rollouts:
        used = [*used, *rollout["combination"].advantages.tolist()][-8:]
        assert rollout["logged"] == used
    first, *_, last = [r["combination"] for r in made.rollouts if r["mode"] == "train"]
    buffers = [combination.statistics.buffer for combination in (first, last)]
    mean = (0.25 * buffers[0] + 0.5 * buffers[1]) / 0.75  # the bias-corrected mean of two
    gram = pk.ObjectiveStatistics(mean, 3, True).gram
    expected = pk.reference.upgrad_weights(gram).weights
    torch.testing.assert_close(last.weights, expected, rtol=1e-6, atol=1e-6)
    assert len(logged(made, "pama/weight/short")) == 2
    assert len(logged(made, "eval_pama/weight/short")) == 2


@pytest.mark.parametrize(
    "rule", [{}, {"pama_noon": True, "pama_bound": "scores"}, {"pama_rule": "upgrad"}], ids=str
)
def test_without_any_signal(rule: dict[str, Any], tmp_path: Path) -> None:
    """Constant rewards, and completions that are all cut off and masked: the weights are the preference."""
    made = trainer(Recorded, [constant(1.0, "a"), constant(2.0, "b")], tmp_path, max_steps=1, **rule)
    made.train()
    assert made.rollouts[0]["advantages"].tolist() == [0] * 8
    cut = {
        "max_completion_length": 2,
        "mask_truncated_completions": True,
        "generation_kwargs": {"min_new_tokens": 2},
    }
    cut_off = trainer(Recorded, REWARDS, tmp_path, max_steps=1, **rule, **cut)
    cut_off.train()
    assert cut_off.rollouts[0]["mask"].sum() == 0
    for trained in (made, cut_off):
        weights = trained.combination.weights
        assert weights.tolist() == pytest.approx([1 / len(weights)] * len(weights))
        for ours, at_start in zip(trained.model.parameters(), model().parameters(), strict=True):
            assert torch.equal(ours, at_start)


def test_fourteen_steps(tmp_path: Path) -> None:
    """Three rewards, and a policy that improves."""
    made = trainer(
        PamaGRPOTrainer,
        REWARDS,
        tmp_path,
        max_steps=14,
        per_device_train_batch_size=32,
        num_generations=8,
        learning_rate=0.02,
        optim="adamw_torch",
    )
    made.train()
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(history) == 14
    assert all(torch.isfinite(p).all() for p in made.model.parameters())

    def mean(entries: list[dict[str, float]], name: str) -> float:
        return sum(entry[f"rewards/{name}/mean"] for entry in entries) / len(entries)

    gains = {name: mean(history[-4:], name) - mean(history[:4], name) for name in NAMES}
    assert min(gains.values()) > 0.1, gains
