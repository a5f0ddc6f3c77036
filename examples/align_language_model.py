"""Align a small language model with three conflicting rewards: PAMA beside fixed weights.

A GPT-2 of two million parameters is fitted to the English that CPython brings along (language
reference and docstrings), so nothing is downloaded. Then it is aligned by PPO, as Algorithm 1 of
He & Maghsudi 2025 (arXiv 2508.07768) has it, with three rewards for the text it writes:

    sentiment   compound score of vaderSentiment, in [-1, 1]
    length      tokens before the end of the sentence, as a share of those allowed
    diversity   share of distinct words; falls with length, and with every repeated happy word

Two runs differ in nothing but the weights of the objectives: PAMA's (positive advantages only), and
1/3 each in the ordinary PPO loss (MORLHF).

    python examples/align_language_model.py            # six minutes on two cores
    python examples/align_language_model.py --quick    # half a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import platform
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import pama_kernels as pk

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("sentiment", "length", "diversity")
END = 0  # token that begins and ends every sentence


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result. Both methods share all but the weights."""

    steps: int = 80
    seed: int = 0
    weights_per: str = "batch"
    regularization: float = 1.0
    fit_steps: int = 600
    vocabulary: int = 2048
    width: int = 160
    layers: int = 4
    heads: int = 5
    prompt_tokens: int = 8  # the first is END
    new_tokens: int = 40
    fit_batch: int = 64
    batch: int = 64
    epochs: int = 3
    learning_rate: float = 5e-4
    value_coef: float = 0.1
    kl_coef: float = 0.1  # per token, against rewards of unit variance
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    eval_every: int = 5
    eval_prompts: int = 256


# --- text ----------------------------------------------------------------------------------------


def english_of_python() -> Iterator[str]:
    """The language reference that `help()` shows, and the docstrings of the standard library."""
    yield from topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if {"test", "tests", "site-packages", "lib2to3"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def sentences() -> list[str]:
    """Distinct sentences of ordinary prose, in a fixed order."""
    found = []
    for text in english_of_python():
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r"::=|>>>|^\s*[-=+|*~\"#]{3}", paragraph, re.MULTILINE):
                continue
            line = re.sub(r"\[\d+\]|[*`]", "", " ".join(paragraph.split()))
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", line):
                if re.fullmatch(r"[A-Z][\w\s,;:'’()/-]{20,220}[.!]", sentence):
                    found.append(sentence)
    return list(dict.fromkeys(found))
