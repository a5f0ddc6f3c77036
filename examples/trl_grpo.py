"""A minimal example of `PamaGRPOTrainer`: three rewards and a tiny policy.

    pip install '.[trl]'
    python examples/trl_grpo.py        # offline, under two minutes on two cores
    accelerate launch --num_processes 2 --cpu examples/trl_grpo.py

The policy is a randomly initialised Qwen2 with about 20,000 parameters over letters. For your own run, change
model, tokenizer and prompts in `main` and the reward functions below.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from pama_kernels.integrations.trl import PamaGRPOConfig, PamaGRPOTrainer

# ---- the rewards: each is an objective, logged under its name -----------------------------------


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Share of vowels."""
    return [sum(x in "aeiou" for x in text) / max(1, len(text)) for text in completions]


def variety(completions: list[str], **_: Any) -> list[float | None]:
    """Share of distinct letters, low if only vowels are used; None: does not apply to short texts."""
    return [len(set(text)) / len(text) if len(text) > 1 else None for text in completions]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# ---- policy, tokenizer and prompts -------------------------------------------------------------


def letters() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<eos>", *string.ascii_lowercase]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def policy(vocabulary: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def prompts(number: int) -> Dataset:
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(number)]
    return Dataset.from_dict({"prompt": texts})


# ---- training ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="PamaGRPOTrainer with three rewards and a tiny policy.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines of the table")
    parser.add_argument(
        "--out",
        help="folder of logs and completions, for `plot` and `inspect` (default: a temporary folder)",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    tokenizer = letters()
    settings = PamaGRPOConfig(
        output_dir=arguments.out or tempfile.mkdtemp(prefix="trl_grpo_"),
        # one set of weights per rollout, from a running mean; try "upgrad", "fixed", "softmin"
        pama_rule="pama",
        pama_momentum=0.8,
        # TRL's own settings
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-3,
        max_steps=arguments.steps,
        logging_steps=arguments.every,
        save_strategy="no",
        log_completions=arguments.out is not None,
        num_completions_to_print=0,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = PamaGRPOTrainer(
        model=policy(len(tokenizer)),
        reward_funcs=[vowels, variety, length],
        args=settings,
        train_dataset=prompts(256),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if arguments.out is not None:
        trainer.save_state()  # as every checkpoint does
    if trainer.accelerator.is_main_process:
        report(trainer)


def report(trainer: PamaGRPOTrainer) -> None:
    """The logs that TRL would send to wandb, TensorBoard and the like, as a table."""
    names = trainer.objective_names
    pairs = [f"{a}~{b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    columns = {
        **{f"reward {name}": f"rewards/{name}/mean" for name in names},
        **{f"weight {name}": f"pama/weight/{name}" for name in names},
        **{f"covariance {name}": f"pama/covariance/{name}" for name in names},  # below 0: decreases
        **{f"conflict {pair}": f"pama/conflict/{pair}" for pair in pairs},
    }
    print("step".rjust(5), *columns, sep="  ")
    for entry in trainer.state.log_history:
        if "loss" in entry:
            values = {title: entry[key] for title, key in columns.items()}  # None: undefined
            cells = [f"{'-' if x is None else f'{x:.3f}'}".rjust(len(title)) for title, x in values.items()]
            print(str(entry["step"]).rjust(5), *cells, sep="  ")


if __name__ == "__main__":
    main()
