"""PAMA in TRL: `GRPOTrainer` and `RLOOTrainer` with several reward functions; each is an objective.

The trainer keeps its own loss, clipping, KL and everything else. In place of its advantages it gets the
combined ones, sum_i c_i A_i, with weights c solved once per rollout, over the completions of all processes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from ._rollout import Advantages, leave_one_out, reward_advantages
from ._trl_config import (
    COMPLETION_MEANS,
    LOSS_TYPES,
    GRPOOptions,
    PamaGRPOConfig,
    PamaOptions,
    PamaRLOOConfig,
)
from ._trl_mixin import PamaMixin

__all__ = [
    "GRPOOptions",
    "LOSS_TYPES",
    "PamaGRPOConfig",
    "PamaGRPOTrainer",
    "PamaOptions",
    "PamaRLOOConfig",
    "PamaRLOOTrainer",
]

EPS = 1e-4  # added to deviations, as TRL does


class PamaGRPOTrainer(PamaMixin, GRPOTrainer):
    """`GRPOTrainer` that combines its reward functions by PAMA instead of by fixed weights.

    Args:
        model: as in `GRPOTrainer`.
        reward_funcs: as in `GRPOTrainer`; each one is an objective. A function may return None (or NaN) for
            completions to which it does not apply: they are ignored for this objective.
        args: a `PamaGRPOConfig`. None: its defaults.

    All other arguments are those of `GRPOTrainer`. The rewards of each function are normalised separately, in
    groups, according to `scale_rewards`. `reward_weights` are the preference, read at every rollout; a reward
    of weight 0 is only logged. docs/trl.md lists the additional metrics.

    Attributes:
        combination: advantages, weights and statistics of the latest rollout, over the completions of all
            processes, on the CPU; None before the first.

    Subclasses: advantages are computed from the return value of `_calculate_rewards`. If a subclass changes
    `output["advantages"]` of a completion, its loss is TRL's own with the changed advantage.

    Raises:
        TypeError, ValueError: at construction: a setting is wrong, two contradict each other, or an option of
            TRL would bypass PAMA or be bypassed by it. During training: a reward function returned an
            infinity.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Algorithm 1; Shao et al. 2024 (arXiv 2402.03300) for GRPO.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "pama"]
    config: ClassVar[type[PamaOptions]] = PamaGRPOConfig

    def _objective_advantages(self, rewards: Tensor, group_size: int, output: dict[str, Any]) -> Advantages:
        advantages = reward_advantages(
            rewards, self.objective_names, group_size=group_size, scale=self.scale_rewards, eps=EPS
        )
        return Advantages(advantages, advantages)

    def _completions_count_the_same(self) -> bool:
        return self.loss_type in COMPLETION_MEANS

    def _clipping_may_bind(self, output: dict[str, Any]) -> bool:
        # On-policy (TRL then keeps no log-probabilities) the losses are linear; SAPO's value is not.
        return "old_per_token_logps" in output or self.loss_type == "sapo"

    def _importance_weights(self, output: dict[str, Any]) -> Tensor | None:
        # Importance weights that correct for a different rollout engine; VESPO includes them in its own
        # factor.
        return None if self.loss_type == "vespo" else output.get("importance_sampling_ratio")


class PamaRLOOTrainer(PamaMixin, RLOOTrainer):
    """`RLOOTrainer` that combines its reward functions by PAMA instead of by fixed weights.

    Args:
        model: as in `RLOOTrainer`.
        reward_funcs: as in `PamaGRPOTrainer`.
        args: a `PamaRLOOConfig`. None: its defaults.

    All other arguments are those of `RLOOTrainer`. A completion is one action: all completions have the same
    weight, independent of their length. Every reward has its own leave-one-out baseline; `reward_clip_range`
    and `normalize_advantages` are applied to each reward separately. The KL penalty is subtracted from every
    reward, and hence from the combined advantage, but weights are solved from the rewards without it.

    Source: He & Maghsudi 2025 (arXiv 2508.07768); Ahmadian et al. 2024 (arXiv 2402.14740) for RLOO.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "rloo", "pama"]
    config: ClassVar[type[PamaOptions]] = PamaRLOOConfig
    _scored_logps: list[Tensor] | None = None  # of the policy and, with a KL penalty, of the reference

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._scored_logps = []
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._scored_logps = None

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*arguments, **named)
        if self._scored_logps is not None:
            self._scored_logps.append(result[0])
        return result

    def _objective_advantages(self, rewards: Tensor, group_size: int, output: dict[str, Any]) -> Advantages:
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        penalty = None
        if self.beta != 0.0:
            assert self._scored_logps is not None
            policy, reference = self._scored_logps
            divergence = ((policy - reference) * output["completion_mask"]).sum(1)
            penalty = self.beta * self.accelerator.gather(divergence).cpu().double()
        return leave_one_out(
            rewards,
            self.objective_names,
            group_size=group_size,
            eps=EPS,
            penalty=penalty,
            whiten=self.normalize_advantages,
        )

    def _completions_count_the_same(self) -> bool:
        return True

    def _clipping_may_bind(self, output: dict[str, Any]) -> bool:
        steps = self.args.steps_per_generation * self.num_iterations
        return bool(self.args.gradient_accumulation_steps % steps)
