"""verl's own training loop on a CPU, from its command line to the optimizer: see verl_cpu.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LETTER_MODEL, letter_tokenizer
from verl_rewards import compute_score

import pama_kernels as pk

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed: `make test-integrations` does it", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
KEYS = "vowels", "short", "late"
PROMPTS = "abc", "the cat", "a b", "dog", "on", "zebra", "x", "we go"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with one token per letter, and its prompts."""
    import pandas
    from transformers import LlamaConfig, LlamaForCausalLM

    where = tmp_path_factory.mktemp("verl")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(where / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LETTER_MODEL)).save_pretrained(where / "model")
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    pandas.DataFrame(rows).to_parquet(where / "prompts.parquet")
    return where


Rows = list[dict[str, Any]]


def train(made: Path, where: Path, *overrides: str) -> tuple[Rows, list[Rows]]:
    """What verl logs for each step, and the responses of each step."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo"),
        *("--config-dir", "tests/integrations", "--config-name", "verl_cpu", f"hydra.run.dir={where}"),
        f"actor_rollout_ref.model.path={made / 'model'}",
        *(f"data.{kind}_files={made / 'prompts.parquet'}" for kind in ("train", "val")),
        *("trainer.logger=[console,file]", f"trainer.rollout_data_dir={where}"),
        *overrides,
    ]
    environment = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "VERL_FILE_LOGGER_PATH": str(where / "metrics"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=500, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (where / "metrics").read_text().splitlines()]
    rollouts = [
        [json.loads(line) for line in (where / f"{line['step']}.jsonl").read_text().splitlines()]
        for line in lines
    ]
    return [line["data"] for line in lines], rollouts


def expected(rollout: Rows) -> Any:
    """By the specification, from verl's record of the responses; every response counts the same."""
    scores = [compute_score("letters", row["output"], "") for row in rollout]
    assert [row["score"] for row in rollout] == pytest.approx([score["score"] for score in scores])
    rewards = torch.tensor(
        [[float("nan") if score[key] is None else score[key] for key in KEYS] for score in scores]
    ).double()
    groups = torch.tensor([PROMPTS.index(row["input"]) for row in rollout])
    raw = pk.reference.group_normalize(rewards, group_ids=groups, eps=1e-6)[:, None]
    mask = torch.ones(len(rollout), 1)
    return pk.reference.combine_advantages(raw, mask, rule=pk.Pama("batch"), objective_mask=~rewards.isnan())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("sync", "trainer.v1.trainer_mode=pama_sync"),
        ("colocate_async", "trainer.v1.trainer_mode=pama_colocate_async"),
        ("older", "trainer.use_v1=false"),
    ],
)
def test_three_steps(made: Path, tmp_path: Path, name: str, setting: str) -> None:
    steps, rollouts = train(made, tmp_path, setting)
    assert len(steps) == 3
    for step, rollout in zip(steps, rollouts, strict=True):
        assert len(rollout) == 16
        combined = expected(rollout)
        # Every update is the first over its rollout: ratios are 1, the loss is minus the mean advantage.
        assert step["actor/pg_loss"] == pytest.approx(-float(combined.advantages.mean()), abs=1e-5)
        assert step["actor/grad_norm"] > 0.01
        if name != "colocate_async":  # which generates ahead of the updates
            assert step["training/rollout_probs_diff_max"] < 1e-6
        if name != "older":
            weights = [step[f"pama/weight/{key}"] for key in KEYS]
            assert weights == pytest.approx(combined.weights.tolist(), abs=1e-4)
            assert {step[f"pama/signal/{key}"] for key in KEYS} == {2}
    assert len({step["actor/entropy"] for step in steps}) == 3


def test_one_objective_trains_as_grpo(made: Path, tmp_path: Path) -> None:
    """The same responses, losses and gradients as verl's `grpo` with its `vanilla` loss, step by step."""
    settings = {
        "pama": ["algorithm.pama.reward_keys=[vowels]"],
        "grpo": [
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",
            "trainer.v1.trainer_mode=sync",
        ],
    }
    (ours, our_rollouts), (theirs, their_rollouts) = (
        train(made, tmp_path / name, *overrides) for name, overrides in settings.items()
    )
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(our_rollouts, their_rollouts, strict=True):
        assert sorted((row["input"], row["output"]) for row in mine) == sorted(
            (row["input"], row["output"]) for row in other
        )
    for key in ("actor/pg_loss", "actor/grad_norm", "actor/entropy"):
        assert [step[key] for step in ours] == pytest.approx(
            [step[key] for step in theirs], rel=1e-4, abs=1e-6
        )
