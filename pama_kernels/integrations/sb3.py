"""PAMA in Stable-Baselines3: PPO with several rewards; each is an objective with its own critic.

Environments, policies, callbacks, schedules, logging and file formats are those of SB3. The advantages of a
rollout get weights c from a rule; the policy's loss is sum_i c_i times the clipped surrogate of objective i.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pama_kernels._validate import Preference, preference_tensor
from pama_kernels.module import PamaLoss
from pama_kernels.rules import RuleLike, noon_of
from pama_kernels.statistics import objective_statistics
from pama_kernels.whiten import masked_whiten

from ._rollout import Combination, combine, make_rule, only_lengths, rollout_metrics
from ._sb3_envs import (
    VecNormalizeObjectives,
    VectorReward,
    VectorRewards,
    make_env,
    make_vec_env,
    objectives_of,
)

# isort: split
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from ._sb3_model import (
    CnnValueHeads,
    MlpValueHeads,
    MultiInputValueHeads,
    ValueHeads,
    VectorDictRolloutBuffer,
    VectorRollout,
    VectorRolloutBuffer,
)

__all__ = ["PamaPPO", "ValueHeads", "VecNormalizeObjectives", "VectorReward", "make_env", "make_vec_env"]

SHOWN_UP_TO = 30  # characters of a name in SB3's printed tables; equal abbreviations are an error there


class PamaPPO(PPO):
    """SB3's `PPO` for environments with vector rewards.

    Args:
        policy: as in `PPO`. A policy class of your own has `ValueHeads` before its other bases.
        env: a Gymnasium environment or its id, with vector or scalar rewards, or a VecEnv from
            `make_vec_env`.
        rule: how the objectives' weights are chosen: "pama", "upgrad", "fixed", "softmin", "paper", a rule of
            `pama_kernels` or a function of `ObjectiveStatistics`. None: the library's default. "softmin" and
            "paper" have weights for each step, the others one set per rollout.
        preference: N non-negative numbers, normalised; uniform by default. Read at every rollout, so that a
            callback may change `model.preference`.
        momentum: solve on a running mean of all rollouts' statistics, in [0, 1); rules per rollout only.
            Saved with the model.

    Attributes:
        objective_names: the names of the objectives, by which they are logged.
        combination: advantages, weights and statistics of the latest rollout; None before the first.

    All other arguments are those of `PPO`. With several objectives, each one's advantages are whitened over
    the rollout: the scale of a reward does not affect the policy. The value loss is the mean over objectives.
    `normalize_advantage` scales the combined advantages of a minibatch to deviation 1 (a root mean square of
    1 under Noon). With one objective the result is bitwise equal to SB3's PPO for every rule without Noon.

    Raises:
        TypeError, ValueError: a setting is wrong, or an environment, policy or buffer does not fit.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Algorithm 1; Schulman et al. 2017 (arXiv 1707.06347), PPO.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpPolicy": MlpValueHeads,
        "CnnPolicy": CnnValueHeads,
        "MultiInputPolicy": MultiInputValueHeads,
    }

    rollout_buffer_class: Any
    policy_kwargs: Any
    _pama: PamaLoss

    def __init__(
        self,
        policy: Any,
        env: Any,
        *others: Any,
        rule: RuleLike = None,
        preference: Preference = None,
        momentum: float = 0.0,
        _init_setup_model: bool = True,
        **named: Any,
    ) -> None:
        self.rule, self.preference, self.momentum = rule, preference, momentum
        self._pama = self._averaging()
        self.objective_names: list[str] = []
        self.combination: Combination | None = None
        self.returns_buffer: deque[Any] | None = None  # of episodes, as SB3's ep_info_buffer
        if isinstance(env, str):
            env = make_env(env)
        super().__init__(policy, env, *others, _init_setup_model=False, **named)
        if self.env is not None:
            self.objective_names = objectives_of(self.env)
        if _init_setup_model:
            self._setup_model()

    # --- set-up -----------------------------------------------------------------------------------------

    def _averaging(self) -> PamaLoss:
        """The rule and the running mean; the loss of the module is not used."""
        settings = {"weights_per": "token"} if isinstance(self.rule, str) and self.rule == "paper" else {}
        return PamaLoss(rule=make_rule(self.rule, settings), momentum=self.momentum)

    def _setup_model(self) -> None:
        self._pama = self._averaging()
        if self.env is not None:
            self._check_objectives(self.env)
        preference_tensor(self.preference, len(self.objective_names), torch.device("cpu"))
        if only_lengths(self._pama.rule) and len(self.objective_names) > 1:
            warnings.warn(
                "rule: without Noon the scores of a rollout's whitened advantages are all 0, so that the "
                "weights are the preference; use bound='gram'",
                stacklevel=3,
            )
        if not issubclass(self.policy_class, ValueHeads):
            plain = self.policy_class in PPO.policy_aliases.values()
            hint = "; a model that PPO saved has one value head: PPO.load reads it" if plain else ""
            raise ValueError(
                f"policy: expected one of {', '.join(self.policy_aliases)}, or a class with ValueHeads "
                f"before its other bases, got {self.policy_class.__name__}{hint}"
            )
        if self.rollout_buffer_class is None:
            several = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = VectorDictRolloutBuffer if several else VectorRolloutBuffer
        elif not issubclass(self.rollout_buffer_class, VectorRollout):
            raise ValueError(
                "rollout_buffer_class: expected None, or a class with VectorRollout before its other bases, "
                f"got {self.rollout_buffer_class.__name__}"
            )
        given = self.policy_kwargs
        self.policy_kwargs = {**given, "objectives": len(self.objective_names)}
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = given

    def _check_objectives(self, env: VecEnv) -> None:
        found = objectives_of(env)
        if found != self.objective_names:
            raise ValueError(f"env: expected the objectives {self.objective_names}, got {found}")

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if not isinstance(env, VecEnv) and not is_wrapped(env, VectorReward):
            env = VectorReward(env)
        return PPO._wrap_env(env, verbose, monitor_wrapper)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        env = self._wrap_env(env, self.verbose)
        self._check_objectives(env)
        super().set_env(env, force_reset)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "combination"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "_pama"], tensors

    # --- rollouts ---------------------------------------------------------------------------------------

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *others: Any
    ) -> Any:
        if self.returns_buffer is None or reset_num_timesteps:
            self.returns_buffer = deque(maxlen=self._stats_window_size)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *others)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: Any = None) -> None:
        super()._update_info_buffer(infos, dones)
        assert self.returns_buffer is not None
        self.returns_buffer.extend(info["vector_return"] for info in infos if "vector_return" in info)

    def collect_rollouts(self, env: VecEnv, callback: Any, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        vectors = VectorRewards(env, self.device)
        finished = super().collect_rollouts(vectors, callback, rollout_buffer, n_rollout_steps)
        if finished:
            self._weigh(rollout_buffer)
        return bool(finished)

    def _weigh(self, buffer: Any) -> None:
        """Solves the weights; the buffer's advantages become the terms c_i A_i (n_steps, n_envs, N)."""
        shape, rule = buffer.advantages.shape, self._pama.rule
        advantages = torch.as_tensor(buffer.advantages, dtype=torch.float64).reshape(-1, shape[-1])
        if shape[-1] > 1:
            advantages = masked_whiten(advantages)
        self.combination = combine(
            advantages,
            torch.ones(advantages.shape, dtype=torch.bool),
            torch.ones(len(advantages), dtype=torch.float64),
            objective_statistics(None, None, advantages, noon=noon_of(rule), pairs=True),
            rule,
            preference_tensor(self.preference, shape[-1], advantages.device),
            average=self._pama.update if self.momentum else None,
        )
        terms = self.combination.weights * (advantages.clamp(min=0) if noon_of(rule) else advantages)
        buffer.advantages = terms.reshape(shape).to(torch.float32).numpy()
        metrics = rollout_metrics(self.combination, dict(enumerate(self.objective_names)), rule)
        for name, value in metrics.items():
            self._record(name, value)

    def _record(self, name: str, value: float) -> None:
        long = len(name.partition("/")[2]) > SHOWN_UP_TO
        self.logger.record(name, value, exclude=("stdout", "log") if long else None)

    def dump_logs(self, iteration: int = 0) -> None:
        if self.returns_buffer:
            mean = np.mean(self.returns_buffer, axis=0)
            for name, value in zip(self.objective_names, mean, strict=True):
                self._record(f"rollout/reward/{name}", float(value))
        super().dump_logs(iteration)

    # --- update -----------------------------------------------------------------------------------------

    def train(self) -> None:
        """PPO's epochs over the rollout, as SB3 has them, with the terms of several objectives."""
        self.policy.set_training_mode(True)
        optimizer, progress = self.policy.optimizer, self._current_progress_remaining
        self._update_learning_rate(optimizer)
        clip_range = self.clip_range(progress)
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(progress)
        logged: dict[str, list[float]] = defaultdict(list)
        within = True
        for epoch in range(self.n_epochs):
            logged["approx_kl"].clear()  # SB3 logs that of the last epoch
            for data in self.rollout_buffer.get(self.batch_size):
                loss = self._loss(data, clip_range, clip_range_vf, logged)
                kl = logged["approx_kl"][-1]
                within = self.target_kl is None or kl <= 1.5 * self.target_kl
                if not within:
                    if self.verbose >= 1:
                        print(f"epoch {epoch} ends early: the KL divergence is {kl:.2f}")
                    break
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                optimizer.step()
            self._n_updates += 1
            if not within:
                break
        for name, values in logged.items():
            self.logger.record(f"train/{name}", np.mean(values))
        self._log_update(loss.item(), clip_range, clip_range_vf)

    def _loss(self, data: Any, clip_range: float, clip_range_vf: float | None, logged: Any) -> Tensor:
        """The loss of a minibatch of M steps: policy, entropy and N value heads."""
        discrete = isinstance(self.action_space, spaces.Discrete)
        actions = data.actions.long().flatten() if discrete else data.actions
        values, log_prob, entropy = self.policy.evaluate_actions(data.observations, actions)
        values, returns = values.flatten(), data.returns  # (M * N,)
        terms = self._normalized(data.advantages.reshape(len(log_prob), -1))
        positive, negative = terms.clamp(min=0).sum(1), terms.clamp(max=0).neg().sum(1)

        # A clipped surrogate is linear in the advantage for each sign, so two terms suffice for any number of
        # objectives.
        log_ratio = log_prob - data.old_log_prob
        ratio = torch.exp(log_ratio)
        clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
        gain = torch.min(positive * ratio, positive * clipped)
        policy_loss = -(gain - torch.max(negative * ratio, negative * clipped)).mean()

        if clip_range_vf is not None:
            values = data.old_values + (values - data.old_values).clamp(-clip_range_vf, clip_range_vf)
        value_loss = F.mse_loss(returns, values)
        entropy_loss = -torch.mean(-log_prob if entropy is None else entropy)
        with torch.no_grad():
            logged["approx_kl"].append(((ratio - 1) - log_ratio).mean().item())
            logged["clip_fraction"].append(((ratio - 1).abs() > clip_range).float().mean().item())
        logged["policy_gradient_loss"].append(policy_loss.item())
        logged["value_loss"].append(value_loss.item())
        logged["entropy_loss"].append(entropy_loss.item())
        loss: Tensor = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        return loss

    def _normalized(self, terms: Tensor) -> Tensor:
        """Normalises the terms c_i A_i (M, N) so that their sum over objectives has mean 0 and standard
        deviation 1."""
        if not self.normalize_advantage or len(terms) < 2:
            return terms
        combined = terms.sum(1)
        if noon_of(self._pama.rule):  # subtracting the mean would create negative advantages again
            return terms / (combined.square().mean().sqrt() + 1e-8)
        means = torch.stack([column.mean() for column in terms.unbind(1)])
        return (terms - means) / (combined.std() + 1e-8)

    def _log_update(self, loss: float, clip_range: float, clip_range_vf: float | None) -> None:
        n, buffer, record = len(self.objective_names), self.rollout_buffer, self.logger.record
        columns = zip(buffer.values.reshape(-1, n).T, buffer.returns.reshape(-1, n).T, strict=True)
        explained = [explained_variance(values, returns) for values, returns in columns]
        record("train/loss", loss)
        record("train/explained_variance", np.mean(explained))
        if n > 1:
            for name, value in zip(self.objective_names, explained, strict=True):
                self._record(f"train/explained_variance/{name}", value)
        if hasattr(self.policy, "log_std"):
            record("train/std", torch.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            record("train/clip_range_vf", clip_range_vf)

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 1,
        tb_log_name: str = "PamaPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> PamaPPO:
        super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        return self
