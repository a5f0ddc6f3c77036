"""English text that comes with CPython, as token ids for a small word-level language model."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

END = 0  # token that begins and ends every text


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


def paragraphs() -> list[str]:
    """Distinct paragraphs of plain prose: words and punctuation, no code, no tables."""
    found = []
    for text in english_of_python():
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
            if re.fullmatch(r"[A-Z][A-Za-z ,;:.'()!?-]{20,400}[.!]", line):
                found.append(line)
    return list(dict.fromkeys(found))


class Corpus:
    """Paragraphs as tokens, one per word or punctuation mark; a tenth of them is held out.

    Paragraphs with a word outside of the vocabulary are left out, so that every text that the model
    can write consists of words.
    """

    def __init__(self, vocabulary: int, prompt_tokens: int, seed: int) -> None:
        text = paragraphs()
        random.Random(seed).shuffle(text)
        self.tokenizer = Tokenizer(models.WordLevel(unk_token="<end>"))
        self.tokenizer.normalizer = normalizers.Lowercase()
        self.tokenizer.pre_tokenizer = pre_tokenizers.Split(
            Regex(r"\w+('\w+)?|[^\w\s]"), "removed", invert=True
        )
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False
        )
        self.tokenizer.train_from_iterator(text, trainer)
        encoded = [e.ids for e in self.tokenizer.encode_batch(text) if END not in e.ids]
        encoded = [[END, *ids, END] for ids in encoded]
        tenth = len(encoded) // 10
        self.valid, self.train = encoded[:tenth], encoded[tenth:]
        beginnings = set(self._prompts(self.train, prompt_tokens))
        self.train_prompts = torch.tensor(sorted(beginnings))
        held_out = dict.fromkeys(self._prompts(self.valid, prompt_tokens))
        self.valid_prompts = torch.tensor([p for p in held_out if p not in beginnings])

    def _prompts(self, encoded: list[list[int]], size: int) -> list[tuple[int, ...]]:
        """The first tokens of the paragraphs whose first sentence is longer than them."""
        full_stop = self.tokenizer.token_to_id(".")
        long_enough = (tuple(ids[:size]) for ids in encoded if len(ids) > size + 2)
        return [prompt for prompt in long_enough if full_stop not in prompt]

    def decode(self, tokens: Tensor) -> str:
        words = [self.tokenizer.id_to_token(t) for t in tokens.tolist() if t != END]
        return re.sub(r" ([,;:.)!?])|(\() ", r"\1\2", " ".join(words))
