"""PPO with vector rewards on MO-Gymnasium, in one file.

The environment's rewards are vectors, the critic has one head per objective, and three calls of the
library are all that is multi-objective about the rest:

    multi_objective_gae    rewards and values (num_envs, T, N) to advantages, for each head by itself
    combine_advantages     the rule's weights, one set for the rollout
    pama_loss              flat advantages (M, N) beside log-probabilities (M,)

`--rule fixed` is ordinary PPO on the weighted reward, for comparison. PAMA looks for one point where no
objective can gain to first order without another losing; it does not trace a front. Which point,
`--preference` and `--regularization` decide along with the rewards. `mo_gymnasium_compare.py` runs both
beside known fronts.

    python examples/mo_gymnasium_ppo.py                                         # deep-sea-treasure-v0
    python examples/mo_gymnasium_ppo.py --env water-reservoir-v0 --preference 1 3    # continuous actions
    python examples/mo_gymnasium_ppo.py --rule fixed --preference 0.7 0.3
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gymnasium
import mo_gymnasium
import torch
from gymnasium.vector import AutoresetMode
from mo_gymnasium.wrappers.vector import MOSyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm

import pama_kernels as pk

gymnasium.logger.min_level = gymnasium.logger.ERROR  # no word about every space with bounds in float64


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of one run."""

    env: str = "deep-sea-treasure-v0"
    rule: str = "pama"
    preference: tuple[float, ...] | None = None
    regularization: float = 0.1  # of rule "pama"
    seed: int = 0
    steps: int = 100_000  # of all environments together
    num_envs: int = 16
    rollout: int = 64  # steps of each environment between two updates
    epochs: int = 4
    minibatches: int = 4
    hidden: int = 64
    learning_rate: float = 3e-3  # falls to 0 in a straight line
    gamma: float = 0.99
    lam: float = 0.95
    clip_range: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    eval_episodes: int = 128

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.type == "float" or entry.name == "seed":
                if not 0 <= value < math.inf:
                    raise ValueError(f"{entry.name}: expected a number of at least 0, got {value}")
            elif entry.type == "int" and value < 1:
                raise ValueError(f"{entry.name}: expected a positive number, got {value}")
        if self.minibatches > self.num_envs * self.rollout:
            raise ValueError(
                f"minibatches: expected at most num_envs * rollout = {self.num_envs * self.rollout}, "
                f"got {self.minibatches}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")


CHOICES = {"rule": ("pama", "upgrad", "paper", "fixed")}  # paper: the paper's rule, with weights per token


@dataclass(frozen=True)
class Task:
    """An environment that the example knows."""

    objectives: tuple[str, ...]
    scale: tuple[float, ...]  # rewards are divided by it
    action_bounds: tuple[float, float] | None = None  # where the action space itself has none
    settings: dict[str, Any] = field(default_factory=dict)


# Scales are about as wide as the fronts, so that equal weights are no extreme.
TASKS = {
    "deep-sea-treasure-v0": Task(("treasure", "time"), (20.0, 20.0)),
    # What is released now matters for a few steps only, hence the smaller gamma.
    "water-reservoir-v0": Task(
        ("flooding", "supply"),
        (30.0, 10.0),
        (0.0, 100.0),
        {"steps": 60_000, "gamma": 0.9, "lam": 0.9, "epochs": 10, "entropy_coef": 0.0},
    ),
}


def task_of(env: str) -> Task:
    """From the table; any other environment gets numbered objectives on their own scale."""
    if env in TASKS:
        return TASKS[env]
    one = mo_gymnasium.make(env)
    if not hasattr(one.unwrapped, "reward_space"):
        raise ValueError(
            f"env: expected an environment of MO-Gymnasium, whose rewards are vectors, got {env}"
        )
    size = one.unwrapped.reward_space.shape[0]
    one.close()
    return Task(tuple(f"objective {i + 1}" for i in range(size)), (1.0,) * size)


def make_envs(env: str, count: int) -> MOSyncVectorEnv:
    envs = MOSyncVectorEnv([lambda: mo_gymnasium.make(env)] * count)
    mode = envs.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.NEXT_STEP:  # `advantages_of` builds on it
        raise RuntimeError(f"expected environments that reset in the step after the last, got {mode}")
    return envs


# --- agent ---------------------------------------------------------------------------------------


def perceptron(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """A policy for discrete or continuous actions, and a critic with one head per objective.

    Integer observations are encoded one-hot, others standardised. Continuous actions are normal with a mean
    in [-1, 1]; -1 and 1 stand for the bounds of the action space.
    """

    def __init__(self, envs: MOSyncVectorEnv, task: Task, hidden: int) -> None:
        super().__init__()
        observations, actions = envs.single_observation_space, envs.single_action_space
        if not isinstance(observations, gymnasium.spaces.Box):
            raise ValueError(f"env: expected observations in a box, got {observations}")
        self.levels: list[int] = []
        if observations.dtype.kind in "iu":
            self.low = torch.as_tensor(observations.low).long().flatten()
            self.levels = (torch.as_tensor(observations.high).long().flatten() - self.low + 1).tolist()
        inputs = sum(self.levels) if self.levels else math.prod(observations.shape)
        self.mean, self.std = torch.zeros(inputs), torch.ones(inputs)
        self.discrete = isinstance(actions, gymnasium.spaces.Discrete)
        if self.discrete:
            outputs = int(actions.n)
        elif isinstance(actions, gymnasium.spaces.Box):
            outputs = math.prod(actions.shape)
            low, high = task.action_bounds or (actions.low, actions.high)
            self.low_action, self.high_action = torch.as_tensor(low), torch.as_tensor(high)
            if not torch.isfinite(self.high_action - self.low_action).all():
                raise ValueError(f"env: expected bounded actions, got {actions}")
            self.log_std = nn.Parameter(torch.full((outputs,), -1.5))
        else:
            raise ValueError(f"env: expected discrete actions or a box of them, got {actions}")
        self.actor = perceptron(inputs, hidden, outputs, gain=0.01)
        self.critic = perceptron(inputs, hidden, len(task.objectives), gain=1.0)

    def encode(self, observations: Any) -> Tensor:
        """(num_envs, ...) as the environments have it, to (num_envs, inputs)."""
        x = torch.as_tensor(observations).flatten(1)
        if not self.levels:
            return x.float()
        columns = zip((x.long() - self.low).unbind(1), self.levels, strict=True)
        return torch.cat([nn.functional.one_hot(x, levels).float() for x, levels in columns], 1)

    def standardise(self, encoded: Tensor) -> None:
        """Fixes the moments of the observations, once."""
        if not self.levels:
            self.mean, self.std = encoded.mean(0), encoded.std(0) + 1e-6

    def policy(self, encoded: Tensor) -> Categorical | Independent:
        out = self.actor((encoded - self.mean) / self.std)
        if self.discrete:
            return Categorical(logits=out, validate_args=False)
        normal = Normal(out.tanh(), self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)

    def values(self, encoded: Tensor) -> Tensor:
        """(..., N)."""
        return self.critic((encoded - self.mean) / self.std)

    def for_env(self, actions: Tensor) -> Any:
        if self.discrete:
            return actions.numpy()
        share = (actions.clamp(-1, 1) + 1) / 2
        return (self.low_action + share * (self.high_action - self.low_action)).numpy()


# --- rollout -------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """(num_envs, T, ...); where `valid` is false, the environment was reset and ignored the action."""

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    rewards: Tensor  # (num_envs, T, N), scaled
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    values: Tensor  # (num_envs, T, N), before the step
    next_values: Tensor  # and of the observation that it led to


class Sampler:
    """Steps the environments, whose state goes on from one rollout to the next."""

    def __init__(self, envs: MOSyncVectorEnv, agent: Agent, task: Task, seed: int) -> None:
        self.envs, self.agent, self.scale = envs, agent, torch.tensor(task.scale)
        self.observation = agent.encode(envs.reset(seed=seed)[0])
        self.resets = torch.zeros(envs.num_envs, dtype=torch.bool)  # the episode ended with the last step
        self.totals = torch.zeros(envs.num_envs, len(task.scale))
        self.finished: deque[Tensor] = deque(maxlen=100)  # returns of the last episodes, undiscounted

    @torch.no_grad()
    def __call__(self, steps: int) -> Rollout:
        rows: dict[str, list[Tensor]] = {}
        for _ in range(steps):
            policy = self.agent.policy(self.observation)
            actions = policy.sample()
            observation, rewards, terminated, truncated, _ = self.envs.step(self.agent.for_env(actions))
            row = {
                "observations": self.observation,
                "actions": actions,
                "logprobs": policy.log_prob(actions),
                "rewards": torch.as_tensor(rewards) / self.scale,
                "terminated": torch.as_tensor(terminated),
                "truncated": torch.as_tensor(truncated),
                "valid": ~self.resets,
            }
            for name, x in row.items():
                rows.setdefault(name, []).append(x)
            self.observation = self.agent.encode(observation)
            self.totals += torch.as_tensor(rewards)
            self.resets = row["terminated"] | row["truncated"]
            self.finished.extend(self.totals[self.resets])
            self.totals[self.resets] = 0
        stacked = {name: torch.stack(x, 1) for name, x in rows.items()}
        all_observations = torch.cat([stacked["observations"], self.observation.unsqueeze(1)], 1)
        values = self.agent.values(all_observations)
        return Rollout(**stacked, values=values[:, :-1], next_values=values[:, 1:])


def advantages_of(r: Rollout, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (num_envs, T, N), for each objective by itself.

    The environments reset in the step after an episode's last, so what follows the last step is still the
    episode's own observation. The step of the reset is masked.
    """
    return pk.multi_objective_gae(
        r.rewards,
        r.values,
        r.valid,
        gamma=gamma,
        lam=lam,
        dones=r.terminated,
        truncated=r.truncated,
        last_values=r.next_values[:, -1],
        final_values=r.next_values,
    )


# --- update --------------------------------------------------------------------------------------


def weighting_of(s: Settings, objectives: int) -> dict[str, Any]:
    """The arguments of `pama_loss` in which the methods differ."""
    if s.preference is not None and len(s.preference) != objectives:
        message = f"preference: expected {objectives} numbers, one for each objective, got {s.preference}"
        raise ValueError(message)
    rules = {
        "pama": pk.Pama(regularization=s.regularization),
        "upgrad": pk.UPGrad(),
        "paper": pk.Pama.paper("token"),
        "fixed": pk.Fixed(),
    }
    return {"rule": rules[s.rule], "preference": s.preference}


def normalise(advantages: Tensor, valid: Tensor, s: Settings) -> Tensor:
    """Advantages (M, N), standardised.

    With fixed weights: so that their combination has mean 0 and variance 1, as ordinary PPO on the weighted
    reward has it. Else each objective by itself: the weights then don't depend on the units of rewards.
    """
    if s.rule != "fixed":
        return pk.masked_whiten(advantages, valid)
    weights = advantages.new_tensor(s.preference or (1.0,) * advantages.shape[-1])
    chosen = advantages[valid]
    spread = (chosen @ (weights / weights.sum())).std(0)
    return (advantages - chosen.mean(0)) / (spread + 1e-8)


def update(
    agent: Agent, optimiser: torch.optim.Optimizer, r: Rollout, s: Settings, weighting: dict[str, Any]
) -> pk.CombinedAdvantages:
    """Several epochs of minibatches on one rollout; returns what the weights were taken from."""
    advantages, returns = (x.flatten(0, 1) for x in advantages_of(r, s.gamma, s.lam))
    observations, actions, logprobs, valid = (
        x.flatten(0, 1) for x in (r.observations, r.actions, r.logprobs, r.valid)
    )
    advantages = normalise(advantages, valid, s)

    # Weights of a batch belong to the whole rollout, not to the minibatch that is just looked at.
    combined = pk.combine_advantages(advantages, valid, **weighting)
    if s.rule != "paper":
        weighting = weighting | {"weights": combined.weights}
    for _ in range(s.epochs):
        for rows in torch.randperm(len(valid)).chunk(s.minibatches):
            here = valid[rows]
            count = here.sum().clamp(min=1)
            policy = agent.policy(observations[rows])
            loss = pk.pama_loss(
                policy.log_prob(actions[rows]),
                logprobs[rows],
                advantages[rows],
                here,
                clip_range=s.clip_range,
                **weighting,
            ).loss
            error = (agent.values(observations[rows]) - returns[rows]).square().sum(-1)
            value_loss = (error * here).sum() / count
            entropy = (policy.entropy() * here).sum() / count
            optimiser.zero_grad()
            (loss + s.value_coef * value_loss - s.entropy_coef * entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), s.max_grad_norm)
            optimiser.step()
    return combined


def train(
    s: Settings, report: Callable[[dict[str, str]], None] | None = None
) -> tuple[Agent, list[list[float]]]:
    """One run: the agent, and the weights of every update."""
    torch.manual_seed(s.seed)
    task = task_of(s.env)
    weighting = weighting_of(s, len(task.objectives))
    envs = make_envs(s.env, s.num_envs)
    agent = Agent(envs, task, s.hidden)
    agent.standardise(Sampler(envs, agent, task, s.seed)(s.rollout).observations.flatten(0, 1))
    optimiser = torch.optim.Adam(agent.parameters(), lr=s.learning_rate, eps=1e-5, fused=True)
    sampler = Sampler(envs, agent, task, s.seed)
    history = []
    for i in range(updates_of(s)):
        optimiser.param_groups[0]["lr"] = s.learning_rate * (1 - i / updates_of(s))
        combined = update(agent, optimiser, sampler(s.rollout), s, weighting)
        history.append(combined.weights.tolist())
        if report is not None:
            recent = torch.stack(list(sampler.finished)).mean(0).tolist() if sampler.finished else []
            named = zip(task.objectives, recent, strict=False)
            weights = " ".join(f"{w:.2f}" for w in combined.weights.tolist())
            report({name: f"{x:.2f}" for name, x in named} | {"weights": weights})
    envs.close()
    return agent, history


def updates_of(s: Settings) -> int:
    return max(1, round(s.steps / (s.num_envs * s.rollout)))


@torch.no_grad()
def evaluate(agent: Agent, s: Settings, *, sampled: bool = False) -> list[float]:
    """Mean discounted return of each objective, unscaled: of the policy's mode, or of sampled actions."""
    with torch.random.fork_rng():
        torch.manual_seed(s.seed + 1_000_003)
        envs = make_envs(s.env, s.eval_episodes)
        observation = agent.encode(envs.reset(seed=s.seed + 1_000_003)[0])
        totals = torch.zeros(s.eval_episodes, len(task_of(s.env).objectives), dtype=torch.float64)
        alive, discount = torch.ones(s.eval_episodes, dtype=torch.bool), 1.0
        while alive.any():
            policy = agent.policy(observation)
            actions = policy.sample() if sampled else policy.mode
            observation, rewards, terminated, truncated, _ = envs.step(agent.for_env(actions))
            observation = agent.encode(observation)
            totals += discount * torch.as_tensor(rewards) * alive.unsqueeze(1)
            alive &= ~torch.as_tensor(terminated | truncated)
            discount *= s.gamma
        envs.close()
    return totals.mean(0).tolist()


# --- command line --------------------------------------------------------------------------------


def settings_for(env: str, **given: Any) -> Settings:
    """The defaults, what suits the environment, and what is given, each over the one before."""
    return Settings(**{"env": env, **(TASKS[env].settings if env in TASKS else {}), **given})


def parse(arguments: list[str] | None = None) -> Settings:
    """One option per setting; what is not given is left to `settings_for`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for entry in dataclasses.fields(Settings):
        options: dict[str, Any] = {"choices": CHOICES.get(entry.name)}
        if entry.type == "bool":
            options = {"action": argparse.BooleanOptionalAction}
        elif entry.type in ("int", "float"):
            options["type"] = {"int": int, "float": float}[entry.type]
        elif entry.type.startswith("tuple"):
            options |= {"type": float, "nargs": "+", "metavar": "X"}
        shown = "equal" if entry.default is None else entry.default
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **options, help=f"default: {shown}")
    given = vars(parser.parse_args(arguments))
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    try:
        s = settings_for(given.pop("env", Settings.env), **given)
        n = len(task_of(s.env).objectives)
        # The library checks its own arguments: on one step, before anything runs.
        zero = torch.zeros(1, 1, n)
        pk.multi_objective_gae(zero, zero, gamma=s.gamma, lam=s.lam)
        pk.pama_loss(zero[0, :, 0], None, zero[0], clip_range=s.clip_range, **weighting_of(s, n))
    except (ValueError, gymnasium.error.Error) as error:
        parser.error(str(error))
    return s


def main() -> None:
    s = parse()
    torch.set_num_threads(1)  # the networks are too small for more
    with tqdm(total=updates_of(s), unit="update", desc=f"{s.env}, {s.rule}") as bar:

        def report(values: dict[str, str]) -> None:
            bar.set_postfix(values, refresh=False)
            bar.update()

        agent, _ = train(s, report)
    names = task_of(s.env).objectives
    for what, sampled in (("most likely actions", False), ("sampled actions", True)):
        returns = zip(names, evaluate(agent, s, sampled=sampled), strict=True)
        print(f"{what}: " + ", ".join(f"{name} {x:.2f}" for name, x in returns))
    print(f"mean returns of {s.eval_episodes} episodes, discounted by {s.gamma:g}")


if __name__ == "__main__":
    sys.exit(main())
