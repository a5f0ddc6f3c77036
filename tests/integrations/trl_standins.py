"""Replacements for what TRL's own tests load from the hub, and PAMA's trainers in place of TRL's.

A pytest plugin for `run_trl_tests.py`, which runs TRL's tests in its own processes. Models are random, of the
architecture in their name, and lie in the layout of the hub's cache, so that the hub's names lead to them.
Datasets are made where `load_dataset` is called.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
from pathlib import Path
from typing import Any

OWNER = "trl-internal-testing"
REVISION = "0" * 40
# Repository, and the file of trl/chat_templates that its tokenizer has
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": "qwen2_5",
    "tiny-Qwen2ForSequenceClassification-2.5": "qwen2_5",
    "tiny-Qwen3ForCausalLM": "qwen3",
    "tiny-Qwen3ForSequenceClassification": "qwen3",
    "tiny-Qwen3MoeForCausalLM": "qwen3",
    "tiny-LlamaForCausalLM-3.2": "llama3_2",
    "tiny-LlamaForSequenceClassification-3.2": "llama3_2",
    "tiny-MistralForCausalLM-0.2": None,
    "tiny-Cohere2ForCausalLM": "cohere2",
    "tiny-Gemma2ForCausalLM": "gemma",
    "tiny-GptOssForCausalLM": "gptoss",
    "tiny-Glm4MoeForCausalLM": "glm4moe",
}
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
]
# What a configuration has of these
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


def tokenizer(template: str | None) -> Any:
    """One token for each byte."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        additional_special_tokens=[],
    )
    fast.add_tokens(SPECIAL[3:])
    if template is not None:
        folder = Path(trl.__file__).parent / "chat_templates"
        fast.chat_template = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    return fast


def make_model(name: str, template: str | None, where: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    architecture = getattr(transformers, name.split("-")[1])
    words = tokenizer(template)
    has = architecture.config_class().to_dict()
    config = architecture.config_class(
        **{key: value for key, value in SIZES.items() if key in has},
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        **({"num_labels": 1} if "Classification" in name else {}),
    )
    architecture(config).save_pretrained(where)
    words.save_pretrained(where)


def make_hub(home: Path) -> None:
    """All models, where transformers looks for those that it has loaded before."""
    for name, template in MODELS.items():
        repository = home / "hub" / f"models--{OWNER}--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        make_model(name, template, repository / "snapshots" / REVISION)


# --- datasets -----------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """The text of the datasets, the Zen of Python: 17 lines for training and 2 for evaluation."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]


def load_dataset(
    path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False
) -> Any:
    """For `datasets.load_dataset`."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    kinds = {
        "standard_prompt_only": lambda words: " ".join(words),
        "conversational_prompt_only": lambda words: [{"role": "user", "content": " ".join(words)}],
    }
    if path != f"{OWNER}/zen" or name not in kinds:
        raise ConnectionError(f"no stand-in for {path}, {name}")
    prompts = [kinds[name](line.split()[:3]) for line in sentences()]
    parts: dict[str, Any] = {"train": prompts[:17], "test": prompts[17:]}
    made = {part: Dataset.from_dict({"prompt": rows}) for part, rows in parts.items()}
    if streaming:
        made = {part: rows.to_iterable_dataset() for part, rows in made.items()}
    if split is not None:
        return made[split]
    return IterableDatasetDict(made) if streaming else DatasetDict(made)


# --- the plugin ---------------------------------------------------------------------------------------------


def absent(name: str) -> Any:
    """Packages that tests of another version of TRL than the installed one need: these are skipped."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def pytest_configure(config: Any) -> None:
    """Runs before TRL's tests are imported, so that they import the replacements."""
    import datasets
    import trl

    datasets.load_dataset = load_dataset
    importlib.import_module("trl.import_utils").__getattr__ = absent
    if os.environ.get("TRL_TESTS_WITH") == "pama":
        from pama_kernels.integrations import trl as adapter

        for kind in ("GRPO", "RLOO"):
            setattr(trl, f"{kind}Trainer", getattr(adapter, f"Pama{kind}Trainer"))
            setattr(trl, f"{kind}Config", getattr(adapter, f"Pama{kind}Config"))
