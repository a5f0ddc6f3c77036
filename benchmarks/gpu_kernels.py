"""The calls that the GPU benchmark times separately: statistics, combined advantages, losses, solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels._solve import solve_batch

from . import peers
from .gpu_timing import Bench, Inputs, Work, agree, available, chosen, inputs, pool_of


def ceilings(bench: Bench) -> None:
    """Rows of a copy of device memory and of an empty kernel."""
    size = 1 << 20 if bench.quick else 1 << 30
    pool = [
        {"x": torch.ones(size // 4, device=bench.device), "y": torch.empty(size // 4, device=bench.device)}
    ]
    copy = Work("copy of device memory", lambda x: x["y"].copy_(x["x"]), 2.0 * size)
    bench.measure("ceiling", f"{size >> 20} MiB", 0, size // 4, [copy], pool)
    empty = Work("empty kernel", empty_kernel(bench))
    bench.measure("ceiling", "nothing", 0, 0, [empty], [{"x": torch.ones(1, device=bench.device)}])


def empty_kernel(bench: Bench) -> Callable[[Inputs], Any]:
    if not bench.on_gpu:
        return lambda x: None
    import triton

    @triton.jit
    def nothing(x):  # type: ignore[no-untyped-def]
        pass

    return lambda x: nothing[(1,)](x["x"])


def eager_statistics(x: Inputs) -> Tensor:
    """Scores of the batch with Noon and their weights without regularization, in PyTorch."""
    inside = (x["logprobs"] - x["old_logprobs"]).exp() <= 1 + peers.CLIP
    kept = (inside & x["mask"]).float()
    scores = (kept.unsqueeze(-1) * x["advantages"].clamp(min=0)).sum((0, 1)) / x["mask"].sum()
    return peers.smallest(scores)


PAPER = pk.Pama.paper("batch")  # the rule of the eager functions
PAMA_AND_DEFAULT = (("", pk.Pama()), (", UPGrad", None))


def weights_of(x: Inputs, rule: pk.Pama | pk.UPGrad = PAPER) -> Tensor:
    """The part of `pama_loss` before its second pass."""
    pairs = isinstance(rule, pk.UPGrad) or rule.bound == "gram"
    noon = isinstance(rule, pk.Pama) and rule.noon
    sums = pk.objective_statistics(**x, clip_range=peers.CLIP, noon=noon, pairs=pairs)
    return solve_batch(sums, rule, None).weights


def first_pass(bench: Bench, tokens: int, n: int) -> None:
    """Statistics and weights of the batch."""
    pool = pool_of(lambda seed: inputs(tokens, n, bench.device, seed), bench.quick)
    moved = float(sum(x.numel() * x.element_size() for x in pool[0].values()))
    works = []
    for name in available(bench.device):
        works += [
            Work(f"statistics and weights: {name}", weights_of, moved, name),
            Work(f"objective_statistics: {name}", lambda x: pk.objective_statistics(**x), moved, name),
        ]
        for title, rule in (("Pama()", pk.Pama()), ("UPGrad", pk.UPGrad())):
            call = functools.partial(weights_of, rule=rule)
            works.append(Work(f"statistics and weights, {title}: {name}", call, moved, name))
    works.append(Work("eager PyTorch, scores and weights alone", eager_statistics, moved))
    for work in works:
        if work.call is weights_of:
            with chosen(work.backend):
                agree(work.call(pool[0]), eager_statistics(pool[0]), 1e-5, work.name)
    bench.measure("statistics and weights", f"{tokens} tokens", n, tokens, works, pool)


def combine(bench: Bench, rows: int, width: int, n: int) -> None:
    """`combine_advantages` of one advantage per sequence and objective, without log-probabilities."""

    def made(seed: int) -> Inputs:
        g = torch.Generator(device=bench.device).manual_seed(seed)
        return {
            "advantages": torch.randn(rows, n, generator=g, device=bench.device),
            "mask": torch.rand(rows, width, generator=g, device=bench.device) < 0.9,
        }

    pool = pool_of(made, bench.quick)
    moved = float(rows * width)

    def ours(x: Inputs, rule: pk.Pama | None) -> Tensor:
        return pk.combine_advantages(**x, rule=rule).advantages

    on_cpu = {name: x.cpu() for name, x in pool[0].items()}
    works = []
    for title, rule in PAMA_AND_DEFAULT:
        call = functools.partial(ours, rule=rule)
        exact = pk.reference.combine_advantages(**on_cpu, rule=rule).advantages
        for name in available(bench.device):
            works.append(Work(f"combine_advantages{title}: {name}", call, moved, name))
            with chosen(name):
                agree(call(pool[0]).cpu(), exact, 1e-4, works[-1].name)
    bench.measure("combine_advantages per sequence", f"mask {rows} x {width}", n, rows * width, works, pool)


def with_gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward and backward, down to the gradient of the log-probabilities."""

    def call(logprobs: Tensor) -> Tensor:
        leaf = logprobs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient

    return call


def per_sequence_loss(bench: Bench, rows: int, width: int, n: int) -> None:
    """`Pama()` and the default rule, one advantage per sequence and objective; eager PPO of one objective."""

    def made(seed: int) -> Inputs:
        x = inputs(rows * width, 1, bench.device, seed)
        return {
            **{name: x[name].reshape(rows, width) for name in ("logprobs", "old_logprobs", "mask")},
            "advantages": torch.randn(rows, n, device=bench.device),
        }

    pool = pool_of(made, bench.quick)
    moved = 2.0 * 9 * rows * width + 4.0 * rows * width  # two passes over log-probs and mask, the gradient

    def ours(x: Inputs, rule: pk.Pama | None) -> Tensor:
        given = {name: x[name] for name in ("old_logprobs", "advantages", "mask")}
        return with_gradient(lambda leaf: pk.pama_loss(leaf, **given, rule=rule).loss)(x["logprobs"])

    def theirs(x: Inputs) -> Tensor:
        one = x["advantages"][:, :1].expand(rows, width)
        return with_gradient(lambda leaf: peers.ppo_loss(leaf, x["old_logprobs"], one, x["mask"]))(
            x["logprobs"]
        )

    works = [
        Work(f"pama_loss{title}: {b}", functools.partial(ours, rule=rule), moved, b)
        for title, rule in PAMA_AND_DEFAULT
        for b in available(bench.device)
    ]
    bench.measure(
        "pama_loss, advantages per sequence",
        f"{rows} x {width}",
        n,
        rows * width,
        [*works, Work("eager PyTorch, one objective", theirs)],
        pool,
    )


def whole_loss(bench: Bench, tokens: int, n: int, weights_per: str) -> None:
    """pama_loss, forward and backward, against the same rule in PyTorch and against one objective."""
    pool = pool_of(lambda seed: inputs(tokens, n, bench.device, seed), bench.quick)
    one = sum(x.numel() * x.element_size() for x in pool[0].values())
    passes = 2 if weights_per == "batch" else 1
    moved = passes * one + 4.0 * tokens  # the gradient

    rule = pk.Pama.paper(weights_per)  # the eager one

    def ours(x: Inputs) -> Tensor:
        given = {name: x[name] for name in ("old_logprobs", "advantages", "mask")}
        options = {"rule": rule, "clip_range": peers.CLIP}
        return with_gradient(lambda leaf: pk.pama_loss(leaf, **given, **options).loss)(x["logprobs"])

    def theirs(loss: peers.Loss, n: int | None) -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            advantages = x["advantages"] if n is None else x["advantages"][..., 0]
            return with_gradient(lambda leaf: loss(leaf, x["old_logprobs"], advantages, x["mask"]))(
                x["logprobs"]
            )

        return call

    works = [Work(f"pama_loss: {b}", ours, moved, b) for b in available(bench.device)]
    same_rule = theirs(peers.eager_loss(weights_per), None)
    works.append(Work("eager PyTorch, the same rule", same_rule))
    works.append(Work("eager PyTorch, one objective", theirs(peers.ppo_loss, 1)))
    scale = float(same_rule(pool[0]).abs().max())
    for work in works[:-2]:
        with chosen(work.backend):
            agree(ours(pool[0]) / scale, same_rule(pool[0]) / scale, 1e-4, work.name)
    bench.measure(f"pama_loss per {weights_per}", f"{tokens} tokens", n, tokens, works, pool)


def solvers(bench: Bench, rows: int, n: int) -> None:
    """Rows of both weight problems; min-norm against TorchJD's MGDA if it is installed (one matrix)."""
    g = torch.Generator(device=bench.device).manual_seed(0)
    scores = [{"x": torch.randn(rows, n, generator=g, device=bench.device)} for _ in range(4)]
    moved = 4.0 * rows * (2 * n + 1)
    works = [
        Work(f"pama_weights: {b}", lambda x: pk.pama_weights(x["x"]), moved, b)
        for b in available(bench.device)
    ]
    bench.measure("pama_weights", f"{rows} rows", n, rows, works, scores)
    grams = []
    for _ in range(2):
        factor = torch.randn(rows, n, n, generator=g, device=bench.device, dtype=torch.float64)
        grams.append({"x": factor @ factor.mT})
    works = [
        Work(f"min_norm_weights: {b}", lambda x: pk.min_norm_weights(x["x"]), None, b)
        for b in available(bench.device)
    ]
    if rows == 1:
        works += torchjd(grams)
    bench.measure("min_norm_weights", f"{rows} rows", n, rows, works, grams)
    works = [
        Work(f"upgrad_weights: {b}", lambda x: pk.upgrad_weights(x["x"]), None, b)
        for b in available(bench.device)
    ]
    bench.measure("upgrad_weights", f"{rows} rows", n, rows, works, grams)


def torchjd(grams: Sequence[Inputs]) -> list[Work]:
    """Its loop branches on tensors, so it waits for the device and has only an eager time."""
    try:
        from torchjd.aggregation import MGDA
    except ImportError:
        print("TorchJD is not installed: its row is missing")
        return []
    solver = MGDA()
    factors = {id(x): torch.linalg.cholesky(x["x"][0]) for x in grams}
    return [Work("TorchJD MGDA", lambda x: solver(factors[id(x)]), waits=True)]
