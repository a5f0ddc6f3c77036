"""One run of the pretrained model: its settings, its steps and its measurements."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import smollm2
import torch
from complaints import HELD_OUT, TRAIN
from customer_service import Rewards, prompt_of
from torch import Tensor

import pama_kernels as pk

from . import ranges
from .gradients import gram_of_gradients, of_gradients
from .split_model import Rollout, SplitModel

PART = "pretrained"
RULES: dict[str, pk.Pama | pk.UPGrad | pk.Fixed] = {
    "fixed": pk.Fixed(),
    "cosines-r0.1": pk.Pama(),
    "upgrad": pk.UPGrad(),
    "paper-token": pk.Pama.paper("token"),
    "paper-batch": pk.Pama.paper("batch"),
}
LOW, HIGH = torch.tensor(ranges.LOW[PART]), torch.tensor(ranges.HIGH[PART])


@dataclass(frozen=True)
class Settings:
    """The same for every rule; the rewards, the temperature and the KL coefficient are the demo's."""

    part: str = PART  # also the name of the problem
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rules: tuple[str, ...] = tuple(RULES)
    rates: tuple[float, ...] = (1.5e-4,)
    steps: int = 10
    prompts: int = 4  # a step; ten steps are one epoch of the complaints
    group: int = 8
    tokens: int = 24
    temperature: float = 0.7
    trained_layers: int = 10
    kl_coef: float = 0.04
    curve_every: int = 2
    curve_replies: int = 2  # to each held-out complaint
    final_replies: int = 6
    greedy_tokens: int = 40
    shown_replies: int = 1  # sampled, to each held-out complaint, beside the greedy one
    pass_replies: int = 6  # to each held-out complaint, sampled at once
    pass_prompts: int = len(HELD_OUT)  # whose logits are computed at once
    gradients_every: int = 0  # steps between two measurements of the objectives' gradients; 0: none
    padded: int | None = None  # tokens of a prompt: sampling at fixed sizes

    def quick(self) -> Settings:
        few = {"curve_replies": self.pass_replies, "final_replies": self.pass_replies} if self.padded else {}
        small = replace(self, seeds=(0,), steps=2, curve_every=1, final_replies=2, greedy_tokens=8)
        return replace(small, rates=self.rates[:1], gradients_every=min(1, self.gradients_every), **few)


def uniform(rows: int, tokens: int, *seed: int) -> Tensor:
    """(rows, tokens); any numbers below 1000 name the stream."""
    number = 0
    for part in seed:
        number = 1000 * number + part
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(number))


@dataclass
class Evaluation:
    scores: Tensor  # (B, N)
    kl: float  # to the initial policy, nats per completion
    tokens: float  # per completion
    texts: list[str]


@dataclass
class Experiment:
    """The model, the rewards, and their evaluation."""

    settings: Settings
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: str | None = None  # a folder; None: the package's
    starts: dict[int, tuple[Evaluation, Evaluation]] = field(default_factory=dict)

    @cached_property
    def policy(self) -> SplitModel:
        model, tokenizer = smollm2.load(self.model, smollm2.best_dtype(self.device), self.device)
        smollm2.train_top_layers(model, self.settings.trained_layers)
        s = self.settings
        ends = smollm2.ends_of(model, tokenizer)
        return SplitModel(model, tokenizer, ends, s.trained_layers, s.temperature, s.padded)

    @cached_property
    def rewards(self) -> Rewards:
        return Rewards(set(self.policy.ends.tolist()), self.device)

    def prompts(self, pairs: list[tuple[str, str]]) -> list[str]:
        tokenizer = self.policy.tokenizer
        return [
            tokenizer.apply_chat_template(
                prompt_of(asked, tokenizer), tokenize=False, add_generation_prompt=True
            )
            for asked, _ in pairs
        ]

    def score(self, rollout: Rollout, pairs: list[tuple[str, str]]) -> tuple[list[str], Tensor]:
        """The completions' texts and rewards (B, N)."""
        ids = rollout.ids()
        texts = self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        each = len(ids) // len(pairs)
        asked, reference = zip(*(pair for pair in pairs for _ in range(each)), strict=True)
        given = {"completions": texts, "completion_ids": ids, "complaint": asked, "reference": reference}
        return texts, torch.tensor([function(**given) for function in self.rewards.functions()]).T

    @torch.no_grad()
    def evaluate(self, each: int, tokens: int, draws: Tensor | None) -> Evaluation:
        """`each` completions for every held-out complaint; `draws` (complaints, each, T)."""
        pairs, kl, lengths, texts, scores = list(HELD_OUT), 0.0, 0.0, [], []
        for first in range(0, each, self.settings.pass_replies):
            some = min(each - first, self.settings.pass_replies)
            uniform = None if draws is None else draws[:, first : first + some].flatten(0, 1)
            rollout = self.policy.sample(self.prompts(pairs), some, tokens, uniform)
            found, values = self.score(rollout, pairs)
            texts.append([found[i : i + some] for i in range(0, len(found), some)])
            scores.append(values.unflatten(0, (len(pairs), some)))
            lengths += float(rollout.mask.sum())
            for i in range(0, len(pairs), self.settings.pass_prompts):
                kl += self.divergence(rollout.of_prompts(i, i + self.settings.pass_prompts))
        number = each * len(pairs)
        flat = [text for parts in zip(*texts, strict=True) for part in parts for text in part]
        return Evaluation(torch.cat(scores, 1).flatten(0, 1), kl / number, lengths / number, flat)

    def divergence(self, rollout: Rollout) -> float:
        """KL to the initial policy, summed over the completions. At each position it is exact over the
        vocabulary, so that the sampled tokens add no noise."""
        logp = self.policy.logits(rollout).log_softmax(-1)
        reference = self.policy.logits(rollout, start=True).log_softmax(-1)
        return float(torch.nn.functional.kl_div(reference, logp, log_target=True, reduction="sum"))

    def sampled(self, seed: int, each: int) -> Evaluation:
        """With the same random numbers in every call; a call with fewer gives the first of them."""
        s, number = self.settings, len(HELD_OUT)
        draws = uniform(s.final_replies * number, s.tokens, seed, 999)
        draws = draws.view(s.final_replies, number, -1)[:each].transpose(0, 1)
        return self.evaluate(each, s.tokens, draws)

    def start(self, seed: int) -> tuple[Evaluation, Evaluation]:
        """Before training: the few completions of the curve, and the many of the end."""
        if seed not in self.starts:
            self.policy.to_start()
            s = self.settings
            self.starts[seed] = self.sampled(seed, s.curve_replies), self.sampled(seed, s.final_replies)
        return self.starts[seed]


@dataclass
class Log:
    """Rows of one run: points of the curve, steps, completions."""

    head: dict[str, Any]
    curve: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def point(self, step: int | str, now: Evaluation, before: Evaluation) -> None:
        means = now.scores.mean(0)
        gains = (means - before.scores.mean(0)) / (HIGH - LOW)
        shares = ((means - LOW) / (HIGH - LOW)).clamp(0.001, 1)
        taken = self.steps
        weights = [
            sum(row[f"weight_{i}"] for row in taken) / len(taken) if taken else "" for i in range(len(means))
        ]
        row = self.head | {"step": step} | numbered("reward", means) | numbered("gain", gains)
        row |= {"worst_gain": float(gains.min()), "balance": float(shares.log().mean().exp()), "kl": now.kl}
        row["gain_per_kl"] = float(gains.mean()) / now.kl if now.kl >= 1e-6 else ""
        row["sacrifice"] = sum(row["sacrificed"] for row in taken) / len(taken) if taken else ""
        measured = [row for row in taken if "mgda_tv" in row]
        row["mgda_tv"] = ""
        if measured:
            names = ("mgda_tv", "gradient_sacrificed")
            row |= {name: sum(x[name] for x in measured) / len(measured) for name in names}
        row |= numbered("weight", weights) | {"tokens": now.tokens}
        self.curve.append(row)

    def reply(self, kind: str, evaluation: Evaluation, each: int, shown: int) -> None:
        for i, (asked, _) in enumerate(HELD_OUT):
            for j in range(shown):
                row = {"rule": self.head["rule"], "seed": self.head["seed"], "kind": kind, "complaint": asked}
                row["reply"] = " ".join(evaluation.texts[i * each + j].split())
                row["rewards"] = [round(x, 3) for x in evaluation.scores[i * each + j].tolist()]
                self.replies.append(row)


def numbered(name: str, values: Any) -> dict[str, Any]:
    return {f"{name}_{i}": x if isinstance(x, str) else float(x) for i, x in enumerate(values)}


def train(
    experiment: Experiment, name: str, rate: float, seed: int, deadline: float = float("inf")
) -> Log | None:
    """None where the deadline (time.time) comes first."""
    s, policy = experiment.settings, experiment.policy
    log = Log({"part": s.part, "problem": s.part, "rule": name, "rate": rate, "seed": seed})
    few, many = experiment.start(seed)
    policy.to_start()
    log.point(0, few, few)
    optimizer = smollm2.Float32AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    order = epochs(seed)
    for step in range(1, s.steps + 1):
        if time.time() > deadline:
            return None
        pairs = [next(order) for _ in range(s.prompts)]
        log.steps.append(
            log.head | {"step": step} | update(experiment, RULES[name], optimizer, pairs, step, seed)
        )
        if step % s.curve_every == 0 and step < s.steps:
            log.point(step, experiment.sampled(seed, s.curve_replies), few)
    end = experiment.sampled(seed, s.final_replies)
    rows = slice_replies(end, s.final_replies, s.curve_replies)
    log.point(s.steps, rows, few)
    log.point("final", end, many)
    log.reply("sampled", end, s.final_replies, s.shown_replies)
    log.reply("greedy", experiment.evaluate(1, s.greedy_tokens, None), 1, 1)
    return log


def slice_replies(evaluation: Evaluation, each: int, few: int) -> Evaluation:
    """The first `few` of `each` completions per complaint, as at the other points of the curve."""
    scores = evaluation.scores.unflatten(0, (-1, each))[:, :few].flatten(0, 1)
    return replace(evaluation, scores=scores)


def epochs(seed: int) -> Iterator[tuple[str, str]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (TRAIN[i] for i in torch.randperm(len(TRAIN), generator=generator).tolist())


def update(
    experiment: Experiment,
    rule: Any,
    optimizer: torch.optim.Optimizer,
    pairs: list[tuple[str, str]],
    step: int,
    seed: int,
) -> dict[str, Any]:
    """One rollout and one gradient step; returns the row of the log."""
    s, policy = experiment.settings, experiment.policy
    draws = uniform(len(pairs) * s.group, s.tokens, seed, step)
    rollout = policy.sample(experiment.prompts(pairs), s.group, s.tokens, draws)
    scores = experiment.score(rollout, pairs)[1].to(policy.device)
    advantages = pk.group_normalize(scores, group_size=s.group)
    # One scale for all rules, against the KL term too.
    combined = pk.combine_advantages(advantages, rollout.mask, rule=rule, normalize=True)
    with torch.no_grad():
        reference = policy.logprobs(rollout, policy.logits(rollout, start=True))
    logprobs = policy.logprobs(rollout, policy.logits(rollout))
    output = pk.pama_loss(
        logprobs,
        logprobs.detach(),
        combined.advantages[:, None],
        rollout.mask,
        rule="fixed",
        ref_logprobs=reference,
        kl_coef=s.kl_coef,
    )
    gram = None
    if s.gradients_every and step % s.gradients_every == 0:
        columns = torch.cat([advantages, combined.advantages[:, None]], 1)
        gram = gram_of_gradients(policy.parameters(), logprobs, rollout.mask, columns)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    policy.model.zero_grad()
    lengths = rollout.mask.sum(1).double()
    correlations = correlation(advantages, combined.advantages, lengths)
    difference = (reference - logprobs.detach())[rollout.mask]
    row = numbered("reward", scores.mean(0)) | numbered("weight", combined.weights)
    row |= numbered("correlation", correlations)
    row["sacrificed"] = float((correlations < -1e-4).any())
    if gram is not None:
        row |= of_gradients(gram, combined.weights)
    row["kl"] = float((difference.exp() - difference - 1).sum()) / len(scores)
    return row | {"tokens": float(lengths.mean())}


def correlation(advantages: Tensor, combined: Tensor, tokens: Tensor) -> Tensor:
    """Of each objective's advantage with the combined one (N,), over the tokens; 0 for a constant."""
    weight = tokens / tokens.sum()
    a, b = advantages.double(), combined.double()[:, None]
    a, b = a - weight @ a, b - weight @ b
    spread = ((weight @ a.square()) * (weight @ b.square())).sqrt()
    return torch.where(spread > 0, (weight @ (a * b)) / spread, 0.0)
