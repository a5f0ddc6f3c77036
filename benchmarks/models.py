"""Causal language models of the shapes of GPT-2 and Llama; random weights, on which speed does not depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    feed_forward: int | None = None  # given: a Llama with untied embeddings; else GPT-2


CPU_SHAPES = (
    Shape("1M", 128, 4, 4, 1024),
    Shape("8M", 256, 8, 8, 8192),
    Shape("30M", 512, 8, 8, 8192),
    Shape("124M", 768, 12, 12, 50257),
)
GPU_SHAPES = (
    CPU_SHAPES[-1],
    Shape("1.5B", 1600, 48, 25, 50257),
    Shape("7B", 4096, 32, 32, 32000, 11008),
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shapes(quick: bool) -> Sequence[Shape]:
    if device().type == "cuda":
        return GPU_SHAPES[:1] if quick else GPU_SHAPES
    return CPU_SHAPES[:2] if quick else CPU_SHAPES


class Policy(nn.Module):
    """The trunk's last hidden state is the shared representation; the head gives log-probabilities."""

    def __init__(self, shape: Shape, positions: int) -> None:
        super().__init__()
        import transformers

        common: dict[str, Any] = {"vocab_size": shape.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        if shape.feed_forward is None:
            config: Any = transformers.GPT2Config(
                n_embd=shape.width,
                n_layer=shape.layers,
                n_head=shape.heads,
                n_positions=positions + 1,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                **common,
            )
            self.model: Any = transformers.GPT2LMHeadModel(config)
            self.trunk: Any = self.model.transformer
        else:
            config = transformers.LlamaConfig(
                hidden_size=shape.width,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                intermediate_size=shape.feed_forward,
                max_position_embeddings=positions + 1,
                tie_word_embeddings=False,
                **common,
            )
            self.model = transformers.LlamaForCausalLM(config)
            self.trunk = self.model.model

    def represent(self, tokens: Tensor) -> Tensor:
        """(B, T, H) of tokens (B, T + 1)."""
        hidden: Tensor = self.trunk(tokens[:, :-1], use_cache=False).last_hidden_state
        return hidden

    def logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(B, T)."""
        logits = self.model.lm_head(hidden).float()
        return -F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logprobs(self.represent(tokens), tokens)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())


def policy(shape: Shape, positions: int) -> Policy:
    """float32 on a CPU, bfloat16 on a GPU."""
    torch.manual_seed(0)
    place = device()
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place:
            return Policy(shape, positions)
    finally:
        torch.set_default_dtype(before)
