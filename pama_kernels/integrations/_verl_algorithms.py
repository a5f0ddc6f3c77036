"""The functions that verl calls: the advantage estimator and the policy loss, and their settings. Only the
loss needs verl."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pama_kernels._validate import AGGREGATIONS, check_choice, check_flag, preference_tensor
from pama_kernels.rules import Rule, noon_of
from pama_kernels.statistics import objective_statistics

from ._rollout import combine, make_rule, prefixed, reward_advantages, rollout_metrics

NAME = "pama"
EPS = 1e-6  # added to deviations, as verl does


@dataclass(frozen=True)
class Settings:
    """The settings in ``algorithm.pama``.

    Args:
        reward_keys: the objectives: names of entries of the reward function's dictionary.
        rule: "pama", "upgrad", "fixed", "softmin" or "paper". None: "pama" where a setting of
            it is given, else the library's default, "upgrad".
        preference: one non-negative number for each objective; with "fixed" the weights. None: uniform.
        weights_per: "batch": one set of weights per rollout. "sequence": one per completion; "token" is
            the same, since rewards belong to completions. None: the rule's default. "paper" needs it.
        bound: of "pama": "gram", the min-norm problem on cosines ("batch" only), or "scores", the
            problem of the paper's Theorem 1 on the mean bound terms. None: the rule's default.
        noon: of "pama": keep positive advantages only. None: False.
        regularization: of "pama": penalty on the distance from the preference, at least 0. None: 0.1.
        temperature: of "softmin", in units of the advantages, above 0. None: 1.
        normalize: divide the combined advantages by their root mean square over tokens.
        aggregation: token weights of the statistics; the trainers set it from `actor.loss_agg_mode`.
    """

    reward_keys: tuple[str, ...]
    rule: str | None = None
    preference: tuple[float, ...] | None = None
    weights_per: str | None = None
    bound: str | None = None
    noon: bool | None = None
    regularization: float | None = None
    temperature: float | None = None
    normalize: bool = False
    aggregation: str = "token-mean"

    def made(self) -> Rule:
        names = "weights_per", "bound", "noon", "regularization", "temperature"
        return make_rule(self.rule, {name: getattr(self, name) for name in names})


def read_settings(algorithm: Any) -> Settings:
    """The settings in verl's ``algorithm`` section.

    Raises:
        ValueError, TypeError: a setting is missing, unknown or wrong; the message names it.
    """
    section: Any = None if algorithm is None else algorithm.get("pama", None)
    if not hasattr(section, "items"):
        raise ValueError(f"algorithm.pama: expected a section with reward_keys, got {section!r}")
    given = {str(name): _plain(value) for name, value in section.items()}
    known = [setting.name for setting in fields(Settings)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"algorithm.pama: expected {', '.join(known)}, got {', '.join(unknown)}")
    keys = given.get("reward_keys")
    if keys is None:
        raise ValueError("algorithm.pama.reward_keys: expected a list of names, got none")
    if not isinstance(keys, tuple) or not keys or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"algorithm.pama.reward_keys: expected a list of names, got {keys!r}")
    if len(set(keys)) != len(keys):
        raise ValueError(f"algorithm.pama.reward_keys: expected different names, got {list(keys)}")
    settings = Settings(**given)
    with prefixed("algorithm.pama."):
        check_flag("normalize", settings.normalize)
        check_choice("aggregation", settings.aggregation, AGGREGATIONS)
        settings.made()
        preference_tensor(settings.preference, len(keys), torch.device("cpu"))
    return settings


def _plain(value: Any) -> Any:
    """Converts a list (also OmegaConf's type) to a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass
class Rollout:
    """Inputs that verl does not pass to an estimator, and outputs that a trainer reads."""

    components: Mapping[str, Any]
    sources: Sequence[int] | None = None  # the row whose reward counts, for each row; itself by default
    parts: Tensor | None = None  # without Noon: (bs, 2), sum_i c_i max(A_i, 0) and sum_i c_i min(A_i, 0)
    metrics: dict[str, float] = field(default_factory=dict)


current_rollout: contextvars.ContextVar[Rollout | None] = contextvars.ContextVar("rollout", default=None)


def compute_pama_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """verl's estimator interface: group-relative advantages of every reward component, combined by a rule.

    Args:
        token_level_rewards: (bs, T); only its device is used: the components are the rewards.
        response_mask: (bs, T), non-zero where a token counts.
        config: verl's ``algorithm`` section, with settings in ``pama``; `norm_adv_by_std_in_grpo` (True by
            default) divides by the group's deviation.
        index: (bs,) group of each row, verl's ``uid``.
        non_tensor_batch: reward key to (bs,) values, None or NaN where a reward does not apply. verl 0.9.1
            passes it to its own ``gdpo`` only; the trainers of this package pass the components differently
            (_verl_trainers.py).

    Returns:
        (advantages, returns), one (bs, T) float32 tensor twice, 0 where masked. One objective without Noon
        gives the same as verl's ``grpo``, except 0 for a group of one.

    Raises:
        ValueError, TypeError: settings or reward components are missing or wrong.
    """
    rollout = current_rollout.get()
    if non_tensor_batch is not None or rollout is None:
        rollout = Rollout(non_tensor_batch or {})
    settings = read_settings(config)
    rule, keys = settings.made(), settings.reward_keys
    if index is None:
        raise ValueError("index: expected the group of each row (verl's uid), got None")
    mask = response_mask.cpu() != 0
    rows = len(mask)
    rewards = _reward_matrix(rollout.components, keys, rows)
    groups = torch.from_numpy(np.unique(np.asarray(index, dtype=str), return_inverse=True)[1])
    sources = torch.tensor(range(rows) if rollout.sources is None else rollout.sources)
    counted, row = torch.unique(sources, return_inverse=True)
    scale = "group" if config.get("norm_adv_by_std_in_grpo", True) else "none"
    once = reward_advantages(rewards[counted], keys, group_ids=groups[counted], scale=scale, eps=EPS)
    advantages, present = once[row], ~rewards[sources].isnan()
    statistics = objective_statistics(
        None,
        None,
        advantages,
        mask,
        noon=noon_of(rule),
        objective_mask=present,
        aggregation=settings.aggregation,
        pairs=True,
    )
    lengths = mask.sum(1)
    combined = combine(
        advantages,
        present,
        ((lengths > 0) if settings.aggregation == "seq-mean-token-mean" else lengths).double(),
        statistics,
        rule,
        preference_tensor(settings.preference, len(keys), torch.device("cpu")),
        normalize=settings.normalize,
    )
    if not noon_of(rule):
        rollout.parts = torch.stack([combined.positive, -combined.negative], -1).float()
    metrics = rollout_metrics(combined, dict(enumerate(keys)), rule)
    rollout.metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
    result = (combined.advantages[:, None] * mask).to(token_level_rewards.device, torch.float32)
    return result, result


def _reward_matrix(components: Mapping[str, Any], keys: Sequence[str], rows: int) -> Tensor:
    """(rows, N) float64, NaN where a reward does not apply."""
    columns = []
    for key in keys:
        if key not in components:
            raise ValueError(
                "algorithm.pama.reward_keys: expected keys of the dictionary that the reward function "
                f"returns, got {key!r}; it has {sorted(components)}"
            )
        values = list(components[key])
        if len(values) != rows:
            raise ValueError(f"reward {key!r}: expected {rows} values, got {len(values)}")
        columns.append([math.nan if value is None else _number(key, value) for value in values])
    return torch.tensor(columns, dtype=torch.float64).reshape(len(keys), rows).T


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"reward {key!r}: expected a finite number or None, got {value!r}")
    return number


def compute_pama_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss interface: sum_i c_i L_i, each objective clipped according to its own sign.

    Two numbers per token are enough for any number of objectives, P = sum_i c_i max(A_i, 0) and
    Q = sum_i c_i min(A_i, 0). With the ratio u, the loss of a token is
    -P min(u, 1 + eps_high) - Q min(max(u, 1 - eps_low), clip_ratio_c).

    Args:
        old_log_prob: (bs, T).
        log_prob: (bs, T).
        advantages: (bs, 2 T), P, then Q, as the pama trainers pass them without Noon; or (bs, T), one
            advantage per token: the loss is then verl's vanilla loss.
        response_mask: (bs, T), non-zero where a token counts.
        loss_agg_mode: verl's aggregation, by its `agg_loss`.
        config: verl's configuration of the actor: clip ranges and batch sizes.
        rollout_is_weights: (bs, T), factors that correct for the rollout engine's probabilities.

    Returns:
        The loss and the metrics of verl's vanilla loss.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.torch_functional import masked_mean

    if config is None:
        raise ValueError("config: expected verl's actor configuration, got None")
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    dual = config.get("clip_ratio_c", 3.0)
    if not dual > 1:
        raise ValueError(f"clip_ratio_c: expected a number above 1, got {dual}")
    rows, width = log_prob.shape
    if advantages.shape == (rows, 2 * width):
        positive, negative = advantages.reshape(rows, width, 2).unbind(-1)
    elif advantages.shape == (rows, width):
        positive, negative = advantages.clamp(min=0), advantages.clamp(max=0)
    else:
        found = tuple(advantages.shape)
        raise ValueError(f"advantages: expected shape {(rows, width)} or {(rows, 2 * width)}, got {found}")

    difference = torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0)
    ratio = difference.exp()
    losses = -positive * ratio.clamp(max=1 + high) - negative * ratio.clamp(min=1 - low, max=dual)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(
        loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    clipped = ((positive > 0) & (ratio > 1 + high)) | ((negative < 0) & (ratio < 1 - low))
    means = {
        "actor/pg_clipfrac": clipped.float(),
        "actor/ppo_kl": -difference.detach(),
        "actor/pg_clipfrac_lower": ((negative < 0) & (ratio > dual)).float(),
    }
    return loss, {name: masked_mean(values, response_mask).item() for name, values in means.items()}
