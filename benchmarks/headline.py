"""Time from n losses to their weights: the paper's O(n) compared with O(n^2 d).

PAMA: the weights from n advantages and the log-probabilities (`combine_advantages`, one set for the batch).
MGDA: n gradients of all d parameters, their Gram matrix, its min-norm point.
MGDA-UB: the same with gradients of the shared representation (the last hidden state).

All get the same forward pass, which is not timed; both kinds of MGDA use this library's exact solver, so that
only the inputs of the methods differ. Random weights in the shape of GPT-2, one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk

from . import models, peers, plots
from .harness import Session, read
from .timing import Contestant, Missing

ROWS, WIDTH = 4, 16  # completions and their tokens: few, which suits MGDA
LARGEST = 5e8  # elements of all gradients on a CPU, so that all benchmarks together stay within ten minutes
RULE = pk.UPGrad()
MODEL_N = 4  # objectives where d varies
LARGEST_N = 16
COPIES = 2  # gradients in memory beside the n: the one at work
BLOCK = 1 << 16  # parameters
TOLERANCE = 1e-4  # of c'Mc: float32 sums over d parameters
PAMA, MGDA, MGDA_UB = "PAMA", "MGDA, full gradients", "MGDA-UB, shared representation"


def run(session: Session) -> None:
    device = models.device()
    session.notes += [
        "time from n losses to their weights, after a forward pass that all share and no time counts",
        f"{ROWS} completions of {WIDTH} tokens on {device.type}; size: parameters",
        "ratio: median over rounds of theirs over PAMA's",
        "difference, MGDA: |norm^2 of the gradient of the weighted loss - c'Mc| over c'Mc",
        "difference, PAMA: largest |c - reference|",
    ]
    held: dict[str, models.Policy] = {}

    def work(shape: models.Shape, n: int) -> None:
        if shape.name not in held:
            held.clear()  # one model at a time
            held[shape.name] = models.policy(shape, WIDTH)
        to_weights(session, held[shape.name], shape.name, n)

    part = functools.partial
    works = [part(work, shape, n) for shape in models.shapes(session.quick) for n in sizes(session.quick)]
    session.each(works)
    plot(session.csv)


def sizes(quick: bool) -> tuple[int, ...]:
    return (2, MODEL_N) if quick else (2, MODEL_N, 8, LARGEST_N)


def norm_squared(gradients: Any) -> float:
    return sum(float(g.double().square().sum()) for g in gradients if g is not None)


def to_weights(session: Session, policy: models.Policy, name: str, n: int) -> None:
    device = models.device()
    g = torch.Generator().manual_seed(n)
    tokens = torch.randint(policy.model.config.vocab_size, (ROWS, WIDTH + 1), generator=g).to(device)
    advantages = (torch.randn(ROWS, WIDTH, n, generator=g) * (1 + 0.5 * torch.arange(n))).to(device)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool, device=device)
    hidden = policy.represent(tokens)
    logprobs = policy.logprobs(hidden, tokens)
    old = (logprobs + 0.1 * torch.randn(ROWS, WIDTH, generator=g).to(device)).detach()
    losses = [peers.ppo_loss(logprobs, old, a.clamp(min=0), mask) for a in advantages.unbind(-1)]
    parameters = list(policy.parameters())

    def pama(_: Any) -> Tensor:
        return pk.combine_advantages(
            advantages,
            mask,
            rule=RULE,
            logprobs=logprobs.detach(),
            old_logprobs=old,
            clip_range=peers.CLIP,
        ).weights

    def pama_apart(_: Contestant) -> float:
        exact = pk.reference.combine_advantages(
            advantages.cpu(),
            mask.cpu(),
            rule=RULE,
            logprobs=logprobs.detach().cpu(),
            old_logprobs=old.cpu(),
            clip_range=peers.CLIP,
        ).weights
        return float((pama(None).cpu().double() - exact).abs().max())

    def solved(variables: Sequence[Tensor]) -> pk.WeightSolution:
        rows = gradients(losses, variables)
        return pk.min_norm_weights(gram(rows))

    def mgda(name: str, variables: Sequence[Tensor]) -> Contestant:
        def apart(_: Contestant) -> float:
            c, optimum = solved(variables)
            weighted = sum(c_i * loss for c_i, loss in zip(c.tolist(), losses, strict=True))
            direct = norm_squared(torch.autograd.grad(weighted, variables, retain_graph=True))
            return abs(direct - float(optimum)) / float(optimum)

        return Contestant(name, settled(lambda _: solved(variables)), [None], apart, tolerance())

    need = (n + COPIES) * policy.size * parameters[0].element_size()
    contestants: list[Contestant | Missing] = [Contestant(PAMA, settled(pama), [None], pama_apart, 1e-5)]
    if need > available_memory():
        contestants.append(Missing(MGDA, f"needs {need / 1e9:.0f} GB of memory"))
    elif device.type == "cpu" and n * policy.size > LARGEST:
        contestants.append(Missing(MGDA, "left out: takes too long"))
    else:
        contestants.append(mgda(MGDA, parameters))
    contestants.append(mgda(MGDA_UB, [hidden]))
    session.measure("time to the weights", name, n, contestants, size=policy.size)


def gradients(losses: Sequence[Tensor], variables: Sequence[Tensor]) -> Tensor:
    """(n, d)."""
    sizes = [x.numel() for x in variables]
    rows = torch.empty(len(losses), sum(sizes), dtype=variables[0].dtype, device=variables[0].device)
    for row, loss in zip(rows, losses, strict=True):
        found = torch.autograd.grad(loss, variables, retain_graph=True)
        for part, gradient in zip(row.split(sizes), found, strict=True):
            part.copy_(gradient.flatten())
    return rows


def gram(rows: Tensor) -> Tensor:
    """(n, n) on the CPU, in blocks: a single float32 sum over all parameters is inaccurate."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK, dim=1):
        total += block.float() @ block.float().T
    return total.cpu()


def tolerance() -> float:
    return TOLERANCE if models.device().type == "cpu" else 0.05  # bfloat16 gradients


def settled(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """On a GPU, including the wait for its work."""
    if models.device().type == "cpu":
        return call

    def wait(x: Any) -> Any:
        result = call(x)
        torch.cuda.synchronize()
        return result

    return wait


def available_memory() -> float:
    if models.device().type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return float("inf")
    return 1024.0 * int(text.split("MemAvailable:")[1].split()[0])


# --- plot --------------------------------------------------------------------------------------------

STYLES = {PAMA: (plots.OURS, "o"), MGDA: ("#1d4e89", "s"), MGDA_UB: ("#2a9d8f", "v")}


def plot(path: Path) -> None:
    records = [r for r in read(path) if r["work"] == "time to the weights" and r["microseconds"]]
    mgda = [(int(r["n"]), int(r["size"])) for r in records if r["contestant"] == MGDA]
    largest = max(mgda)[1]  # the largest model with the most objectives
    with plots.figure(path.with_suffix(".png"), 2) as axes:
        if not axes:
            return

        def series(fixed: tuple[str, int], x: str) -> plots.Series:
            found: plots.Series = {}
            for r in records:
                if int(r[fixed[0]]) == fixed[1]:
                    point = (float(r[x]), float(r["microseconds"]) * 1e-3)
                    found.setdefault(r["contestant"], []).append(point)
            return found

        plots.lines(axes[0], series(("n", MODEL_N), "size"), STYLES)
        axes[0].set_title(f"{MODEL_N} objectives", loc="left", fontsize=11)
        axes[0].set_xlabel("parameters d of the model")
        axes[0].set_xscale("log")
        plots.lines(axes[1], series(("size", largest), "n"), STYLES)
        axes[1].set_title(f"model of {largest / 1e6:.0f} M parameters", loc="left", fontsize=11)
        axes[1].set_xlabel("objectives n")
        axes[0].set_ylabel("milliseconds to the weights (lower is better)")
