"""A rollout, settings and configurations for the tests of the verl adapter."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.integrations import _verl_algorithms as algorithms

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "verl"
KEYS = ["correct", "concise", "polite"]
EPS = 1e-6

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="verl is not installed: `make test-integrations` does it"
)


def section(keys: list[str] = KEYS, scale: bool = True, **pama: Any) -> dict[str, Any]:
    pama = {"reward_keys": keys, **pama}
    return {"adv_estimator": "pama", "norm_adv_by_std_in_grpo": scale, "pama": pama}


class Batch:
    """Six prompts with four responses each, in mixed order; rewards that are absent, masks with holes."""

    def __init__(self, width: int = 7, absent: bool = True, objectives: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows, self.width = 24, width
        order = torch.randperm(self.rows, generator=generator)
        self.uid = np.array([f"prompt {int(i) // 4}" for i in order], dtype=object)
        self.rewards = torch.randn(self.rows, objectives, generator=generator) * torch.tensor(
            [1.0, 5, 0.2][:objectives]
        )
        if absent:
            self.rewards[torch.rand(self.rows, objectives, generator=generator) < 0.15] = math.nan
        lengths = torch.randint(1, width + 1, (self.rows, 1), generator=generator)
        self.mask = torch.arange(width) < lengths
        self.mask[:, 1:] &= torch.rand(self.rows, width - 1, generator=generator) < 0.8  # tool tokens
        self.mask[5] = False  # a row of padding
        self.old = torch.randn(self.rows, width, generator=generator) - 2
        self.logprobs = self.old + 0.4 * torch.randn(self.rows, width, generator=generator)

    def components(self) -> dict[str, np.ndarray]:
        values = {
            key: [None if math.isnan(value) else value for value in column]
            for key, column in zip(KEYS, self.rewards.T.tolist(), strict=False)
        }
        return {key: np.array(column, dtype=object) for key, column in values.items()}

    def estimate(self, config: dict[str, Any]) -> Tensor:
        advantages, returns = algorithms.compute_pama_advantage(
            torch.zeros(self.rows, self.width),
            self.mask,
            config=config,
            index=self.uid,
            non_tensor_batch=self.components(),
        )
        assert returns is advantages
        return advantages

    def reference(self, config: dict[str, Any], rule: Any, **arguments: Any) -> tuple[Tensor, Tensor, Any]:
        """Per-objective advantages, presence, and the combination by the specification."""
        groups = torch.from_numpy(np.unique(self.uid.astype(str), return_inverse=True)[1])
        scale = config["norm_adv_by_std_in_grpo"]
        advantages = pk.reference.group_normalize(
            self.rewards.double(), group_ids=groups, scale=scale, eps=EPS
        )
        present = ~self.rewards.isnan()
        combined = pk.reference.combine_advantages(
            advantages, self.mask, rule=rule, objective_mask=present, **arguments
        )
        return advantages, present, combined


# Settings, and what the specification gets
RULES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "default": ({}, pk.UPGrad(), {}),
    "preference": (
        {"regularization": 0.5, "preference": [1, 2, 0]},
        pk.Pama(regularization=0.5),
        {"preference": [1, 2, 0]},
    ),
    "sequence": ({"weights_per": "sequence", "regularization": 0.1}, pk.Pama("sequence"), {}),
    "token": ({"weights_per": "token", "regularization": 0.1}, pk.Pama("sequence"), {}),
    "noon": ({"bound": "scores", "noon": True}, pk.Pama(bound="scores", noon=True), {}),
    "upgrad": ({"rule": "upgrad", "preference": [3, 1, 1]}, pk.UPGrad(), {"preference": [3, 1, 1]}),
    "fixed": ({"rule": "fixed", "normalize": True}, pk.Fixed(), {"normalize": True}),
    "softmin": ({"rule": "softmin", "temperature": 0.5}, pk.SoftMin(0.5), {}),
    "paper": ({"rule": "paper", "weights_per": "sequence"}, pk.Pama.paper("sequence"), {}),
    "aggregation": (
        {"aggregation": "seq-mean-token-mean"},
        pk.UPGrad(),
        {"aggregation": "seq-mean-token-mean"},
    ),
}


class Section(dict[str, Any]):
    """Replaces a section of verl's configuration."""

    def __getattr__(self, name: str) -> Any:
        value = self[name]
        return Section(value) if isinstance(value, dict) else value


def configuration(loss_mode: str = "pama", use_v1: bool = True, **pama: Any) -> Section:
    actor = {"policy_loss": {"loss_mode": loss_mode}}
    return Section(
        algorithm=section(**pama),
        actor_rollout_ref={"actor": actor, "rollout": {"n": 4}},
        trainer={"use_v1": use_v1, "v1": {"trainer_mode": "pama_sync"}},
    )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def actor_config(**settings: Any) -> Any:
    from verl.workers.config import ActorConfig

    named = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 1, **settings}
    return ActorConfig(**named)


def data_proto(batch: Batch, **components: Any) -> Any:
    from tensordict import TensorDict
    from verl import DataProto

    tensors = {"token_level_rewards": torch.zeros(24, 7), "response_mask": batch.mask.long()}
    return DataProto(
        batch=TensorDict(tensors, batch_size=24),
        non_tensor_batch={"uid": batch.uid, **components},
    )


def composed(*overrides: str) -> Any:
    """The example's configuration, as hydra composes it on top of verl's own."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(EXAMPLE), version_base=None):
        return compose("pama_grpo", ["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])
