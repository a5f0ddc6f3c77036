"""PAMA in TRL: `GRPOTrainer` with several reward functions, each of them an objective.

The trainer keeps its own loss, clipping, KL and everything else. In place of its advantages it gets the
combined ones, sum_i c_i A_i, with weights c solved once per rollout, over the completions of all processes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import Tensor

from pama_kernels._arguments import check_number, prior_tensor
from pama_kernels.advantages import (
    PAIRS_UP_TO,
    CombinedAdvantages,
    combine_advantages,
    group_normalize,
    weights_from_statistics,
)
from pama_kernels.loss import PamaLoss
from pama_kernels.statistics import ObjectiveStatistics, objective_statistics

OLDEST, NEWEST = (1, 11), (1, 16)  # releases of TRL that were tested, see docs/trl.md


def _check_version() -> None:
    wanted = "trl from {}.{} to {}.{}".format(*OLDEST, *NEWEST)
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"pama_kernels.integrations.trl: expected {wanted}, found none (pip install 'pama-kernels[trl]')"
        ) from None
    release = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not OLDEST <= release <= NEWEST:
        raise ImportError(f"pama_kernels.integrations.trl: expected {wanted}, found {found}")


_check_version()

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

# Loss types whose loss per token is linear in the advantage on each side of 0: positive advantages may be
# combined before it, and with `pama_noon=False` the positive and the negative ones each by themselves.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LOGGED = ("score", "weight", "positive_fraction", "conflict", "optimum")
STATE_FILE = "pama_state.pt"
EPS = 1e-4  # added to deviations, as TRL does


@dataclass
class PamaGRPOConfig(GRPOConfig):
    """`GRPOConfig` with PAMA's settings: the arguments of `combine_advantages`, and `PamaLoss`'s momentum.

    GRPO's rewards belong to completions: "token" and "sequence" are the same problem. TRL's
    `reward_weights`, if given, are the prior; what has weight 0 is only logged.
    """

    pama_weights_per: str = field(
        default="batch",
        metadata={"help": "Whose weights: 'batch' (one set per rollout), 'sequence' or 'token'."},
    )
    pama_bound: str = field(
        default="scores",
        metadata={"help": "'scores' (Theorem 1 on mean scores) or 'gram' (min-norm; 'batch' only)."},
    )
    pama_noon: bool = field(
        default=True, metadata={"help": "Keep positive advantages only (Noon PPO), as the paper does."}
    )
    pama_prior: list[float] | None = field(
        default=None,
        metadata={"help": "Where the weights lie when the scores do not decide; uniform by default."},
    )
    pama_regularization: float = field(
        default=0.1, metadata={"help": "Pull towards the prior, relative to the scores' second moment."}
    )
    pama_momentum: float = field(
        default=0.0,
        metadata={"help": "Solve on a running mean of all rollouts' statistics, in [0, 1) ('batch' only)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _settings(self)


def _settings(args: Any) -> PamaLoss:
    """The settings and the running mean; the loss of the module is not used. Raises where one is wrong."""
    try:
        if not isinstance(args.pama_noon, bool):
            raise TypeError(f"noon: expected True or False, got {args.pama_noon!r}")
        if not isinstance(args.pama_prior, (list, tuple, type(None))):
            raise TypeError(f"prior: expected a list of numbers, got {args.pama_prior!r}")
        return PamaLoss(
            weights_per=args.pama_weights_per,
            bound=args.pama_bound,
            noon=args.pama_noon,
            prior=args.pama_prior,
            regularization=args.pama_regularization,
            momentum=args.pama_momentum,
        )
    except (TypeError, ValueError) as error:  # "argument: expected ..., got ..."
        raise type(error)(f"pama_{error}") from None


def _check_options(args: Any) -> None:
    """Options of the trainer that would bypass the combined advantages, or be bypassed by them."""
    if not isinstance(args, PamaGRPOConfig):
        raise TypeError(f"args: expected a PamaGRPOConfig, got {type(args).__name__}")
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel: expected False, got True: TRL up to 1.13 computes a loss of Liger's with it; "
            "layer kernels also come with model_init_kwargs={'use_kernels': True}"
        )
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {args.loss_type!r}")
    if args.scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards: expected 'group', 'batch' or 'none', got {args.scale_rewards!r}")
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            "multi_objective_aggregation: expected the default 'sum_then_normalize', got "
            f"{args.multi_objective_aggregation!r}: PAMA normalises each reward and combines them itself"
        )
    if args.reward_weights is not None:
        if args.pama_prior is not None:
            raise ValueError("pama_prior: expected None with reward_weights, which are the prior, got both")
        for weight in args.reward_weights:
            check_number("reward_weights", weight, 0.0, float("inf"))
        if not any(args.reward_weights):
            raise ValueError(f"reward_weights: expected at least one above 0, got {args.reward_weights}")


class PamaGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` that combines its reward functions by PAMA instead of by fixed weights.

    Takes the arguments of `GRPOTrainer`, with `args` a `PamaGRPOConfig`. Every reward function whose weight
    is not 0 is an objective. Its rewards are normalised by themselves, in groups, as `scale_rewards` says;
    completions for which it returns None have no part in it. Logged beside TRL's own, for each objective by
    the name of its reward function: ``pama/score/<name>``, ``pama/weight/<name>``,
    ``pama/positive_fraction/<name>``, ``pama/conflict/<name>~<name>``; and ``pama/optimum``.

    `combination` is the `CombinedAdvantages` of the latest rollout: all processes' completions, on the CPU.

    Raises (all but the last at construction):
        TypeError, ValueError: a setting is wrong, two contradict each other, or an option of TRL would bypass
            PAMA or be bypassed by it; a reward function returned an infinity.

    Source: He & Maghsudi 2025 (arXiv 2508.07768), Algorithm 1; Shao et al. 2024 (arXiv 2402.03300) for GRPO.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "pama"]

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **named: Any
    ) -> None:
        _check_options(args)
        self._pama = _settings(args)
        self.combination: CombinedAdvantages | None = None
        self._gathered_rewards: Tensor | None = None
        self._forward_cache: list[Any] | None = None
        if isinstance(reward_funcs, tuple):  # of which TRL takes lists only
            reward_funcs = list(reward_funcs)
        super().__init__(model, reward_funcs, args, *others, **named)
        self._columns, self._prior = self._objectives()
        self.objective_names = [self.reward_func_names[i] for i in self._columns]
        self._two_sided = not args.pama_noon and len(self._columns) > 1
        if self._two_sided and (args.pama_weights_per, args.pama_bound) == ("batch", "scores"):
            warnings.warn(
                "pama_noon=False: the advantages of a group add up to 0, so that the scores of 'batch' only "
                "reflect the lengths of completions; use pama_bound='gram'",
                stacklevel=2,
            )
        if self._two_sided and getattr(args, "use_adaptive_entropy", False):
            raise ValueError(
                "use_adaptive_entropy: expected False with pama_noon=False and several objectives, got True: "
                "the loss has several parts then, and TRL's controller would count each"
            )

    def _objectives(self) -> tuple[list[int], Tensor]:
        """Columns of the reward matrix that are objectives, and their prior."""
        names, args = self.reward_func_names, self.args
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"reward_funcs: expected different names, by which they are logged, got {', '.join(repeated)}"
                " more than once (TRL takes a function's __name__, else the name of the class)"
            )
        prior = args.pama_prior
        columns = list(range(len(names)))
        if args.reward_weights is not None:
            weights = self.reward_weights.tolist()  # TRL has appended those of environments
            columns = [i for i in columns if weights[i] != 0]
            prior = [weights[i] for i in columns]
        n = len(columns)
        if prior is not None and len(prior) != n:
            raise ValueError(f"pama_prior: expected {n} numbers, one for each of {names}, got {len(prior)}")
        if n == 1:
            for setting, is_set in (
                ("pama_bound='gram'", args.pama_bound == "gram"),
                ("pama_momentum", args.pama_momentum > 0),
                ("pama_prior", args.pama_prior is not None),
            ):
                if is_set:
                    raise ValueError(
                        f"reward_funcs: expected at least two objectives with {setting}, got one, "
                        f"{names[columns[0]]}, whose weight is always 1"
                    )
        return columns, prior_tensor(prior, n, torch.device("cpu"))[0]

    # --- from rewards to the trainer's advantages -----------------------------------------------------------

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*arguments, **named)
        self._gathered_rewards = rewards  # (completions of all processes, reward functions); NaN for None
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        rewards, self._gathered_rewards = self._gathered_rewards, None
        if rewards is None:
            raise RuntimeError("PamaGRPOTrainer: this TRL does not score completions by _calculate_rewards")
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        # Corrections for a rollout engine that differs; VESPO has them within its own factor.
        importance = None if self.loss_type == "vespo" else output.get("importance_sampling_ratio")
        if importance is not None:
            importance = importance.cpu().expand(mask.shape)

        # TRL has waited for the device many times by now, and this is little: on the CPU the same kernels
        # serve every accelerator, in float64.
        rewards = rewards[:, self._columns].cpu().double()
        advantages = self._normalize(
            rewards, self.num_generations if mode == "train" else self.num_generations_eval
        )
        present = ~rewards.isnan()
        rank, rows = self.accelerator.process_index, len(inputs)
        local = slice(rank * rows, (rank + 1) * rows)
        statistics = objective_statistics(
            None,
            None,
            advantages[local, None].expand(*mask.shape, -1),  # (B, N) would be ambiguous with N tokens
            mask.cpu(),
            noon=self.args.pama_noon,
            objective_mask=present[local],
            importance_weights=importance,
            gram=self.args.pama_bound == "gram" or len(self._columns) <= PAIRS_UP_TO,
        )
        self._pama.train(mode == "train")
        self.combination = self._combine(advantages, present, self._merge(statistics))

        device = output["advantages"].device
        output["advantages"] = self.combination.advantages[local].to(device, torch.float32)
        if self._two_sided:
            for name, sign in (("pama_positive", 1), ("pama_negative", -1)):
                side = combine_advantages(
                    sign * advantages,
                    weights_per="sequence",
                    weights=self.combination.weights,
                    objective_mask=present,
                )
                output[name] = sign * side.advantages[local].to(device, torch.float32)
        self._log_combination(mode)
        return output

    def _normalize(self, rewards: Tensor, group_size: int) -> Tensor:
        """Each objective by itself: minus the mean of its group, over what `scale_rewards` says."""
        infinite = rewards.isinf().any(0).tolist()
        if any(infinite):
            names = [name for name, bad in zip(self.objective_names, infinite, strict=True) if bad]
            raise ValueError(
                f"reward_funcs: expected finite rewards or None, got inf from {', '.join(names)}"
            )
        scale = self.args.scale_rewards
        advantages = group_normalize(rewards, group_size=group_size, scale=scale == "group", eps=EPS)
        if scale == "batch":
            squares = (rewards - rewards.nanmean(0)).square().nansum(0)
            degrees = (~rewards.isnan()).sum(0) - 1
            advantages = advantages / ((squares / degrees.clamp(min=1)).sqrt() + EPS)
        return advantages

    def _merge(self, statistics: ObjectiveStatistics) -> ObjectiveStatistics:
        """Over all processes by one all-reduce: bitwise equal on each."""
        if self.accelerator.num_processes == 1:
            return statistics
        buffer = self.accelerator.reduce(statistics.buffer.to(self.accelerator.device), reduction="sum")
        return ObjectiveStatistics(buffer.cpu(), statistics.objectives, statistics.has_gram)

    def _combine(
        self, advantages: Tensor, present: Tensor, statistics: ObjectiveStatistics
    ) -> CombinedAdvantages:
        args = self.args
        weights = optimum = None
        if args.pama_weights_per == "batch":
            mean = self._pama.update(statistics) if args.pama_momentum else statistics
            weights, optimum = weights_from_statistics(
                mean, args.pama_bound, self._prior, args.pama_regularization, wide=True
            )
        combined = combine_advantages(
            advantages,
            weights_per="sequence",  # all tokens of a completion have the same advantages
            weights=weights,
            noon=args.pama_noon,
            prior=self._prior,
            regularization=args.pama_regularization,
            objective_mask=present,
        )
        if optimum is None:
            optimum = combined.optimum
        return CombinedAdvantages(combined.advantages, combined.weights, optimum, statistics)

    def _log_combination(self, mode: str) -> None:
        assert self.combination is not None
        for name, value in self.combination.metrics(self.objective_names).items():
            if name.split("/")[1] in LOGGED:
                self._metrics[mode][name].append(value.item())
        # TRL has logged the advantages that it would have used.
        logged, used = self._logs["advantages"], self.combination.advantages.tolist()
        for _ in range(min(len(used), len(logged))):
            logged.pop()
        logged.extend(used)

    # --- the loss where negative advantages are kept --------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's own loss L; with `pama_noon=False`, sum_i c_i L(A_i) = L(P) + L(-Q) - L(0).

        P = sum_i c_i max(A_i, 0), Q = sum_i c_i max(-A_i, 0): their difference alone would lose what
        clipping does where signs disagree. L(0) is all that does not depend on advantages: KL, entropy
        bonus, auxiliary loss. The model runs once.
        """
        if "pama_positive" not in inputs:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mode = "train" if self.model.training else "eval"
        positive, negative = inputs["pama_positive"], inputs["pama_negative"]
        kept = self._metrics[mode]
        losses, metrics = [], []
        self._forward_cache = []
        try:
            for side in (positive, negative, torch.zeros_like(positive)):
                self._metrics[mode] = defaultdict(list)
                losses.append(super()._compute_loss(model, {**inputs, "advantages": side}))
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
        if self._forward_cache is None:
            return super()._get_per_token_logps_and_entropies(*arguments, **named)
        if not self._forward_cache:
            self._forward_cache.append(super()._get_per_token_logps_and_entropies(*arguments, **named))
        return self._forward_cache[0]

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.pama_momentum and self.args.should_save:
            state = {"objectives": self.objective_names, "running_mean": self._pama.state_dict()}
            torch.save(state, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.args.pama_momentum or checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            warnings.warn(f"no {STATE_FILE} in {checkpoint}: PAMA's running mean starts anew", stacklevel=2)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["objectives"] != self.objective_names:
            raise ValueError(
                f"resume_from_checkpoint: expected the running mean of {self.objective_names}, "
                f"got that of {state['objectives']} in {path}"
            )
        self._pama.load_state_dict(state["running_mean"])
