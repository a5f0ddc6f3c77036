"""Metrics per objective and pair; undefined ones are NaN, which means exclude."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_setup import (
    NAMES,
    REWARDS,
    PamaGRPOTrainer,
    Recorded,
    constant,
    copies,
    late,
    logged,
    run,
    trainer,
    vowels,
)

import pama_kernels as pk
from pama_kernels.integrations._rollout import combine, make_rule, rollout_metrics

OF_RULES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gram": ({"pama_rule": "pama"}, {"cosine"}),
    "scores": ({"pama_bound": "scores", "pama_noon": True}, {"score"}),
    "sequence": ({"pama_weights_per": "sequence"}, {"score"}),
    "default": ({}, {"second_moment"}),
    "fixed": ({"pama_rule": "fixed"}, set()),
    "softmin": ({"pama_rule": "softmin"}, set()),
}


@pytest.mark.parametrize("rule", OF_RULES)
def test_keys_and_values(rule: str, tmp_path: Path) -> None:
    settings, own = OF_RULES[rule]
    made = trainer(Recorded, REWARDS, tmp_path, max_steps=1, **settings)
    made.train()
    entry, combination = made.state.log_history[0], made.combination
    found = {name for name in entry if name.startswith("pama/")}
    kinds = {"weight", "signal", "covariance", *own}
    assert found == {
        *(f"pama/{kind}/{name}" for kind in kinds for name in NAMES),
        *(f"pama/conflict/{pair}" for pair in ("vowels~short", "vowels~late", "short~late")),
        "pama/optimum",
    }
    weights = [entry[f"pama/weight/{name}"] for name in NAMES]
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert all(entry[f"pama/signal/{name}"] == 2 for name in NAMES)
    assert all(-1 <= entry[f"pama/conflict/{pair}"] <= 1 for pair in ("vowels~short", "short~late"))
    statistics = combination.statistics
    if "score" in own:
        assert [entry[f"pama/score/{name}"] for name in NAMES] == statistics.scores.tolist()
    if rule == "scores":
        total = sum(w * entry[f"pama/score/{name}"] for w, name in zip(weights, NAMES, strict=True))
        assert entry["pama/optimum"] == pytest.approx(total, abs=1e-9)
    if rule == "gram":  # (Cc)_i >= c'Cc, up to the pull towards the preference
        cosines = [entry[f"pama/cosine/{name}"] for name in NAMES]
        assert entry["pama/optimum"] == pytest.approx(
            sum(w * x for w, x in zip(weights, cosines, strict=True))
        )


def test_covariance_is_that_of_the_statistics() -> None:
    """Signed and where all are present; below 0 exactly where a first-order step makes the objective fall."""
    advantages = torch.randn(40, 4, dtype=torch.float64)
    advantages[:, 1] = -advantages[:, 0] + 0.1 * advantages[:, 2]
    mask = torch.rand(40, 9) < torch.linspace(0.1, 1, 40)[:, None]
    present = torch.ones(40, 4, dtype=torch.bool)
    statistics = pk.objective_statistics(None, None, advantages, mask, pairs=True)
    assert statistics.covariance is not None
    for rule, preference in (
        (make_rule("fixed", {}), [1.0, 0.1, 0.1, 0.1]),
        (make_rule("upgrad", {}), [1.0] * 4),
    ):
        p = torch.tensor(preference, dtype=torch.float64)
        combined = combine(advantages, present, mask.sum(1).double(), statistics, rule, p / p.sum())
        expected = statistics.covariance @ combined.weights
        torch.testing.assert_close(combined.covariance, expected, rtol=1e-5, atol=1e-6)
        metrics = rollout_metrics(combined, dict(enumerate("abcd")), rule)
        assert metrics["pama/covariance/b"] == pytest.approx(float(expected[1]), abs=1e-6)
        assert (metrics["pama/covariance/b"] < 0) == (preference[0] > preference[1])


def test_absent_and_constant_rewards_are_distinguished(tmp_path: Path) -> None:
    """An objective that applies in the second rollout only is logged with that rollout's values alone."""
    calls: list[int] = []

    def sometimes(completions: list[str], **arguments: Any) -> list[float | None]:
        calls.append(0)
        return late(completions, **arguments) if len(calls) % 2 == 0 else [None] * len(completions)

    rewards = [vowels, sometimes, constant(1.0), constant(None, "never")]
    made, _ = run(PamaGRPOTrainer, rewards, tmp_path, max_steps=2, logging_steps=1)
    first, second = made.state.log_history[:2]
    assert [first[f"pama/signal/{name}"] for name in ("vowels", "sometimes", "constant", "never")] == [
        2,
        0,
        1,
        0,
    ]
    for name in ("pama/weight/sometimes", "pama/covariance/sometimes", "pama/second_moment/never"):
        assert first[name] is None
    assert (first["pama/weight/vowels"], first["pama/weight/constant"]) == (1, 0)
    for pair in ("vowels~constant", "vowels~never", "sometimes~never"):
        assert second[f"pama/conflict/{pair}"] is None
    calls.clear()
    together, _ = run(PamaGRPOTrainer, rewards, tmp_path, max_steps=2, logging_steps=2)
    both = together.state.log_history[0]
    for name in ("pama/weight/sometimes", "pama/covariance/sometimes", "pama/conflict/vowels~sometimes"):
        assert both[name] == pytest.approx(second[name])
        assert not math.isnan(both[name])


@pytest.mark.parametrize("number", [8, 9])
def test_many_objectives(number: int, tmp_path: Path) -> None:
    """Pairs up to 8, then the worst pair alone."""
    made, _ = run(PamaGRPOTrainer, [*copies(late, number - 1), vowels], tmp_path, max_steps=1)
    conflicts = [name for name in made.state.log_history[0] if name.startswith("pama/conflict/")]
    matrix = made.combination.statistics.conflict
    if number == 8:
        assert len(conflicts) == 28
    else:
        assert conflicts == ["pama/conflict/worst"]
        (worst,) = logged(made, "pama/conflict/worst")
        assert worst == pytest.approx(float(matrix.min()))
