"""PAMA's trainers on verl's own data plane: a real TransferQueue, verl's advantage and actor-update code.

Only the model is ours (a table of log-probabilities), and nothing is generated: test_verl_run.py does that.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed: `make test-integrations` does it", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "verl"
KEYS = ("correct", "concise", "polite")
PROMPT = 3
pytestmark = pytest.mark.filterwarnings("ignore")  # of ray, verl and tensordict


@pytest.mark.timeout(600)
def test_wrong_setting_is_an_error_on_the_command_line(tmp_path: Path) -> None:
    """Through verl's own entry point and its Ray worker, in which the plug-in is loaded automatically."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo"),
        *("--config-dir", "examples/verl", "--config-name", "pama_grpo", f"hydra.run.dir={tmp_path}"),
        *(
            "algorithm.pama.preference=[1,2]",
            "actor_rollout_ref.model.path=none",
            "trainer.n_gpus_per_node=1",
        ),
        *("data.train_files=none", "data.val_files=none", "ray_kwargs.ray_init.num_cpus=6"),
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=ROOT, env=environment)
    assert done.returncode != 0
    assert "ValueError: algorithm.pama.preference: expected 3 numbers, got 2" in done.stderr


@pytest.fixture(scope="module")
def queue() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import transfer_queue
        from omegaconf import OmegaConf

        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        storage = {"num_data_storage_units": 1, "total_storage_size": 1000}
        transfer_queue.init(
            OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage}})
        )
        yield transfer_queue
        transfer_queue.close()
        ray.shutdown()


class Rollout:
    """Three prompts with four sessions, one of which has two rows, and one row of verl's padding."""

    def __init__(self, queue: Any, partition: str) -> None:
        from transfer_queue import KVBatchMeta
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        generator = torch.Generator().manual_seed(5)
        names = [(f"prompt{p}", s, 0) for p in range(3) for s in range(4)] + [
            ("prompt1", 2, 1),
            ("pad", 0, 0),
        ]
        names = [names[int(i)] for i in torch.randperm(len(names), generator=generator)]
        self.keys = ["_".join(map(str, name)) for name in names]
        self.uid = [name[0] for name in names]
        self.lengths = [1 if uid == "pad" else 2 + i % 5 for i, uid in enumerate(self.uid)]
        shape = (len(names), max(self.lengths))
        self.mask = torch.zeros(shape, dtype=torch.int64)
        for i, length in enumerate(self.lengths):
            self.mask[i, :length] = int(self.uid[i] != "pad")
        self.old = torch.randn(shape, generator=generator) - 2
        self.logprobs = self.old + 0.4 * torch.randn(shape, generator=generator)
        session = {name[:2]: torch.randn(3, generator=generator).tolist() for name in names}
        self.rewards: list[dict[str, float | None]] = [
            {"score": 0.0, **dict(zip(KEYS, session[name[:2]], strict=True))} for name in names
        ]
        self.rewards[3]["polite"] = None
        rows = [
            {
                "uid": self.uid[i],
                "prompts": torch.zeros(PROMPT, dtype=torch.int64),
                "responses": torch.ones(length, dtype=torch.int64),
                "response_mask": self.mask[i, :length],
                "loss_mask": self.mask[i, :length],
                "rm_scores": torch.zeros(length),
                "old_log_probs": self.old[i, :length],
                "table": torch.tensor([i]),
                "extra_fields": {"reward_extra_info": self.rewards[i], "turn_scores": []},
            }
            for i, length in enumerate(self.lengths)
        ]
        self.batch = KVBatchMeta(
            partition_id=partition, keys=self.keys, tags=[{"is_padding": uid == "pad"} for uid in self.uid]
        )
        queue.kv_batch_put(
            keys=self.keys,
            partition_id=partition,
            fields=list_of_dict_to_tensordict(rows),
            tags=self.batch.tags,
        )

    def expected(self, rule: Any) -> tuple[Tensor, Tensor, Any]:
        """By the specification: the baseline counts each session once, the weights every valid token."""
        from pama_kernels.integrations._verl_trainers import final_rows

        matrix = torch.tensor(
            [[float("nan") if row[key] is None else row[key] for key in KEYS] for row in self.rewards]
        ).double()
        final = final_rows(self.keys)
        once = sorted(set(final))
        groups = torch.tensor([sorted(set(self.uid)).index(uid) for uid in self.uid])
        normal = torch.zeros_like(matrix)
        normal[once] = pk.reference.group_normalize(matrix[once], group_ids=groups[once], eps=1e-6)
        wide = normal[final][:, None].expand(-1, self.mask.shape[1], -1)
        present = ~matrix[final].isnan()
        combined = pk.reference.combine_advantages(wide, self.mask, rule=rule, objective_mask=present)
        return wide, present, combined

    def stored(self, queue: Any, *fields: str) -> Any:
        return queue.kv_batch_get(keys=self.keys, partition_id=self.batch.partition_id, select_fields=fields)


def _trainer(mode: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.v1 import get_trainer_cls

    with initialize_config_dir(str(EXAMPLE), version_base=None):
        config = compose("pama_grpo", ["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])
    config.trainer.v1.trainer_mode = f"pama_{mode}"
    return get_trainer_cls(f"pama_{mode}")(config)


class Workers:
    """Takes the place of the actor's workers: one rank, micro-batches of 7, verl's `ppo_loss`."""

    def __init__(self, queue: Any, rollout: Rollout, config: Any) -> None:
        from verl.utils.config import omega_conf_to_dataclass

        self.queue, self.config = queue, omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self.config.global_batch_info.clear()
        self.table = rollout.logprobs.clone().requires_grad_()
        self.lengths = rollout.lengths
        self.loss = 0.0

    def update_actor(self, batch: Any) -> dict[str, Any]:
        from verl.utils import tensordict_utils as tu
        from verl.workers.engine.utils import prepare_micro_batches
        from verl.workers.utils.losses import ppo_loss

        data = self.queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
        tu.assign_non_tensor(
            data,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=7,
            dp_size=1,
            batch_num_tokens=int(data["loss_mask"].values().sum()),
            global_batch_size=batch.extra_info["global_batch_size"],
        )
        for micro in prepare_micro_batches(data)[0]:
            rows = []
            for i in (
                micro["table"].values().tolist()
                if micro["table"].is_nested
                else micro["table"].flatten().tolist()
            ):
                # The prediction of a token is at the position before it.
                response = self.table[i, : self.lengths[i]]
                rows.append(torch.nn.functional.pad(response, (PROMPT - 1, 1)))
            output = {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}
            loss, _ = ppo_loss(self.config, output, micro)
            loss.backward()
            self.loss += float(loss.detach())
        return {"metrics": {"mfu": 0.0}}


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
@pytest.mark.parametrize("weights_per", ["batch", "sequence"])
def test_advantages(queue: Any, mode: str, weights_per: str) -> None:
    trainer = _trainer(
        mode, f"algorithm.pama.weights_per={weights_per}", "actor_rollout_ref.actor.use_kl_loss=false"
    )
    rollout = Rollout(queue, f"advantages {mode} {weights_per}")
    metrics: dict[str, Any] = {}
    trainer._compute_advantage(rollout.batch, metrics)
    _, _, combined = rollout.expected(pk.Pama(weights_per))
    for field in ("advantages", "returns"):
        found = rollout.stored(queue, field, "response_mask")[field].to_padded_tensor(0.0)
        torch.testing.assert_close(found.double(), combined.advantages, rtol=0, atol=2e-5)  # float32
    assert combined.advantages.any()
    names = {f"pama/{what}/{key}" for what in ("weight", "signal", "covariance") for key in KEYS}
    assert names < set(metrics)
    if weights_per == "batch":
        weights = [metrics[f"pama/weight/{key}"] for key in KEYS]
        assert weights == pytest.approx(combined.weights.tolist(), abs=1e-5)


@pytest.mark.parametrize("weights_per", ["batch", "sequence"])
def test_each_objective_is_clipped_by_its_own_sign(queue: Any, weights_per: str) -> None:
    """The loss `pama` through verl's actor update: sum_i c_i L_i and its gradient, over all micro-batches."""
    trainer = _trainer(
        "sync",
        f"algorithm.pama.weights_per={weights_per}",
        "actor_rollout_ref.actor.use_kl_loss=false",
    )
    rollout = Rollout(queue, f"signed {weights_per}")
    workers = Workers(queue, rollout, trainer.config)
    trainer.actor_rollout_wg = workers
    metrics: dict[str, Any] = {}
    trainer._compute_advantage(rollout.batch, metrics)
    before = rollout.stored(queue, "advantages", "response_mask")["advantages"].to_padded_tensor(0.0)
    trainer._update_actor(rollout.batch, metrics)
    after = rollout.stored(queue, "advantages", "response_mask")["advantages"].to_padded_tensor(0.0)
    assert torch.equal(after, before)

    raw, present, combined = rollout.expected(pk.Pama(weights_per))
    # Solved where the rollout is scored, so with the ratio 1; then divided by presence (equal preferences).
    weights = combined.weights
    if weights_per == "batch":
        here = (present != 0).double()
        weights = weights * here / here.mean(-1, keepdim=True)
    logprobs = rollout.logprobs.double().requires_grad_()
    # No padding in the specification's denominator; verl's token-mean counts valid tokens, too.
    wanted = pk.reference.pama_loss(
        logprobs, rollout.old, raw, rollout.mask, objective_mask=present, weights=weights,
        clip_range=0.2, dual_clip=3.0,
    )  # fmt: skip
    wanted.loss.backward()
    assert workers.loss == pytest.approx(float(wanted.loss.detach()), abs=1e-6)
    torch.testing.assert_close(workers.table.grad.double(), logprobs.grad, rtol=0, atol=1e-6)
    assert (combined.advantages < 0).any()


def test_components_of_a_reward_model(queue: Any) -> None:
    """A reward model that shares the devices puts them into separate fields."""
    from verl.utils import tensordict_utils as tu

    trainer = _trainer("sync", "actor_rollout_ref.actor.use_kl_loss=false")
    rollout = Rollout(queue, "reward model")
    import numpy as np

    columns = {key: np.array([row[key] for row in rollout.rewards], dtype=object) for key in KEYS}
    keys, partition = rollout.keys, rollout.batch.partition_id
    without = [{} for _ in keys]
    queue.kv_batch_put(
        keys=keys, partition_id=partition, fields=tu.get_tensordict({**columns, "extra_fields": without})
    )
    found = trainer._reward_components(SimpleNamespace(keys=keys, partition_id=partition))
    assert {key: list(column) for key, column in columns.items()} == found


def test_a_missing_reward_key_is_an_error(queue: Any) -> None:
    trainer = _trainer(
        "sync", "algorithm.pama.reward_keys=[correct,brief]", "actor_rollout_ref.actor.use_kl_loss=false"
    )
    rollout = Rollout(queue, "missing")
    with pytest.raises(ValueError, match=r"got 'brief'; it has .*'concise', 'correct', 'polite', 'score'"):
        trainer._compute_advantage(rollout.batch, {})


def test_v1_does_not_pass_components_to_gdpo(queue: Any) -> None:
    """As docs/verl.md states: V1 does not pass the reward components to verl's own `gdpo` estimator."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    keys = f"+algorithm.gdpo_reward_keys=[{','.join(KEYS)}]"
    trainer = _trainer("sync", "actor_rollout_ref.actor.use_kl_loss=false", keys)
    trainer.config.algorithm.adv_estimator = "gdpo"
    rollout = Rollout(queue, "gdpo")
    with pytest.raises((AssertionError, KeyError)):
        get_trainer_cls("sync")._compute_advantage(trainer, rollout.batch, {})
