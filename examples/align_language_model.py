"""Align a small language model with three conflicting rewards: PAMA beside fixed weights.

A causal language model of 1.6 million parameters is fitted to the English that CPython brings along
(language reference and docstrings), so nothing is downloaded. Then PPO aligns it, as Algorithm 1 of
He & Maghsudi 2025 (arXiv 2508.07768) has it, with three rewards for what it writes after a prompt:

    sentiment   compound score of vaderSentiment, in [-1, 1]
    length      tokens before the end of the text, as a share of those allowed
    diversity   share of distinct tokens: falls with length, and with every repeated happy word

Two runs have the same start, prompts, budget and optimiser. They differ in the rule that weights the
objectives alone: PAMA's, which is the library's default, or 1/3 each (MORLHF). Both keep negative advantages
and whiten each objective by itself.

The settings were chosen with the rules of the library's first edition; one seed shows how methods behave, not
which is better. A comparison over seeds and learning rates is `python -m study`.

    python examples/align_language_model.py            # about four minutes on two cores
    python examples/align_language_model.py --quick    # half a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _corpus import Corpus
from _language_model import SCORERS, Policy, Rewards, Shape, fit
from _report import draw, mean_and_error, reward_table, write_files
from torch import Tensor, nn
from tqdm import tqdm

import pama_kernels as pk

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("sentiment", "length", "diversity")


@dataclass(frozen=True)
class Settings(Shape):
    """Everything that decides the result. Both methods share all but the weights."""

    steps: int = 60
    seed: int = 0
    rule: str = "pama"  # beside fixed weights
    batch: int = 128
    epochs: int = 2
    learning_rate: float = 3e-4
    value_learning_rate: float = 3e-3
    kl_coef: float = 0.05  # per token, against rewards of unit variance
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    eval_every: int = 5
    eval_prompts: int = 256


# --- alignment -----------------------------------------------------------------------------------


@dataclass
class Run:
    """What one method did."""

    name: str
    policy: Policy
    curve: list[dict[str, Any]] = field(default_factory=list)  # a row per step
    step_ms: list[float] = field(default_factory=list)
    kernel_ms: list[float] = field(default_factory=list)


class Stopwatch:
    """Milliseconds spent inside of `with`, added up."""

    def __init__(self) -> None:
        self.ms = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.ms += 1e3 * (time.perf_counter() - self.start)


@torch.no_grad()
def evaluate(
    policy: Policy, reference: Policy, rewards: Rewards, prompts: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Rewards (B, N) of one answer to each prompt, and the KL to the reference per token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = policy.sample(prompts, rewards.shape.new_tokens, generator)
    scores, mask = rewards(tokens)
    log_ratio = policy(tokens, mask)[0] - reference(tokens, mask)[0]
    return scores, float(log_ratio[mask].mean())


def per_objective(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}_{key}": x for key, x in zip(OBJECTIVES, values.tolist(), strict=True)}


def align(name: str, reference: Policy, corpus: Corpus, rewards: Rewards, s: Settings, rule: str) -> Run:
    """Algorithm 1: sample, score, N advantages, weights, policy step, N value-head steps.

    `rule` goes to `pk.pama_loss` and is all that the methods differ in.
    """
    policy = copy.deepcopy(reference)
    run = Run(name, policy)
    optimiser = torch.optim.Adam(
        [
            {"params": policy.model.parameters(), "lr": s.learning_rate},
            {"params": policy.value_heads.parameters(), "lr": s.value_learning_rate},
        ]
    )
    shuffle = torch.Generator().manual_seed(s.seed)  # the same prompts for both methods
    generator = torch.Generator().manual_seed(s.seed)

    def prompts(size: int) -> Tensor:
        chosen = torch.randint(len(corpus.train_prompts), (size,), generator=shuffle)
        return corpus.train_prompts[chosen]

    def held_out() -> dict[str, float]:
        """The same prompts and random numbers every time: the curve moves with the policy alone."""
        fixed = corpus.valid_prompts[: s.eval_prompts]
        return per_objective("held_out", evaluate(policy, reference, rewards, fixed, s.seed)[0].mean(0))

    # Rewards are put on one scale, once and for all: mean 0 and variance 1 under the reference.
    start, _ = evaluate(reference, reference, rewards, prompts(512), s.seed)
    mean, std = start.mean(0), start.std(0)

    progress = tqdm(range(s.steps), desc=f"align by {name}", unit="step")
    for step in progress:
        row: dict[str, Any] = {"method": name, "step": step}
        if step % s.eval_every == 0:
            row |= held_out()
        whole, kernels = Stopwatch(), Stopwatch()
        with whole:
            tokens = policy.sample(prompts(s.batch), s.new_tokens, generator)
            scores, mask = rewards(tokens)
            with torch.no_grad():
                old_logprobs, values = policy(tokens, mask)
                log_ratio = old_logprobs - reference(tokens, mask)[0]

            # Every objective pays for leaving the reference (k1), so that each convex combination
            # of them pays once. The score comes with the last token.
            token_rewards = (-s.kl_coef * log_ratio).unsqueeze(-1).repeat(1, 1, len(OBJECTIVES))
            token_rewards[torch.arange(s.batch), mask.sum(1) - 1] += (scores - mean) / std
            with kernels:
                advantages, returns = pk.multi_objective_gae(
                    token_rewards, values, mask, gamma=s.gamma, lam=s.lam
                )
            # Each objective whitened: else the one of the widest advantages decides, and where a
            # value head lags behind its reward, no sign means anything.
            advantages = pk.masked_whiten(advantages, mask)

            for _ in range(s.epochs):
                logprobs, values = policy(tokens, mask)
                with kernels:
                    out = pk.pama_loss(
                        logprobs, old_logprobs, advantages, mask, clip_range=s.clip_range, rule=rule
                    )
                value_loss = (values - returns)[mask].square().mean()
                optimiser.zero_grad()
                (out.loss + value_loss).backward()
                nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
                optimiser.step()

        run.step_ms.append(whole.ms)
        run.kernel_ms.append(kernels.ms)
        weights = out.weights if out.weights.dim() == 1 else out.weights.mean(0)
        row |= {"kl": float(log_ratio[mask].mean())}
        row |= per_objective("reward", scores.mean(0)) | per_objective("weight", weights)
        run.curve.append(row)
        live = {key: f"{row['reward_' + key]:.2f} (w {row['weight_' + key]:.2f})" for key in OBJECTIVES}
        progress.set_postfix(live | {"KL": f"{row['kl']:.2f}"})
    run.curve.append({"method": name, "step": s.steps} | held_out())
    return run


# --- main job ------------------------------------------------------------------------------------


def samples_of(policy: Policy, corpus: Corpus, settings: Settings, prompts: Tensor) -> list[str]:
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = policy.sample(prompts, settings.new_tokens, generator)
    size = settings.prompt_tokens
    return [f"{corpus.decode(row[:size])} | {corpus.decode(row[size:])}" for row in tokens]


def arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="policy steps of each method")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--rule", choices=("pama", "upgrad", "softmin"), default=defaults.rule)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for demo.png, demo.json and demo.csv "
        "(default: docs/images and examples/results; with --quick a temporary folder)",
    )
    parser.add_argument("--quick", action="store_true", help="half a minute, to see that it runs")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"steps: expected a positive number, got {options.steps}")
    return options


def main() -> None:
    options = arguments()
    settings = Settings(seed=options.seed, rule=options.rule)
    if options.quick:
        settings = replace(settings, fit_steps=60, steps=6, batch=32, eval_every=3, eval_prompts=32)
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)
    picture_folder, results_folder = ROOT / "docs" / "images", ROOT / "examples" / "results"
    if options.out or options.quick:
        folder = options.out or Path(tempfile.gettempdir()) / "pama-demo"
        picture_folder = results_folder = folder

    began, cpu_began = time.perf_counter(), time.process_time()
    torch.manual_seed(settings.seed)
    corpus = Corpus(settings.vocabulary, settings.prompt_tokens, settings.seed)
    prompts = corpus.valid_prompts
    reference = Policy(settings, len(OBJECTIVES))
    parameters = sum(p.numel() for p in reference.model.parameters())
    print(
        f"{len(corpus.train)} paragraphs, {sum(map(len, corpus.train))} tokens; "
        f"{len(prompts)} held-out prompts; a model of {parameters / 1e6:.1f} million parameters"
    )
    perplexity = fit(reference, corpus, settings, settings.seed)
    print(f"perplexity on held-out text: {perplexity:.0f}")

    rewards = Rewards(corpus, settings, [SCORERS[name] for name in OBJECTIVES])
    runs = [
        align("PAMA", reference, corpus, rewards, settings, settings.rule),
        align("MORLHF", reference, corpus, rewards, settings, "fixed"),
    ]

    policies = {"before": reference} | {run.name: run.policy for run in runs}
    table, samples = {}, {}
    for name, policy in policies.items():
        # Several answers to every held-out prompt, with random numbers that no curve has used.
        answers = [
            evaluate(policy, reference, rewards, prompts, settings.seed + 1 + repeat)
            for repeat in range(1 if options.quick else 4)
        ]
        scores = torch.cat([scores for scores, _ in answers])
        kl = statistics.mean(kl for _, kl in answers)
        table[name] = {"rewards": mean_and_error(scores), "kl": round(kl, 4)}
        samples[name] = samples_of(policy, corpus, settings, prompts[:5])
    step_ms, kernel_ms = (statistics.mean(ms) for ms in (runs[0].step_ms, runs[0].kernel_ms))
    result = {
        "command": " ".join(["python examples/align_language_model.py", *sys.argv[1:]]),
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pama-kernels", "torch", "transformers")},
        },
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "perplexity": round(perplexity, 1),
        "objectives": OBJECTIVES,
        "answers": len(scores),
        "table": table,
        "step_ms": round(step_ms, 1),
        "kernel_ms": round(kernel_ms, 3),
        "kernel_percent": round(100 * kernel_ms / step_ms, 3),
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu_began, 1),
        "samples": samples,
    }
    curves = [row for run in runs for row in run.curve]
    write_files(results_folder, result, curves)
    title = (
        f"Three conflicting rewards of a language model with {parameters / 1e6:.1f} M parameters: "
        "PAMA and fixed equal weights (MORLHF)"
    )
    draw(picture_folder / "demo.png", OBJECTIVES, curves, title)

    for name, texts in samples.items():
        print(f"\n{name}:")
        print("\n".join(f"  {text}" for text in texts))
    print(f"\n{reward_table(OBJECTIVES, table)}")
    print(
        f"\nPAMA's kernels: {kernel_ms:.2f} ms of a step of {step_ms:.0f} ms "
        f"({100 * kernel_ms / step_ms:.2f} %), GAE once and the loss with its gradient "
        f"{settings.epochs} times"
    )
    print(f"picture: {picture_folder / 'demo.png'}; figures: {results_folder / 'demo.json'}, demo.csv")
    print(f"{result['wall_s']:.0f} s")


if __name__ == "__main__":
    main()
