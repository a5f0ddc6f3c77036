"""The part of the adapter that is common to TRL's trainers with several reward functions."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from pama_kernels.rules import noon_of
from pama_kernels.statistics import ObjectiveStatistics, objective_statistics

from ._rollout import (
    Advantages,
    Combination,
    combine,
    only_lengths,
    prefixed,
    rollout_metrics,
    unique_names,
)
from ._trl_config import PamaOptions, read_settings

# Attributes that TRL's adaptive entropy controller changes in each call of the loss.
ENTROPY_STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
STATE_FILE = "pama_state.pt"


class PamaMixin:
    """Mixin (first base class) for a trainer of TRL that has `_calculate_rewards`,
    `_generate_and_score_completions` and `_compute_loss`. Subclasses override the first methods for their
    trainer.
    """

    config: ClassVar[type[PamaOptions]]
    # Of TRL's trainer
    args: Any
    model: Any
    accelerator: Any
    reward_func_names: list[str]
    reward_weights: Tensor
    num_generations: int
    num_generations_eval: int
    _metrics: Any
    _logs: Any
    _calculate_rewards: Callable[..., Tensor]

    # --- methods that depend on the trainer -----------------------------------------------------------------

    def _objective_advantages(self, rewards: Tensor, group_size: int, output: dict[str, Any]) -> Advantages:
        """Advantages from rewards (completions of all processes, reward functions), float64 on the CPU."""
        raise NotImplementedError

    def _completions_count_the_same(self) -> bool:
        """Whether the loss averages over completions; otherwise it weighs every token equally."""
        raise NotImplementedError

    def _clipping_may_bind(self, output: dict[str, Any]) -> bool:
        """Whether clipping can make the loss nonlinear in the advantage in some step over the rollout."""
        raise NotImplementedError

    def _importance_weights(self, output: dict[str, Any]) -> Tensor | None:
        """(B, T) or (B, 1), factors by which the loss multiplies tokens independently of the advantage."""
        return None

    # --- construction ---------------------------------------------------------------------------------------

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **named: Any
    ) -> None:
        if args is None:  # as TRL does
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.config(f"{name.split('/')[-1]}-PAMA")
        self.config.check(args)
        self._pama, self._normalize = read_settings(args), args.pama_normalize
        self.combination: Combination | None = None
        self._forward_cache: list[Any] | None = None
        self._forward_calls = 0
        self._silence_known = False
        if isinstance(reward_funcs, tuple):  # TRL accepts lists only
            reward_funcs = list(reward_funcs)
        super().__init__(model, reward_funcs, args, *others, **named)  # type: ignore[call-arg]
        names = self.reward_func_names
        self.reward_func_names = self.objective_names = unique_names(names)
        if names != self.objective_names:
            warnings.warn(
                f"reward_funcs: expected different names, by which they are logged, got {', '.join(names)}; "
                f"they are logged as {', '.join(self.objective_names)}. To choose names set __name__ of a "
                "function or an instance, wrap a partial in a function, or load a model and set "
                "config._name_or_path",
                stacklevel=2,
            )
        if args.pama_preference is not None:
            if len(args.pama_preference) != len(names):
                raise ValueError(
                    f"pama_preference: expected {len(names)} numbers, one for each of "
                    f"{self.objective_names}, got {len(args.pama_preference)}"
                )
            self.reward_weights = torch.tensor(args.pama_preference, dtype=torch.float32)
        self._preference()
        if only_lengths(self._pama.rule) and len(names) > 1:
            warnings.warn(
                "pama_bound='scores': without Noon the advantages of a group add up to 0, so that the scores "
                "of a batch reflect the lengths of completions or nothing; use pama_bound='gram'",
                stacklevel=2,
            )

    def _preference(self) -> Tensor:
        """TRL's current `reward_weights`, (N,) on the CPU."""
        weights = torch.as_tensor(self.reward_weights).detach().cpu().double()
        shape = (len(self.objective_names),)
        if weights.shape != shape or not (weights >= 0).all() or not 0 < float(weights.sum()) < math.inf:
            raise ValueError(
                f"reward_weights: expected {shape[0]} non-negative finite numbers, at least one above 0, got "
                f"{weights.tolist()}"
            )
        return weights / weights.sum()

    # --- from rewards to the trainer's advantages -----------------------------------------------------------

    @contextmanager
    def _recorded_rewards(self) -> Iterator[list[Tensor]]:
        """Records what `_calculate_rewards` returns to TRL, including the changes of subclasses."""
        calculate, own = self._calculate_rewards, self.__dict__.get("_calculate_rewards")
        returned: list[Tensor] = []

        def recorded(*arguments: Any, **named: Any) -> Tensor:
            returned.append(calculate(*arguments, **named))
            return returned[-1]

        self._calculate_rewards = recorded
        try:
            yield returned
        finally:
            del self._calculate_rewards
            if own is not None:
                self._calculate_rewards = own

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with self._recorded_rewards() as returned:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if not returned:
            raise RuntimeError(
                f"{type(self).__name__}: this trainer does not score completions by _calculate_rewards"
            )
        mode = "train" if self.model.training else "eval"
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        preference = self._preference()

        # TRL has synchronised with the device many times by now, and the tensors are small: on the CPU the
        # same float64 kernels are used for every accelerator.
        rewards = returned[-1].cpu().double()  # (completions of all processes, reward functions)
        size = self.num_generations if mode == "train" else self.num_generations_eval
        advantages, applied = self._objective_advantages(rewards, size, output)
        present = ~rewards.isnan() & (preference > 0)
        rows, rank = len(inputs), self.accelerator.process_index
        local = slice(rank * rows, (rank + 1) * rows)
        lengths = mask.sum(1)
        statistics = self._statistics(advantages[local], present[local], mask, lengths, output)
        lengths = self.accelerator.gather(lengths).cpu()
        self._pama.train(mode == "train")
        with prefixed("pama_"):
            self.combination = combine(
                advantages,
                present,
                ((lengths > 0) if self._completions_count_the_same() else lengths).double(),
                statistics,
                self._pama.rule,
                preference,
                applied=applied,
                average=self._pama.update if self._pama.momentum else None,
                normalize=self._normalize,
            )
        if mode == "train":
            self._warn_of_silence()
        self._ship(output, local)
        self._log_combination(mode, preference)
        return output

    def _statistics(
        self, advantages: Tensor, present: Tensor, mask: Tensor, lengths: Tensor, output: dict[str, Any]
    ) -> ObjectiveStatistics:
        """Over all processes by one all-reduce: bitwise equal on each."""
        importance = self._importance_weights(output)
        if importance is None:  # then only the numbers of tokens are needed
            tokens = {"cu_seqlens": torch.nn.functional.pad(lengths.cpu().cumsum(0), (1, 0))}
        else:
            tokens = {"mask": mask.cpu(), "importance_weights": importance.cpu().expand(mask.shape)}
        statistics = objective_statistics(
            None,
            None,
            advantages,
            noon=noon_of(self._pama.rule),
            objective_mask=present,
            aggregation="seq-mean-token-mean" if self._completions_count_the_same() else "token-mean",
            pairs=True,
            **tokens,
        )
        if self.accelerator.num_processes == 1:
            return statistics
        buffer = self.accelerator.reduce(statistics.buffer.to(self.accelerator.device), reduction="sum")
        return ObjectiveStatistics(buffer.cpu(), statistics.objectives, statistics.has_pairs)

    def _warn_of_silence(self) -> None:
        """Warns once if rewards vary but all combined advantages are 0."""
        assert self.combination is not None
        if self._silence_known or self.combination.advantages.any():
            return
        live = self.combination.statistics.signal
        if not live.any():
            return
        self._silence_known = True
        names = [name for name, varies in zip(self.objective_names, live.tolist(), strict=True) if varies]
        warnings.warn(
            f"every combined advantage of a rollout is 0 though {', '.join(names)} vary: nothing is learned "
            "from it. Either the rewards are opposite, or, with Noon and weights per completion, in every "
            "completion some reward is constant or below its mean",
            stacklevel=2,
        )

    def _ship(self, output: dict[str, Any], local: slice) -> None:
        """Adds the positive and negative parts to the batch if signs disagree and clipping may be active;
        `advantages` is their difference."""
        assert self.combination is not None
        _, positive, negative, *_ = self.combination
        device = output["advantages"].device
        sides = [side[local].to(device, torch.float32) for side in (positive, negative)]
        output["advantages"] = sides[0] - sides[1]
        disagree = bool(((positive > 0) & (negative > 0)).any())  # the same on all processes
        if disagree and self._clipping_may_bind(output):
            output["pama_positive"], output["pama_negative"] = sides

    def _log_combination(self, mode: str, preference: Tensor) -> None:
        assert self.combination is not None
        names = {i: name for i, name in enumerate(self.objective_names) if preference[i] > 0}
        for name, value in rollout_metrics(self.combination, names, self._pama.rule).items():
            self._metrics[mode][name].append(value)  # TRL ignores NaN in its means
        # TRL has logged the advantages that it would have used.
        logged, used = self._logs["advantages"], self.combination.advantages.tolist()
        for _ in range(min(len(used), len(logged))):
            logged.pop()
        logged.extend(used)

    # --- the loss where signs disagree ----------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's own loss L or, with both parts, sum_i c_i L(A_i) = L(P) + L(-Q) - L(0).

        P = sum_i c_i max(A_i, 0), Q = sum_i c_i max(-A_i, 0): their difference would not give the exact
        clipped loss where signs disagree. L(0) has the terms that do not depend on advantages: KL, entropy
        bonus, auxiliary loss. The model runs once.
        """
        if "pama_positive" not in inputs:
            loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
            return loss
        advantages, positive, negative = (
            inputs[name] for name in ("advantages", "pama_positive", "pama_negative")
        )
        if advantages.dim() == 2:  # a subclass computed advantages per token
            positive, negative = positive[:, None], negative[:, None]
        ours = advantages == positive - negative  # where a subclass changed it, TRL's own loss is used
        positive = torch.where(ours, positive, advantages.clamp(min=0))
        negative = torch.where(ours, negative, advantages.clamp(max=0).neg())
        mode = "train" if self.model.training else "eval"
        kept = self._metrics[mode]
        entropy = {name: getattr(self, name) for name in ENTROPY_STATE if hasattr(self, name)}
        losses, metrics = [], []
        self._forward_cache = []
        try:
            for side in (positive, -negative, torch.zeros_like(positive)):
                self.__dict__.update(entropy)
                self._forward_calls = 0
                self._metrics[mode] = defaultdict(list)
                losses.append(super()._compute_loss(model, {**inputs, "advantages": side}))  # type: ignore[misc]
                metrics.append(self._metrics[mode])
        finally:
            self._forward_cache = None
            self._metrics[mode] = kept
        for name in metrics[0]:  # clip ratios add up like the loss; the others are equal in all three
            of_positive, of_negative, of_zero = (logged[name] for logged in metrics)
            kept[name].extend(p + n - z for p, n, z in zip(of_positive, of_negative, of_zero, strict=True))
        total: Tensor = losses[0] + losses[1] - losses[2]
        return total

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        """While a loss is evaluated again, its calls return the first results, in the same order."""
        recorded = self._forward_cache
        if recorded is not None and self._forward_calls < len(recorded):
            self._forward_calls += 1
            return recorded[self._forward_calls - 1]
        result = super()._get_per_token_logps_and_entropies(*arguments, **named)  # type: ignore[misc]
        if recorded is not None:
            self._forward_calls += 1
            recorded.append(result)
        return result

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._pama.momentum and self.args.should_save:
            state = {"objectives": self.objective_names, "running_mean": self._pama.state_dict()}
            torch.save(state, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if not self._pama.momentum or checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            warnings.warn(f"no {STATE_FILE} in {checkpoint}: PAMA's running mean is reset", stacklevel=2)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["objectives"] != self.objective_names:
            raise ValueError(
                f"resume_from_checkpoint: expected the running mean of {self.objective_names}, "
                f"got that of {state['objectives']} in {path}"
            )
        self._pama.load_state_dict(state["running_mean"])
