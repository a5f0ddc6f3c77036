"""A small environment with three objectives, and a trainer on it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="not installed (pip install 'pama-kernels[sb3]')")
from pama_kernels.integrations.sb3 import PamaPPO, make_vec_env

NAMES = ["left", "right", "cost"]
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "device": "cpu"}


class Levers(gymnasium.Env):
    """Four levers with rewards for two objectives; `cost` for a third. Some episodes terminate."""

    PAYS = np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.0, 0.0]])

    def __init__(self, count: int = 3, mapping: bool = False) -> None:
        self.count, self.mapping = count, mapping
        self.action_space = gymnasium.spaces.Discrete(4)
        box = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"x": box}) if mapping else box
        self.reward_space = gymnasium.spaces.Box(-10.0, 10.0, (count,))

    def _look(self) -> Any:
        x = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return {"x": x} if self.mapping else x

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._look(), {}

    def step(self, action: Any) -> Any:
        noise = self.np_random.normal()
        reward = np.array([*self.PAYS[int(action)], -5 * abs(noise)])[: self.count]
        return self._look(), reward, bool(self.np_random.random() < 0.05), False, {}


def levers(count: int = 3, limit: int = 7, mapping: bool = False) -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Levers(count, mapping), limit)


def vectors(n_envs: int = 2, count: int = 3, **named: Any) -> Any:
    return make_vec_env(lambda: levers(count, **named), n_envs, seed=0, objectives=NAMES[:count])


def trained(rule: Any = None, steps: int = 128, env: Any = None, **named: Any) -> PamaPPO:
    return PamaPPO(
        "MlpPolicy", vectors() if env is None else env, rule=rule, seed=0, **(SMALL | named)
    ).learn(steps)
