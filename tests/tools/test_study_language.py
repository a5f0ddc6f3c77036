"""The study's language model: its losses are the library's, its report that of the logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pama-kernels[study]'")
pytest.importorskip(
    "vaderSentiment", reason="vaderSentiment is not installed: pip install 'pama-kernels[study]'"
)

import pama_kernels as pk
from study import language, measures, report, store
from study.rules import BY_NAME, Rule

SHAPE = replace(language.SHAPE, vocabulary=32, width=8, layers=1, heads=2, new_tokens=6)


@pytest.fixture
def policy() -> language.Policy:
    return language.Policy(SHAPE, 3)


def batch(policy: language.Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their mask, and advantages of three objectives."""
    prompts = torch.randint(1, 32, (8, SHAPE.prompt_tokens))
    tokens = policy.sample(prompts, SHAPE.new_tokens, torch.Generator().manual_seed(0))
    answers = tokens[:, SHAPE.prompt_tokens :]
    mask = (answers == 0).cumsum(1) - (answers == 0).long() == 0
    return tokens, mask, torch.randn(*mask.shape, 3)


@pytest.mark.parametrize("rule", [BY_NAME[name] for name in language.SHORT_LIST], ids=lambda rule: rule.name)
def test_loss_is_the_librarys_under_the_rules_weights(policy: language.Policy, rule: Rule) -> None:
    losses = language.Losses(rule, policy, 0.2)
    tokens, mask, advantages = batch(policy)
    logprobs = policy(tokens, mask)[0]
    old = logprobs.detach() + 0.1 * torch.randn_like(logprobs) * mask
    loss, weights = losses(logprobs, old, advantages, mask)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    given = weights if rule.gradients else None
    args = (logprobs, old, advantages, mask)
    expected = pk.reference.pama_loss(*args, rule=rule.rule, weights=given).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    if rule.gradients:
        inputs = list(policy.model.parameters()) if rule.gradients == "mgda" else [losses.representation]
        grads = []
        for one in torch.eye(3):
            each = pk.pama_loss(*args, weights=one)
            grads.append(torch.autograd.grad(each.loss, inputs, retain_graph=True))
        _, c = measures.min_norm(language.gram_of(grads).numpy())
        np.testing.assert_allclose(weights, c, atol=1e-4)


def test_scorers_are_within_the_box_of_the_hypervolume() -> None:
    texts = [
        "",
        "a terrible, horrible failure",
        "great success and wonderful happy results",
        "the the the the",
    ]
    for name, scorers in language.EXPERIMENTS.items():
        for text in texts:
            words = list(range(len(text.split())))
            scores = [score(text, words, 24) for score in scorers.values()]
            assert all(
                w <= s <= b for w, s, b in zip(language.WORST[name], scores, language.BEST[name], strict=True)
            )
    assert language.clipped_length("", [], 24) == 0.5
    assert language.clipped_length("", list(range(24)), 24) == 1.5
    assert language.information("A word, a Word: this sentence", [], 24) == pytest.approx(3 / 12)


def test_a_killed_study_can_be_reported(tmp_path: Path) -> None:
    """Tables name what is there and leave out the rest."""
    rows = [
        {"kind": kind, "step": step, "kl": 1.0, "reward_0": 0.1, "reward_1": 0.7, "jitter": 0.2}
        | {"true_min_norm": 1.0, "largest_norm": 2.0, "loss_ms": 1.0, "step_ms": 4.0}
        for kind, step in (("log", 9), ("final", 36))
    ]
    for seed in (0, 1):
        for rule in ("start", "fixed"):
            store.write(tmp_path / "sentiment-length" / f"{rule}--{seed}.csv", rows)
    lm = report.Language(tmp_path)
    tables = report.found_tables(report.Sweep(tmp_path), report.Theory(tmp_path), lm)
    found = tables["language-sentiment-length"]
    assert "| fixed, equal | 0.100 ± 0.000 | 0.700 ± 0.000 | 11.0 ± 0.0 |" in found
    assert "Pama" not in found
    assert tables["language-three"] == report.MISSING


def test_pages_are_filled_by_name_and_an_unknown_name_is_an_error() -> None:
    page = "a\n<!-- study:x -->\nold\n<!-- end -->\nb <!--study y/z-->old<!----> c"
    once = report.fill(page, {"x": "| new |"}, {"y/z": lambda: "0.5"})
    assert once == "a\n<!-- study:x -->\n| new |\n<!-- end -->\nb <!--study y/z-->0.5<!----> c"
    assert report.fill(once, {"x": "| new |"}, {"y/z": lambda: "0.5"}) == once
    with pytest.raises(KeyError, match="x"):
        report.fill(page, {}, {"y/z": lambda: "0.5"})
