"""Other implementations on the tensors that `pama_loss` takes: eager PyTorch, TRL, verl, Liger.

The eager functions are efficient ones: with Noon the clipped loss of the combination equals the combination
of clipped losses, so the objectives are combined first and the remaining cost is that of one objective.
"""

from __future__ import annotations

import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CLIP = 0.2
VERL_DUAL_CLIP = 3.0  # verl's default

# (logprobs, old_logprobs, advantages, mask) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped surrogate of one objective; advantages (B, T), (B, 1) or (M,)."""
    ratio = (logprobs.float() - old_logprobs.float()).exp()
    advantages = advantages.float()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -(surrogate * mask).sum() / mask.sum()


def smallest(scores: Tensor) -> Tensor:
    """PAMA's weights of scores (..., N) >= 0 without regularization: equal where they are smallest."""
    tied = (scores == scores.amin(-1, keepdim=True)).to(scores.dtype)
    return tied / tied.sum(-1, keepdim=True)


def eager_loss(weights_per: str) -> Loss:
    """PAMA's loss with Noon; advantages (B, T, N), (B, 1, N) or (M, N). "given" takes equal weights."""

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        positive = advantages.float().clamp(min=0)
        with torch.no_grad():
            inside = (logprobs.float() - old_logprobs.float()).exp() <= 1 + CLIP
            if weights_per == "token":
                combined = (smallest(positive * inside.unsqueeze(-1)) * positive).sum(-1)
            elif weights_per == "sequence":
                kept = (inside & mask).float().unsqueeze(1)
                scores = (kept @ positive.expand(*mask.shape, -1)).squeeze(1) / mask.sum(1, keepdim=True)
                combined = (positive @ smallest(scores).unsqueeze(-1)).squeeze(-1)
            elif weights_per == "batch":
                kept = (inside & mask).float()
                if positive.dim() == 3 and positive.shape[1] == 1:  # per sequence: never expanded
                    scores = kept.sum(1) @ positive.squeeze(1) / mask.sum()
                else:
                    scores = kept.flatten() @ positive.flatten(0, -2) / mask.sum()
                combined = positive @ smallest(scores)
            else:
                combined = positive.mean(-1)
        return ppo_loss(logprobs, old_logprobs, combined, mask)

    return loss


def eager_statistics(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Most of what `objective_statistics` sums; advantages (B, T, N)."""
    log_ratio = (logprobs - old_logprobs).unsqueeze(-1)
    ratio, valid = log_ratio.exp(), mask.unsqueeze(-1)
    positive = advantages.clamp(min=0)
    inside = ratio <= 1 + CLIP
    indicator = positive * (inside & valid)
    surrogate = torch.min(ratio * positive, ratio.clamp(1 - CLIP, 1 + CLIP) * positive)
    return {
        "count": mask.sum(),
        "indicator": indicator.sum((0, 1)),
        "indicator_square": indicator.square().sum((0, 1)),
        "logprob": (indicator * logprobs.unsqueeze(-1)).sum((0, 1)),
        "surrogate": (surrogate * valid).sum((0, 1)),
        "advantage": (advantages * valid).sum((0, 1)),
        "advantage_square": (advantages.square() * valid).sum((0, 1)),
        "positive": ((advantages > 0) & valid).sum((0, 1)),
        "clipped": ((advantages > 0) & ~inside & valid).sum((0, 1)),
        "kl": ((ratio - 1 - log_ratio) * valid).sum(),
    }


def compiled_loss(weights_per: str) -> Loss:
    """`eager_loss` compiled, which needs a C++ compiler; compiled here, so that an error is raised here."""
    compiled: Loss = torch.compile(eager_loss(weights_per), dynamic=False)
    _compile(compiled, torch.ones(2, 8, 2))
    return compiled


def _compile(loss: Loss, advantages: Tensor) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            logprobs = torch.zeros(2, 8, requires_grad=True)
            loss(logprobs, torch.zeros(2, 8), advantages, torch.ones(2, 8, dtype=torch.bool)).backward()
    except Exception as error:  # whatever the compiler says
        raise ImportError(f"torch.compile fails: {str(error).strip().splitlines()[0][:100]}") from error


class _OneProcess:
    """The methods of the accelerator that TRL's loss calls."""

    num_processes = 1

    @staticmethod
    def reduce(x: Tensor, reduction: str = "sum") -> Tensor:
        return x

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


def trl_loss() -> Loss:
    """`GRPOTrainer._compute_loss` itself (loss_type "bnpo", a token mean), its metrics included.

    The model is replaced by given log-probabilities, and its entropies, which only a metric uses, by the old
    log-probabilities. The mask is int64, as in the trainer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_class = _named("trl", "trl.trainer.grpo_trainer", "GRPOTrainer")
    given: dict[str, Any] = {}
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="bnpo",
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        current_gradient_accumulation_steps=1,
        vllm_importance_sampling_correction=False,
        args=SimpleNamespace(delta=None),
        model=SimpleNamespace(training=True),
        accelerator=_OneProcess(),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (given["logprobs"], given["entropies"], None),
    )

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        given.update(logprobs=logprobs, entropies=old_logprobs)
        prompt = mask[:, :1]
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old_logprobs,
        }
        trainer._metrics["train"].clear()
        result: Tensor = trainer_class._compute_loss(trainer, None, inputs)
        return result

    return loss


def verl_loss() -> Loss:
    """`compute_policy_loss_vanilla` itself, metrics and the dual clip that it always applies included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = _named("verl", "verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
        config = _named("verl", "verl.workers.config", "ActorConfig")(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=CLIP
        )

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = function(
            old_log_prob=old_logprobs,
            log_prob=logprobs,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=config,
        )[0]
        return result

    return loss


def liger_loss() -> Loss:
    """The loss function inside `LigerFusedLinearGRPOLoss` ("bnpo", a token mean), compiled as it compiles it.

    The log-probabilities are given; advantages are (B, 1), since it takes one per sequence.
    """
    function = _named("liger_kernel", "liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOFunction")
    compiled = torch.compile(function.ppo_loss_fn)

    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = compiled(
            *(logprobs, mask, advantages.squeeze(1), mask),
            old_per_token_logps=old_logprobs,
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            beta=0.0,
            loss_type="bnpo",
        )[0]
        return result

    _compile(loss, torch.ones(2, 1))
    return loss


def _named(package: str, module: str, name: str) -> Any:
    """From an optional package; ImportError if it or one of its requirements is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # TRL wraps what is missing in a RuntimeError
        reason = str(error).strip().splitlines()[-1]
        raise ImportError(reason if package in reason else f"{package}: {reason}") from error
