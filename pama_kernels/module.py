"""`pama_loss` as a module that holds its settings and, optionally, a running mean of the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._call import Number, WeightsPer, statistics_size
from ._solve import AveragedRule
from ._validate import (
    AGGREGATIONS,
    ClipRange,
    Preference,
    check_choice,
    check_number,
    check_preference_type,
    check_process_group,
    clip_bounds,
    preference_tensor,
)
from .loss import PamaLossOutput, pama_loss
from .rules import RuleLike, needs_pairs, record, resolve_rule
from .statistics import ObjectiveStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PamaLoss(nn.Module):
    """`pama_loss` with stored settings and, optionally, weights from a running mean of the statistics.

    Args:
        rule: as in `pama_loss`.
        preference: as in `pama_loss`.
        clip_range: as in `pama_loss`.
        dual_clip: as in `pama_loss`.
        aggregation: as in `pama_loss`.
        kl_coef: as in `pama_loss`.
        momentum: 0 solves each batch separately. In (0, 1), with a rule per batch, the weights come from a
            bias-corrected running mean of the statistics of all batches so far: m <- momentum m + (1 -
            momentum) s. Weights that are solved on single noisy batches need not converge; weights from a
            running mean do (CR-MOGM, Zhou et al. 2022).
        objectives: N. The running mean then exists from the start, so that a copy made before the first batch
            (an averaged model) has it too. Not needed if `preference` is given.
        process_group: as in `pama_loss`.

    The running mean is updated in training mode only, never by a batch with a NaN or infinity, and is part of
    `state_dict()` once N is known.
    """

    running_statistics: Tensor | None
    batches: Tensor | None

    def __init__(
        self,
        *,
        rule: RuleLike = None,
        preference: Preference = None,
        clip_range: ClipRange = 0.2,
        dual_clip: Number | None = None,
        aggregation: str = "token-mean",
        kl_coef: Number = 0.0,
        momentum: float = 0.0,
        objectives: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.rule = resolve_rule(rule)
        try:
            number = check_number("momentum", momentum, 0.0, 1.0)
        except ValueError:
            number = 1.0
        if isinstance(number, Tensor) or number == 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        self.momentum = number
        batch = record(self.rule).weights_per == WeightsPer.BATCH
        if self.momentum and not batch:
            raise ValueError(f"momentum: needs a rule with one set of weights for the batch, got {self.rule}")
        clip_bounds(clip_range, dual_clip)
        check_process_group(process_group, batch=batch)
        if objectives is not None:
            if isinstance(objectives, bool) or not isinstance(objectives, Integral):
                raise TypeError(f"objectives: expected an integer, got {type(objectives).__name__}")
            if objectives < 1:
                raise ValueError(f"objectives: expected at least 1, got {objectives}")
        if preference is not None:
            device = preference.device if isinstance(preference, Tensor) else torch.device("cpu")
            if not isinstance(preference, Tensor):
                check_preference_type(preference)
            scalar = isinstance(preference, Tensor) and preference.dim() == 0
            objectives = int(objectives or (1 if scalar else len(preference)))
            preference_tensor(preference, objectives, device)
        self.objectives = objectives
        self.preference, self.clip_range, self.dual_clip = preference, clip_range, dual_clip
        self.aggregation, self.kl_coef = aggregation, check_number("kl_coef", kl_coef, 0.0)
        self.process_group = process_group
        check_choice("aggregation", aggregation, AGGREGATIONS)
        known = self.momentum > 0 and objectives is not None
        empty = statistics_size(objectives or 0, needs_pairs(self.rule)) if known else None
        self.register_buffer("running_statistics", None if empty is None else _zeros(empty))
        self.register_buffer("batches", None if empty is None else _zeros(()))

    def extra_repr(self) -> str:
        shown = "rule", "preference", "clip_range", "dual_clip", "aggregation", "kl_coef", "momentum"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        objective_mask: Tensor | None = None,
        importance_weights: Tensor | None = None,
        normalizer: Number | None = None,
        ref_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PamaLossOutput:
        """`pama_loss` of the arguments with the stored settings; with momentum its `statistics` are those of
        the batch."""
        rule = self.rule
        if self.momentum and weights is None:
            rule = AveragedRule(rule, self.update)
        return pama_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            rule=rule,
            preference=self.preference,
            weights=weights,
            clip_range=self.clip_range,
            dual_clip=self.dual_clip,
            objective_mask=objective_mask,
            importance_weights=importance_weights,
            aggregation=self.aggregation,
            normalizer=normalizer,
            ref_logprobs=ref_logprobs,
            kl_coef=self.kl_coef,
            cu_seqlens=cu_seqlens,
            process_group=self.process_group,
        )

    def update(self, statistics: ObjectiveStatistics) -> ObjectiveStatistics:
        """Adds a batch to the running mean (in training mode) and returns the bias-corrected mean."""
        batch = statistics.buffer
        if self.running_statistics is None or self.batches is None:
            self.running_statistics, self.batches = torch.zeros_like(batch), batch.new_zeros(())
        running = self.running_statistics.to(batch.device)
        batches = self.batches.to(batch.device)
        if running.shape != batch.shape:
            raise ValueError(
                "advantages: expected the objectives of the running mean's batches "
                f"({running.numel()} statistics), got {batch.numel()} statistics of {statistics!r}"
            )
        if self.training:
            usable = torch.isfinite(batch).all()
            blended = self.momentum * running + (1 - self.momentum) * batch
            running = torch.where(usable, blended, running)
            batches = batches + usable
            self.running_statistics, self.batches = running, batches
        correction = 1 - self.momentum**batches
        mean = torch.where(batches > 0, running / correction, batch)
        return ObjectiveStatistics(mean, statistics.objectives, statistics.has_pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PamaLoss:
        """The copy uses the same process group, which cannot be copied."""
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> PamaLoss:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "process_group: expected None to pickle a PamaLoss, got a process group; save its "
                "state_dict(), or set process_group to None first"
            )
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PamaLoss:
        """Statistics and preference follow the module to another device, in their own dtype: counts don't fit
        a half type."""
        if isinstance(self.preference, Tensor):
            self.preference = self.preference.to(fn(self.preference).device)
        kept = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, x in kept.items():
            moved = self._buffers[name]
            setattr(self, name, x if moved is None else x.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Creates the buffers from a checkpoint, since they otherwise exist only after the first batch."""
        names = ("running_statistics", "batches") if self.momentum else ()
        for name in names:
            saved, kept = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (kept is None or kept.shape == saved.shape or self.objectives is None):
                setattr(self, name, saved.detach().clone())
            elif saved is None and self.objectives is None:
                setattr(self, name, None)
            elif saved is None:  # saved before its first batch
                state_dict[prefix + name] = torch.zeros_like(kept)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _zeros(shape: int | tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
