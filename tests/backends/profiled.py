"""One call of the statistics and of the loss at a size that fills a GPU, for Nsight Compute."""

from __future__ import annotations

import os

import torch

import pama_kernels as pk

device = os.environ.get("PAMA_TEST_DEVICE", "cuda")
rows, width, n = (4096, 1024, 4) if device == "cuda" else (4, 32, 4)
g = torch.Generator(device=device).manual_seed(0)
logprobs = -torch.rand(rows, width, generator=g, device=device)
old = logprobs + 0.2 * torch.randn(rows, width, generator=g, device=device)
advantages = torch.randn(rows, width, n, generator=g, device=device)
mask = torch.rand(rows, width, generator=g, device=device) < 0.9
pk.objective_statistics(logprobs, old, advantages, mask)
for given in (advantages, advantages[:, 0]):  # per token, per sequence
    leaf = logprobs.clone().requires_grad_()
    pk.pama_loss(leaf, old, given, mask).loss.backward()
pk.combine_advantages(advantages[:, 0], mask)
if device == "cuda":
    torch.cuda.synchronize()
print("profiled")
