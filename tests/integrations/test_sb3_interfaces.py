"""PamaPPO through SB3's interfaces: logs, files, callbacks, wrappers and errors."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_setup import NAMES, SMALL, levers, trained, vectors

# isort: split
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import pama_kernels as pk
from pama_kernels.integrations.sb3 import (
    PamaPPO,
    ValueHeads,
    VecNormalizeObjectives,
    VectorReward,
    make_vec_env,
)


def test_logs(tmp_path: Path) -> None:
    formats = ["csv", "stdout"] + (["tensorboard"] if importlib.util.find_spec("tensorboard") else [])
    model = PamaPPO("MlpPolicy", vectors(), seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), formats))
    model.learn(256)
    model.logger.close()
    with open(tmp_path / "progress.csv", newline="", encoding="utf-8") as file:
        *_, row = csv.DictReader(file)
    for name in NAMES:
        for what in ("pama/weight", "pama/covariance", "pama/signal", "rollout/reward"):
            assert np.isfinite(float(row[f"{what}/{name}"])), what
    weights = [float(row[f"pama/weight/{name}"]) for name in NAMES]
    assert sum(weights) == pytest.approx(1)
    assert -1 <= float(row["pama/conflict/left~right"]) <= 1
    assert model.returns_buffer is not None
    means = np.mean(model.returns_buffer, 0)
    assert [float(row[f"rollout/reward/{name}"]) for name in NAMES] == pytest.approx(means.tolist())
    assert float(row["rollout/ep_rew_mean"]) == pytest.approx(means.sum(), rel=1e-4)


def test_long_names_are_left_out_of_the_printed_table() -> None:
    names = [f"a name that is longer than the table is wide, number {i}" for i in range(3)]
    env = make_vec_env(levers, 2, objectives=names)
    model = PamaPPO("MlpPolicy", env, verbose=1, **SMALL).learn(128)
    assert model.objective_names == names


def test_save_and_load(tmp_path: Path) -> None:
    model = trained("upgrad", preference=[1, 2, 3], momentum=0.9)
    model.save(tmp_path / "model")
    loaded = PamaPPO.load(tmp_path / "model", env=vectors(), device="cpu")
    assert (loaded.rule, loaded.preference, loaded.momentum) == ("upgrad", [1, 2, 3], 0.9)
    assert loaded.objective_names == NAMES
    for name, x in model.policy.state_dict().items():
        torch.testing.assert_close(loaded.policy.state_dict()[name], x, rtol=0, atol=0)
    assert loaded._pama.batches == model._pama.batches == 2
    torch.testing.assert_close(loaded._pama.running_statistics, model._pama.running_statistics)
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded._pama.batches == 3
    observation = np.zeros(3, np.float32)
    again = PamaPPO.load(tmp_path / "model", device="cpu")  # without an environment: to predict
    assert (
        again.predict(observation, deterministic=True)[0] == model.predict(observation, deterministic=True)[0]
    )
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    assert policy.predict_values(torch.zeros(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match="env: expected the objectives"):
        PamaPPO.load(tmp_path / "model", env=vectors(count=2), device="cpu")


def test_callbacks_evaluate_and_change_the_preference() -> None:
    class Schedule(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.model.preference = [1.0, float(self.num_timesteps > 0), 0.0]

    normalized = VecNormalizeObjectives(vectors()), VecNormalizeObjectives(vectors(), training=False)
    evaluation = EvalCallback(normalized[1], n_eval_episodes=4, eval_freq=32, verbose=0)
    model = PamaPPO("MlpPolicy", normalized[0], rule="fixed", seed=0, **SMALL)
    model.learn(64, callback=[Schedule(), evaluation])
    assert model.combination is not None
    assert model.combination.weights.tolist() == [1.0, 0.0, 0.0]
    model.learn(64, callback=Schedule(), reset_num_timesteps=False)
    assert model.combination.weights.tolist() == [0.5, 0.5, 0.0]
    assert np.isfinite(evaluation.last_mean_reward)
    assert (normalized[1].ret_rms.var != 1).all()  # those of the training environments
    assert np.isfinite(evaluate_policy(model, vectors(), n_eval_episodes=4)).all()


def test_each_objective_is_normalised_separately(tmp_path: Path) -> None:
    """As VecNormalize does on an environment with this one reward."""

    class Only(gymnasium.RewardWrapper):
        def __init__(self, env: Any, i: int) -> None:
            super().__init__(env)
            self.i = i

        def reward(self, reward: Any) -> float:
            return float(reward[self.i])

    settings: dict[str, Any] = {"gamma": 0.9, "clip_reward": 2.0}
    envs: list[Any] = [VecNormalizeObjectives(vectors(), **settings)]
    envs += [
        VecNormalize(sb3_make_vec_env(lambda i=i: Only(levers(), i), 2, seed=0), **settings) for i in range(3)
    ]
    seen = [env.reset() for env in envs]
    for t in range(50):
        actions = np.array([t % 4, (t // 3) % 4])
        (observation, total, dones, infos), *single = [env.step(actions) for env in envs]
        rewards = np.stack([info["vector_reward"] for info in infos])
        for i, (x, reward, *_) in enumerate(single):
            np.testing.assert_array_equal(x, observation)
            np.testing.assert_allclose(rewards[:, i], reward, rtol=1e-6)
        np.testing.assert_allclose(total, rewards.sum(1), rtol=1e-6)
        for info in (info for info, done in zip(infos, dones, strict=True) if done):
            assert info["episode"]["r"] == pytest.approx(info["vector_return"].sum(), rel=1e-4, abs=1e-5)
    assert len(seen) == 4
    envs[0].save(str(tmp_path / "normalize.pkl"))
    loaded = VecNormalizeObjectives.load(str(tmp_path / "normalize.pkl"), vectors())
    np.testing.assert_array_equal(loaded.ret_rms.var, envs[0].ret_rms.var)
    loaded.reset()
    assert loaded.step(np.array([0, 1]))[3][0]["vector_reward"].shape == (3,)


def test_dictionaries_of_observations_and_one_environment() -> None:
    model = PamaPPO("MultiInputPolicy", levers(mapping=True), **SMALL).learn(64)
    assert model.policy.value_net.out_features == 3
    assert model.objective_names == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")  # of its reward space
def test_mo_gymnasium_environment_by_id() -> None:
    pytest.importorskip("mo_gymnasium", reason="not installed (pip install 'pama-kernels[gym]')")
    model = PamaPPO("MlpPolicy", "deep-sea-treasure-v0", **SMALL).learn(32)
    assert model.policy.value_net.out_features == 2


@pytest.mark.slow
def test_environments_in_processes() -> None:
    env = make_vec_env(levers, 2, seed=0, objectives=NAMES, vec_env_cls=SubprocVecEnv)
    try:
        separate = trained(env=env)
    finally:
        env.close()
    together = trained(env=make_vec_env(levers, 2, seed=0, objectives=NAMES))
    for name, x in together.policy.state_dict().items():
        torch.testing.assert_close(separate.policy.state_dict()[name], x, rtol=0, atol=0)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: trained("mgda"), ValueError, "rule: expected one of"),
        (lambda: trained(3), TypeError, "rule: expected a rule"),
        (lambda: trained(preference=[1, 2]), ValueError, "preference: expected 3"),
        (lambda: trained(preference=[1, -1, 1]), ValueError, "preference: expected non-negative"),
        (lambda: trained(momentum=1.0), ValueError, "momentum: expected a number in"),
        (lambda: trained("softmin", momentum=0.5), ValueError, "momentum: needs a rule with one set"),
        (
            lambda: trained(lambda statistics: torch.ones(2)),
            ValueError,
            "weights of the rule: expected shape",
        ),
        (
            lambda: trained(env=DummyVecEnv([levers])),
            ValueError,
            "env: expected environments in VectorReward",
        ),
        (lambda: trained(env=VecNormalize(vectors())), ValueError, "env: expected VecNormalizeObjectives"),
        (lambda: VectorReward(Monitor(levers())), ValueError, "env: expected Monitor around VectorReward"),
        (lambda: VectorReward(levers(), ["a", "b"]), ValueError, "objectives: expected 3 different names"),
        (
            lambda: VectorReward(levers(), ["a", "b", "a"]),
            ValueError,
            "objectives: expected 3 different names",
        ),
        (lambda: PamaPPO(PPO.policy_aliases["MlpPolicy"], vectors()), ValueError, "policy: expected one of"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_scores_of_whitened_advantages_give_the_preference() -> None:
    with pytest.warns(UserWarning, match="rule: without Noon the scores"):
        model = trained(pk.Pama(bound="scores"), preference=[1, 1, 2])
    assert model.combination is not None
    assert model.combination.weights.tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_an_environment_whose_reward_has_another_size() -> None:
    env = VectorReward(gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda r: [r, r]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward: expected 1 numbers, one for each of \['0'\], got 2"):
        env.step(0)


def test_custom_policy_class() -> None:
    class Wide(ValueHeads, PPO.policy_aliases["MlpPolicy"]):  # type: ignore[misc]
        pass

    model = PamaPPO(Wide, vectors(), policy_kwargs={"net_arch": [16]}, **SMALL)
    assert model.policy.value_net.out_features == 3
    assert model.policy_kwargs == {"net_arch": [16]}


class _Broken(gymnasium.Wrapper):
    """Returns a reward that is not finite."""

    def __init__(self, value: float) -> None:
        super().__init__(levers())
        self.value = value

    def step(self, action: Any) -> Any:
        observation, reward, *others = self.env.step(action)
        return observation, np.array([reward[0], self.value, reward[2]]), *others


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite_are_named(value: float) -> None:
    env = make_vec_env(lambda: _Broken(value), 2, objectives=NAMES)
    with pytest.raises(ValueError, match=r"reward: expected finite numbers, .* wrong in \['right'\]"):
        trained(env=env)


def test_vector_reward_around_vector_reward_is_refused() -> None:
    for inner in (VectorReward(levers()), Monitor(VectorReward(levers()))):
        with pytest.raises(ValueError, match="env: expected an environment that is not in VectorReward"):
            VectorReward(inner)


def test_normalize_needs_vector_rewards() -> None:
    plain = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")])
    with pytest.raises(ValueError, match="env: expected environments in VectorReward"):
        VecNormalizeObjectives(plain)


def test_normalize_of_other_objectives_is_refused(tmp_path: Path) -> None:
    """Statistics that were saved with three objectives do not fit two."""
    env = VecNormalizeObjectives(vectors(count=3))
    trained(env=env)
    env.save(str(tmp_path / "normalize.pkl"))
    with pytest.raises(ValueError, match=r"venv: expected 3 objectives, .* got \['left', 'right'\]"):
        VecNormalizeObjectives.load(str(tmp_path / "normalize.pkl"), vectors(count=2))
    again = VecNormalizeObjectives.load(str(tmp_path / "normalize.pkl"), vectors(count=3))
    assert again.ret_rms.var.shape == (3,)
    trained(env=again)


@pytest.mark.parametrize("with_env", [False, True])
def test_loading_a_file_of_plain_ppo_is_an_error(with_env: bool, tmp_path: Path) -> None:
    PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "plain")
    env = make_vec_env("CartPole-v1") if with_env else None
    with pytest.raises(ValueError, match=r"policy: .* PPO saved has one value head: PPO\.load reads it"):
        PamaPPO.load(tmp_path / "plain", env=env)
