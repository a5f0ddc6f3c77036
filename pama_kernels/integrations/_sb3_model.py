"""Mixins that give a policy and a rollout buffer one value per objective, for `PamaPPO`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from torch import Tensor, nn


class ValueHeads:
    """Mixin for an `ActorCriticPolicy` (as first base class): the critic has one output per objective.

    Args:
        objectives: N, passed by `PamaPPO`.
    """

    def __init__(self, *arguments: Any, objectives: int = 1, **named: Any) -> None:
        self.objectives = objectives
        super().__init__(*arguments, **named)

    def _build(self: Any, lr_schedule: Any) -> None:
        super()._build(lr_schedule)  # type: ignore[misc]
        if self.objectives == 1:  # unchanged, with the same random numbers
            return
        self.value_net = nn.Linear(self.value_net.in_features, self.objectives)
        if self.ortho_init:
            self.value_net.apply(partial(self.init_weights, gain=1.0))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self: Any) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "objectives": self.objectives}  # type: ignore[misc]


class MlpValueHeads(ValueHeads, ActorCriticPolicy):
    pass


class CnnValueHeads(ValueHeads, ActorCriticCnnPolicy):
    pass


class MultiInputValueHeads(ValueHeads, MultiInputActorCriticPolicy):
    pass


class VectorRollout:
    """Mixin for a `RolloutBuffer` (as first base class): rewards, values, advantages and returns are
    (n_steps, n_envs, N).

    Advantages come from SB3's own GAE, called once per objective. To the last reward of a truncated episode
    SB3 adds the discounted value of the state that was reached, which is what `multi_objective_gae` does with
    `truncated` and `final_values`.
    """

    rewards: Any
    values: Any
    advantages: Any
    returns: Any

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._steps: list[tuple[Any, Any]] = []

    def add(
        self, obs: Any, action: Any, reward: Tensor, episode_start: Any, value: Tensor, log_prob: Tensor
    ) -> None:
        rewards = reward.cpu().numpy()
        self._steps.append((rewards, value.cpu().numpy()))
        super().add(obs, action, rewards[:, 0], episode_start, value[:, 0], log_prob)  # type: ignore[misc]

    def compute_returns_and_advantage(self, last_values: Tensor, dones: Any) -> None:
        rewards, values = (np.stack(column) for column in zip(*self._steps, strict=True))
        columns = []
        for i in range(rewards.shape[-1]):
            self.rewards, self.values = rewards[..., i], values[..., i]
            self.advantages = np.zeros_like(self.rewards)
            super().compute_returns_and_advantage(last_values[:, i], dones)  # type: ignore[misc]
            columns.append((self.advantages, self.returns))
        self.rewards, self.values = rewards, values
        self.advantages, self.returns = (np.stack(column, -1) for column in zip(*columns, strict=True))


class VectorRolloutBuffer(VectorRollout, RolloutBuffer):
    pass


class VectorDictRolloutBuffer(VectorRollout, DictRolloutBuffer):
    pass
