"""The PPO example against a plain PPO written here, its runs, and the fronts that it is measured by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples"
pytest.importorskip("mo_gymnasium", reason="mo-gymnasium is not installed (pip install 'pama-kernels[gym]')")
sys.path.insert(0, str(EXAMPLES))
import _fronts  # noqa: E402
import mo_gymnasium_ppo as ppo  # noqa: E402

sys.path.remove(str(EXAMPLES))

TREASURE, RESERVOIR = "deep-sea-treasure-v0", "water-reservoir-v0"
SMALL: dict[str, Any] = {"num_envs": 4, "rollout": 128, "hidden": 16, "eval_episodes": 8}


@pytest.fixture(params=[TREASURE, RESERVOIR])
def sampled(request: pytest.FixtureRequest) -> Iterator[tuple[ppo.Agent, ppo.Rollout, ppo.Settings]]:
    """An agent and 4 x 128 steps of it: some episodes terminate or are truncated within."""
    s = ppo.settings_for(request.param, **SMALL)
    envs = ppo.make_envs(s.env, s.num_envs)
    task = ppo.task_of(s.env)
    agent = ppo.Agent(envs, task, s.hidden)
    agent.standardise(ppo.Sampler(envs, agent, task, seed=1)(50).observations.flatten(0, 1))
    yield agent, ppo.Sampler(envs, agent, task, seed=1)(s.rollout), s
    envs.close()


# --- rollout -------------------------------------------------------------------------------------


def test_resets_are_marked(sampled: tuple[ppo.Agent, ppo.Rollout, ppo.Settings]) -> None:
    agent, r, s = sampled
    done = r.terminated | r.truncated
    assert (r.terminated if s.env == TREASURE else r.truncated).any()
    torch.testing.assert_close(r.valid[:, 1:], ~done[:, :-1])
    assert r.valid[:, 0].all()
    assert (r.rewards[~r.valid] == 0).all()
    # The step of a reset starts from the episode's last observation: its value is what follows the last step.
    torch.testing.assert_close(r.next_values[:, :-1], agent.values(r.observations).detach()[:, 1:])


def plain_gae(r: ppo.Rollout, gamma: float, lam: float) -> Tensor:
    """One environment, objective and step after the other, backwards; 0 where an environment was reset."""
    out = torch.zeros_like(r.values)
    envs, steps, objectives = r.values.shape
    for e in range(envs):
        for i in range(objectives):
            running = 0.0
            for t in reversed(range(steps)):
                if not r.valid[e, t]:
                    continue
                follows = 0.0 if r.terminated[e, t] else float(r.next_values[e, t, i])
                if r.terminated[e, t] or r.truncated[e, t]:
                    running = 0.0
                delta = float(r.rewards[e, t, i]) + gamma * follows - float(r.values[e, t, i])
                running = delta + gamma * lam * running
                out[e, t, i] = running
    return out


def in_float64(r: ppo.Rollout) -> ppo.Rollout:
    return replace(r, **{k: x.double() for k, x in vars(r).items() if x.is_floating_point()})


def test_advantages_are_those_of_a_plain_loop(sampled: tuple[Any, ppo.Rollout, ppo.Settings]) -> None:
    _, r, s = sampled
    r = in_float64(r)
    # Either end at once: the last step is done in one environment, and the reset of another.
    r.truncated[0, -1], r.terminated[1, -2:], r.valid[1, -1] = True, torch.tensor([True, False]), False
    r.rewards += torch.randn_like(r.rewards) * r.valid.unsqueeze(-1)
    advantages, returns = ppo.advantages_of(r, s.gamma, s.lam)
    torch.testing.assert_close(advantages, plain_gae(r, s.gamma, s.lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, (advantages + r.values) * r.valid.unsqueeze(-1))


# --- update --------------------------------------------------------------------------------------


def plain_update(
    agent: ppo.Agent, optimiser: torch.optim.Optimizer, r: ppo.Rollout, s: ppo.Settings, noon: bool
) -> None:
    """PPO with one reward: clipped surrogate, squared error of the value, entropy."""
    valid = r.valid.flatten()
    rows_of = {k: x.flatten(0, 1) for k, x in vars(r).items()}
    gae = plain_gae(r, s.gamma, s.lam).flatten()
    returns = gae + r.values.flatten()
    advantages = (gae - gae[valid].mean()) / gae[valid].std(correction=int(s.rule == "fixed"))
    if noon:
        advantages = advantages.clamp(min=0)
    for _ in range(s.epochs):
        for chunk in torch.randperm(len(valid)).chunk(s.minibatches):
            rows = chunk[valid[chunk]]
            policy = agent.policy(rows_of["observations"][rows])
            ratio = (policy.log_prob(rows_of["actions"][rows]) - rows_of["logprobs"][rows]).exp()
            clipped = ratio.clamp(1 - s.clip_range, 1 + s.clip_range)
            surrogate = torch.minimum(ratio * advantages[rows], clipped * advantages[rows])
            values = agent.values(rows_of["observations"][rows]).squeeze(-1)
            loss = -surrogate.mean() + s.value_coef * (values - returns[rows]).square().mean()
            loss = loss - s.entropy_coef * policy.entropy().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), s.max_grad_norm)
            optimiser.step()


@pytest.mark.parametrize(
    ("options", "noon"),
    [
        ({"rule": "fixed"}, False),
        ({"rule": "pama"}, False),
        ({"rule": "upgrad"}, False),
        ({"rule": "paper"}, True),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_one_objective_is_plain_ppo(
    sampled: tuple[ppo.Agent, ppo.Rollout, ppo.Settings], options: dict[str, Any], noon: bool
) -> None:
    """The parameters after 8 steps are the same as those of the PPO above; SGD, so that gradients show."""
    agent, r, s = sampled
    s = replace(s, epochs=2, minibatches=4, entropy_coef=0.01, **options)
    agent.critic[-1] = nn.Linear(s.hidden, 1)
    agent.double()
    agent.mean, agent.std = agent.mean.double(), agent.std.double()
    r = in_float64(r)
    r = replace(r, rewards=r.rewards[..., :1], values=r.values[..., :1], next_values=r.next_values[..., :1])
    before = {k: x.clone() for k, x in agent.state_dict().items()}
    reached = []
    for plain in (True, False):
        agent.load_state_dict(before)
        torch.manual_seed(7)
        optimiser = torch.optim.SGD(agent.parameters(), lr=0.3)
        if plain:
            plain_update(agent, optimiser, r, s, noon)
        else:
            ppo.update(agent, optimiser, r, s, ppo.weighting_of(s, 1))
        reached.append({k: x.clone() for k, x in agent.state_dict().items()})
    moved = max(float((reached[0][k] - before[k]).abs().max()) for k in before if k.startswith("actor"))
    assert moved > 1e-3
    # 1e-8 is added to the deviation of the advantages, about 1.
    torch.testing.assert_close(reached[1], reached[0], rtol=1e-6, atol=1e-7)


def test_fixed_weights_are_ppo_on_the_weighted_reward(
    sampled: tuple[ppo.Agent, ppo.Rollout, ppo.Settings],
) -> None:
    """The combined advantage is the standardised GAE of the weighted reward and the weighted value."""
    _, r, s = sampled
    s = replace(s, rule="fixed", preference=(0.7, 0.3))
    r, w = in_float64(r), torch.tensor([0.7, 0.3], dtype=torch.float64)
    valid = r.valid.flatten()
    advantages = ppo.normalise(ppo.advantages_of(r, s.gamma, s.lam)[0].flatten(0, 1), valid, s)
    weighted = {k: (getattr(r, k) @ w).unsqueeze(-1) for k in ("rewards", "values", "next_values")}
    scalar = plain_gae(replace(r, **weighted), s.gamma, s.lam).flatten()[valid]
    torch.testing.assert_close((advantages @ w)[valid], (scalar - scalar.mean()) / scalar.std())


# --- runs ----------------------------------------------------------------------------------------


def test_runs_learn_and_repeat() -> None:
    s = ppo.settings_for(TREASURE, steps=6_000, eval_episodes=64)
    start = ppo.train(replace(s, steps=1, learning_rate=0.0))[0]
    scale = torch.tensor(ppo.task_of(TREASURE).scale)

    def score(agent: ppo.Agent) -> float:
        return float((torch.tensor(ppo.evaluate(agent, s, sampled=True)) / scale).mean())

    for options in ({"rule": "fixed"}, {"rule": "pama"}, {"rule": "paper"}):
        agent, weights = ppo.train(replace(s, **options))
        assert score(agent) > score(start) + 0.05, options
    again, same = ppo.train(replace(s, **options))
    assert same == weights
    torch.testing.assert_close(dict(again.state_dict()), dict(agent.state_dict()), rtol=0, atol=0)
    assert ppo.train(replace(s, seed=1, **options))[1] != weights


@pytest.mark.parametrize("options", [{"rule": "upgrad"}, {"preference": (1.0, 3.0)}, {"rule": "fixed"}])
def test_continuous_run(options: dict[str, Any]) -> None:
    s = ppo.settings_for(RESERVOIR, steps=1_000, **(SMALL | options))
    reports: list[dict[str, str]] = []
    agent, weights = ppo.train(s, reports.append)
    assert len(weights) == len(reports) == ppo.updates_of(s)
    assert torch.isfinite(torch.tensor([weights[-1], ppo.evaluate(agent, s)])).all()


def test_an_environment_that_the_example_does_not_know() -> None:
    agent, weights = ppo.train(ppo.settings_for("fruit-tree-v0", steps=512, **SMALL))
    assert len(weights[0]) == 6
    assert agent.critic[-1].out_features == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preference", "1"], "preference: expected 2 numbers"),
        (["--steps", "0"], "steps: expected a positive number, got 0"),
        (["--minibatches", "9999"], "minibatches: expected at most"),
        (["--env", "no-such-sea-v0"], "no-such-sea"),
        (["--env", "CartPole-v1"], "expected an environment of MO-Gymnasium"),
        (["--rule", "mgda"], "invalid choice"),
        (["--seed", "-1"], "seed: expected a number of at least 0"),
        (["--learning-rate", "nan"], "learning_rate: expected a number of at least 0"),
        (["--gamma", "1.5"], "gamma: expected a number in [0, 1]"),
        (["--preference", "-1", "2"], "preference: expected non-negative"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ppo.parse(arguments)
    assert message in capsys.readouterr().err


def test_options_reach_the_settings() -> None:
    s = ppo.parse(
        ["--env", RESERVOIR, "--preference", "1", "3", "--rule", "upgrad", "--lam", "0.5", "--seed", "0"]
    )
    assert s == ppo.settings_for(RESERVOIR, preference=(1.0, 3.0), rule="upgrad", lam=0.5)
    assert (s.gamma, s.steps) == (0.9, 60_000)


# --- reference fronts ----------------------------------------------------------------------------


def test_measures() -> None:
    front = torch.tensor([[0.0, 2.0], [1.0, 1.5], [2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(_fronts.nondominated(torch.cat([front, front, front - 0.1])), front)
    assert _fronts.distance(front, front).max() < 1e-12
    assert _fronts.distance(front, [[1.5, 0.75]]).item() < 1e-12
    assert _fronts.hypervolume(front, front) == pytest.approx(1)
    assert _fronts.hypervolume(front, front[1:2]) == pytest.approx(
        0.6 * 0.85 / (0.1 * 1.1 + 0.5 * 0.85 + 0.5 * 0.1)
    )
    assert _fronts.hypervolume(front, [[-5.0, 3.0]]) == 0


@pytest.mark.parametrize("env", [TREASURE, RESERVOIR])
def test_fronts_are_concave(env: str) -> None:
    front = _fronts.FRONTS[env](ppo.settings_for(env).gamma)
    slopes = front.diff(dim=0)[:, 1] / front.diff(dim=0)[:, 0]
    assert (slopes < 0).all()
    assert len(_fronts.nondominated(front)) == len(front)
    if env == RESERVOIR:  # solutions of weighted problems: on their convex hull
        assert (slopes.diff() <= 1e-9).all()


def test_the_reservoirs_front_is_reached_by_its_policy() -> None:
    """Without regard to supply everything is released: simulated, within four standard errors."""
    s = ppo.settings_for(RESERVOIR)
    envs = ppo.make_envs(RESERVOIR, 64)
    observation, _ = envs.reset(seed=0)
    total = torch.zeros(64, 2, dtype=torch.float64)
    for t in range(100):
        observation, rewards, *_ = envs.step(observation)
        total += s.gamma**t * torch.as_tensor(rewards)
    envs.close()
    error = total.std(0) / 8
    # The grid of whole levels: half a unit in each of the 1 / (1 - gamma) steps that count, at the most.
    end = _fronts.FRONTS[RESERVOIR](s.gamma)[-1]
    assert ((total.mean(0) - end).abs() < 4 * error).all(), (total.mean(0), end, error)
