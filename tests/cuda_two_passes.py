"""Weights of the batch: the first pass by emulated CUDA kernels, the second by Triton's interpreter.

And the first pass of either as the GPU benchmark times it.

A program of its own: `TRITON_INTERPRET=1` is read when Triton is imported.
"""

from __future__ import annotations

import cuda_emulation  # noqa: F401
import torch
from problems import make

import pama_kernels as pk
from benchmarks import gpu
from pama_kernels import backends, reference

assert backends.find("cpu", "loss").__module__ == "pama_kernels.backends.cuda.passes"
EPS = torch.finfo(torch.float32).eps

for layout in ("padded", "packed", "per-sequence"):
    for bound, aggregation in (
        ("scores", "token-mean"),
        ("scores", "seq-mean-token-mean"),
        ("gram", "seq-mean-token-mean"),
    ):
        options = {"weights_per": "batch", "bound": bound, "regularization": 0.1}
        problem = make(layout, rows=4, width=9, seed=3, importance_weights=True)
        arguments = problem.loss_arguments()
        leaf, wide = problem.logprobs.clone().requires_grad_(), problem.logprobs.double().requires_grad_()
        found = pk.pama_loss(**{**arguments, "logprobs": leaf}, **options, aggregation=aggregation)
        wanted = reference.pama_loss(**{**arguments, "logprobs": wide}, **options, aggregation=aggregation)
        (gradient,) = torch.autograd.grad(found.loss, leaf)
        (wanted_gradient,) = torch.autograd.grad(wanted.loss, wide)
        combined = pk.combine_advantages(**problem.combine_arguments(False), **options)
        wanted_combined = reference.combine_advantages(**problem.combine_arguments(False), **options)
        # At most 36 terms of a size up to 2 e^1.25, three float32 roundings each.
        tolerance = 3 * 36 * 7 * EPS
        for x, y in (
            (found.loss, wanted.loss),
            (found.weights, wanted.weights),
            (gradient, wanted_gradient),
            (combined.advantages, wanted_combined.advantages),
            (combined.weights, wanted_combined.weights),
        ):
            assert float((x.detach() - y.detach()).abs().max()) <= tolerance, (layout, bound)
x = gpu.inputs(96, 3, torch.device("cpu"), seed=0)
for backend in ("cuda", "triton"):
    first = gpu.launch_of(backend)
    assert first is not None
    assert float((first(x) - gpu.eager_statistics(x)).abs().max()) <= 4 * EPS, backend
print("both passes ran")
