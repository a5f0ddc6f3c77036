"""A tiny language model, a tokenizer and reward functions for TRL, all made on the spot."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from pama_kernels.integrations.trl import PamaGRPOConfig, PamaGRPOTrainer

PROMPTS = ["abc", "the cat", "a b", "dog", "on", "zebra", "x", "we go"]
Reward = Callable[..., list[Any]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    symbols = ["<pad>", "<eos>", *string.ascii_lowercase, " "]
    letters = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def late(completions: list[str], **_: Any) -> list[float | None]:
    """Share of letters of the second half of the alphabet, for completions of two letters and more."""
    return [sum(x > "m" for x in text) / len(text) if len(text) > 1 else None for text in completions]


# One rollout of 8 completions per step, fast and silent
TINY: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "max_steps": 2,
    "seed": 3,
}


def settings(kind: type[GRPOConfig], where: Path, **changes: Any) -> GRPOConfig:
    return kind(**{"output_dir": str(where), **TINY, **changes})


def trainer(
    kind: type[GRPOTrainer], rewards: list[Reward], where: Path, *, policy: Any = None, **changes: Any
) -> Any:
    named = {key: changes.pop(key) for key in ("callbacks", "eval_dataset") if key in changes}
    config = PamaGRPOConfig if issubclass(kind, PamaGRPOTrainer) else GRPOConfig
    return kind(
        model() if policy is None else policy,
        rewards,
        settings(config, where, **changes),
        train_dataset=changes.pop("train_dataset", None) or dataset(),
        processing_class=tokenizer(),
        **named,
    )
