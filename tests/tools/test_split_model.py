"""The study's model with trained top layers, against the whole model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import LETTER_MODEL, letter_tokenizer

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pama-kernels[study]'")

from transformers import LlamaConfig, LlamaForCausalLM

from study.split_model import Rollout, SplitModel

PROMPTS = ["an order", "late", "the shoes"]  # of different lengths
EACH, WIDTH, TEMPERATURE, END = 4, 12, 0.7, 1


@pytest.fixture
def policy() -> SplitModel:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**LETTER_MODEL, "num_hidden_layers": 3})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    policy = SplitModel(model, letter_tokenizer(), {END}, 2, TEMPERATURE)
    with torch.no_grad():  # away from the start
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return policy


def draws() -> torch.Tensor:
    return torch.rand(len(PROMPTS) * EACH, WIDTH, generator=torch.Generator().manual_seed(1))


def whole_model_logprobs(policy: SplitModel, rollout: Rollout) -> list[torch.Tensor]:
    """Row by row, without padding, cache or split."""
    found = []
    for row, ids in enumerate(rollout.ids()):
        prompt = policy.tokenizer(PROMPTS[row // EACH])["input_ids"]
        logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return found


def test_logprobs_are_those_of_the_whole_model(policy: SplitModel) -> None:
    rollout = policy.sample(PROMPTS, EACH, WIDTH, draws())
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max()  # some rows were dropped early
    logprobs = policy.logprobs(rollout, policy.logits(rollout))
    for row, expected in enumerate(whole_model_logprobs(policy, rollout)):
        # a few hundred float32 operations on numbers of the order of 10
        torch.testing.assert_close(logprobs[row, : lengths[row]], expected, atol=1e-4, rtol=1e-4)
    assert (logprobs[~rollout.mask] == 0).all()


def test_start_is_the_model_before_training(policy: SplitModel) -> None:
    rollout = policy.sample(PROMPTS, EACH, WIDTH, draws())
    start = policy.logprobs(rollout, policy.logits(rollout, start=True))
    assert (start - policy.logprobs(rollout, policy.logits(rollout))).abs().max() > 0.01
    policy.to_start()
    torch.testing.assert_close(policy.logprobs(rollout, policy.logits(rollout)), start, atol=0, rtol=0)


def test_gradients_are_those_of_the_whole_model(policy: SplitModel) -> None:
    rollout = policy.sample(PROMPTS, EACH, WIDTH, draws())
    weight = torch.randn(rollout.mask.shape)
    (policy.logprobs(rollout, policy.logits(rollout)) * weight).sum().backward()
    found = [p.grad for p in policy.parameters()]
    policy.model.zero_grad()
    rows = whole_model_logprobs(policy, rollout)
    torch.stack([(row * weight[i, : len(row)]).sum() for i, row in enumerate(rows)]).sum().backward()
    for p, gradient in zip(policy.parameters(), found, strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(gradient, p.grad, atol=1e-4 * scale, rtol=1e-3)


def test_a_row_depends_on_its_own_numbers_only(policy: SplitModel) -> None:
    uniform = draws()
    first = policy.sample(PROMPTS, EACH, WIDTH, uniform).ids()
    uniform[1:] = 1 - uniform[1:]
    assert policy.sample(PROMPTS, EACH, WIDTH, uniform).ids()[0] == first[0]


def test_greedy_takes_the_likeliest_token(policy: SplitModel) -> None:
    rollout = policy.sample(PROMPTS, 1, WIDTH, None)
    likeliest = policy.logits(rollout).argmax(-1)
    torch.testing.assert_close(likeliest, rollout.tokens[rollout.mask])
