"""python -m study.sentiment_length [--quick] [--out DIR]

The paper's first experiment (He & Maghsudi 2025, arXiv 2508.07768: GPT-2, sentiment and length) at small
scale, with the settings of its code base (RiC): PPO with four epochs of mini-batches, raw rewards, an
adaptive KL penalty. The model is a word-level transformer that is first fitted to English text. A rule with
"-reference" takes the ratio of PPO to the frozen reference model instead of the rollout policy: the paper can
be read either way.

`fixed-raw` is the paper's MORLHF, one value head on r1 / 2 + r2 / 2; `fixed` whitens each objective's
advantages. With two whitened objectives, Pama on cosines and UPGrad are `fixed`.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import pama_kernels as pk

from . import ranges
from .corpus import END, Corpus
from .store import Store
from .tiny_model import Policy, Shape, fit

PART, PROBLEM = "sentiment_length", "sentiment-length"
REFERENCE = "-reference"
RULES: dict[str, pk.Pama | pk.Fixed] = {
    "fixed-raw": pk.Fixed(),
    "fixed": pk.Fixed(),
    "paper-token": pk.Pama.paper("token"),
    "paper-batch": pk.Pama.paper("batch"),
}
OBJECTIVES = ("sentiment", "length")
LOW, HIGH = torch.tensor(ranges.LOW[PART]), torch.tensor(ranges.HIGH[PART])
SHAPE = Shape()
USUAL_TOKENS = 16  # instead of the paper's 140 characters


@dataclass(frozen=True)
class Settings:
    """The same for every rule. Clip, discount, epochs, KL coefficient and target are the paper's (RiC's PPO);
    its LoRA at rate 1e-5 is the full training of a tiny model at higher rates here."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    rates: tuple[float, ...] = (1e-3, 3e-4)
    rules: tuple[str, ...] = tuple(name + end for name in RULES for end in ("", REFERENCE))
    shape: Shape = SHAPE
    steps: int = 30
    batch: int = 64
    mini_batch: int = 16
    epochs: int = 4
    value_rate: float = 3e-3
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.2
    kl_target: float = 3.0  # nats per completion
    kl_horizon: int = 10_000  # completions
    curve_every: int = 5
    curve_prompts: int = 128
    gradients_every: int = 6


QUICK = Settings(
    seeds=(0,), rates=(1e-3,), shape=Shape(fit_steps=60), steps=2, curve_every=1, gradients_every=1
)


class Setting:
    """The initial model, the text and the rewards: the same for all runs."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.file = folder / f"{PART}-{settings.shape.fit_steps}.pt"
        self.sentiment = SentimentIntensityAnalyzer()

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus(self.settings.shape.vocabulary, self.settings.shape.prompt_tokens, 0)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Fitted once, and saved in the folder of the logs."""
        if not self.file.exists():
            torch.manual_seed(0)
            policy = Policy(self.settings.shape, 1)
            perplexity = fit(policy, self.corpus, self.settings.shape, 0)
            print(f"perplexity on held-out text: {perplexity:.0f}")
            unfinished = self.file.with_suffix(".unfinished")
            torch.save(policy.model.state_dict(), unfinished)
            unfinished.replace(self.file)
        return dict(torch.load(self.file))

    def policy(self, seed: int) -> Policy:
        torch.manual_seed(seed)
        policy = Policy(self.settings.shape, len(OBJECTIVES) + 1)  # the last: of the mean reward
        policy.model.load_state_dict(self.weights)
        return policy

    def rewards(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2), and the mask (B, T) of the completions' tokens, END included."""
        answers = tokens[:, self.settings.shape.prompt_tokens :]
        ended = (answers == END).cumsum(1)
        mask = ended - (answers == END).long() == 0
        lengths = (ended == 0).sum(1)
        sentiment = [self.sentiment.polarity_scores(self.corpus.decode(row))["compound"] for row in answers]
        return torch.stack([torch.tensor(sentiment), (lengths / USUAL_TOKENS).clamp(0.5, 1.5)], 1), mask

    @torch.no_grad()
    def evaluate(self, policy: Policy, start: Policy, prompts: Tensor, seed: int) -> tuple[Tensor, float]:
        """Rewards (B, 2) of one completion per prompt, and the KL to the initial policy per completion."""
        generator = torch.Generator().manual_seed(seed)
        tokens = policy.sample(prompts, self.settings.shape.new_tokens, generator)
        scores, mask = self.rewards(tokens)
        log_ratio = start(tokens, mask)[0] - policy(tokens, mask)[0]
        # E[r - 1] = 0 for the ratio r: less noise, and never negative.
        return scores, float((log_ratio.exp() - 1 - log_ratio).sum(1).mean())


class Run:
    """Training under one rule, with measurements."""

    def __init__(self, setting: Setting, name: str, rate: float, seed: int) -> None:
        self.setting, self.seed, s = setting, seed, setting.settings
        self.rule, self.raw = RULES[name.removesuffix(REFERENCE)], name.startswith("fixed-raw")
        self.to_reference = name.endswith(REFERENCE)
        self.start = setting.policy(seed).requires_grad_(False)
        self.policy = copy.deepcopy(self.start).requires_grad_(True)
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.policy.model.parameters(), "lr": rate},
                {"params": self.policy.value_heads.parameters(), "lr": s.value_rate},
            ]
        )
        self.kl_coef = s.kl_coef
        self.head = {"part": PART, "problem": PROBLEM, "rule": name, "rate": rate, "seed": seed}
        self.rows: list[dict[str, Any]] = []
        self.weights: list[Tensor] = []
        self.sacrifices: list[float] = []
        self.distances: list[float] = []

    def point(self, step: int | str, now: tuple[Tensor, float], before: Tensor) -> None:
        means, kl = now[0].mean(0), now[1]
        gains = (means - before.mean(0)) / (HIGH - LOW)
        shares = ((means - LOW) / (HIGH - LOW)).clamp(0.001, 1)
        row = self.head | {"step": step, "kl": kl, "kl_coef": self.kl_coef}
        row |= {"worst_gain": float(gains.min()), "balance": float(shares.log().mean().exp())}
        row["gain_per_kl"] = float(gains.mean()) / kl if kl >= 1e-6 else float("nan")
        row |= {"sacrifice": mean(self.sacrifices), "mgda_tv": mean(self.distances)}
        for i in range(len(OBJECTIVES)):
            row |= {f"reward_{i}": float(means[i]), f"gain_{i}": float(gains[i])}
            row[f"weight_{i}"] = mean([float(w[i]) for w in self.weights])
        self.rows.append(row)

    def step(self, number: int) -> None:
        s, setting, policy = self.setting.settings, self.setting, self.policy
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        pool = setting.corpus.train_prompts
        prompts = pool[torch.randint(len(pool), (s.batch,), generator=generator)]
        tokens = policy.sample(prompts, s.shape.new_tokens, generator)
        scores, mask = setting.rewards(tokens)
        with torch.no_grad():
            (old, values), reference = policy(tokens, mask), self.start(tokens, mask)[0]
        scores = torch.cat([scores, scores.mean(1, keepdim=True)], 1)
        rewards = (-self.kl_coef * (old - reference)).unsqueeze(-1).repeat(1, 1, scores.shape[1])
        rewards[torch.arange(s.batch), mask.sum(1) - 1] += scores
        advantages, returns = pk.multi_objective_gae(rewards, values, mask, gamma=s.gamma, lam=s.lam)
        each = pk.masked_whiten(advantages[..., :-1], mask)
        used = pk.masked_whiten(advantages[..., -1:], mask) if self.raw else each
        self.measure(tokens, mask, each, used, number)
        denominator = reference if self.to_reference else old
        for _ in range(s.epochs):
            for part in torch.randperm(s.batch, generator=generator).split(s.mini_batch):
                logprobs, values = policy(tokens[part], mask[part])
                loss = pk.pama_loss(
                    logprobs, denominator[part], used[part], mask[part], rule=self.rule, clip_range=s.clip
                ).loss
                self.optimizer.zero_grad()
                (loss + (values - returns[part])[mask[part]].square().mean()).backward()
                nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
                self.optimizer.step()
        kl = float((old - reference).sum(1).mean())
        # The controller of the KL coefficient that PPO trainers use (Ziegler et al. 2019).
        self.kl_coef *= 1 + min(max(kl / s.kl_target - 1, -0.2), 0.2) * s.batch / s.kl_horizon

    def measure(self, tokens: Tensor, mask: Tensor, each: Tensor, used: Tensor, number: int) -> None:
        """The rule's weights on the whole batch, at ratio 1."""
        combined = pk.combine_advantages(used, mask, rule=self.rule)
        a, b = each[mask].double(), combined.advantages[mask].double()
        a, b = a - a.mean(0), b - b.mean()
        spread = (a.square().mean(0) * b.square().mean()).sqrt()
        correlations = (a * b[:, None]).mean(0) / spread.clamp(min=1e-300)
        self.sacrifices.append(float((correlations < -1e-4).any()))
        if self.raw:
            return
        self.weights.append(combined.weights)
        if number % self.setting.settings.gradients_every == 1 % self.setting.settings.gradients_every:
            logprobs = self.policy(tokens, mask)[0][mask]
            losses = (logprobs[:, None] * each[mask]).mean(0)
            parameters = list(self.policy.model.parameters())
            rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
            gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
            mgda = pk.min_norm_weights(gradients @ gradients.T).weights
            self.distances.append(float((mgda - combined.weights).abs().sum()) / 2)

    def __call__(self) -> list[dict[str, Any]]:
        s, setting = self.setting.settings, self.setting
        prompts = setting.corpus.valid_prompts
        few, every = (prompts[: s.curve_prompts], 1000 + self.seed), (prompts, 2000 + self.seed)
        before = setting.evaluate(self.start, self.start, *few)
        self.point(0, before, before[0])
        for number in range(1, s.steps + 1):
            self.step(number)
            if number % s.curve_every == 0:
                self.point(number, setting.evaluate(self.policy, self.start, *few), before[0])
        first = setting.evaluate(self.start, self.start, *every)[0]
        self.point("final", setting.evaluate(self.policy, self.start, *every), first)
        return self.rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def run(folder: Path, quick: bool = False) -> None:
    """Rate by rate and seed by seed, so that an interrupted study still compares all rules."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = QUICK if quick else Settings()
    setting, store = Setting(settings, folder), Store(folder / f"{PART}.csv.gz")
    jobs = [
        (name, rate, seed)
        for rate in settings.rates
        for seed in settings.seeds
        for name in settings.rules
        if not store.has(PROBLEM, name, rate, seed)
    ]
    for name, rate, seed in (bar := tqdm(jobs, desc=PART, unit="run")):
        bar.set_postfix_str(f"{name}, rate {rate:g}, seed {seed}")
        store.add(Run(setting, name, rate, seed)())
    store.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of one seed: to see that it runs")
    local = Path(__file__).parent / "local"
    parser.add_argument("--out", type=Path, default=local, help="folder of the logs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options.out, options.quick)


if __name__ == "__main__":
    main()
