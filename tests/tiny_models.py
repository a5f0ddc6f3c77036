"""A tokenizer of letters and the sizes of a tiny causal model, for tests that need a real one."""

from __future__ import annotations

import string
from typing import Any

LETTERS = ["<pad>", "<eos>", *string.ascii_lowercase, " "]
# Of a configuration of transformers with a Llama-like architecture
LETTER_MODEL: dict[str, Any] = {
    "vocab_size": len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def letter_tokenizer() -> Any:
    """One token per letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(LETTERS)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")
