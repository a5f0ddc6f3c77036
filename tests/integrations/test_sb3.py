"""PamaPPO against SB3's PPO, against the library's own functions, and through SB3's interfaces."""

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
from torch import Tensor

pytest.importorskip("stable_baselines3", reason="not installed (pip install 'pama-kernels[sb3]')")
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

NAMES = ["left", "right", "cost"]
SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "device": "cpu"}


class Levers(gymnasium.Env):
    """Four levers with rewards for two objectives; `cost` for a third. Some episodes end by themselves."""

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


# --- one objective -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "rule", "settings"),
    [
        ("CartPole-v1", "pama", {}),
        ("CartPole-v1", "softmin", {"normalize_advantage": False, "max_grad_norm": 0.1}),
        ("Pendulum-v1", "upgrad", {"ent_coef": 0.01, "learning_rate": lambda left: 1e-3 * left}),
        (
            "Pendulum-v1",
            "fixed",
            {"use_sde": True, "clip_range_vf": 0.2, "target_kl": 1e-3, "n_epochs": 4, "gae_lambda": 0.8},
        ),
    ],
)
def test_one_objective_is_sb3s_ppo_bit_for_bit(env: str, rule: str, settings: dict[str, Any]) -> None:
    """The same seed, ten updates, rewards and observations scaled; Pendulum's episodes are truncated."""
    settings = {"n_steps": 64, "batch_size": 64, "n_epochs": 2, "seed": 3, "device": "cpu", **settings}
    theirs = PPO("MlpPolicy", VecNormalize(sb3_make_vec_env(env, 2, seed=3)), **settings)
    start = {k: x.clone() for k, x in theirs.policy.state_dict().items()}
    theirs.learn(10 * 128)
    ours = PamaPPO("MlpPolicy", VecNormalizeObjectives(make_vec_env(env, 2, seed=3)), rule=rule, **settings)
    ours.learn(10 * 128)
    expected, found = theirs.policy.state_dict(), ours.policy.state_dict()
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)
        if name.startswith("mlp_extractor"):
            assert not torch.equal(x, start[name])
    logged = {name: value for name, value in theirs.logger.name_to_value.items() if name.startswith("train/")}
    # The loss of an epoch that target_kl ends is logged by both; means of the same numbers.
    assert {name: float(ours.logger.name_to_value[name]) for name in logged} == pytest.approx(
        logged, rel=1e-5
    )


# --- rollouts ------------------------------------------------------------------------------------


class Recorder(BaseCallback):
    """What a rollout saw, and the advantages before they were combined."""

    def _on_rollout_start(self) -> None:
        self.steps: list[tuple[Any, Any]] = []

    def _on_step(self) -> bool:
        self.steps.append((self.locals["infos"], self.locals["dones"]))
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.locals["rollout_buffer"]
        self.advantages, self.returns = buffer.advantages.copy(), buffer.returns.copy()
        self.values = buffer.values.copy()
        observation = torch.as_tensor(self.locals["new_obs"])
        self.last_values = self.model.policy.predict_values(observation).detach()


def test_advantages_are_those_of_multi_objective_gae() -> None:
    """Episodes that end and episodes that are truncated; values of the states reached by truncation."""
    record = Recorder()
    model = PamaPPO("MlpPolicy", vectors(), seed=0, gamma=0.9, gae_lambda=0.8, **SMALL)
    model.learn(64, callback=record)
    shape = record.advantages.shape
    assert shape == (32, 2, 3)
    rewards, final = torch.zeros(shape), torch.zeros(shape)
    dones, truncated = torch.zeros(shape[:2]), torch.zeros(shape[:2])
    model = PamaPPO("MlpPolicy", vectors(), seed=0, gamma=0.9, gae_lambda=0.8, **SMALL)  # as it was then
    for t, (infos, done) in enumerate(record.steps):
        for i, info in enumerate(infos):
            rewards[t, i] = torch.as_tensor(info["vector_reward"])
            cut = bool(info["TimeLimit.truncated"])
            truncated[t, i], dones[t, i] = cut, bool(done[i]) and not cut
            if cut:
                seen = torch.as_tensor(info["terminal_observation"])[None]
                final[t, i] = model.policy.predict_values(seen).detach()[0]
    assert dones.any()
    assert truncated.any()
    expected = pk.multi_objective_gae(
        rewards.transpose(0, 1),
        torch.as_tensor(record.values).transpose(0, 1),
        gamma=0.9,
        lam=0.8,
        dones=dones.T,
        truncated=truncated.T,
        last_values=record.last_values,
        final_values=final.transpose(0, 1),
    )
    for found, x in zip((record.advantages, record.returns), expected, strict=True):
        # SB3's GAE adds up in float32.
        torch.testing.assert_close(torch.as_tensor(found), x.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [None, "pama", "upgrad", "fixed", "softmin", "paper", pk.Pama(regularization=1.0)]
)
def test_terms_are_weighted_whitened_advantages(rule: Any) -> None:
    record = Recorder()
    preference = [1.0, 2.0, 1.0]
    model = PamaPPO("MlpPolicy", vectors(), rule=rule, preference=preference, seed=0, **SMALL)
    model.learn(64, callback=record)
    advantages = pk.masked_whiten(torch.as_tensor(record.advantages).double().reshape(-1, 3))
    own = {"paper": pk.Pama.paper("sequence")}.get(rule, rule) if isinstance(rule, str) else rule
    expected = pk.combine_advantages(advantages, rule=own, preference=preference)
    assert model.combination is not None
    torch.testing.assert_close(model.combination.weights, expected.weights, rtol=1e-9, atol=1e-12)
    terms = torch.as_tensor(model.rollout_buffer.advantages).reshape(32 * 2, 3)  # (n_envs, n_steps) rows
    combined = expected.advantages.reshape(32, 2).T.reshape(-1)
    torch.testing.assert_close(terms.sum(1), combined.float(), rtol=1e-5, atol=1e-5)  # stored in float32
    assert (terms >= 0).all() == (rule == "paper")


def test_two_objectives_get_equal_weights() -> None:
    for rule in ("pama", "upgrad"):
        model = trained(rule, env=vectors(count=2))
        assert model.combination is not None
        torch.testing.assert_close(model.combination.weights, torch.full((2,), 0.5, dtype=torch.float64))


def test_a_function_is_a_rule() -> None:
    model = trained(lambda statistics: torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    assert model.combination is not None
    assert model.combination.weights.tolist() == [0.2, 0.3, 0.5]


# --- update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["pama", "paper"])
def test_the_policy_loss_is_pama_loss(rule: str) -> None:
    """Also where the policy has moved out of the clip range and signs disagree."""
    model = trained(rule, ent_coef=0.0, vf_coef=0.0, normalize_advantage=False)
    with torch.no_grad():
        model.policy.action_net.weight.add_(torch.randn(model.policy.action_net.weight.shape) * 0.3)
    data = next(model.rollout_buffer.get(64))
    terms = data.advantages.reshape(64, 3)
    _, logprobs, _ = model.policy.evaluate_actions(data.observations, data.actions.long().flatten())
    ratio = (logprobs - data.old_log_prob).exp()
    assert ((ratio - 1).abs() > 0.2).float().mean() > 0.2
    expected = pk.pama_loss(logprobs, data.old_log_prob, terms, weights=torch.ones(3), clip_range=0.2).loss
    parameters = list(model.policy.action_net.parameters())
    logged: dict[str, list[float]] = {k: [] for k in ("approx_kl", "clip_fraction", "policy_gradient_loss")}
    logged |= {"value_loss": [], "entropy_loss": []}
    found = model._loss(data, 0.2, None, logged)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, parameters) for x in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)  # sums over 64 in float32
    if rule == "pama":
        assert ((terms > 0).any(1) & (terms < 0).any(1)).any()


def test_normalisation_is_that_of_the_combined_advantage() -> None:
    model = trained("upgrad")
    data = next(model.rollout_buffer.get(32))
    terms = data.advantages.reshape(32, 3)
    combined = model._normalized(terms).sum(1)
    expected = terms.sum(1) - terms.sum(1).mean()
    torch.testing.assert_close(combined, expected / terms.sum(1).std(), rtol=1e-5, atol=1e-5)
    noon = trained(pk.Pama(bound="scores", noon=True))
    scaled = noon._normalized(next(noon.rollout_buffer.get(32)).advantages.reshape(32, 3))
    assert (scaled >= 0).all()
    assert float(scaled.sum(1).square().mean()) == pytest.approx(1, rel=1e-5)


def test_scales_of_rewards_do_not_matter_to_the_weights() -> None:
    """Whitening: all rewards of an objective a thousand times as large."""

    class Larger(gymnasium.RewardWrapper):
        def reward(self, reward: Any) -> Any:
            return reward * np.array([1.0, 1000.0, 1.0])

    def first_weights(wrap: Callable[[Any], Any]) -> Tensor:
        env = make_vec_env(lambda: wrap(levers()), 2, seed=0)
        model = PamaPPO("MlpPolicy", env, seed=0, **SMALL)
        torch.nn.init.zeros_(model.policy.value_net.weight)
        model.learn(64)
        assert model.combination is not None
        return model.combination.weights

    torch.testing.assert_close(first_weights(Larger), first_weights(lambda env: env), rtol=1e-5, atol=1e-6)


def test_learns_what_the_preference_says() -> None:
    """By the fixed rule with all weight on one objective its lever; by the default the one good for both."""

    def lever(**named: Any) -> int:
        env = VecNormalizeObjectives(vectors(8, 2, limit=4), norm_obs=False)
        settings = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-2, "device": "cpu"}
        model = PamaPPO("MlpPolicy", env, seed=0, **settings, **named).learn(4096)
        actions, _ = model.predict(np.random.default_rng(0).uniform(-1, 1, (64, 3)), deterministic=True)
        return int(np.bincount(actions, minlength=4).argmax())

    assert lever(rule="fixed", preference=[1, 0]) == 0
    assert lever() == 2


# --- SB3's interfaces ----------------------------------------------------------------------------


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


def test_long_names_do_not_stop_the_table_on_the_screen() -> None:
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


def test_normalisation_of_each_objective_by_itself(tmp_path: Path) -> None:
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
def test_mo_gymnasium_by_its_name() -> None:
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


def test_scores_of_whitened_advantages_decide_nothing() -> None:
    with pytest.warns(UserWarning, match="rule: without Noon the scores"):
        model = trained(pk.Pama(bound="scores"), preference=[1, 1, 2])
    assert model.combination is not None
    assert model.combination.weights.tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_an_environment_whose_reward_has_another_size() -> None:
    env = VectorReward(gymnasium.wrappers.TransformReward(gymnasium.make("CartPole-v1"), lambda r: [r, r]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"reward: expected 1 numbers, one for each of \['0'\], got 2"):
        env.step(0)


def test_a_policy_of_ones_own() -> None:
    class Wide(ValueHeads, PPO.policy_aliases["MlpPolicy"]):  # type: ignore[misc]
        pass

    model = PamaPPO(Wide, vectors(), policy_kwargs={"net_arch": [16]}, **SMALL)
    assert model.policy.value_net.out_features == 3
    assert model.policy_kwargs == {"net_arch": [16]}
