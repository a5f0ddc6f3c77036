"""Advantages per sequence (B, N), the layout of GRPO and RLOO: the loss, and the combined advantage.

loss: `pama_loss` and its gradient, compared with eager PPO and the losses of TRL, verl and Liger for one
    objective.
combine: `combine_advantages` without log-probabilities, compared with a read of the mask.
variants: one and 64 objectives.

Calls rotate through inputs that together exceed the last-level cache. One thread unless stated otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import pama_kernels as pk

from . import losses, plots
from .batches import SEQUENCE, Case, copies
from .harness import Session
from .timing import FLOOR, Contestant, available_threads, floor

COMBINE, MASK_SHAPE = "combine_advantages", (512, 4096)
MIDDLE = Case(2**18, 8, SEQUENCE)
SIZES = (1, 2, 4, 16, 32, 64)  # beside MIDDLE's


def run(session: Session) -> None:
    session.notes += losses.NOTES
    part = functools.partial
    case, loss = MIDDLE, part(losses.loss, session)
    rules = (losses.DEFAULT, losses.PAMA, losses.GIVEN, losses.BATCH, losses.SCALAR)
    works: list[Callable[[], None]] = [part(loss, case, rules, losses.TRAINERS)]
    works += [part(loss, replace(case, n=n), rules[:1]) for n in ((64,) if session.quick else SIZES)]
    works.append(part(loss, Case(64, 4, SEQUENCE, width=16), rules[:1]))
    if not session.quick:
        large = Case(512 * 4096, 8, SEQUENCE, width=4096)
        works.append(part(loss, large, rules[:1], (losses.TRL,)))
        works.append(part(loss, replace(case, dtype=torch.bfloat16), rules[:1]))
    if available_threads() > 1:
        works.append(part(loss, replace(case, threads=2), rules[:1], (losses.TRL,)))
    one, many = replace(case, n=1), replace(case, n=64)
    others = {"N=64": (many, losses.DEFAULT)}
    works.append(part(losses.variants, session, one, losses.DEFAULT, "N=1", others))
    for dtype in (torch.bool, torch.int64):
        works += [part(combine, session, n, dtype) for n in ((8,) if session.quick else (1, 8, 64))]
    session.each(works)
    plot(session.csv)


def combine(session: Session, n: int, dtype: torch.dtype, shape: tuple[int, int] = MASK_SHAPE) -> None:
    """With a mask of bool, or of int64 as in TRL."""
    rows, width = shape
    g = torch.Generator().manual_seed(n)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (rows, 1), generator=g)
    mask = mask.to(dtype)
    advantages = torch.randn(rows, n, generator=g)
    size = mask.numel() * mask.element_size()

    def ours(x: tuple[Tensor, Tensor]) -> Tensor:
        return pk.combine_advantages(*x).advantages

    def check(c: Contestant) -> float:  # of the first rows: the reference has every objective at every token
        some = slice(max(4 * losses.CHECKED // (n * width), 1))
        exact = pk.reference.combine_advantages(advantages[some], mask[some]).advantages
        return float((c.call((advantages[some], mask[some])).double() - exact).abs().max())

    pool = [(advantages.clone(), mask.clone()) for _ in range(copies(size))]
    tolerance = losses.TOLERANCE[torch.float32]
    own = Contestant(COMBINE, ours, pool, check, tolerance, moved=float(size))
    case = f"mask {rows} x {width}, {str(dtype).removeprefix('torch.')}"
    session.measure("combine", case, n, [own, floor(size, 0, len(pool))], size=mask.numel())


STYLES = {losses.LOSS: (plots.OURS, "o"), losses.PPO: ("#1d4e89", "^"), FLOOR: ("#777777", "s")}


def plot(path: Path) -> None:
    """Nanoseconds per token of loss and gradient, from the CSV."""
    series = losses.nanoseconds(path, MIDDLE, losses.DEFAULT)
    with plots.figure(path.with_suffix(".png"), 1) as panels:
        for axes in panels:
            plots.lines(axes, series, STYLES)
            title = f"loss and gradient, UPGrad, {MIDDLE.tokens:,} tokens"
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("objectives N (eager PPO: one)")
            axes.set_ylabel("nanoseconds per token, one thread (lower is better)")
