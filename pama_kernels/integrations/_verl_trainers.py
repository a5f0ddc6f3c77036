"""Extends verl's trainers: passes reward components to the estimator and checks settings early."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pama_kernels.rules import noon_of

from ._rollout import only_lengths
from ._verl_algorithms import NAME, Rollout, current_rollout, read_settings

MODES = ("sync", "colocate_async", "separate_async")

_log = logging.getLogger("pama_kernels.integrations.verl")


def check_config(config: Any, carries_components: bool) -> None:
    """Checks verl's configuration before anything is generated."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    if algorithm.adv_estimator != NAME:
        raise ValueError(f"algorithm.adv_estimator: expected {NAME!r}, got {algorithm.adv_estimator!r}")
    settings = read_settings(algorithm)
    if not carries_components:
        raise ValueError(
            f"trainer.v1.trainer_mode: expected {', '.join(f'pama_{mode}' for mode in MODES)} with "
            f"adv_estimator={NAME!r}, got {config.trainer.v1.trainer_mode!r}: it hides reward components"
        )
    if algorithm.get("use_kl_in_reward", False):
        raise ValueError(
            "algorithm.use_kl_in_reward: expected false with pama, got true: reward components do not "
            "contain the KL penalty; use actor_rollout_ref.actor.use_kl_loss"
        )
    if (responses := config.actor_rollout_ref.rollout.n) < 2:
        raise ValueError(
            "actor_rollout_ref.rollout.n: expected 2 or more with pama, whose baseline is the mean of the "
            f"group, got {responses}"
        )
    if only_lengths(settings.made()):
        _log.warning(
            "algorithm.pama.bound: 'scores' without noon: the advantages of a group add up to 0, so that the "
            "scores of a batch only reflect the lengths of completions; use gram"
        )
    if noon_of(settings.made()):
        return
    if not config.trainer.get("use_v1", True):
        _log.warning(
            "pama: with trainer.use_v1=false the loss clips each combined advantage according to its own "
            "sign. With noon: true this is exact; otherwise, if objectives disagree, only in the first "
            "optimisation step on a rollout"
        )
    elif (loss := actor.policy_loss.get("loss_mode", "vanilla")) != NAME:
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode: expected {NAME!r}, with which each objective is "
            f"clipped according to its own sign, or algorithm.pama.noon=true, got {loss!r}"
        )


def set_aggregation(config: Any) -> None:
    """Sets the token weights of the statistics to those of the actor's loss."""
    from omegaconf import open_dict

    mode = config.actor_rollout_ref.actor.get("loss_agg_mode", "token-mean")
    with open_dict(config):
        config.algorithm.pama.aggregation = mode if mode == "seq-mean-token-mean" else "token-mean"


def final_rows(keys: Sequence[str]) -> list[int]:
    """For each row the last one of its session: an agent loop may yield several rows, which share one reward.

    Keys are verl's ``uid_session_index``.
    """
    parsed = [key.rsplit("_", 2) for key in keys]
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for row, (uid, session, index) in enumerate(parsed):
        last[uid, session] = max(last.get((uid, session), (-1, -1)), (int(index), row))
    return [last[uid, session][1] for uid, session, _ in parsed]


class PamaTrainer:
    """Mixin (first base class) for verl's V1 trainers, which do not pass reward components to an
    estimator."""

    mode: str
    parts: dict[str, list[float]] | None = None

    def __init__(self, config: Any) -> None:
        from omegaconf import open_dict

        check_config(config, carries_components=True)
        set_aggregation(config)
        with open_dict(config):  # verl chooses buffers and sections by the mode's name
            config.trainer.v1.trainer_mode = self.mode
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        rollout = Rollout(self._reward_components(batch), final_rows(batch.keys))
        token = current_rollout.set(rollout)
        try:
            result = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        finally:
            current_rollout.reset(token)
        metrics.update(rollout.metrics)
        self.parts = None
        if rollout.parts is not None:
            self.parts = dict(zip(batch.keys, rollout.parts.tolist(), strict=True))
        return result

    def _reward_components(self, batch: Any) -> dict[str, list[Any]]:
        """The reward components: for each key one value per row, None where the reward function omitted the
        key."""
        import transfer_queue as tq

        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        stored = tq.kv_batch_get(**where, select_fields=["extra_fields"])
        rows = stored.pop("extra_fields").tolist() if "extra_fields" in stored else []
        returned = [row.get("reward_extra_info") or {} for row in rows]
        if not any(returned):  # a reward model that shares the training devices: a field for each key
            stored = tq.kv_batch_get(
                **where,
                select_fields=list(read_settings(self.config.algorithm).reward_keys),  # type: ignore[attr-defined]
            )
            return {str(key): list(stored[key]) for key in list(stored.keys())}
        names = dict.fromkeys(name for reward in returned for name in reward)
        return {name: [reward.get(name) for reward in returned] for name in names}

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Without Noon, passes both parts of the advantages to the actor; all other code gets their sum."""
        if self.parts is None:
            return super()._update_actor(batch, metrics)  # type: ignore[misc]
        import transfer_queue as tq
        from tensordict import TensorDict

        where = {"keys": batch.keys, "partition_id": batch.partition_id}

        def put(rows: list[Tensor]) -> None:
            nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            tq.kv_batch_put(**where, fields=TensorDict({"advantages": nested}, batch_size=len(rows)))

        stored = tq.kv_batch_get(**where, select_fields=["advantages", "response_mask"])
        sums = list(stored["advantages"].unbind())
        rows = zip(batch.keys, sums, strict=True)
        put([row.new_tensor(self.parts[key]).repeat(len(row)) for key, row in rows])
        try:
            return super()._update_actor(batch, metrics)  # type: ignore[misc]
        finally:
            put(sums)


def register_trainers(v1: ModuleType) -> None:
    """`v1`: the module verl.trainer.ppo.v1."""
    for mode in MODES:
        base = v1.get_trainer_cls(mode)
        trainer = type(f"Pama{base.__name__}", (PamaTrainer, base), {"mode": mode, "__module__": __name__})
        v1.register_trainer(f"pama_{mode}")(trainer)
    _check_at_construction(v1.PPOTrainer)


def extend_older_trainer(ray_trainer: ModuleType) -> None:
    """Wraps its `compute_advantage`, which passes `non_tensor_batch` only to gdpo, to make it available to
    pama."""
    compute = ray_trainer.compute_advantage

    @functools.wraps(compute)
    def compute_advantage(data: Any, adv_estimator: Any, *arguments: Any, **named: Any) -> Any:
        if adv_estimator != NAME or current_rollout.get() is not None:
            return compute(data, adv_estimator, *arguments, **named)
        rollout = Rollout(data.non_tensor_batch)
        token = current_rollout.set(rollout)
        try:
            data = compute(data, adv_estimator, *arguments, **named)
        finally:
            current_rollout.reset(token)
        _log.info("%s", rollout.metrics)  # this trainer has no way to log metrics of an estimator
        return data

    ray_trainer.compute_advantage = compute_advantage  # type: ignore[attr-defined]
    _check_at_construction(ray_trainer.RayPPOTrainer)


def _check_at_construction(trainer: type) -> None:
    construct = trainer.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        if config.algorithm.adv_estimator == NAME and not isinstance(self, PamaTrainer):
            check_config(config, carries_components=not config.trainer.get("use_v1", True))
            set_aggregation(config)
        construct(self, config, *arguments, **named)

    trainer.__init__ = __init__  # type: ignore[misc]
