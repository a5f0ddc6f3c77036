"""The study's language model: sampling at fixed sizes, and the gradients of the objectives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("quadprog", reason="quadprog is not installed: pip install 'pama-kernels[study]'")
pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from study import gradients, measures
from study.split_model import SplitModel


class Letters:
    """A tokenizer: one token for each letter."""

    def __call__(self, prompts: list[str], padding: object, max_length: int | None, **_: object) -> object:
        width = max_length if padding == "max_length" else max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, text in zip(ids, prompts, strict=True):
            row[width - len(text) :] = torch.tensor([ord(x) - 90 for x in text])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def tiny_split_model() -> SplitModel:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)  # logits that are far from equal
    return SplitModel(model, Letters(), {1, 2, 3}, 2, 1.0)


def test_sampling_at_fixed_sizes_draws_the_same_completions() -> None:
    model, prompts = tiny_split_model(), ["abc", "fghij"]
    uniform = torch.rand(8, 9, generator=torch.Generator().manual_seed(1))
    first = model.sample(prompts, 4, 9, uniform)
    model.padded = 7
    for _ in range(2):  # the buffers are used again
        second = model.sample(prompts, 4, 9, uniform)
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(first.tokens[first.mask], second.tokens[second.mask])
        torch.testing.assert_close(model.logits(first), model.logits(second), atol=1e-4, rtol=1e-4)
    assert not first.mask.all()
    one = second.of_prompts(1, 2)
    expected = model.logits(second)[int(second.mask[:4].sum()) :]
    torch.testing.assert_close(model.logits(one), expected, atol=1e-4, rtol=1e-4)


def test_gram_matrix_of_the_objectives_is_that_of_their_gradients() -> None:
    model = tiny_split_model()
    rollout = model.sample(["abc", "fghij"], 4, 9, torch.rand(8, 9))
    advantages = torch.randn(8, 3)
    weights = torch.tensor([0.2, 0.3, 0.5])
    columns = torch.cat([advantages, (advantages @ weights)[:, None]], 1)
    logprobs = model.logprobs(rollout, model.logits(rollout))
    gram = gradients.gram_of_gradients(model.parameters(), logprobs, rollout.mask, columns)
    torch.testing.assert_close(gram[:3, 3], gram[:3, :3] @ weights.double(), atol=1e-6, rtol=1e-4)
    row = gradients.of_gradients(gram, weights)
    _, least = measures.min_norm(gram[:3, :3])
    assert row["mgda_tv"] == pytest.approx(np.abs(least - weights.numpy()).sum() / 2, abs=1e-3)
    assert row["gradient_sacrificed"] == float((gram[:3, 3] < 0).any())
