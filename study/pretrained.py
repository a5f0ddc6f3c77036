"""python -m study.pretrained [--quick] [--out DIR]

A pretrained model: GRPO of SmolLM2-135M-Instruct on the three rewards of the demo, helpful, friendly and
brief (examples/customer_service.py), paired over rules: a seed fixes the prompts and the random numbers of
every step and of every evaluation. The loop is `combine_advantages` and `pama_loss`, one gradient step a
rollout, no trainer around them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
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
from tqdm import tqdm

import pama_kernels as pk

from . import ranges
from .split_model import Rollout, SplitModel
from .store import Store

PART = PROBLEM = "pretrained"
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
    """What every rule gets; the rewards, the temperature and the KL coefficient are the demo's."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rules: tuple[str, ...] = tuple(RULES)
    rate: float = 1.5e-4
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


QUICK = Settings(seeds=(0,), steps=2, curve_every=1, final_replies=2, greedy_tokens=8)


def uniform(rows: int, tokens: int, *seed: int) -> Tensor:
    """(rows, tokens); any numbers below 1000 name the stream."""
    number = 0
    for part in seed:
        number = 1000 * number + part
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(number))


@dataclass
class Evaluation:
    scores: Tensor  # (B, N)
    kl: float  # to the start, nats per reply
    tokens: float  # a reply
    texts: list[str]


@dataclass
class Experiment:
    """The model, the rewards, and what is measured of them."""

    settings: Settings
    starts: dict[int, tuple[Evaluation, Evaluation]] = field(default_factory=dict)

    @cached_property
    def policy(self) -> SplitModel:
        device = torch.device("cpu")
        model, tokenizer = smollm2.load(None, smollm2.best_dtype(device), device)
        smollm2.train_top_layers(model, self.settings.trained_layers)
        s = self.settings
        return SplitModel(
            model, tokenizer, smollm2.ends_of(model, tokenizer), s.trained_layers, s.temperature
        )

    @cached_property
    def rewards(self) -> Rewards:
        return Rewards(set(self.policy.ends.tolist()), torch.device("cpu"))

    def prompts(self, pairs: list[tuple[str, str]]) -> list[str]:
        tokenizer = self.policy.tokenizer
        return [
            tokenizer.apply_chat_template(
                prompt_of(asked, tokenizer), tokenize=False, add_generation_prompt=True
            )
            for asked, _ in pairs
        ]

    def score(self, rollout: Rollout, pairs: list[tuple[str, str]]) -> tuple[list[str], Tensor]:
        """The replies' texts and rewards (B, N)."""
        ids = rollout.ids()
        texts = self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        each = len(ids) // len(pairs)
        asked, reference = zip(*(pair for pair in pairs for _ in range(each)), strict=True)
        given = {"completions": texts, "completion_ids": ids, "complaint": asked, "reference": reference}
        return texts, torch.tensor([function(**given) for function in self.rewards.functions()]).T

    @torch.no_grad()
    def evaluate(self, each: int, tokens: int, draws: Tensor | None) -> Evaluation:
        """`each` replies to every held-out complaint."""
        pairs = list(HELD_OUT)
        rollout = self.policy.sample(self.prompts(pairs), each, tokens, draws)
        texts, scores = self.score(rollout, pairs)
        logp = self.policy.logits(rollout).log_softmax(-1)
        reference = self.policy.logits(rollout, start=True).log_softmax(-1)
        # The divergence at each position in full: the sampled tokens add no noise of their own.
        kl = torch.nn.functional.kl_div(reference, logp, log_target=True, reduction="sum")
        return Evaluation(scores, float(kl) / len(texts), float(rollout.mask.sum(1).float().mean()), texts)

    def sampled(self, seed: int, each: int) -> Evaluation:
        """With the same random numbers at every call; the first replies are those of a call with fewer."""
        s, number = self.settings, len(HELD_OUT)
        draws = uniform(s.final_replies * number, s.tokens, seed, 999)
        draws = draws.view(s.final_replies, number, -1)[:each].transpose(0, 1).reshape(number * each, -1)
        return self.evaluate(each, s.tokens, draws)

    def start(self, seed: int) -> tuple[Evaluation, Evaluation]:
        """Before training: the few replies of the curve, and the many of the end."""
        if seed not in self.starts:
            self.policy.to_start()
            s = self.settings
            self.starts[seed] = self.sampled(seed, s.curve_replies), self.sampled(seed, s.final_replies)
        return self.starts[seed]


@dataclass
class Log:
    """Rows of one run: points of the curve, steps, replies."""

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
        row["mgda_tv"] = ""
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


def train(experiment: Experiment, name: str, seed: int) -> Log:
    s, policy = experiment.settings, experiment.policy
    log = Log({"part": PART, "problem": PROBLEM, "rule": name, "rate": s.rate, "seed": seed})
    few, many = experiment.start(seed)
    policy.to_start()
    log.point(0, few, few)
    optimizer = smollm2.Float32AdamW(policy.parameters(), lr=s.rate, weight_decay=0.0)
    order = epochs(seed)
    for step in range(1, s.steps + 1):
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
    """The first `few` of `each` replies to a complaint: those that the other points of the curve have."""
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
    """One rollout and one gradient step; what is logged of it."""
    s, policy = experiment.settings, experiment.policy
    draws = uniform(len(pairs) * s.group, s.tokens, seed, step)
    rollout = policy.sample(experiment.prompts(pairs), s.group, s.tokens, draws)
    scores = experiment.score(rollout, pairs)[1]
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
    row["kl"] = float((difference.exp() - difference - 1).sum()) / len(scores)
    return row | {"tokens": float(lengths.mean())}


def correlation(advantages: Tensor, combined: Tensor, tokens: Tensor) -> Tensor:
    """Of each objective's advantage with the combined one (N,), over the tokens; 0 for a constant."""
    weight = tokens / tokens.sum()
    a, b = advantages.double(), combined.double()[:, None]
    a, b = a - weight @ a, b - weight @ b
    spread = ((weight @ a.square()) * (weight @ b.square())).sqrt()
    return torch.where(spread > 0, (weight @ (a * b)) / spread, 0.0)


def run(folder: Path, quick: bool = False, seeds: tuple[int, ...] = (), rules: tuple[str, ...] = ()) -> None:
    """Seed by seed, so that a study that was stopped early still compares all rules."""
    settings = QUICK if quick else Settings()
    settings = replace(settings, seeds=seeds or settings.seeds, rules=rules or settings.rules)
    steps, curve = Store(folder / f"{PART}_steps.csv.gz"), Store(folder / f"{PART}.csv.gz")
    jobs = [
        (rule, seed)
        for seed in settings.seeds
        for rule in settings.rules
        if not curve.has(PROBLEM, rule, settings.rate, seed)
    ]
    experiment = Experiment(settings)
    smollm2.keep_freed_memory()
    for rule, seed in (bar := tqdm(jobs, desc=PART, unit="run")):
        bar.set_postfix_str(f"{rule}, seed {seed}")
        log = train(experiment, rule, seed)
        with gzip.open(folder / f"{PART}_replies.jsonl.gz", "at", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in log.replies)
        steps.add(log.steps)
        curve.add(log.curve)  # last: a run that is there is whole
    steps.finish()
    curve.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "local", help="folder of the logs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=[], help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options.out, options.quick, tuple(options.seeds), tuple(options.rules))


if __name__ == "__main__":
    main()
