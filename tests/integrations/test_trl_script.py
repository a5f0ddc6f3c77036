"""A typical script: LoRA, an evaluation set, gradient accumulation, and realistic rewards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_setup import (
    GRPOTrainer,
    PamaGRPOTrainer,
    PamaRLOOTrainer,
    RLOOTrainer,
    constant,
    dataset,
    late,
    logged,
    model,
    trainer,
    vowels,
)

import pama_kernels as pk

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

SATURATED = constant(1.0, "format")


def half(completions: list[str], **_: Any) -> list[float | None]:
    """None for every second completion."""
    values = late(completions)
    return [value if i % 2 else None for i, value in enumerate(values)]


def by_signal(statistics: pk.ObjectiveStatistics) -> Tensor:
    """A rule of one's own: the objectives that vary share the weight."""
    live = statistics.signal.double()
    return live / live.sum().clamp(min=1)


RULES: dict[str, dict[str, Any]] = {
    "pama": {"pama_rule": "pama"},
    "upgrad": {"pama_rule": "upgrad"},
    "fixed": {"pama_rule": "fixed"},
    "softmin": {"pama_rule": "softmin"},
    "paper": {"pama_rule": "paper", "pama_weights_per": "batch"},
    "callable": {"pama_rule": by_signal},
}
SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "num_generations": 8,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "learning_rate": 0.03,
    "optim": "adamw_torch",
    "beta": 0.0,
}


def trained(kind: Any, where: Path, **changes: Any) -> Any:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear")
    policy = model()
    with torch.no_grad():  # the layers that LoRA adapts have little effect in a random model
        policy.lm_head.weight.mul_(20)
    made = trainer(
        kind,
        [vowels, SATURATED, half],
        where,
        eval_dataset=dataset().select(range(4)),
        peft_config=lora,
        policy=policy,
        **{**SETTINGS, **changes},
    )
    made.train()
    return made


def reached(made: Any) -> dict[str, float]:
    """Mean of the last three rollouts, of the two rewards that vary."""
    return {name: sum(logged(made, f"rewards/{name}/mean")[-3:]) / 3 for name in ("vowels", "half")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """The result of TRL's own trainers."""
    where = tmp_path_factory.mktemp("plain")
    return {
        name: reached(trained(kind, where / name))
        for name, kind in (("grpo", GRPOTrainer), ("rloo", RLOOTrainer))
    }


@pytest.mark.parametrize(
    ("rule", "kind"),
    # both trainers share the code of the rules: RLOO runs one for each kind of weights
    [*((rule, "grpo") for rule in RULES), *((rule, "rloo") for rule in ("pama", "softmin", "callable"))],
)
def test_script(rule: str, kind: str, plain: dict[str, dict[str, float]], tmp_path: Path) -> None:
    ours = {"grpo": PamaGRPOTrainer, "rloo": PamaRLOOTrainer}[kind]
    made = trained(ours, tmp_path, **RULES[rule])
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    evaluations = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert (len(steps), len(evaluations)) == (12, 2)
    for prefix, entries in (("", steps), ("eval_", evaluations)):
        for entry in entries:
            assert entry[f"{prefix}pama/signal/format"] == 1
            assert 1 <= entry[f"{prefix}pama/signal/half"] <= 2  # evaluation: the mean over batches
            numbers = {key: x for key, x in entry.items() if key.startswith(f"{prefix}pama/")}
            assert len(numbers) <= 3 * 4 + 3 + 1  # by objective, by pair, the optimum
            assert all(x is None or math.isfinite(x) for x in numbers.values())
            assert entry[f"{prefix}pama/conflict/vowels~format"] is None
    if rule != "softmin":  # weights per batch: of what varies, until all has been learned
        signals = [max(entry[f"pama/signal/{name}"] for name in ("vowels", "half")) for entry in steps]
        taught = [entry["pama/weight/format"] for entry, x in zip(steps, signals, strict=True) if x == 2]
        assert set(taught) == {0}
    start = sum(steps[0][f"rewards/{name}/mean"] for name in ("vowels", "half"))
    gain, theirs = (sum(x.values()) - start for x in (reached(made), plain[kind]))
    # One short run each, so the last rewards are noisy: with other versions of TRL either may end higher.
    # The paper's rule has no part in the comparison: under its clamp a batch has no conflicts.
    assert gain > (0 if rule == "paper" else 0.75 * theirs), (start, gain, theirs)
    assert theirs > 0.2
