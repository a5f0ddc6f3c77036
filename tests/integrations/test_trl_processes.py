"""Several processes have the same weights, those of one process; checkpoints contain the running mean."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl_setup import (
    REWARDS,
    Recorded,
    RecordedRLOO,
    Recording,
    late,
    saved_model,
    short,
    trainer,
    vowels,
)

from pama_kernels.integrations._trl_mixin import STATE_FILE


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"pama_bound": "scores", "pama_noon": True},
        {"pama_rule": "fixed", "pama_preference": [1.0, 2.0, 1.0]},  # with the number of objectives known
    ],
    ids=str,
)
def test_resume(rule: dict[str, Any], tmp_path: Path) -> None:
    """Four steps at once, or two and two with a checkpoint between them: the same bits."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "pama_momentum": 0.8, **rule}
    whole = trainer(Recorded, REWARDS, tmp_path / "whole", **changes)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = trainer(Recorded, REWARDS, tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert float(resumed._pama.batches) == float(whole._pama.batches) == 4
    assert torch.equal(resumed._pama.running_statistics, whole._pama.running_statistics)
    assert torch.equal(resumed.combination.weights, whole.combination.weights)
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)

    others = trainer(Recorded, [short, vowels, late], tmp_path / "others", **changes)
    with pytest.raises(
        ValueError, match=r"expected the running mean of \['short', .* got that of \['vowels'"
    ):
        others.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE_FILE).unlink()
    anew = trainer(Recorded, REWARDS, tmp_path / "anew", **changes)
    with pytest.warns(UserWarning, match="running mean is reset"):
        anew.train(resume_from_checkpoint=str(checkpoint))
    assert float(anew._pama.batches) == 2


# --- two processes ------------------------------------------------------------------------------------------

WORLDS = {
    "pama": {"pama_momentum": 0.5, "num_iterations": 2, "max_steps": 4},
    "upgrad": {"pama_rule": "upgrad", "pama_normalize": True, "loss_type": "grpo"},
    "sequence": {"pama_weights_per": "sequence", "pama_regularization": 0.2},
    "rloo": {"beta": 0.5, "normalize_advantages": True, "num_iterations": 2, "max_steps": 4},
}


def kind(name: str) -> type[Recording]:
    return RecordedRLOO if name == "rloo" else Recorded


def replaying(base: type[Recording]) -> type[Recording]:
    """Returns given completions instead of generating."""

    class Replayed(base):
        to_generate: list[Any]

        def _generate(self, prompts: Any, *_: Any) -> Any:
            return self.to_generate.pop(0)

    return Replayed


def worker(rank: int, where: Path) -> None:
    """One of two processes, with 3 groups of 4 completions, 6 for each process: one group is in both."""
    gc.freeze()
    generated: list[Any] = []

    def generating(base: type[Recording]) -> type[Recording]:
        class Generating(base):
            def _generate(self, *arguments: Any) -> Any:
                generated.append(super()._generate(*arguments))
                return generated[-1]

        return Generating

    results = {}
    for name, changes in WORLDS.items():
        generated.clear()
        made = trainer(
            generating(kind(name)),
            REWARDS,
            where / name,
            per_device_train_batch_size=6,
            policy=saved_model(where / f"policy{rank}"),
            **changes,
        )
        assert made.accelerator.num_processes == 2
        made.train()
        results[name] = {
            "rollouts": [
                {**rollout, "combination": rollout["combination"]._asdict()} for rollout in made.rollouts
            ],
            "generated": list(generated),
            "parameters": [p.detach().clone() for p in made.model.parameters()],
            "log": [
                {key: value for key, value in entry.items() if key.startswith("pama/")}
                for entry in made.state.log_history
                if "loss" in entry
            ],
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
    here = Path(__file__).parent
    processes = []
    for rank in range(2):
        code = f"import test_trl_processes as tests; tests.worker({rank}, tests.Path({str(where)!r}))"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent.parent))),
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
        assert torch.equal(a["rewards"].nan_to_num(-9), b["rewards"].nan_to_num(-9))
        for field in ("weights", "advantages", "positive", "negative"):
            assert torch.equal(a["combination"][field], b["combination"][field]), field
        assert torch.equal(a["scores"], b["scores"])
        assert a["keys"] == b["keys"]
        assert ("pama_positive" in a["keys"]) == (name in ("pama", "rloo"))
        both = torch.cat([a["advantages"], b["advantages"]]).double()
        torch.testing.assert_close(both, a["combination"]["advantages"], rtol=1e-6, atol=1e-6)
        assert not torch.equal(a["advantages"], b["advantages"])

    one = trainer(
        replaying(kind(name)),
        REWARDS,
        tmp_path,
        per_device_train_batch_size=12,
        policy=saved_model(tmp_path / "policy"),
        **WORLDS[name],
    )
    one.to_generate = [
        tuple(joined(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first["generated"], second["generated"], strict=True)
    ]
    one.train()
    # KL is of float32 log-probabilities, which differ by rounding between batch sizes; rewards do not.
    tolerance = 1e-6 if name == "rloo" else 1e-12
    log = [entry for entry in one.state.log_history if "loss" in entry]
    for ours, theirs, expected in zip(first["log"], second["log"], log, strict=True):
        assert ours == theirs
        assert ours == pytest.approx({key: expected[key] for key in ours}, rel=0, abs=max(tolerance, 1e-9))
    for ours, expected in zip(first["rollouts"], one.rollouts, strict=True):
        for field in ("weights", "advantages"):
            wanted = getattr(expected["combination"], field)
            torch.testing.assert_close(ours["combination"][field], wanted, rtol=0, atol=tolerance)
    # Sums of float32 gradients in another order
    for ours, both, expected in zip(
        first["parameters"], second["parameters"], one.model.parameters(), strict=True
    ):
        assert torch.equal(ours, both)
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)
