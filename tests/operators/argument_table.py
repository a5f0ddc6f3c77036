"""Every public function with a valid call and the kind of each argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from argument_kinds import (
    CALLABLES,
    CHOICE,
    CLIP,
    CU_SEQLENS,
    FLAG,
    GROUP,
    INF,
    NAN,
    OUT,
    PREFERENCE,
    PREFERENCE_TYPES,
    RULE,
    SPARSE,
    B,
    Kind,
    M,
    N,
    Shapes,
    T,
    floats,
    mask,
    near_misses,
    number,
    ones,
)

import pama_kernels as pk

PADDED = (B, T)
BESIDE: Shapes = (*near_misses(PADDED), (T, B), (M,), (1, T))
PER_TOKEN = floats(PADDED, BESIDE)
ADVANTAGES = floats(
    (B, T, N),
    ((N,), (), (B, T, N, 1), (B, T + 1, N), (B + 1, T, N), (N, B, T), (B + 1, N), (M, N), (B, T, 0)),
)
OBJECTIVE_MASK = mask((B, N), ((N,), (B,), (B, N + 1), (B + 1, N), (N, B), (B, T, N), (M, N)))
TOKENS = {
    "advantages": ADVANTAGES,
    "mask": mask(PADDED, BESIDE),
    "objective_mask": OBJECTIVE_MASK,
    "aggregation": CHOICE,
    "clip_range": CLIP,
    "cu_seqlens": CU_SEQLENS,
}
WEIGHTS = floats((N,), ((N + 1,), (1,), (), (B, N + 1), (B + 1, N), (1, N), (B, T, N)))
RULES = {"rule": RULE + CALLABLES, "preference": PREFERENCE, "weights": WEIGHTS, "process_group": GROUP}
LOGPROBS = floats(PADDED, ((B, T, N), ()), first=True)
DUAL_CLIP = number(1.1, 1.0, -3.0, none=True)
POSITIVE, COEFFICIENT, FRACTION = number(0.0, -1.0, INF), number(-0.1, INF), number(-0.1, 1.1)
GRAM = floats((2, N, N), ((), (N,), (N, 2), (2, N, N + 1), (0, 0)), first=True)
GAE_MASK, STEPS = mask(PADDED), floats((B, T, N))


class Function(NamedTuple):
    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, Kind]


_ALL = {
    "logprobs": ones(B, T),
    "old_logprobs": ones(B, T),
    "advantages": ones(B, T, N),
    "mask": ones(B, T),
}
_EYES = {"gram": torch.eye(N).repeat(2, 1, 1)}
_STEPS = {"rewards": ones(B, T, N), "values": ones(B, T, N)}
FUNCTIONS = {
    "combine_advantages": Function(
        pk.combine_advantages,
        {"advantages": ones(B, T, N), "mask": ones(B, T)},
        {**TOKENS, **RULES, "logprobs": floats(PADDED, first=True), "old_logprobs": Kind(), "normalize": FLAG}
        | {"mask": mask(PADDED, ((), (B, T + 1), (B + 1, T), (T, B), (B, T, 1), (1, T)))},
    ),
    "pama_loss": Function(
        pk.pama_loss,
        {**_ALL, "ref_logprobs": ones(B, T)},
        {**TOKENS, **RULES, "logprobs": LOGPROBS, "dual_clip": DUAL_CLIP, "kl_coef": COEFFICIENT}
        | dict.fromkeys(("old_logprobs", "importance_weights", "ref_logprobs"), PER_TOKEN)
        | {
            "statistics": FLAG,
            "normalizer": Kind(
                (0.0, -2.0, NAN, INF, torch.tensor(-2.0), ones(1), ones(device="meta")), (True, "7")
            ),
        },
    ),
    "PamaLoss": Function(
        pk.PamaLoss,
        {},
        {"rule": RULE, "preference": Kind((), PREFERENCE_TYPES), "clip_range": CLIP, "dual_clip": DUAL_CLIP}
        | {"aggregation": CHOICE, "kl_coef": COEFFICIENT, "process_group": GROUP}
        | {"momentum": number(-0.1, 1.0, 1.5, tensors=False), "objectives": Kind((0, -1), (2.0, True))},
    ),
    "objective_statistics": Function(
        pk.objective_statistics,
        _ALL,
        {**TOKENS, "logprobs": LOGPROBS, "noon": FLAG, "dual_clip": DUAL_CLIP, "pairs": FLAG}
        | dict.fromkeys(("old_logprobs", "importance_weights"), PER_TOKEN),
    ),
    "pama_weights": Function(
        pk.pama_weights,
        {"scores": ones(2, N)},
        {"scores": floats((2, N), ((), (4, 0)), first=True), "preference": PREFERENCE, "out": OUT}
        | {"regularization": COEFFICIENT}
        | {
            "scale": Kind((0.0, -1.0, NAN, INF), (True, "1"))
            + floats((2,), ((3,), (2, 1)))._replace(types=(SPARSE,))
        },
    ),
    "min_norm_weights": Function(
        pk.min_norm_weights,
        _EYES,
        {"gram": GRAM, "preference": PREFERENCE, "regularization": COEFFICIENT, "out": OUT},
    ),
    "upgrad_weights": Function(
        pk.upgrad_weights, _EYES, {"gram": GRAM, "preference": PREFERENCE, "out": OUT}
    ),
    "pareto_gap": Function(
        pk.pareto_gap,
        {**_EYES, "weights": ones(2, N) / N},
        {"gram": GRAM._replace(values=GRAM.values[:4]), "weights": floats((2, N))},
    ),
    "multi_objective_gae": Function(
        pk.multi_objective_gae,
        _STEPS,
        {
            "rewards": floats((B, T, N), ((B, T), (B, T, N, 1), (N,)), first=True),
            "values": STEPS,
            "mask": GAE_MASK,
        }
        | {"dones": GAE_MASK, "last_values": floats((B, N), (*near_misses((B, N)), (B, T), (B, T, N)))}
        | {"gamma": FRACTION, "lam": FRACTION},
    ),
    "multi_objective_gae, truncated": Function(
        pk.multi_objective_gae,
        {**_STEPS, "truncated": ones(B, T), "final_values": ones(B, T, N)},
        {"truncated": GAE_MASK, "final_values": STEPS},
    ),
    "group_normalize": Function(
        pk.group_normalize,
        {"rewards": ones(6, N)},
        {"rewards": floats((6, N), ((6,), (6, N, 1), ()), first=True), "scale": FLAG}
        | {"group_size": Kind((4, 0, -2, 12), (2.0, True, "2")), "eps": number(-1.0, INF, tensors=False)}
        | {"group_ids": floats((6,), ((5,), (6, 1)), bad=(torch.float32, torch.complex64))},
    ),
    "masked_whiten": Function(
        pk.masked_whiten,
        {"advantages": ones(B, T, N), "mask": ones(B, T)},
        {
            "advantages": ADVANTAGES,
            "mask": mask(PADDED, ((B, T, N), (T, B))),
            "objective_mask": OBJECTIVE_MASK,
        }
        | {"process_group": GROUP},
    ),
    "Pama": Function(
        pk.Pama,
        {},
        {"weights_per": CHOICE, "bound": Kind(("wrong", 3)), "noon": FLAG, "regularization": COEFFICIENT},
    ),
    "SoftMin": Function(pk.SoftMin, {}, {"temperature": POSITIVE, "weights_per": CHOICE}),
}
