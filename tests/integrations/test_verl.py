"""PAMA in verl: the estimator alone, then with the real package: registries, losses, both trainers."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.integrations import _verl_algorithms as algorithms
from pama_kernels.integrations import _verl_trainers as trainers

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "verl"
KEYS = ["correct", "concise", "polite"]
EPS = 1e-6

needs_verl = pytest.mark.skipif(
    importlib.util.find_spec("verl") is None, reason="verl is not installed: `make test-integrations` does it"
)


def section(keys: list[str] = KEYS, scale: bool = True, **pama: Any) -> dict[str, Any]:
    pama = {"reward_keys": keys, **pama}
    return {"adv_estimator": "pama", "norm_adv_by_std_in_grpo": scale, "pama": pama}


class Batch:
    """Six prompts with four responses each, in mixed order; rewards that are absent, masks with holes."""

    def __init__(self, width: int = 7, absent: bool = True, objectives: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows, self.width = 24, width
        order = torch.randperm(self.rows, generator=generator)
        self.uid = np.array([f"prompt {int(i) // 4}" for i in order], dtype=object)
        self.rewards = torch.randn(self.rows, objectives, generator=generator) * torch.tensor(
            [1.0, 5, 0.2][:objectives]
        )
        if absent:
            self.rewards[torch.rand(self.rows, objectives, generator=generator) < 0.15] = math.nan
        lengths = torch.randint(1, width + 1, (self.rows, 1), generator=generator)
        self.mask = torch.arange(width) < lengths
        self.mask[:, 1:] &= torch.rand(self.rows, width - 1, generator=generator) < 0.8  # tool tokens
        self.mask[5] = False  # a row of padding
        self.old = torch.randn(self.rows, width, generator=generator) - 2
        self.logprobs = self.old + 0.4 * torch.randn(self.rows, width, generator=generator)

    def components(self) -> dict[str, np.ndarray]:
        values = {
            key: [None if math.isnan(value) else value for value in column]
            for key, column in zip(KEYS, self.rewards.T.tolist(), strict=False)
        }
        return {key: np.array(column, dtype=object) for key, column in values.items()}

    def estimate(self, config: dict[str, Any]) -> Tensor:
        advantages, returns = algorithms.compute_pama_advantage(
            torch.zeros(self.rows, self.width),
            self.mask,
            config=config,
            index=self.uid,
            non_tensor_batch=self.components(),
        )
        assert returns is advantages
        return advantages

    def reference(self, config: dict[str, Any], rule: Any, **arguments: Any) -> tuple[Tensor, Tensor, Any]:
        """Per-objective advantages, presence, and what the specification makes of them."""
        groups = torch.from_numpy(np.unique(self.uid.astype(str), return_inverse=True)[1])
        scale = config["norm_adv_by_std_in_grpo"]
        advantages = pk.reference.group_normalize(
            self.rewards.double(), group_ids=groups, scale=scale, eps=EPS
        )
        present = ~self.rewards.isnan()
        combined = pk.reference.combine_advantages(
            advantages, self.mask, rule=rule, objective_mask=present, **arguments
        )
        return advantages, present, combined


# Settings, and what the specification gets
RULES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "default": ({}, pk.Pama(), {}),
    "preference": (
        {"regularization": 0.5, "preference": [1, 2, 0]},
        pk.Pama(regularization=0.5),
        {"preference": [1, 2, 0]},
    ),
    "sequence": ({"weights_per": "sequence", "regularization": 0.1}, pk.Pama("sequence"), {}),
    "token": ({"weights_per": "token", "regularization": 0.1}, pk.Pama("sequence"), {}),
    "noon": ({"bound": "scores", "noon": True}, pk.Pama(bound="scores", noon=True), {}),
    "upgrad": ({"rule": "upgrad", "preference": [3, 1, 1]}, pk.UPGrad(), {"preference": [3, 1, 1]}),
    "fixed": ({"rule": "fixed", "normalize": True}, pk.Fixed(), {"normalize": True}),
    "softmin": ({"rule": "softmin", "temperature": 0.5}, pk.SoftMin(0.5), {}),
    "paper": ({"rule": "paper", "weights_per": "sequence"}, pk.Pama.paper("sequence"), {}),
    "aggregation": (
        {"aggregation": "seq-mean-token-mean"},
        pk.Pama(),
        {"aggregation": "seq-mean-token-mean"},
    ),
}


# ---- the estimator, without verl -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [True, False])
def test_estimator(rule: str, scale: bool) -> None:
    """Solved in float64; the advantages are float32."""
    settings, made, arguments = RULES[rule]
    batch, config = Batch(), section(scale=scale, **settings)
    _, _, combined = batch.reference(config, made, **arguments)
    expected = combined.advantages[:, None] * batch.mask
    torch.testing.assert_close(batch.estimate(config).double(), expected, rtol=1e-5, atol=1e-6)


def test_estimator_ignores_what_is_masked() -> None:
    batch = Batch(absent=False)
    config = section()
    before = batch.estimate(config)
    assert not before[~batch.mask].any()
    # The row of padding is a group of its own, as verl makes it.
    batch.uid[5] = "padding"
    without = batch.estimate(config)
    batch.rewards[5] = 1e6
    assert torch.equal(batch.estimate(config), without)


def test_several_rows_of_one_session() -> None:
    """The reward counts once in its group; every row of the session gets the advantage."""
    keys = ["a_0_0", "a_1_1", "b_x_0_0", "a_1_0", "b_x_1_0", "a_1_2"]
    assert trainers.final_rows(keys) == [0, 5, 2, 5, 4, 5]
    rewards = {"r": [1.0, 9.0, 2.0, 9.0, 5.0, 3.0]}  # 9.0: rows that are not the last of their session
    rollout = algorithms.Rollout(rewards, trainers.final_rows(keys))
    token = algorithms.current_rollout.set(rollout)
    try:
        advantages, _ = algorithms.compute_pama_advantage(
            torch.zeros(6, 2),
            torch.ones(6, 2),
            config=section(["r"], scale=False),
            index=np.array(["a", "a", "b_x", "a", "b_x", "a"], dtype=object),
        )
    finally:
        algorithms.current_rollout.reset(token)
    assert advantages[:, 0].tolist() == [-1.0, 1.0, -1.5, 1.0, 1.5, 1.0]
    assert rollout.metrics["pama/weight/r"] == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_parts(rule: str) -> None:
    """What the loss gets without Noon: positive and negative advantages, each combined by the weights."""
    settings, made, arguments = RULES[rule]
    batch, config = Batch(), section(**settings)
    rollout = algorithms.Rollout(batch.components())
    token = algorithms.current_rollout.set(rollout)
    try:
        advantages, _ = algorithms.compute_pama_advantage(
            torch.zeros(24, 7), batch.mask, config=config, index=batch.uid
        )
    finally:
        algorithms.current_rollout.reset(token)
    if getattr(made, "noon", False):
        assert rollout.parts is None
        return
    assert rollout.parts is not None
    raw, present, combined = batch.reference(config, made, **arguments)
    unscaled = batch.reference(config, made, **{**arguments, "normalize": False})[2]
    size = combined.advantages.abs().max() / unscaled.advantages.abs().max()
    here = present.double()
    weights = combined.weights
    if weights.dim() == 1:
        preference = torch.tensor(arguments.get("preference", [1, 1, 1])).double()
        weights = (here * weights) / (here @ (preference / preference.sum()))[:, None]
    weights = torch.nan_to_num(weights * here, posinf=0.0)
    rows = batch.mask.any(1)
    for part, wanted in zip(rollout.parts.unbind(-1), (raw.clamp(min=0), raw.clamp(max=0)), strict=True):
        wanted = (weights * wanted).sum(-1) * size
        torch.testing.assert_close(part[rows].double(), wanted[rows], rtol=1e-5, atol=1e-5)
    assert (rollout.parts[..., 0] >= 0).all()
    assert (rollout.parts[..., 1] <= 0).all()
    torch.testing.assert_close(rollout.parts.sum(-1)[:, None] * batch.mask, advantages, rtol=0, atol=1e-6)


def test_metrics() -> None:
    """Those of docs/verl.md; what says nothing is left out, which a NaN in a mean would not be."""
    batch = Batch()
    batch.rewards[:, 1] = 1.0
    batch.rewards[:, 2] = math.nan
    rollout = algorithms.Rollout(batch.components())
    token = algorithms.current_rollout.set(rollout)
    try:
        algorithms.compute_pama_advantage(torch.zeros(24, 7), batch.mask, config=section(), index=batch.uid)
    finally:
        algorithms.current_rollout.reset(token)
    assert rollout.metrics == {
        "pama/weight/correct": 1.0,
        "pama/weight/concise": 0.0,
        "pama/covariance/correct": pytest.approx(rollout.metrics["pama/covariance/correct"]),
        "pama/covariance/concise": 0.0,
        "pama/cosine/correct": pytest.approx(1.0),
        "pama/cosine/concise": 0.0,
        "pama/signal/correct": 2.0,
        "pama/signal/concise": 1.0,
        "pama/signal/polite": 0.0,
        "pama/optimum": pytest.approx(1.0),
    }
    assert rollout.metrics["pama/covariance/correct"] > 0


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no section": ({}, r"algorithm\.pama: expected a section"),
    "unknown": ({"weight_per": "batch"}, r"algorithm\.pama: expected .*weights_per.*, got weight_per"),
    "rule": ({"rule": "magic"}, r"algorithm\.pama\.rule: expected .*'magic'"),
    "whose": ({"weights_per": "rollout"}, r"algorithm\.pama\.weights_per: expected .*'rollout'"),
    "not of the rule": (
        {"rule": "upgrad", "noon": True},
        r"algorithm\.pama\.noon: expected None with algorithm\.pama\.rule='upgrad'",
    ),
    "no keys": ({"reward_keys": None}, r"algorithm\.pama\.reward_keys: expected a list of names, got none"),
    "no rewards": ({"reward_keys": []}, r"algorithm\.pama\.reward_keys: expected a list of names"),
    "a string": ({"reward_keys": "correct"}, r"algorithm\.pama\.reward_keys: expected a list of names"),
    "twice": ({"reward_keys": ["a", "a"]}, r"algorithm\.pama\.reward_keys: expected different names"),
    "preference": ({"preference": [1, 2]}, r"algorithm\.pama\.preference: expected 3 numbers, got 2"),
    "negative": ({"preference": [1, 2, -1]}, r"algorithm\.pama\.preference: "),
    "regularization": ({"regularization": -1}, r"algorithm\.pama\.regularization: "),
    "noon": ({"noon": "no"}, r"algorithm\.pama\.noon: expected True or False, got 'no'"),
    "gram per sequence": ({"bound": "gram", "weights_per": "sequence"}, r"algorithm\.pama\.bound: "),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings(case: str) -> None:
    given, message = WRONG_SETTINGS[case]
    config = section(**given) if given else {"pama": None}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        algorithms.read_settings(config)


def test_wrong_components() -> None:
    batch = Batch()
    arguments: dict[str, Any] = {"config": section(), "index": batch.uid}
    rewards, mask = torch.zeros(24, 7), batch.mask

    def raises(error: type[Exception], message: str, **changed: Any) -> None:
        with pytest.raises(error, match=message):
            algorithms.compute_pama_advantage(rewards, mask, **{**arguments, **changed})

    raises(ValueError, r"reward_keys: expected keys .* got 'correct'; it has \[\]")
    some = {key: batch.components()[key] for key in ("correct", "concise")}
    raises(ValueError, r"got 'polite'; it has \['concise', 'correct'\]", non_tensor_batch=some)
    short = {**batch.components(), "concise": [0.0] * 23}
    raises(ValueError, r"reward 'concise': expected 24 values, got 23", non_tensor_batch=short)
    for wrong in ("good", -math.inf, [1.0, 2.0]):
        column = np.array([0.0] * 23 + [None], dtype=object)
        column[23] = wrong
        message = r"reward 'concise': expected a finite number or None, got "
        raises(ValueError, message, non_tensor_batch={**batch.components(), "concise": column})
    raises(ValueError, "index: expected the group", non_tensor_batch=batch.components(), index=None)


class Section(dict[str, Any]):
    """Stands for a section of verl's configuration."""

    def __getattr__(self, name: str) -> Any:
        value = self[name]
        return Section(value) if isinstance(value, dict) else value


def configuration(loss_mode: str = "pama", use_v1: bool = True, **pama: Any) -> Section:
    actor = {"policy_loss": {"loss_mode": loss_mode}}
    return Section(
        algorithm=section(**pama),
        actor_rollout_ref={"actor": actor, "rollout": {"n": 4}},
        trainer={"use_v1": use_v1, "v1": {"trainer_mode": "pama_sync"}},
    )


def test_which_loss_a_rule_needs(caplog: pytest.LogCaptureFixture) -> None:
    """Without Noon V1 needs the loss `pama`; the older trainer says what its own does."""
    trainers.check_config(configuration(), carries_components=True)
    trainers.check_config(configuration("vanilla", noon=True), carries_components=True)
    assert not caplog.records
    for rule in ("pama", "upgrad", "fixed", "softmin"):
        with pytest.raises(ValueError, match=r"policy_loss\.loss_mode: expected 'pama'.* got 'vanilla'"):
            trainers.check_config(configuration("vanilla", rule=rule), carries_components=True)
    trainers.check_config(configuration("vanilla", use_v1=False), carries_components=True)
    assert "clips each combined advantage by its own sign" in caplog.text
    trainers.check_config(configuration(bound="scores"), carries_components=True)
    assert "only reflect the lengths of responses; use gram" in caplog.text


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


FAKE_VERSION = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name != "verl":
        return real(name)
    if {found!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {found!r}
metadata.version = version
from pama_kernels.integrations import verl
try:
    verl.check()
except RuntimeError as error:
    print(error)
"""


def test_unsupported_release_is_refused_aloud() -> None:
    done = _python(FAKE_VERSION.format(found="0.8.0"))
    wanted = "expected verl 0.9.1 to 0.9.1, found 0.8.0"
    assert wanted in done.stdout
    assert "pama_kernels is not registered with verl" in done.stderr  # without any logging set up
    assert wanted in done.stderr


def test_without_verl() -> None:
    done = _python(FAKE_VERSION.format(found=None))
    assert done.stdout == "pama_kernels is not registered with verl: verl is not installed\n"
    assert not done.stderr


# ---- with verl -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl() -> Iterator[ModuleType]:
    """Our module, after verl and its trainers were imported: their imports warn, about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pama_kernels.integrations import verl

        verl.check()
        yield verl


@needs_verl
def test_verl_loads_the_plug_in() -> None:
    """By the installed entry point, with nothing of ours imported."""
    code = """
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
print(get_adv_estimator_fn("pama").__name__, get_policy_loss_fn("pama").__name__)
from verl.trainer.ppo.v1 import get_trainer_cls
print(*(get_trainer_cls(f"pama_{mode}").__name__ for mode in ("sync", "colocate_async", "separate_async")))
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("compute_pama_advantage", "compute_pama_policy_loss"),
        *("PamaPPOTrainerSync", "PamaPPOTrainerColocateAsync", "PamaPPOTrainerSeparateAsync"),
    ]


@needs_verl
def test_a_name_that_is_taken_is_not_silent() -> None:
    code = """
from verl.trainer.ppo.core_algos import register_adv_est
register_adv_est("pama")(print)
from pama_kernels.integrations import verl
try:
    verl.check()
except RuntimeError as error:
    print(error)
"""
    done = _python(code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "not registered with verl: ValueError: Adv estimator pama has already been" in done.stdout
    assert "pama_kernels is not registered with verl" in done.stderr


@needs_verl
def test_check_tells_that_plug_ins_are_off(verl: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered in this process, it would not be in verl's workers."""
    for chosen in ("none", "other, another"):
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", chosen)
        with pytest.raises(RuntimeError, match=f"^VERL_USE_EXTERNAL_PLUGINS: .* got {chosen}"):
            verl.check()
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other, PAMA")
    verl.check()


def _actor(**settings: Any) -> Any:
    from verl.workers.config import ActorConfig

    named = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 1, **settings}
    return ActorConfig(**named)


GLOBAL = {
    "alone": {},
    "ranks": {"dp_size": 4, "batch_num_tokens": 321, "global_batch_size": 77, "loss_scale_factor": 50},
}
CLIPS: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 1.2},
}
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@needs_verl
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("world", GLOBAL)
@pytest.mark.parametrize("corrected", [False, True])
def test_policy_loss_is_vanilla_for_one_objective(
    verl: ModuleType, aggregation: str, clip: str, world: str, corrected: bool
) -> None:
    """One objective, both as (bs, T) and in parts: verl's own loss, its gradient and its metrics."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    batch = Batch()
    advantages = torch.randn(24, 7) * batch.mask
    config = _actor(**CLIPS[clip])
    config.global_batch_info.update(GLOBAL[world])
    results = []
    for name, given in (
        ("vanilla", advantages),
        ("pama", advantages),
        ("pama", torch.stack([advantages.clamp(min=0), advantages.clamp(max=0)], -1).flatten(1)),
    ):
        logprobs = batch.logprobs.clone().requires_grad_()
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=batch.old,
            log_prob=logprobs,
            advantages=given,
            response_mask=batch.mask,
            loss_agg_mode=aggregation,
            config=config,
            rollout_is_weights=batch.old.exp() if corrected else None,
        )
        loss.backward()
        results.append((loss, logprobs.grad, metrics))
    (loss, gradient, metrics), *others = results
    assert gradient.any()
    assert metrics["actor/pg_clipfrac"] > 0
    for other in others:
        assert torch.equal(other[0], loss)
        # verl's gradient goes half through each side of its maximum where they tie: one rounding.
        torch.testing.assert_close(other[1], gradient, rtol=3 * torch.finfo(torch.float32).eps, atol=0)
        assert other[2] == pytest.approx(metrics, abs=1e-7)


@needs_verl
@pytest.mark.parametrize("dual", [3.0, 1.25])
def test_policy_loss_of_objectives_that_disagree(verl: ModuleType, dual: float) -> None:
    """The loss on two parts is sum_i c_i L_i, which the trainer's loss on sum_i c_i A_i is not."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    batch = Batch(absent=False)
    raw, _, combined = batch.reference(section(), pk.Pama("batch", "scores", regularization=0.5))
    weights = combined.weights
    parts = torch.stack([(weights * raw.clamp(min=0)).sum(-1), (weights * raw.clamp(max=0)).sum(-1)], -1)
    arguments: dict[str, Any] = {
        "response_mask": batch.mask,
        "loss_agg_mode": "token-mean",
        "config": _actor(clip_ratio_c=dual),
    }
    logprobs = batch.logprobs.double().requires_grad_()
    loss, _ = get_policy_loss_fn("pama")(batch.old.double(), logprobs, parts.repeat(1, 7), **arguments)
    loss.backward()
    wanted = batch.logprobs.double().requires_grad_()
    output = pk.reference.pama_loss(
        wanted, batch.old, raw, batch.mask, weights=weights, clip_range=0.2, dual_clip=dual,
    )  # fmt: skip
    output.loss.backward()
    torch.testing.assert_close(loss, output.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logprobs.grad, wanted.grad, rtol=1e-12, atol=1e-15)
    vanilla, _ = get_policy_loss_fn("vanilla")(
        batch.old.double(), logprobs, parts.sum(-1)[:, None].expand(-1, 7), **arguments
    )
    assert abs(float((vanilla - loss).detach() / loss.detach())) > 1e-3


@needs_verl
def test_policy_loss_refuses_other_shapes(verl: ModuleType) -> None:
    batch = Batch()
    arguments = (batch.old, batch.logprobs, torch.zeros(24, 7, 3), batch.mask, "token-mean")
    with pytest.raises(ValueError, match=r"^advantages: expected shape \(24, 7\) or \(24, 14\), got"):
        verl.compute_pama_policy_loss(*arguments, _actor())
    with pytest.raises(ValueError, match=r"^config: expected verl's actor configuration"):
        verl.compute_pama_policy_loss(*arguments)


@needs_verl
def test_masked_values_do_not_reach_the_loss(verl: ModuleType) -> None:
    batch = Batch()
    advantages = torch.randn(24, 7)
    first, _ = verl.compute_pama_policy_loss(
        batch.old, batch.logprobs, advantages, batch.mask, "token-mean", _actor()
    )
    poisoned = [torch.where(batch.mask, x, math.nan) for x in (batch.old, batch.logprobs, advantages)]
    second, _ = verl.compute_pama_policy_loss(*poisoned, batch.mask, "token-mean", _actor())
    assert torch.equal(first, second)


def _proto(batch: Batch, **components: Any) -> Any:
    from tensordict import TensorDict
    from verl import DataProto

    tensors = {"token_level_rewards": torch.zeros(24, 7), "response_mask": batch.mask.long()}
    return DataProto(
        batch=TensorDict(tensors, batch_size=24),
        non_tensor_batch={"uid": batch.uid, **components},
    )


@needs_verl
@pytest.mark.parametrize("rule", ["default", "sequence", "noon"])
def test_older_trainer(verl: ModuleType, rule: str) -> None:
    """Through verl's own `compute_advantage`, whose registered estimators see no components otherwise."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch, config = Batch(), section(**RULES[rule][0])
    data = compute_advantage(
        _proto(batch, **batch.components()), adv_estimator="pama", config=OmegaConf.create(config)
    )
    assert torch.equal(data.batch["advantages"], batch.estimate(config))
    assert data.batch["returns"] is data.batch["advantages"] or torch.equal(
        data.batch["returns"], data.batch["advantages"]
    )
    with pytest.raises(ValueError, match=r"got 'correct'; it has \['uid'\]"):
        compute_advantage(_proto(batch), adv_estimator="pama", config=OmegaConf.create(config))


@needs_verl
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_one_objective_is_verls_grpo(verl: ModuleType, scale: bool, copies: int) -> None:
    """One reward, or the same one three times."""
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch = Batch(absent=False, objectives=1)
    data = _proto(batch, **{key: batch.components()["correct"] for key in KEYS[:copies]})
    data.batch["token_level_rewards"][:, 0] = batch.rewards[:, 0]
    config = section(KEYS[:copies], scale)
    arguments: dict[str, Any] = {"norm_adv_by_std_in_grpo": scale, "config": config}
    wanted = compute_advantage(data, adv_estimator="grpo", **arguments).batch["advantages"].clone()
    found = compute_advantage(data, adv_estimator="pama", **arguments).batch["advantages"]
    # verl subtracts and divides in float32: a few roundings of the rewards, over deviations of 0.4 and more.
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


def _config(*overrides: str) -> Any:
    """The example's configuration, as hydra composes it on top of verl's own."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(EXAMPLE), version_base=None):
        return compose("pama_grpo", ["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])


@needs_verl
def test_example_configuration(verl: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """verl's own validation takes it, and so do both trainers' checks."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = _config()
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.loss_mode == "pama"
    verl.check(config)
    verl.check(_config("trainer.use_v1=false", "trainer.v1.trainer_mode=sync"))
    reward = config.reward.custom_reward_function
    assert config.algorithm.pama.reward_keys == KEYS
    spec = importlib.util.spec_from_file_location("reward", ROOT / reward.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    returned = getattr(module, reward.name)("source", "Thanks, it is 42", "42")
    assert set(KEYS) < set(returned)
    assert getattr(module, reward.name)("source", "Hm", "")["correct"] is None


@needs_verl
def test_example_command() -> None:
    """The command line in the example's head, stopped after the configuration."""
    line = ["-m", "verl.trainer.main_ppo", "--config-dir", "examples/verl", "--config-name", "pama_grpo"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *line, "--cfg", "job", "actor_rollout_ref.model.path=MODEL"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "trainer_mode: pama_sync" in done.stdout
    assert " ".join(line) in (EXAMPLE / "pama_grpo.yaml").read_text()


VANILLA = ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",)
WRONG_CONFIGS: dict[str, tuple[tuple[str, ...], str]] = {
    "trainer": (
        ("trainer.v1.trainer_mode=sync",),
        r"trainer\.v1\.trainer_mode: expected pama_sync, .* got 'sync'",
    ),
    "preference": (
        ("algorithm.pama.preference=[1,2]",),
        r"algorithm\.pama\.preference: expected 3 numbers, got 2",
    ),
    "kl": (("algorithm.use_kl_in_reward=true",), r"algorithm\.use_kl_in_reward: expected false"),
    "group": (("actor_rollout_ref.rollout.n=1",), r"actor_rollout_ref\.rollout\.n: expected 2 or more"),
    "loss": (VANILLA, r"actor_rollout_ref\.actor\.policy_loss\.loss_mode: expected 'pama'.* got 'vanilla'"),
}


@needs_verl
def test_vanilla_loss_where_it_is_the_same(verl: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """With Noon it is; the older trainer can send one number only, and says what that means."""
    verl.check(_config(*VANILLA, "algorithm.pama.noon=true"))
    assert not caplog.records
    verl.check(_config(*VANILLA, "trainer.use_v1=false", "trainer.v1.trainer_mode=sync"))
    assert "clips each combined advantage by its own sign" in caplog.text


@needs_verl
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_token_weights_of_the_loss(verl: ModuleType, mode: str) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    trainer = get_trainer_cls("pama_sync")(_config(f"actor_rollout_ref.actor.loss_agg_mode={mode}"))
    wanted = mode if mode == "seq-mean-token-mean" else "token-mean"
    assert trainer.config.algorithm.pama.aggregation == wanted


@needs_verl
@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configuration_is_refused_at_construction(verl: ModuleType, case: str) -> None:
    """In verl's own trainers as well as in ours: before a model is loaded or anything generated."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1 import get_trainer_cls

    overrides, message = WRONG_CONFIGS[case]
    config = _config(*overrides)
    with pytest.raises(ValueError, match=f"^{message}"):
        verl.check(config)
    older = functools.partial(
        RayPPOTrainer, tokenizer=None, role_worker_mapping={}, resource_pool_manager=None
    )
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode) if config.trainer.use_v1 else older
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(config)


@needs_verl
def test_other_estimators_are_left_alone(verl: ModuleType) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = _config("algorithm.adv_estimator=grpo", "trainer.v1.trainer_mode=sync")
    trainer = get_trainer_cls("sync")(config)
    assert trainer.trainer_mode == "sync"
    with pytest.raises(ValueError, match=r"^algorithm\.adv_estimator: expected 'pama', got 'grpo'"):
        get_trainer_cls("pama_sync")(config)


@needs_verl
@pytest.mark.parametrize("mode", trainers.MODES)
def test_trainers_are_verls_own_but_for_the_name(verl: ModuleType, mode: str) -> None:
    """Buffers and sections that verl chooses by the mode's name are those of the mode."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    separate = [
        "data.train_batch_size=256",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    ]
    overrides = separate if mode == "separate_async" else []
    ours = get_trainer_cls(f"pama_{mode}")(_config(f"trainer.v1.trainer_mode=pama_{mode}", *overrides))
    theirs = get_trainer_cls(mode)(
        _config("algorithm.adv_estimator=grpo", f"trainer.v1.trainer_mode={mode}", *overrides)
    )
    assert isinstance(ours, type(theirs))
    assert ours.trainer_mode == mode
    assert type(ours.replay_buffer) is type(theirs.replay_buffer)
    assert ours.parameter_sync_step == theirs.parameter_sync_step
