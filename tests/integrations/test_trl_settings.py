"""Settings: errors and when they are raised; YAML and the command line; versions of TRL."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import TrlParser
from trl_setup import (
    REWARDS,
    GRPOConfig,
    GRPOTrainer,
    PamaGRPOConfig,
    PamaGRPOTrainer,
    dataset,
    model,
    settings,
    short,
    tokenizer,
    trainer,
)

import pama_kernels as pk
from pama_kernels.integrations import _trl_config as configuration


def first_only(statistics: pk.ObjectiveStatistics) -> Tensor:
    return (torch.arange(statistics.objectives) == 0).double()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pama_rule": "magic"}, "pama_rule: expected one of 'pama', 'upgrad', .* got 'magic'"),
    ({"pama_rule": 3}, "pama_rule: expected a rule"),
    ({"pama_rule": lambda statistics: statistics.scores}, "pama_rule: expected a function at module level"),
    ({"pama_weights_per": "rollout"}, "pama_weights_per: expected one of 'batch', 'sequence', 'token'"),
    ({"pama_bound": "norm"}, "pama_bound: expected one of"),
    (
        {"pama_bound": "gram", "pama_weights_per": "token"},
        "pama_bound: 'gram' needs pama_weights_per='batch', got pama_weights_per='token'",
    ),
    ({"pama_momentum": 1.0}, r"pama_momentum: expected a number in \[0, 1\)"),
    ({"pama_momentum": 1.5}, r"pama_momentum: expected a number in \[0, 1\), got 1.5"),
    ({"pama_momentum": -0.1}, r"pama_momentum: expected a number in \[0, 1\), got -0.1"),
    ({"pama_momentum": 0.5, "pama_weights_per": "token"}, "pama_momentum: needs a rule with one set"),
    ({"pama_regularization": -1.0}, "pama_regularization: expected"),
    ({"pama_noon": "no"}, "pama_noon: expected True or False, got 'no'"),
    ({"pama_normalize": 1}, "pama_normalize: expected True or False, got 1"),
    ({"pama_temperature": 1.0}, "pama_temperature: expected None with pama_rule=None, which has no such"),
    ({"pama_rule": "softmin", "pama_temperature": 0.0}, "pama_temperature: expected a number"),
    ({"pama_rule": "upgrad", "pama_noon": True}, "pama_noon: expected None with pama_rule='upgrad'"),
    ({"pama_rule": pk.Fixed(), "pama_noon": True}, r"pama_noon: expected None with pama_rule=Fixed\(\)"),
    (
        {"pama_rule": "paper"},
        "pama_weights_per: expected 'batch', 'sequence' or 'token' with pama_rule='paper'",
    ),
    ({"pama_rule": "paper", "pama_weights_per": "token", "pama_noon": True}, "pama_noon: expected None"),
    ({"pama_preference": [1.0, -1.0, 1.0]}, "pama_preference: expected non-negative"),
    ({"pama_preference": [0.0, 0.0, 0.0]}, "pama_preference: "),
    ({"pama_preference": 0.5}, "pama_preference: expected a list"),
    (
        {"pama_preference": [1.0]},
        r"pama_preference: expected 3 numbers, one for each of \['vowels', .*, got 1",
    ),
    (
        {"pama_preference": [1.0, 1.0, 1.0], "reward_weights": [1.0, 1.0, 0.0]},
        "pama_preference: expected None with",
    ),
    ({"reward_weights": [1.0, -1.0, 1.0]}, "reward_weights: expected 3 non-negative .* -1"),
    ({"reward_weights": [0.0, 0.0, 0.0]}, "reward_weights: expected .* at least one above 0"),
    ({"reward_weights": [1.0, 1.0]}, "Number of reward weights"),
    ({"loss_type": "magic"}, "loss_type: expected one of grpo, .*, got 'magic'"),
    ({"scale_rewards": "rank"}, "scale_rewards: expected"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation: expected the def"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG, ids=lambda x: ",".join(x) if isinstance(x, dict) else ""
)
def test_wrong_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Errors at the construction of the configuration or the trainer, before anything is generated."""
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        trainer(PamaGRPOTrainer, REWARDS, tmp_path, **changes)


def test_wrong_configuration(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: expected a PamaGRPOConfig, got GRPOConfig"):
        PamaGRPOTrainer(model(), REWARDS, settings(GRPOConfig, tmp_path), dataset())
    changed = settings(PamaGRPOConfig, tmp_path)
    changed.pama_regularization = -1.0  # after its own check
    with pytest.raises(ValueError, match="pama_regularization"):
        PamaGRPOTrainer(model(), REWARDS, changed, train_dataset=dataset(), processing_class=tokenizer())


def test_wrong_weights_of_a_function(tmp_path: Path) -> None:
    made = trainer(PamaGRPOTrainer, REWARDS, tmp_path, pama_rule=two_weights)
    with pytest.raises(ValueError, match=r"^weights of the pama_rule: expected shape \(3,\), got \(2,\)"):
        made.train()


def two_weights(statistics: pk.ObjectiveStatistics) -> Tensor:
    return torch.ones(2)


def test_scores_that_only_reflect_lengths(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="pama_bound='scores': without Noon .* use pama_bound='gram'"):
        trainer(PamaGRPOTrainer, REWARDS, tmp_path, pama_bound="scores")


def test_liger_is_an_error_where_it_replaces_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL up to 1.12 has a separate loss for it; later versions only replace layers."""
    made = settings(PamaGRPOConfig, tmp_path)
    made.use_liger_kernel = True
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", None, raising=False)
    with pytest.raises(ValueError, match=r"^use_liger_kernel: expected False, got True: this version of TRL"):
        PamaGRPOConfig.check(made)
    monkeypatch.delattr(GRPOTrainer, "compute_liger_loss")
    PamaGRPOConfig.check(made)


# --- plain data ---------------------------------------------------------------------------------------------

GIVEN = {
    "pama_rule": "pama",
    "pama_preference": [1.0, 2.0],
    "pama_weights_per": "batch",
    "pama_bound": "scores",
    "pama_noon": True,
    "pama_regularization": 0.5,
    "pama_momentum": 0.25,
    "pama_normalize": True,
}


def parsed(arguments: list[str], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrlParser([PamaGRPOConfig]).parse_args_and_config(arguments, **options)[0]


@pytest.mark.parametrize("source", ["command line", "yaml"])
def test_parser_of_trl(source: str, tmp_path: Path) -> None:
    common = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    if source == "command line":
        for name, value in GIVEN.items():
            values = value if isinstance(value, list) else [value]
            common += [f"--{name}", *(str(x) for x in values)]
    else:
        (tmp_path / "config.yaml").write_text(json.dumps(GIVEN))  # which is YAML
        common += ["--config", str(tmp_path / "config.yaml")]
    made = parsed(common)
    assert {name: getattr(made, name) for name in GIVEN} == GIVEN
    made = parsed(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--pama_noon", "false"]
    )
    assert made.pama_noon is False
    made = parsed([*common[:6], "--pama_rule", "softmin", "--pama_temperature", "0.5"])
    assert (made.pama_rule, made.pama_temperature, made.pama_noon) == ("softmin", 0.5, None)


def test_configuration_as_json_and_pickle(tmp_path: Path) -> None:
    """As loggers and checkpoints need it."""
    made = settings(PamaGRPOConfig, tmp_path, pama_preference=[1.0, 2.0], pama_noon=False)
    assert json.loads(made.to_json_string())["pama_preference"] == [1.0, 2.0]
    for rule, name in (
        (first_only, "first_only"),
        (pk.SoftMin(0.5), repr(pk.SoftMin(0.5))),
        ("upgrad", "upgrad"),
    ):
        made = settings(PamaGRPOConfig, tmp_path, pama_rule=rule)
        assert json.loads(made.to_json_string())["pama_rule"] == name
        assert pickle.loads(pickle.dumps(made)).pama_rule == rule
    trained = trainer(PamaGRPOTrainer, [short], tmp_path, pama_rule=first_only, max_steps=1)
    trained.train()
    trained.save_model()


# --- versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["1.10.0", "0.29.1", "1.17rc1", "2.0.0.dev0"])
def test_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"expected trl from 1\.\d+ to 1\.\d+, found {re.escape(found)}"):
        configuration._check_version()


def test_no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise configuration.PackageNotFoundError(name)

    monkeypatch.setattr(configuration, "version", missing)
    with pytest.raises(ImportError, match=r"found none \(pip install 'pama-kernels\[trl\]'\)"):
        configuration._check_version()
