"""What verl calls: settings, the advantage estimator and the policy loss. Only the loss needs verl."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pama_kernels.advantages import combine_advantages, group_normalize

NAME = "pama"
EPS = 1e-6  # added to deviations, as verl does
LOGGED = ("score", "weight", "positive_fraction", "conflict", "optimum")


@dataclass(frozen=True)
class Settings:
    """``algorithm.pama``: `reward_keys` name the objectives, the rest goes to `combine_advantages`."""

    reward_keys: tuple[str, ...]
    weights_per: str = "batch"
    bound: str = "scores"
    noon: bool = True
    prior: tuple[float, ...] | None = None
    regularization: float = 0.1

    def rule(self) -> dict[str, Any]:
        # Rewards belong to whole responses: weights per token are those of the sequence.
        per = "sequence" if self.weights_per == "token" else self.weights_per
        names = ("bound", "noon", "prior", "regularization")
        return {"weights_per": per, **{name: getattr(self, name) for name in names}}


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
    if not isinstance(given.get("noon", True), bool):
        raise TypeError(f"algorithm.pama.noon: expected true or false, got {given['noon']!r}")
    if given.get("bound") == "gram" and len(keys) < 2:
        raise ValueError(f"algorithm.pama.bound: 'gram' needs two rewards or more, got {list(keys)}")
    settings = Settings(**given)
    try:
        combine_advantages(torch.empty(0, len(keys)), **settings.rule())
    except (TypeError, ValueError) as error:  # "argument: expected ..., got ..."
        raise type(error)(f"algorithm.pama.{error}") from None
    return settings


def _plain(value: Any) -> Any:
    """A list of any kind (OmegaConf has its own) as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass
class Rollout:
    """What verl does not pass to an estimator, and what a trainer wants back from it."""

    components: Mapping[str, Any]
    sources: Sequence[int] | None = None  # the row whose reward counts, for each row; itself by default
    parts: Tensor | None = None  # noon=False: (bs, 2), sum_i c_i max(A_i, 0) and sum_i c_i min(A_i, 0)
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
    """verl's estimator interface: group-relative advantages of every reward component, combined by PAMA.

    Args:
        token_level_rewards: (bs, T); only its device is used: the components are the rewards.
        response_mask: (bs, T), non-zero where a token counts.
        config: verl's ``algorithm`` section, with settings in ``pama``; `norm_adv_by_std_in_grpo` (True by
            default) divides by the group's deviation.
        index: (bs,) group of each row, verl's ``uid``.
        non_tensor_batch: reward key to (bs,) values, None where a reward does not apply. verl 0.9.1 passes
            it to its own ``gdpo`` only; in its trainers the components come another way (_verl_trainers.py).

    Returns:
        (advantages, returns), one (bs, T) tensor twice, 0 where masked. One objective with `noon=False` gives
        what verl's ``grpo`` gives, but 0 for a group of one.

    Raises:
        ValueError, TypeError: settings or reward components are missing or wrong.
    """
    rollout = current_rollout.get()
    if non_tensor_batch is not None or rollout is None:
        rollout = Rollout(non_tensor_batch or {})
    settings = read_settings(config)
    if index is None:
        raise ValueError("index: expected the group of each row (verl's uid), got None")
    device = token_level_rewards.device
    rows, width = response_mask.shape
    rewards = _reward_matrix(rollout.components, settings.reward_keys, rows).to(device)
    groups = torch.from_numpy(np.unique(np.asarray(index, dtype=str), return_inverse=True)[1]).to(device)
    sources = torch.tensor(range(rows) if rollout.sources is None else rollout.sources, device=device)
    counted, row = torch.unique(sources, return_inverse=True)
    scale = bool(config.get("norm_adv_by_std_in_grpo", True))
    advantages = group_normalize(rewards[counted], group_ids=groups[counted], scale=scale, eps=EPS)[row]
    present = ~rewards[sources].isnan()
    # Responses of N tokens would make (bs, N) look like one advantage per token.
    mask = response_mask if width != len(settings.reward_keys) else _one_wider(response_mask)
    combined = combine_advantages(advantages, mask, objective_mask=present, **settings.rule())
    if not settings.noon:
        given = {**settings.rule(), "noon": True, "weights": combined.weights, "objective_mask": present}
        positive = combine_advantages(advantages, mask, **given).advantages
        negative = combine_advantages(-advantages, mask, **given).advantages
        rollout.parts = torch.stack([positive, -negative], -1)
    metrics = combined.metrics(settings.reward_keys)
    rollout.metrics = {name: value.item() for name, value in metrics.items() if name.split("/")[1] in LOGGED}
    result = combined.advantages[:, None] * (response_mask != 0)
    return result, result


def _reward_matrix(components: Mapping[str, Any], keys: Sequence[str], rows: int) -> Tensor:
    """(rows, N) float32, NaN where the reward function returned None."""
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
    return torch.tensor(columns, dtype=torch.float32).reshape(len(keys), rows).T


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"reward {key!r}: expected a finite number or None, got {value!r}")
    return number


def _one_wider(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_zeros(len(mask), 1)], 1)


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
        advantages: (bs, 2 T), P and Q of a token side by side, as the pama trainers send them with
            `noon=False`; or (bs, T), one advantage per token: the loss is then verl's vanilla loss.
        The others, the aggregation (verl's `agg_loss`) and the metrics are those of the vanilla loss.
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
