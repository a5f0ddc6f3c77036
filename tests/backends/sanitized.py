"""A short run of every kernel, for compute-sanitizer: odd sizes, masks, layouts and dtypes.

Arguments choose cases, 0 to 2; default: all. The cases share rules and layouts out, since each combination is
a variant of the Triton kernels to compile. `PYTORCH_NO_CUDA_MEMORY_CACHING=1` gives each tensor memory of its
own, so that access out of bounds is seen.
"""

from __future__ import annotations

import os
import sys

import torch

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad

device = os.environ.get("PAMA_TEST_DEVICE", "cuda")
RULES = (
    *(Fixed(), Pama(), Pama(bound="scores"), UPGrad(), Pama("sequence"), SoftMin()),
    *(Pama("token"), SoftMin(1.0, "token"), Pama.paper("token")),
)
g = torch.Generator(device=device).manual_seed(0)
placed = globals().get("copied", lambda x: x)  # of guarded.py

CASES = ((1, 3, 37, torch.float32), (4, 5, 201, torch.float32), (5, 2, 33, torch.bfloat16))
for case in map(int, sys.argv[1:] or "012"):
    n, rows, width, dtype = CASES[case]
    logprobs = placed(-torch.rand(rows, width, generator=g, device=device))
    old = placed(logprobs + 0.1 * torch.randn(rows, width, generator=g, device=device))
    advantages = placed(torch.randn(rows, width, n, generator=g, device=device).to(dtype))
    mask = placed(torch.rand(rows, width, generator=g, device=device) < 0.7)
    present = placed(torch.rand(rows, n, generator=g, device=device) < 0.8)
    pk.objective_statistics(logprobs, old, advantages, mask, objective_mask=present, pairs=True)
    pk.objective_statistics(logprobs, old, advantages)
    for number, rule in enumerate(RULES):
        given = advantages if (number + case) % 2 else advantages[:, 0]
        leaf = placed(logprobs.clone()).requires_grad_()
        pk.pama_loss(leaf, old, given, mask, rule=rule, objective_mask=present).loss.backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        if number % 3 == case:
            pk.combine_advantages(given, mask, rule=rule, aggregation="seq-mean-token-mean", normalize=True)
    # packed, with everything that may be given
    ends = width * torch.arange(rows + 1, device=device)
    ends[1] -= width // 2
    flat = {"old_logprobs": old.flatten(), "ref_logprobs": placed(old.flatten()), "mask": mask.flatten()}
    weights = placed(torch.rand(rows * width, generator=g, device=device))
    rule = RULES[1 + 3 * (case % 2)]
    for given in (advantages.flatten(0, 1), advantages[:, 0]):
        if len(given) != rows and rule.weights_per == "sequence":  # type: ignore[attr-defined]
            continue
        leaf = placed(logprobs.flatten()).requires_grad_()
        pk.pama_loss(
            leaf,
            advantages=given,
            **flat,
            rule=rule,
            importance_weights=weights,
            kl_coef=0.1,
            cu_seqlens=ends,
        ).loss.backward()
    pk.pama_weights(advantages)
    vectors = torch.randn(7, n, n + 2, generator=g, device=device)
    pk.min_norm_weights(vectors @ vectors.mT, regularization=0.1)
    pk.upgrad_weights(vectors @ vectors.mT)
    over, final = mask.logical_not(), advantages.roll(1, 1)
    pk.multi_objective_gae(advantages, advantages.abs(), mask, truncated=over, final_values=final)
    pk.group_normalize(torch.randn(6, n, generator=g, device=device), group_size=3)
if device == "cuda":
    torch.cuda.synchronize()
print("every kernel ran")
