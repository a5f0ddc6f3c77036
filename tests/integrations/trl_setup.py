"""A tiny language model, a tokenizer and reward functions for TRL, without downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install 'pama-kernels[trl]'")

from datasets import Dataset
from tiny_models import LETTER_MODEL
from tiny_models import letter_tokenizer as tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, RLOOConfig, RLOOTrainer
from trl import GRPOTrainer as GRPOTrainer

import pama_kernels as pk
from pama_kernels.integrations._trl_mixin import PamaMixin
from pama_kernels.integrations.trl import PamaGRPOConfig as PamaGRPOConfig
from pama_kernels.integrations.trl import PamaGRPOTrainer, PamaRLOOTrainer

PROMPTS = ["abc", "the cat", "a b", "dog", "on", "zebra", "x", "we go"]
Reward = Callable[..., list[Any]]


def model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**LETTER_MODEL))


def saved_model(where: Path) -> Qwen2ForCausalLM:
    """From a path, where TRL finds the reference."""
    model().save_pretrained(where)
    return Qwen2ForCausalLM.from_pretrained(where)


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def late(completions: list[str], **_: Any) -> list[float | None]:
    """Share of letters of the second half of the alphabet, for completions of two letters and more."""
    return [sum(x > "m" for x in text) / len(text) if len(text) > 1 else None for text in completions]


REWARDS: list[Reward] = [vowels, short, late]
NAMES = ["vowels", "short", "late"]


def constant(value: float | None, name: str = "constant") -> Reward:
    """A saturated reward; None: one that never applies."""

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [value] * len(completions)

    reward.__name__ = name
    return reward


def copies(function: Reward, number: int) -> list[Reward]:
    """The same reward under different names."""

    def copy(index: int) -> Reward:
        def reward(**arguments: Any) -> list[Any]:
            return function(**arguments)

        reward.__name__ = f"{function.__name__}{index}"
        return reward

    return [copy(i) for i in range(number)]


# One rollout of 8 completions per step, fast and silent
TINY: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "max_steps": 2,
    "seed": 3,
}


def settings(kind: Any, where: Path, **changes: Any) -> Any:
    return kind(**{"output_dir": str(where), **TINY, **changes})


def trainer(kind: Any, rewards: list[Reward], where: Path, *, policy: Any = None, **changes: Any) -> Any:
    named = {key: changes.pop(key) for key in ("callbacks", "eval_dataset", "peft_config") if key in changes}
    if issubclass(kind, PamaMixin):
        config: Any = kind.config
    else:
        config = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    return kind(
        model() if policy is None else policy,
        rewards,
        settings(config, where, **changes),
        train_dataset=changes.pop("train_dataset", None) or dataset(),
        processing_class=tokenizer(),
        **named,
    )


# --- what happened ------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """All gradients in one vector before every step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


def run(
    kind: Any, rewards: list[Any], where: Path, *callbacks: TrainerCallback, **changes: Any
) -> tuple[Any, list[Tensor]]:
    """The trainer after training, and its gradients."""
    gradients = Gradients()
    made = trainer(kind, rewards, where, callbacks=[gradients, *callbacks], **changes)
    made.train()
    return made, gradients.seen


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """TRL normalises in float32: advantages, and later the parameters, may differ by its roundings."""
    for ours_now, expected_now in zip(ours, expected, strict=True):
        scale = float(expected_now.abs().max())
        torch.testing.assert_close(ours_now, expected_now, rtol=0, atol=tolerance * scale)


class Recording(PamaMixin):
    """Records the inputs of a rollout's weights."""

    rollouts: list[dict[str, Any]]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.rollouts = []
        super().__init__(*arguments, **named)

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*arguments, **named)
        self.rollouts.append({"rewards": rewards.clone()})
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        combination = self.combination
        assert combination is not None
        self.rollouts[-1].update(
            mode="train" if self.model.training else "eval",
            mask=output["completion_mask"] * output.get("tool_mask", 1),
            keys=set(output),
            advantages=output["advantages"],
            combination=combination,
            scores=combination.statistics.scores,
            logged=list(self._logs["advantages"]),
        )
        return output


class Recorded(Recording, PamaGRPOTrainer): ...


class RecordedRLOO(Recording, PamaRLOOTrainer): ...


def specified(rollout: dict[str, Any], rule: Any, **arguments: Any) -> Any:
    """The combination of a rollout's rewards by the specification."""
    rewards = rollout["rewards"].double()
    return pk.reference.combine_advantages(
        pk.reference.group_normalize(rewards, group_size=4),
        rollout["mask"],
        rule=rule,
        **{"objective_mask": ~rewards.isnan(), **arguments},
    )
