"""A small causal language model with value heads, and its fit to text."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from .corpus import END, Corpus


@dataclass(frozen=True)
class Shape:
    """The model and its fit."""

    fit_steps: int = 800
    fit_batch: int = 32
    vocabulary: int = 2048
    width: int = 64
    layers: int = 2
    heads: int = 4
    prompt_tokens: int = 5  # the first is END
    new_tokens: int = 24


class Policy(nn.Module):
    """A causal language model with one value head per objective."""

    def __init__(self, shape: Shape, objectives: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.width * 8 // 3,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.prompt_tokens + shape.new_tokens,
            bos_token_id=END,
            eos_token_id=END,
        )
        self.model = LlamaForCausalLM(config)
        self.value_heads = nn.Sequential(
            nn.Linear(shape.width, shape.width),
            nn.GELU(),
            nn.Linear(shape.width, objectives),
        )
        nn.init.zeros_(self.value_heads[-1].weight)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) of the last T tokens, and the values (B, T, N) before each.

        Both are 0 where masked: the vocabulary costs more than the rest of so small a model.
        """
        size = mask.shape[1]
        hidden = self.model.model(tokens[:, :-1]).last_hidden_state[:, -size:]
        logits = self.model.lm_head(hidden[mask])
        logprobs = torch.zeros(mask.shape).masked_scatter(
            mask, -F.cross_entropy(logits, tokens[:, -size:][mask], reduction="none")
        )
        # The value heads read the trunk and leave it alone: what moves the policy is its loss.
        return logprobs, self.value_heads(hidden.detach()) * mask.unsqueeze(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, new_tokens: int, generator: torch.Generator) -> Tensor:
        """The prompts and what follows them (B, P + T), filled up with END; T as the longest needs.

        Token t of row b depends on one random number of its own, whenever the other rows end.
        """
        size = prompts.shape[1]
        uniform = torch.rand(len(prompts), new_tokens, generator=generator)
        tokens = F.pad(prompts, (0, new_tokens), value=END)
        rows = torch.arange(len(prompts))  # those that go on: the cache holds no others
        cache = DynamicCache(config=self.model.config)
        step = prompts
        for position in range(size, size + new_tokens):
            logits = self.model(step, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            cdf = logits.softmax(-1).cumsum(-1)
            drawn = uniform[rows, position - size, None] * cdf[:, -1:]
            step = torch.searchsorted(cdf, drawn, right=True).clamp(max=cdf.shape[1] - 1)
            tokens[rows, position] = step.squeeze(1)
            alive = (step != END).squeeze(1)
            rows, step = rows[alive], step[alive]
            if not len(rows):
                break
            if not alive.all():
                cache.batch_select_indices(alive)
        return tokens[:, : position + 1]


def fit(policy: Policy, corpus: Corpus, shape: Shape, seed: int) -> float:
    """Next-token prediction on the paragraphs; returns the perplexity on those held out."""
    steps, size = shape.fit_steps, shape.fit_batch
    width = shape.prompt_tokens + shape.new_tokens
    optimiser = torch.optim.AdamW(policy.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps, pct_start=0.1)

    def loss_of(batch: list[list[int]]) -> Tensor:
        rows = [torch.tensor(ids[:width]) for ids in batch]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        logits = policy.model(tokens[:, :-1].clamp(min=END)).logits
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])

    shuffle = random.Random(seed)
    progress = tqdm(range(steps), desc="fit the model", unit="step", mininterval=0.5)
    for _ in progress:
        # Neighbours in length, so that little of the batch is padding.
        pool = sorted(shuffle.sample(corpus.train, 16 * size), key=len)
        start = size * shuffle.randrange(16)
        loss = loss_of(pool[start : start + size])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    with torch.no_grad():
        return float(loss_of(corpus.valid).exp())
