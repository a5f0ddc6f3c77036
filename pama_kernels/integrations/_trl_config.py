"""The configurations of the trainers, and which versions and options of TRL they work with."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pama_kernels._validate import check_flag, preference_tensor
from pama_kernels.module import PamaLoss
from pama_kernels.rules import Fixed

from ._rollout import make_rule, prefixed

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

from trl import GRPOConfig, GRPOTrainer, RLOOConfig  # noqa: E402

# Loss types whose loss per token is linear in the advantage on each side of 0, so that two numbers for each
# completion are enough for any number of objectives.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# Those of these loss types that average over completions; the others weigh every token equally.
COMPLETION_MEANS = ("grpo", "sapo")


@dataclass
class PamaOptions:
    """Mixin for a configuration of TRL: the rule and its settings.

    Args:
        pama_rule: "pama", "upgrad", "fixed", "softmin" or "paper". In Python also a rule (`pk.UPGrad()`) or a
            function of `ObjectiveStatistics` that returns weights (N,), defined at module level because
            checkpoints pickle the configuration. None: "pama" where a setting of it
            is given, else the library's default, "upgrad".
        pama_preference: one non-negative number for each reward, another name for TRL's `reward_weights`:
            only one of the two may be given. None: uniform.
        pama_weights_per: "batch": one set of weights per rollout, over the completions of all processes.
            "sequence": one per completion; "token" is the same, since a reward belongs to a completion. None:
            the rule's default. "paper" needs it.
        pama_bound: of "pama": "gram", the min-norm problem on cosines ("batch" only), or "scores", the
            problem of the paper's Theorem 1 on the mean bound terms. None: the rule's default.
        pama_noon: of "pama": keep positive advantages only. None: False.
        pama_regularization: of "pama": penalty on the distance from the preference, at least 0. None: 0.1.
        pama_temperature: of "softmin", in units of the advantages, above 0. None: 1.
        pama_momentum: in [0, 1): solve on a running mean of the statistics of all rollouts so far ("batch"
            only); 0: each rollout separately.
        pama_normalize: divide the combined advantages by their root mean square over tokens.

    Raises:
        TypeError, ValueError: a setting is wrong, or the rule does not have it.
    """

    pama_rule: str | None = field(
        default=None,
        metadata={
            "help": "How weights are chosen: 'pama', 'upgrad', 'fixed', 'softmin' or 'paper' (in Python also "
            "a rule of pama_kernels or a function of ObjectiveStatistics)."
        },
    )
    pama_preference: list[float] | None = field(
        default=None, metadata={"help": "One number for each reward; the same as reward_weights."}
    )
    pama_weights_per: str | None = field(
        default=None,
        metadata={"help": "'batch' (one set of weights per rollout) or 'sequence' (one per completion)."},
    )
    pama_bound: str | None = field(
        default=None,
        metadata={"help": "'gram' (min-norm on cosines; 'batch' only) or 'scores' (the paper's Theorem 1)."},
    )
    pama_noon: bool | None = field(
        default=None, metadata={"help": "Keep positive advantages only (Noon PPO), as the paper does."}
    )
    pama_regularization: float | None = field(
        default=None, metadata={"help": "Pull of 'pama' towards the preference, at least 0."}
    )
    pama_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of 'softmin', in units of the advantages."}
    )
    pama_momentum: float = field(
        default=0.0,
        metadata={"help": "Solve on a running mean of all rollouts' statistics, in [0, 1) ('batch' only)."},
    )
    pama_normalize: bool = field(
        default=False, metadata={"help": "Divide the combined advantages by their root mean square."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        read_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """Represents a rule object by its name and settings, since loggers write JSON."""
        made: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if not isinstance(self.pama_rule, (str, type(None))):
            made["pama_rule"] = getattr(self.pama_rule, "__name__", repr(self.pama_rule))
        return made

    @classmethod
    def check(cls, args: Any) -> None:
        """Raises where an option of TRL would bypass the combined advantages, or be bypassed by them."""
        if not issubclass(type(args), cls):
            raise TypeError(f"args: expected a {cls.__name__}, got {type(args).__name__}")
        if args.reward_weights is not None and args.pama_preference is not None:
            raise ValueError(
                "pama_preference: expected None with reward_weights, which are the preference, got both"
            )


class GRPOOptions(PamaOptions):
    """`PamaOptions` for `GRPOConfig` and classes derived from it."""

    @classmethod
    def check(cls, args: Any) -> None:
        super().check(args)
        if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise ValueError(
                "use_liger_kernel: expected False, got True: this version of TRL replaces the loss with it"
            )
        if args.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {args.loss_type!r}")
        if args.scale_rewards not in ("group", "batch", "none"):
            raise ValueError(
                f"scale_rewards: expected 'group', 'batch' or 'none', got {args.scale_rewards!r}"
            )
        if args.multi_objective_aggregation != "sum_then_normalize" and not cls._is_gdpo(args):
            raise ValueError(
                "multi_objective_aggregation: expected the default 'sum_then_normalize', got "
                f"{args.multi_objective_aggregation!r}: PAMA normalises each reward and combines them itself "
                "('normalize_then_sum' is allowed with what it means here: pama_rule='fixed', "
                "pama_normalize=True and scale_rewards='group')"
            )

    @staticmethod
    def _is_gdpo(args: Any) -> bool:
        return bool(
            args.multi_objective_aggregation == "normalize_then_sum"
            and (args.pama_rule == "fixed" or isinstance(args.pama_rule, Fixed))
            and args.pama_normalize
            and args.scale_rewards == "group"
        )


@dataclass
class PamaGRPOConfig(GRPOOptions, GRPOConfig):
    """`GRPOConfig` with the options of `PamaOptions`."""


@dataclass
class PamaRLOOConfig(PamaOptions, RLOOConfig):
    """`RLOOConfig` with the options of `PamaOptions`."""


def read_settings(args: Any) -> PamaLoss:
    """The rule and the running mean; the loss of the module is not used. Raises where a setting is wrong."""
    names = "weights_per", "bound", "noon", "regularization", "temperature"
    with prefixed("pama_"):
        check_flag("normalize", args.pama_normalize)
        rule = make_rule(args.pama_rule, {name: getattr(args, f"pama_{name}") for name in names})
        try:
            pickle.dumps(rule)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "rule: expected a function at module level, since checkpoints pickle it, got "
                f"{rule!r} ({error})"
            ) from None
        if not isinstance(args.pama_preference, (list, tuple, type(None))):
            raise TypeError(f"preference: expected a list of numbers, got {args.pama_preference!r}")
        if args.pama_preference is not None:
            preference_tensor(args.pama_preference, len(args.pama_preference), torch.device("cpu"))
        # Without the preference, it takes the size of the running mean from the trainer's statistics.
        return PamaLoss(rule=rule, momentum=args.pama_momentum)
