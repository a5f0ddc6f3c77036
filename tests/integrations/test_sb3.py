"""PamaPPO against SB3's PPO, and against the library's own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_setup import SMALL, levers, trained, vectors
from torch import Tensor

# isort: split
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import pama_kernels as pk
from pama_kernels.integrations.sb3 import PamaPPO, VecNormalizeObjectives, make_vec_env

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
    """Records the inputs of a rollout, and the advantages before they are combined."""

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


def test_weights_are_invariant_to_reward_scales() -> None:
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


def test_policy_follows_the_preference() -> None:
    """By the fixed rule with all weight on one objective its lever; by the default the one good for both."""

    def lever(**named: Any) -> int:
        env = VecNormalizeObjectives(vectors(8, 2, limit=4), norm_obs=False)
        settings = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-2, "device": "cpu"}
        model = PamaPPO("MlpPolicy", env, seed=0, **settings, **named).learn(4096)
        actions, _ = model.predict(np.random.default_rng(0).uniform(-1, 1, (64, 3)), deterministic=True)
        return int(np.bincount(actions, minlength=4).argmax())

    assert lever(rule="fixed", preference=[1, 0]) == 0
    assert lever() == 2
