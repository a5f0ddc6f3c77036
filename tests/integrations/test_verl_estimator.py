"""The advantage estimator for verl, without verl: advantages, metrics, wrong settings and components."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from verl_setup import RULES, Batch, configuration, section

import pama_kernels as pk
from pama_kernels.integrations import _verl_algorithms as algorithms
from pama_kernels.integrations import _verl_trainers as trainers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [True, False])
def test_estimator(rule: str, scale: bool) -> None:
    """Solved in float64; the advantages are float32."""
    settings, made, arguments = RULES[rule]
    batch, config = Batch(), section(scale=scale, **settings)
    _, _, combined = batch.reference(config, made, **arguments)
    expected = combined.advantages[:, None] * batch.mask
    torch.testing.assert_close(batch.estimate(config).double(), expected, rtol=1e-5, atol=1e-6)


def test_estimator_ignores_masked_tokens() -> None:
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
    """The inputs of the loss without Noon: positive and negative advantages, combined separately."""
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
    """Those of docs/verl.md; undefined metrics are left out, since a NaN would make a mean NaN."""
    batch = Batch()
    batch.rewards[:, 1] = 1.0
    batch.rewards[:, 2] = math.nan
    rollout = algorithms.Rollout(batch.components())
    token = algorithms.current_rollout.set(rollout)
    try:
        algorithms.compute_pama_advantage(torch.zeros(24, 7), batch.mask, config=section(), index=batch.uid)
    finally:
        algorithms.current_rollout.reset(token)
    advantages, present, _ = batch.reference(section(), pk.UPGrad())
    valid = batch.mask * present[:, :1]
    second_moment = float((advantages[:, :1].square() * valid).sum() / valid.sum())
    assert rollout.metrics == {
        "pama/weight/correct": 1.0,
        "pama/weight/concise": 0.0,
        "pama/covariance/correct": pytest.approx(rollout.metrics["pama/covariance/correct"]),
        "pama/covariance/concise": 0.0,
        "pama/second_moment/correct": pytest.approx(second_moment),
        "pama/second_moment/concise": 0.0,
        "pama/signal/correct": 2.0,
        "pama/signal/concise": 1.0,
        "pama/signal/polite": 0.0,
        "pama/optimum": pytest.approx(second_moment),
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


def test_required_policy_loss_of_each_rule(caplog: pytest.LogCaptureFixture) -> None:
    """Without Noon V1 needs the loss `pama`; the older trainer logs a warning."""
    trainers.check_config(configuration(), carries_components=True)
    trainers.check_config(configuration("vanilla", noon=True), carries_components=True)
    assert not caplog.records
    for rule in ("pama", "upgrad", "fixed", "softmin"):
        with pytest.raises(ValueError, match=r"policy_loss\.loss_mode: expected 'pama'.* got 'vanilla'"):
            trainers.check_config(configuration("vanilla", rule=rule), carries_components=True)
    trainers.check_config(configuration("vanilla", use_v1=False), carries_components=True)
    assert "clips each combined advantage according to its own sign." in caplog.text
    trainers.check_config(configuration(bound="scores"), carries_components=True)
    assert "only reflect the lengths of completions; use gram" in caplog.text
