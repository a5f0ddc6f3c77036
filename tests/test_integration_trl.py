"""TRL's real trainer on a tiny model: the same loss and gradients, weights of the whole rollout, resume."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import runpy
import socket
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

pytest.importorskip("trl", reason="trl is not installed: pip install 'pama-kernels[trl]'")

from transformers import HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_setup import TINY, dataset, late, model, settings, short, tokenizer, trainer, vowels

from pama_kernels.integrations import trl as integration
from pama_kernels.integrations.trl import LOSS_TYPES, PamaGRPOConfig, PamaGRPOTrainer

# Transformers' own, while it renames an argument that TRL sets
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
REWARDS = [vowels, short, late]
NAMES = ["vowels", "short", "late"]


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """A training ends with a garbage collection that takes longer than itself: leave out old objects."""
    gc.freeze()
    yield
    gc.unfreeze()


def copies(function: Any, number: int) -> list[Any]:
    """The same reward under different names."""

    def copy(index: int) -> Any:
        def reward(**arguments: Any) -> Any:
            return function(**arguments)

        reward.__name__ = f"{function.__name__}{index}"
        return reward

    return [copy(i) for i in range(number)]


class Gradients(TrainerCallback):
    """All gradients in one vector before every step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


def logged(trained: Any, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def run(kind: Any, rewards: list[Any], where: Path, **changes: Any) -> tuple[Any, list[Tensor]]:
    """The trainer after training, and its gradients."""
    gradients = Gradients()
    made = trainer(kind, rewards, where, callbacks=[gradients], **changes)
    made.train()
    return made, gradients.seen


# --- the trainer's own loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_reward_is_grpo(loss_type: str, tmp_path: Path) -> None:
    """One objective with its negative advantages, or the same three times: GRPO's loss and gradients.

    Four steps on one rollout: from the second one on the ratio is not 1, and clipping binds.
    """
    changes = {
        "loss_type": loss_type,
        "num_iterations": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.5,
        "importance_sampling_level": "sequence" if loss_type == "luspo" else "token",
    }
    plain, expected = run(GRPOTrainer, [short], tmp_path, **changes)
    if loss_type not in ("cispo", "sapo", "vespo"):
        assert max(logged(plain, "clip_ratio/region_mean")) > 0.05
    for number, bound in ((1, "scores"), (3, "gram")):
        ours, gradients = run(
            PamaGRPOTrainer, copies(short, number), tmp_path, pama_noon=False, pama_bound=bound, **changes
        )
        # TRL normalises in float32: advantages, and later the parameters, may differ by its roundings.
        assert len(logged(ours, "loss")) == 4
        assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0, abs=1e-6)
        for ours_now, expected_now in zip(gradients, expected, strict=True):
            scale = float(expected_now.abs().max())
            torch.testing.assert_close(ours_now, expected_now, rtol=0, atol=1e-5 * scale)
        for name in ("clip_ratio/region_mean", "clip_ratio/low_mean", "entropy", "num_tokens"):
            assert logged(ours, name) == pytest.approx(logged(plain, name), rel=0, abs=1e-6)


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_scale_rewards(scale_rewards: str, tmp_path: Path) -> None:
    plain, expected = run(GRPOTrainer, [late], tmp_path, scale_rewards=scale_rewards)
    ours, gradients = run(PamaGRPOTrainer, [late], tmp_path, scale_rewards=scale_rewards, pama_noon=False)
    for ours_now, expected_now in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            ours_now, expected_now, rtol=0, atol=1e-5 * float(expected_now.abs().max())
        )
    assert ours._logs["advantages"] == pytest.approx(plain._logs["advantages"], abs=1e-5)


class Audited(PamaGRPOTrainer):
    """Compares each loss and gradient with sum_i L(c_i A_i) - (N - 1) L(0), by TRL's own loss L."""

    differences: list[tuple[float, float]]
    calls = 0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        seen = {}
        normalize = self._normalize

        def recorded(*arguments: Any) -> Tensor:
            seen["advantages"] = normalize(*arguments)
            seen["present"] = ~arguments[0].isnan()
            return seen["advantages"]

        self._normalize = recorded  # type: ignore[method-assign]
        output = super()._generate_and_score_completions(inputs)
        del self._normalize
        advantages = seen["advantages"].clamp(min=0) if self.args.pama_noon else seen["advantages"]
        assert self.combination is not None
        output["weighted"] = (self.combination.weights * advantages * seen["present"]).float()
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        parameters = list(self.model.parameters())
        terms = inputs["weighted"].unbind(1)
        loss = super()._compute_loss(model, inputs)
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        expected = sum(
            GRPOTrainer._compute_loss(self, model, {**inputs, "advantages": term}) for term in terms
        )
        zero = {**inputs, "advantages": torch.zeros_like(terms[0])}
        expected = expected - (len(terms) - 1) * GRPOTrainer._compute_loss(self, model, zero)
        self._metrics["train"] = metrics
        gradients = [
            torch.cat([x.flatten() for x in torch.autograd.grad(total, parameters, retain_graph=True)])
            for total in (loss, expected)
        ]
        error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
        self.differences.append((abs(loss.item() - expected.item()), float(error)))
        return loss


@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sum_of_losses(loss_type: str, noon: bool, tmp_path: Path) -> None:
    """Three objectives that disagree: the loss is sum_i c_i L_i, with clipping, KL and entropy bonus."""
    model().save_pretrained(tmp_path / "policy")  # TRL loads the reference from where the policy came from
    policy = type(model()).from_pretrained(tmp_path / "policy")
    extra = {"entropy_coef": 0.01} if "entropy_coef" in GRPOConfig.__dataclass_fields__ else {}
    Audited.differences = []
    trained, _ = run(
        Audited,
        REWARDS,
        tmp_path,
        policy=policy,
        loss_type=loss_type,
        beta=0.1,
        num_iterations=3,
        max_steps=3,
        learning_rate=0.5,
        epsilon=0.1,
        delta=1.5,
        off_policy_mask_threshold=0.01,
        pama_noon=noon,
        pama_bound="scores" if noon or loss_type == "dapo" else "gram",
        pama_weights_per="sequence" if loss_type == "dapo" else "batch",
        pama_regularization=0.2,
        **extra,
    )
    assert len(Audited.differences) == 3
    # A few sums of 48 float32 terms in another order
    assert max(loss for loss, _ in Audited.differences) < 2e-6
    assert max(gradient for _, gradient in Audited.differences) < 2e-5
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        assert max(logged(trained, "clip_ratio/high_mean")) > 0.02
        assert (max(logged(trained, "clip_ratio/low_mean")) > 0.02) == (not noon)
    for name in ("kl", "entropy", "loss"):
        assert len(logged(trained, name)) == 3  # one value per step, as ever


def test_sides_matter(tmp_path: Path) -> None:
    """Where signs disagree and clipping binds, GRPO's loss on the combination is another one."""
    changes = {"pama_bound": "gram", "pama_noon": False, "num_iterations": 2, "epsilon": 0.01}
    made = trainer(PamaGRPOTrainer, REWARDS, tmp_path, **changes)
    seen = []
    passes: list[None] = []
    made.model.model.register_forward_hook(lambda *_: passes.append(None))
    compute = made._compute_loss

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        passes.clear()
        loss = compute(model, inputs)
        assert len(passes) == 1  # the model runs once for all parts of the loss
        seen.append((loss.item(), GRPOTrainer._compute_loss(made, model, inputs).item()))
        return loss

    made._compute_loss = both
    made.train()
    (first, same), (second, other) = seen
    assert first == pytest.approx(same, abs=1e-6)  # on-policy
    assert abs(second - other) > 1e-4


# --- the weights --------------------------------------------------------------------------------------------


class Recorded(PamaGRPOTrainer):
    """Keeps what a rollout's weights are made of."""

    rollouts: list[dict[str, Any]]
    zero_tool_mask = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.rollouts = []
        super().__init__(*arguments, **named)

    def _generate(self, *arguments: Any) -> Any:
        generated = list(super()._generate(*arguments))
        if self.zero_tool_mask:  # the first token of every completion came from a tool
            assert generated[2] is None
            generated[2] = [[0] + [1] * (len(ids) - 1) for ids in generated[1]]
        return tuple(generated)

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*arguments, **named)
        self.rollouts.append({"rewards": rewards.clone()})
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        combination = self.combination
        assert combination is not None
        self.rollouts[-1].update(
            mode="train" if self.model.training else "eval",
            mask=mask,
            tool_mask="tool_mask" in output,
            advantages=output["advantages"],
            all_advantages=combination.advantages,
            weights=combination.weights,
            scores=combination.statistics.scores,
            tokens=combination.statistics.token_count,
            logged=list(self._logs["advantages"]),
        )
        return output


def directly(rollout: dict[str, Any], **changes: Any) -> pk.CombinedAdvantages:
    """The same by the library's own functions, from the rewards and the mask."""
    rewards = rollout["rewards"].double()
    rows, width = rollout["mask"].shape
    return pk.combine_advantages(
        pk.group_normalize(rewards, group_size=4)[:, None].expand(rows, width, -1),
        rollout["mask"],
        objective_mask=~rewards.isnan(),
        **{"weights_per": "batch", **changes},
    )


@pytest.mark.parametrize("length", [3, 6])  # 3: as many tokens as objectives
@pytest.mark.parametrize(
    "changes",
    [
        {"regularization": 0.1, "prior": [1.0, 2.0, 3.0]},
        {"bound": "gram"},
        {"noon": False, "bound": "gram"},
        {"weights_per": "sequence", "regularization": 0.3},
        {"weights_per": "token", "prior": [0.0, 1.0, 1.0]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_reach_the_weights(changes: dict[str, Any], length: int, tmp_path: Path) -> None:
    pama = {f"pama_{name}": value for name, value in changes.items()}
    made = trainer(Recorded, REWARDS, tmp_path, max_completion_length=length, **pama)
    made.train()
    assert len(made.rollouts) == 2
    for rollout in made.rollouts:
        assert rollout["mask"].shape == (8, length)
        expected = directly(rollout, **changes)
        weights = rollout["weights"]
        if changes.get("weights_per") == "token":  # the library reports the mean over tokens
            lengths = rollout["mask"].sum(1, dtype=torch.float64)
            weights = (weights * lengths[:, None]).sum(0) / lengths.sum()
        torch.testing.assert_close(weights, expected.weights, rtol=1e-9, atol=1e-12)
        of_token = expected.advantages[
            :, 0
        ].float()  # all tokens of a completion have the same, and the first counts
        torch.testing.assert_close(rollout["advantages"], of_token, rtol=1e-6, atol=1e-7)
        assert list(rollout["logged"]) == rollout["all_advantages"].tolist()


def test_absent_rewards(tmp_path: Path) -> None:
    """None is not 0: such completions count neither in the group's mean nor in the objective's score."""

    def even(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(x)) if i % 2 else None for i, x in enumerate(completions)]

    def never(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    made = trainer(Recorded, [vowels, even, never], tmp_path, max_steps=1, pama_regularization=0.1)
    made.train()
    (rollout,) = made.rollouts
    assert rollout["rewards"].isnan().sum(0).tolist() == [0, 4, 8]
    counts = made.combination.statistics.count
    lengths = rollout["mask"].sum(1)
    assert counts.tolist() == [lengths.sum(), lengths[1::2].sum(), 0]
    torch.testing.assert_close(rollout["weights"], directly(rollout, regularization=0.1).weights)
    assert torch.isfinite(rollout["advantages"]).all()
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_reward_weights(tmp_path: Path) -> None:
    """Zero: logged only. The rest: the prior."""
    made = trainer(Recorded, tuple(REWARDS), tmp_path, reward_weights=[1, 0, 3], pama_regularization=1e9)
    made.train()
    assert made.objective_names == ["vowels", "late"]
    torch.testing.assert_close(
        made.rollouts[0]["weights"], torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=0, atol=1e-6
    )
    entry = made.state.log_history[0]
    assert "rewards/short/mean" in entry
    assert not [name for name in entry if name.startswith("pama/") and "short" in name]


def test_tool_mask_and_importance_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a tool wrote do not count; corrections for the rollout engine weigh the scores."""
    score = GRPOTrainer._generate_and_score_completions

    def corrected(self: Any, inputs: Any) -> dict[str, Any]:
        output = score(self, inputs)
        rows = output["completion_ids"].shape[0]
        output["importance_sampling_ratio"] = 0.5 + torch.arange(rows, dtype=torch.float32)[:, None] / rows
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", corrected)
    monkeypatch.setattr(Recorded, "zero_tool_mask", True)
    made = trainer(Recorded, REWARDS, tmp_path, max_steps=1, pama_bound="gram")
    made.train()
    (rollout,) = made.rollouts
    assert rollout["tool_mask"]
    assert float(rollout["tokens"]) == rollout["mask"].sum()
    rewards = rollout["rewards"].double()
    importance = (0.5 + torch.arange(8) / 8)[:, None].expand(rollout["mask"].shape)
    expected = pk.objective_statistics(
        None,
        None,
        pk.group_normalize(rewards, group_size=4),
        rollout["mask"],
        objective_mask=~rewards.isnan(),
        importance_weights=importance,
        gram=True,
    )
    torch.testing.assert_close(rollout["scores"], expected.scores)
    torch.testing.assert_close(
        rollout["weights"], pk.min_norm_weights(expected.gram, regularization=0.1).weights
    )


def test_once_per_rollout_and_evaluation(tmp_path: Path) -> None:
    """Accumulation, several iterations and evaluation: solved once per rollout; no evaluation in the mean."""
    made = trainer(
        Recorded,
        REWARDS,
        tmp_path,
        max_steps=4,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_dataset=dataset().select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
        pama_momentum=0.5,
        pama_regularization=0.1,
    )
    made.train()
    modes = [rollout["mode"] for rollout in made.rollouts]
    assert modes == ["train", "eval", "eval", "train", "eval", "eval"]
    assert float(made._pama.batches) == 2
    used: list[float] = []  # of the latest 8 completions, training's and evaluation's
    for rollout in made.rollouts:
        used = [*used, *rollout["all_advantages"].tolist()][-8:]
        assert rollout["logged"] == used
    first, *_, last = [rollout for rollout in made.rollouts if rollout["mode"] == "train"]
    statistics = [directly(rollout).statistics.buffer for rollout in (first, last)]
    mean = (0.25 * statistics[0] + 0.5 * statistics[1]) / 0.75  # the bias-corrected mean of two
    merged = pk.ObjectiveStatistics(mean, 3, True)
    expected = pk.pama_weights(merged.scores, regularization=0.1, scale=merged.second_moments.max()).weights
    torch.testing.assert_close(last["weights"], expected)
    assert len(logged(made, "pama/weight/short")) == 2
    assert len(logged(made, "eval_pama/weight/short")) == 2


def test_twenty_steps(tmp_path: Path) -> None:
    """Three rewards: logs of each objective and pair, weights on the simplex, and a policy that improves."""
    made = trainer(
        PamaGRPOTrainer,
        REWARDS,
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=32,
        num_generations=8,
        learning_rate=0.02,
        optim="adamw_torch",
        pama_regularization=0.1,
    )
    made.train()
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(history) == 20
    pairs = ["vowels~short", "vowels~late", "short~late"]
    for entry in history:
        weights = [entry[f"pama/weight/{name}"] for name in NAMES]
        assert min(weights) >= 0
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        scores = [entry[f"pama/score/{name}"] for name in NAMES]
        optimum = sum(w * s for w, s in zip(weights, scores, strict=True))
        assert entry["pama/optimum"] == pytest.approx(optimum, abs=1e-12)
        assert all(0 <= entry[f"pama/positive_fraction/{name}"] <= 1 for name in NAMES)
        assert all(-1 <= entry[f"pama/conflict/{pair}"] <= 1 for pair in pairs)
        assert all(f"rewards/{name}/mean" in entry for name in NAMES)
        assert math.isfinite(entry["loss"])
    assert all(torch.isfinite(p).all() for p in made.model.parameters())

    def mean(entries: list[dict[str, float]], name: str) -> float:
        return sum(entry[f"rewards/{name}/mean"] for entry in entries) / len(entries)

    gains = {name: mean(history[-4:], name) - mean(history[:4], name) for name in NAMES}
    assert gains["short"] > 0.5, gains
    assert gains["vowels"] + gains["late"] > 0, gains


# --- checkpoints --------------------------------------------------------------------------------------------


def test_resume(tmp_path: Path) -> None:
    """Four steps at once, or two and two with a checkpoint between them: the same bits."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "pama_momentum": 0.8}
    whole = trainer(Recorded, REWARDS, tmp_path / "whole", **changes)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = trainer(Recorded, REWARDS, tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert float(resumed._pama.batches) == float(whole._pama.batches) == 4
    assert torch.equal(resumed._pama.running_statistics, whole._pama.running_statistics)
    assert torch.equal(resumed.rollouts[-1]["weights"], whole.rollouts[-1]["weights"])
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)

    others = trainer(Recorded, [short, vowels, late], tmp_path / "others", **changes)
    with pytest.raises(
        ValueError, match=r"expected the running mean of \['short', .* got that of \['vowels'"
    ):
        others.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / integration.STATE_FILE).unlink()
    anew = trainer(Recorded, REWARDS, tmp_path / "anew", **changes)
    with pytest.warns(UserWarning, match="running mean starts anew"):
        anew.train(resume_from_checkpoint=str(checkpoint))
    assert float(anew._pama.batches) == 2


# --- several processes --------------------------------------------------------------------------------------

WORLDS = {
    "scores": {"pama_regularization": 0.1, "pama_momentum": 0.5},
    "gram": {"pama_bound": "gram", "pama_noon": False},
    "sequence": {"pama_weights_per": "sequence", "pama_regularization": 0.2},
}


class Replayed(Recorded):
    """Generates what it is told to."""

    to_generate: list[Any]

    def _generate(self, prompts: Any, *_: Any) -> Any:
        return self.to_generate.pop(0)


def worker(rank: int, where: Path) -> None:
    """One of two processes, with 3 groups of 4 completions, 6 for each process: one group is in both."""
    gc.freeze()
    generated: list[Any] = []

    class Generating(Recorded):
        def _generate(self, *arguments: Any) -> Any:
            generated.append(super()._generate(*arguments))
            return generated[-1]

    results = {}
    for name, changes in WORLDS.items():
        generated.clear()
        made = trainer(Generating, REWARDS, where / name, per_device_train_batch_size=6, **changes)
        assert made.accelerator.num_processes == 2
        made.train()
        results[name] = {
            "rollouts": made.rollouts,
            "generated": list(generated),
            "parameters": [p.detach().clone() for p in made.model.parameters()],
            "log": [entry for entry in made.state.log_history if "loss" in entry],
            "running_mean": made._pama.running_statistics,
        }
    torch.save(results, where / f"rank{rank}.pt")


def joined(first: Any, second: Any) -> Any:
    return first + second if isinstance(first, list) else first


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    where = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        code = f"import test_integration_trl as tests; tests.worker({rank}, tests.Path({str(where)!r}))"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(errors)
    return [torch.load(where / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", WORLDS)
def test_two_processes(name: str, two_processes: list[dict[str, Any]], tmp_path: Path) -> None:
    """Bit for bit the same weights; they and the parameters as of one process with the whole batch."""
    first, second = (rank[name] for rank in two_processes)
    assert len(first["rollouts"]) == 2
    for a, b in zip(first["rollouts"], second["rollouts"], strict=True):
        for field in ("rewards", "weights", "scores", "all_advantages", "logged"):
            both = [torch.as_tensor(rollout[field]).nan_to_num(-9) for rollout in (a, b)]
            assert torch.equal(*both), field
        assert not torch.equal(a["advantages"], b["advantages"])
        assert torch.equal(
            torch.cat([a["advantages"], b["advantages"]]).double(), a["all_advantages"].float().double()
        )
    if name == "scores":
        assert torch.equal(first["running_mean"], second["running_mean"])

    one = trainer(Replayed, REWARDS, tmp_path, per_device_train_batch_size=12, **WORLDS[name])
    one.to_generate = [
        tuple(joined(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first["generated"], second["generated"], strict=True)
    ]
    one.train()
    for ours, expected in zip(first["rollouts"], one.rollouts, strict=True):
        assert torch.equal(ours["rewards"].nan_to_num(-9), expected["rewards"].nan_to_num(-9))
        torch.testing.assert_close(ours["weights"], expected["weights"], rtol=0, atol=1e-14)
        torch.testing.assert_close(ours["all_advantages"], expected["all_advantages"], rtol=0, atol=1e-13)
    # Sums of float32 gradients in another order
    for ours, both, expected in zip(
        first["parameters"], second["parameters"], one.model.parameters(), strict=True
    ):
        assert torch.equal(ours, both)
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


# --- wrong use ----------------------------------------------------------------------------------------------


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pama_weights_per": None},
            "pama_weights_per: expected one of 'batch', 'sequence', 'token', got None",
        ),
        ({"pama_weights_per": "rollout"}, "pama_weights_per: expected one of"),
        ({"pama_bound": "norm"}, "pama_bound: expected one of"),
        ({"pama_bound": "gram", "pama_weights_per": "token"}, "pama_bound: 'gram' goes with"),
        ({"pama_momentum": 1.0}, r"pama_momentum: expected a number in \[0, 1\)"),
        ({"pama_momentum": 0.5, "pama_weights_per": "token"}, "pama_momentum: goes with weights_per='batch'"),
        ({"pama_regularization": -1.0}, "pama_regularization: expected"),
        ({"pama_prior": [1.0, -1.0, 1.0]}, "pama_prior: "),
        ({"pama_prior": [0.0, 0.0, 0.0]}, "pama_prior: "),
        ({"pama_prior": 0.5}, "pama_prior: expected"),
        ({"pama_noon": "no"}, "pama_noon: expected True or False, got 'no'"),
        (
            {"pama_prior": [1.0, 1.0]},
            r"pama_prior: expected 3 numbers, one for each of \['vowels', .*, got 2",
        ),
        (
            {"pama_prior": [1.0, 1.0, 1.0], "reward_weights": [1.0, 1.0, 0.0]},
            "pama_prior: expected None with",
        ),
        ({"reward_weights": [1.0, -1.0, 1.0]}, "reward_weights: expected .* got -1"),
        ({"reward_weights": [0.0, 0.0, 0.0]}, "reward_weights: expected at least one above 0"),
        ({"reward_weights": [1.0, 1.0]}, "(?i)number of reward weights"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
        ({"loss_type": "magic"}, "loss_type: expected one of grpo, .*, got 'magic'"),
        ({"scale_rewards": "rank"}, "scale_rewards: expected"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation: expected the def",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """At construction, of the configuration where it suffices: nothing has been generated."""
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(PamaGRPOTrainer, REWARDS, tmp_path, **changes)


@pytest.mark.parametrize(
    ("rewards", "changes", "message"),
    [
        (copies(short, 1) * 2, {}, "reward_funcs: expected different names, .* got short0 more than once"),
        ([short], {"pama_bound": "gram"}, "at least two objectives with pama_bound='gram', got one, short"),
        ([short], {"pama_momentum": 0.5}, "at least two objectives with pama_momentum, got one"),
        ([short], {"pama_prior": [1.0]}, "at least two objectives with pama_prior, got one"),
        (
            [short, vowels],
            {"pama_bound": "gram", "reward_weights": [0.0, 1.0]},
            "at least two objectives with pama_bound='gram', got one, vowels",
        ),
    ],
)
def test_wrong_rewards(rewards: list[Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(PamaGRPOTrainer, rewards, tmp_path, **changes)


def test_wrong_options_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: expected a PamaGRPOConfig, got GRPOConfig"):
        PamaGRPOTrainer(model(), REWARDS, settings(GRPOConfig, tmp_path), dataset())
    with pytest.raises(TypeError, match="args: expected a PamaGRPOConfig, got NoneType"):
        PamaGRPOTrainer(model(), REWARDS)
    changed = settings(PamaGRPOConfig, tmp_path)
    changed.pama_regularization = -1.0  # after its own check
    with pytest.raises(ValueError, match="pama_regularization"):
        PamaGRPOTrainer(model(), REWARDS, changed, train_dataset=dataset(), processing_class=tokenizer())
    if "use_adaptive_entropy" in GRPOConfig.__dataclass_fields__:
        with pytest.raises(ValueError, match="use_adaptive_entropy: expected False"):
            trainer(
                PamaGRPOTrainer,
                REWARDS,
                tmp_path,
                pama_noon=False,
                pama_bound="gram",
                use_adaptive_entropy=True,
            )
        trainer(PamaGRPOTrainer, REWARDS, tmp_path, use_adaptive_entropy=True)


def test_wrong_results_of_rewards(tmp_path: Path) -> None:
    def one(**_: Any) -> list[float]:
        return [1.0]

    def infinite(completions: list[str], **_: Any) -> list[float]:
        return [float("inf")] + [0.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="'one' returned 1 rewards, but 8 were expected"):
        trainer(PamaGRPOTrainer, [short, one], tmp_path).train()
    with pytest.raises(ValueError, match="expected finite rewards or None, got inf from infinite"):
        trainer(PamaGRPOTrainer, [short, infinite], tmp_path).train()


@pytest.mark.parametrize("changes", [{}, {"pama_noon": False, "pama_bound": "gram"}], ids=["noon", "gram"])
def test_nothing_to_learn_from(changes: dict[str, Any], tmp_path: Path) -> None:
    """Constant rewards, and completions that are all cut off and masked: weights of the prior, no NaN."""
    made = trainer(Recorded, copies(constant, 2), tmp_path, max_steps=1, **changes)
    made.train()
    assert made.rollouts[0]["advantages"].tolist() == [0] * 8
    cut = {
        "max_completion_length": 2,
        "mask_truncated_completions": True,
        "generation_kwargs": {"min_new_tokens": 2},
    }
    cut_off = trainer(Recorded, REWARDS, tmp_path, max_steps=1, **changes, **cut)
    cut_off.train()
    assert cut_off.rollouts[0]["mask"].sum() == 0
    for trained in (made, cut_off):
        weights = trained.rollouts[0]["weights"]
        assert weights.tolist() == pytest.approx([1 / len(weights)] * len(weights))
        for ours, at_start in zip(trained.model.parameters(), model().parameters(), strict=True):
            assert torch.equal(ours, at_start)


def test_scores_that_only_reflect_lengths(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="use pama_bound='gram'"):
        trainer(PamaGRPOTrainer, REWARDS, tmp_path, pama_noon=False)


@pytest.mark.parametrize("found", ["1.10.0", "0.29.1", "1.17rc1", "2.0.0.dev0"])
def test_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"expected trl from 1\.\d+ to 1\.\d+, found {re.escape(found)}"):
        integration._check_version()


def test_no_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise integration.PackageNotFoundError(name)

    monkeypatch.setattr(integration, "version", missing)
    with pytest.raises(ImportError, match=r"found none \(pip install 'pama-kernels\[trl\]'\)"):
        integration._check_version()


def test_configuration_is_plain_data(tmp_path: Path) -> None:
    """As TRL's command line and checkpoints need it."""
    made = settings(PamaGRPOConfig, tmp_path, pama_prior=[1.0, 2.0], pama_noon=False)
    assert json.loads(made.to_json_string())["pama_prior"] == [1.0, 2.0]
    arguments = (
        f"--output_dir {tmp_path} --use_cpu true --bf16 false --pama_weights_per batch --pama_prior 1 2 "
    )
    arguments += "--pama_noon false --pama_momentum 0.5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (parsed,) = HfArgumentParser(PamaGRPOConfig).parse_args_into_dataclasses(arguments.split())
    assert (parsed.pama_prior, parsed.pama_noon, parsed.pama_momentum) == ([1.0, 2.0], False, 0.5)


# --- what users read and start from ------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/trl.md runs as it is printed, with a tiny model and on the CPU."""
    text = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks

    class Tiny(PamaGRPOConfig):
        def __init__(self, **named: Any) -> None:
            super().__init__(**TINY, **named)

    monkeypatch.setattr(integration, "PamaGRPOConfig", Tiny)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {"model": model(), "tokenizer": tokenizer(), "dataset": dataset()})


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", "--steps", "2", "--every", "1"])
    runpy.run_path(str(ROOT / "examples/trl_grpo.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] in (["1"], ["2"]) for line in lines) == 2
    assert any("weight vowels" in line for line in lines)
