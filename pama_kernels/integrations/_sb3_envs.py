"""Passes vector rewards through Stable-Baselines3's environment interface, which has one scalar reward per
step.

The reward that SB3 sees is the sum of the objectives. The vector is passed as ``vector_reward`` in the step's
`info`, so that Monitor, VecEnvs, callbacks and `evaluate_policy` work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

TESTED = "2.9"  # releases of Stable-Baselines3, see docs/sb3.md


def _check_version() -> None:
    wanted = f"stable-baselines3 {TESTED}"
    try:
        found = version("stable-baselines3")
    except PackageNotFoundError:
        raise ImportError(
            f"pama_kernels.integrations.sb3: expected {wanted}, found none (pip install 'pama-kernels[sb3]')"
        ) from None
    if found.split(".")[:2] != TESTED.split("."):
        raise ImportError(f"pama_kernels.integrations.sb3: expected {wanted}, found {found}")


_check_version()

import gymnasium  # noqa: E402
from stable_baselines3.common.env_util import is_wrapped  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env as _make_vec_env  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import (  # noqa: E402
    VecEnv,
    VecEnvWrapper,
    VecNormalize,
    unwrap_vec_normalize,
)


class VectorReward(gymnasium.Wrapper):
    """An environment whose rewards are vectors, with their sum as its reward.

    Args:
        env: an environment of MO-Gymnasium, or any whose `step` returns a vector; a scalar reward is one
            objective.
        objectives: the names of the rewards, by which they are logged. None: "0", "1", ... Needed if the
            environment has no `reward_space`, which gives their number, and its reward is a vector.

    `info` gets ``vector_reward`` (N,) at each step and ``vector_return`` (N,), the undiscounted sum of the
    episode, at its last.
    """

    def __init__(self, env: Any, objectives: Sequence[str] | None = None) -> None:
        super().__init__(env)
        if is_wrapped(env, VectorReward):
            raise ValueError("env: expected an environment that is not in VectorReward yet, got one that is")
        try:
            count = int(np.prod(env.get_wrapper_attr("reward_space").shape))
        except AttributeError:
            count = 1 if objectives is None else len(objectives)
        self.objectives = _names(objectives, count)
        if count > 1 and is_wrapped(env, Monitor):
            raise ValueError(
                "env: expected Monitor around VectorReward, since it takes scalar rewards only, got it inside"
            )
        self._total = np.zeros(count)

    def reset(self, **named: Any) -> Any:
        self._total = np.zeros(len(self.objectives))
        return self.env.reset(**named)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        vector = np.array(reward, dtype=np.float64).reshape(-1)
        if len(vector) != len(self.objectives):
            raise ValueError(
                f"reward: expected {len(self.objectives)} numbers, one for each of {self.objectives}, got "
                f"{len(vector)}; name them by VectorReward(env, objectives=[...])"
            )
        if not np.isfinite(vector).all():
            wrong = [
                name for name, value in zip(self.objectives, vector, strict=True) if not np.isfinite(value)
            ]
            raise ValueError(f"reward: expected finite numbers, got {vector.tolist()}, wrong in {wrong}")
        self._total += vector
        info = {**info, "vector_reward": vector}
        if terminated or truncated:
            info["vector_return"] = self._total.copy()
        return observation, float(vector.sum()), terminated, truncated, info


def _names(objectives: Sequence[str] | None, count: int) -> list[str]:
    if objectives is None:
        return [str(i) for i in range(count)]
    names = [str(name) for name in objectives]
    if isinstance(objectives, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(f"objectives: expected {count} different names, got {objectives!r}")
    return names


def make_env(
    env_id: str | Callable[..., Any], objectives: Sequence[str] | None = None, **named: Any
) -> VectorReward:
    """One environment in `VectorReward`.

    Args:
        env_id: an id (MO-Gymnasium's are known where it is installed), or a function that makes the
            environment.
        objectives: as in `VectorReward`.

    All other arguments are passed to `gymnasium.make` or the function.
    """
    if not isinstance(env_id, str):
        return VectorReward(env_id(**named), objectives)
    if find_spec("mo_gymnasium"):
        import mo_gymnasium  # noqa: F401  (registers its environments)
    # The checker takes scalar rewards only.
    return VectorReward(gymnasium.make(env_id, **{"disable_env_checker": True, **named}), objectives)


def make_vec_env(
    env_id: str | Callable[..., Any],
    n_envs: int = 1,
    seed: int | None = None,
    *,
    objectives: Sequence[str] | None = None,
    **named: Any,
) -> VecEnv:
    """SB3's `make_vec_env` for vector rewards: each environment in `VectorReward`, that in Monitor.

    Args:
        env_id: as in `make_env`.
        n_envs: number of environments.
        seed: of the first environment; the others get the following numbers.
        objectives: as in `VectorReward`.

    All other arguments are passed to SB3's function (`env_kwargs`, `vec_env_cls` ...).
    """
    return _make_vec_env(partial(make_env, env_id, objectives), n_envs, seed, **named)


class VectorRewards(VecEnvWrapper):
    """Returns rewards (num_envs, N) instead of their sums: as an array, or as a tensor on a `device`.

    Where an episode is truncated, SB3's rollouts add a tensor of values to rewards[i], which a row of an
    array does not allow.
    """

    def __init__(self, venv: VecEnv, device: torch.device | None = None) -> None:
        super().__init__(venv)
        self.device = device

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, _, dones, infos = self.venv.step_wait()
        rewards = np.stack([info["vector_reward"] for info in infos]).astype(np.float32)
        tensor = None if self.device is None else torch.as_tensor(rewards, device=self.device)
        return observations, rewards if tensor is None else tensor, dones, infos


class VecNormalizeObjectives(VecNormalize):
    """`VecNormalize` that divides each objective by the running deviation of its own discounted return.

    Args:
        venv: from `make_vec_env`.

    All other arguments are those of `VecNormalize`: observations are normalised too, unless
    ``norm_obs=False``. What callbacks see as the reward is the sum of the scaled objectives; Monitor and
    ``vector_return`` keep the original ones.
    """

    returns: Any

    def __init__(self, venv: VecEnv, *others: Any, **named: Any) -> None:
        objectives_of(venv)
        super().__init__(VectorRewards(venv), *others, **named)

    def set_venv(self, venv: VecEnv) -> None:
        names, known = objectives_of(venv), np.shape(self.ret_rms.var)
        if known not in ((), (len(names),)):
            raise ValueError(
                f"venv: expected {known[0]} objectives, as the statistics were saved with, got {names}"
            )
        super().set_venv(VectorRewards(venv))

    def _update_reward(self, reward: Any) -> None:
        if self.returns.ndim == 1:  # the base class starts them, one for each environment
            self.returns = np.zeros(reward.shape)
        super()._update_reward(reward)

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = super().step_wait()
        infos = [{**info, "vector_reward": row} for info, row in zip(infos, rewards, strict=True)]
        return observations, rewards.sum(1), dones, infos


def objectives_of(env: VecEnv) -> list[str]:
    """The names of the objectives of environments in `VectorReward`."""
    if not env.has_attr("objectives"):
        raise ValueError(
            "env: expected environments in VectorReward, which make_vec_env of "
            "pama_kernels.integrations.sb3 puts them in, got others"
        )
    names, *others = env.get_attr("objectives")
    if any(other != names for other in others):
        raise ValueError(f"env: expected the same objectives in all environments, got {[names, *others]}")
    normalize = unwrap_vec_normalize(env)
    if normalize is not None and not isinstance(normalize, VecNormalizeObjectives) and normalize.norm_reward:
        raise ValueError(
            "env: expected VecNormalizeObjectives, or VecNormalize with norm_reward=False, got VecNormalize, "
            "which scales the sum of the objectives only"
        )
    return list(names)
