"""Control tasks with several reward terms, and one training run of `PamaPPO` on one of them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from pama_kernels.integrations.sb3 import PamaPPO, VecNormalizeObjectives, make_vec_env

gymnasium.logger.min_level = gymnasium.logger.ERROR  # it warns of every space with bounds in float64


@dataclass(frozen=True)
class Task:
    """An environment of MO-Gymnasium and the settings of PPO, which all methods share."""

    objectives: tuple[str, ...]
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)
    num_envs: int = 16
    one_hot: bool = False
    gamma_of_returns: float = 1.0  # returns are discounted where the known front is
    episodes: int = 16  # of the evaluation
    worst: tuple[float, ...] | None = None  # returns at 0 of the scale; None: the lowest of the known front


GRID = {
    "n_steps": 64,
    "batch_size": 256,
    "n_epochs": 4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
}
TASKS = {
    "mo-hopper-v5": Task(
        ("forward", "height", "energy"),
        50_000,
        {"learning_rate": 1e-3, "n_steps": 128, "batch_size": 256, "n_epochs": 5, "gamma": 0.99},
    ),
    "resource-gathering-v0": Task(
        ("safety", "gold", "gem"),
        60_000,
        {"learning_rate": 3e-3, **GRID},
        one_hot=True,
        gamma_of_returns=0.99,
        episodes=128,
        worst=(-1.0, 0.0, 0.0),
    ),
    "deep-sea-treasure-v0": Task(
        ("treasure", "time"),
        40_000,
        {"learning_rate": 3e-3, **GRID},
        one_hot=True,
        gamma_of_returns=0.99,
        episodes=1,
    ),
}


class OneHot(gymnasium.ObservationWrapper):
    """Integers in a box, each encoded one-hot."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        space = env.observation_space
        self.low = space.low.astype(int)
        self.levels = space.high.astype(int) - self.low + 1
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (int(self.levels.sum()),), np.float32)

    def observation(self, observation: Any) -> Any:
        columns = zip(np.asarray(observation).astype(int) - self.low, self.levels, strict=True)
        return np.concatenate([np.eye(levels, dtype=np.float32)[x] for x, levels in columns])


class WeightedReward(gymnasium.RewardWrapper):
    """One reward in place of several: their weighted sum, in their own units."""

    def __init__(self, env: Any, weights: tuple[float, ...]) -> None:
        super().__init__(env)
        self.weights, self.reward_space = np.asarray(weights), gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def reward(self, reward: Any) -> float:
        return float(self.weights @ reward)


def make(name: str, reward: tuple[float, ...] | None = None, **named: Any) -> Any:
    import mo_gymnasium

    env = mo_gymnasium.make(name, **named)
    if TASKS[name].one_hot:
        env = OneHot(env)
    return env if reward is None else WeightedReward(env, reward)


@dataclass(frozen=True)
class Run:
    """One training run. `reward`: these weights in the reward itself, which is then the only objective."""

    env: str
    rule: str = "pama"
    preference: tuple[float, ...] | None = None
    reward: tuple[float, ...] | None = None
    seed: int = 0
    steps: int | None = None

    @property
    def task(self) -> Task:
        return TASKS[self.env]

    @property
    def method(self) -> str:
        """The name in tables and pictures."""
        if self.steps == 0:
            return "untrained"
        if self.reward is not None:
            return "reward " + ":".join(f"{x:g}" for x in self.reward)
        return self.rule + "".join(f" {x:g}" for x in self.preference or ())


def train(run: Run, callback: Any = None) -> PamaPPO:
    torch.set_num_threads(1)
    task = run.task
    names = None if run.reward is not None else task.objectives
    envs = make_vec_env(partial(make, run.env, run.reward), task.num_envs, run.seed, objectives=names)
    rewards = VecNormalizeObjectives(envs, norm_obs=not task.one_hot, gamma=task.settings["gamma"])
    settings = dict(task.settings)
    settings["learning_rate"] = partial(_falling, settings["learning_rate"])
    model = PamaPPO(
        "MlpPolicy",
        rewards,
        rule=run.rule,
        preference=run.preference,
        seed=run.seed,
        device="cpu",
        **settings,
    )
    model.learn(task.steps if run.steps is None else run.steps, callback=callback)
    return model


def _falling(start: float, remaining: float) -> float:
    return start * remaining


def evaluate(model: PamaPPO, run: Run) -> list[float]:
    """Mean return of each objective under the policy's most likely actions; episodes of their own seed."""
    task = run.task
    envs: VecEnv = make_vec_env(partial(make, run.env), task.episodes, seed=1_000_003 + run.seed)
    normalize: Callable[[Any], Any] = model.get_vec_normalize_env().normalize_obs
    observations = envs.reset()
    total = np.zeros((task.episodes, len(task.objectives)))
    alive, discount = np.ones(task.episodes, dtype=bool), 1.0
    while alive.any():
        actions, _ = model.predict(normalize(observations), deterministic=True)
        observations, _, dones, infos = envs.step(actions)
        total += discount * alive[:, None] * np.stack([info["vector_reward"] for info in infos])
        alive &= ~dones
        discount *= task.gamma_of_returns
    envs.close()
    return [float(x) for x in total.mean(0)]


def measure(run: Run) -> dict[str, Any]:
    """Trains and evaluates: one row of the results."""
    began = time.process_time()
    weights: list[list[float]] = []

    def note(local: dict[str, Any], _: Any) -> bool:
        combination = local["self"].combination
        if combination is not None and (not weights or weights[-1] is not combination.weights):
            weights.append(combination.weights)
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = train(run, note)
        returns = evaluate(model, run)
    late = torch.stack(weights[-max(1, len(weights) // 4) :]).mean(0).tolist() if weights else []
    row: dict[str, Any] = {"env": run.env, "method": run.method, "seed": run.seed}
    row["steps"] = model.num_timesteps
    row |= {f"return_{i + 1}": round(x, 4) for i, x in enumerate(returns)}
    row |= {f"weight_{i + 1}": round(w, 4) for i, w in enumerate(late) if run.reward is None}
    return row | {"cpu_s": round(time.process_time() - began, 1)}
