"""Advantages per token (B, T, N), as value heads give them: the loss, and the statistics alone.

loss: `pama_loss` and its gradient, compared with eager PPO, eager PyTorch with the same rule (also under
    `torch.compile`), and the losses of TRL and verl for one objective.
variants: regularization 0.1 and 0, bfloat16 and float32.
statistics: `objective_statistics`, compared with eager PyTorch.

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

from . import losses, peers, plots
from .batches import PACKED, SEQUENCE, Batch, Case, pool
from .harness import Session
from .losses import BARE, BATCH, DEFAULT, GIVEN, PAMA, SCALAR, TOKEN, TOKEN_REGULARIZED, TRL, VERL
from .timing import FLOOR, Contestant, Missing, available_threads, floor

STATISTICS, EAGER = "objective_statistics", "eager PyTorch"
MIDDLE = Case(2**18, 8)
SMALL = Case(64, 4, width=16)


def run(session: Session) -> None:
    session.notes += losses.NOTES
    session.notes.append("difference, statistics: largest relative one of the sums that eager PyTorch takes")
    part, case = functools.partial, MIDDLE
    loss = part(losses.loss, session)
    rules = (DEFAULT, PAMA, BARE, GIVEN, BATCH, SCALAR, TOKEN)
    works: list[Callable[[], None]] = [
        part(bandwidth, session),
        part(loss, case, rules, (TRL, VERL), True),
        part(loss, SMALL, (DEFAULT, TOKEN)),
        part(loss, replace(case, n=32), (BATCH, TOKEN) if session.quick else (DEFAULT, BATCH, TOKEN)),
    ]
    if not session.quick:
        works += [part(loss, replace(case, n=n), (DEFAULT, TOKEN)) for n in (1, 2, 4, 16)]
        works += [part(loss, Case(tokens, 4), (DEFAULT, TOKEN)) for tokens in (2**10, 2**14, 2**20)]
        works.append(part(loss, replace(case, layout=PACKED), (DEFAULT,)))
        works.append(part(loss, replace(case, dtype=torch.bfloat16), (DEFAULT, BATCH, TOKEN)))
    if available_threads() > 1:
        works.append(part(loss, replace(case, threads=2), (DEFAULT, TOKEN), (TRL,)))
    regularized = {TOKEN_REGULARIZED: (case, TOKEN_REGULARIZED)}
    works.append(part(losses.variants, session, case, TOKEN, TOKEN, regularized))
    brain = replace(case, dtype=torch.bfloat16)
    for rule in (BATCH, DEFAULT):
        others = {"float32": (case, rule)}
        works.append(part(losses.variants, session, brain, rule, "bfloat16", others))
    cases = [replace(case, n=n) for n in ((4,) if session.quick else (1, 4, 8, 32))]
    if not session.quick:
        cases += [replace(case, dtype=torch.bfloat16), replace(case, layout=SEQUENCE)]
    works += [part(statistics, session, x) for x in cases]
    session.each(works)
    plot(session.csv)


def bandwidth(session: Session) -> None:
    """The floor of some hundred MB read, and of as many written, by one thread and by all."""
    count = 1 << (25 if session.quick else 28)
    contestants: list[Contestant | Missing] = []
    for threads in sorted({1, available_threads()}):
        for name, read_bytes, written in (("read", count, 0), ("written", 0, count)):
            row = floor(read_bytes, written, 1, threads=threads)
            row.name = name + f", {threads} threads" * (threads > 1)
            contestants.append(row)
    session.measure("bandwidth", f"{count >> 20} MiB", 1, contestants, size=count)


def our_statistics(x: Batch) -> pk.ObjectiveStatistics:
    logprobs = x.logprobs.detach()
    return pk.objective_statistics(logprobs, x.old, x.advantages, x.mask, clip_range=peers.CLIP, noon=True)


def with_pairs(x: Batch) -> pk.ObjectiveStatistics:
    """What the default rule solves from."""
    logprobs = x.logprobs.detach()
    return pk.objective_statistics(logprobs, x.old, x.advantages, x.mask, clip_range=peers.CLIP, pairs=True)


def statistics(session: Session, case: Case) -> None:
    batches = pool(case)
    size = batches[0].bytes

    def eager(x: Batch) -> dict[str, Tensor]:
        logprobs, old, advantages = (t.float() for t in (x.logprobs.detach(), x.old, x.objectives))
        return peers.eager_statistics(logprobs, old, advantages, x.mask)

    def check(c: Contestant) -> float:
        return statistics_apart(eager(batches[0]), our_statistics(batches[0]))

    contestants: list[Contestant | Missing] = [
        Contestant(STATISTICS, our_statistics, batches, moved=float(size)),
        floor(size, 0, len(batches)),
        Contestant(EAGER, eager, batches, check, losses.TOLERANCE[torch.float32] * 10),
        Contestant(f"{STATISTICS}, with pairs", with_pairs, batches, moved=float(size)),
    ]
    session.measure("statistics", case.name, case.n, contestants, size=case.tokens)


def statistics_apart(eager: dict[str, Tensor], ours: pk.ObjectiveStatistics) -> float:
    """Largest difference of the sums that both take, relative to the sum, or to the tokens for counts."""
    count = ours.token_count
    pairs = [
        (eager["count"], count, count),
        (eager["indicator"], ours.scores * count, ours.scores * count),
        (eager["positive"], ours.positive_fraction * count, count),
        (eager["clipped"], ours.clip_fraction * count, count),
        (eager["kl"], ours.approx_kl * count, ours.approx_kl * count),
    ]
    return max(float(((a.double() - b.double()).abs() / scale.double()).max()) for a, b, scale in pairs)


STYLES = {
    losses.LOSS: (plots.OURS, "o"),
    losses.EAGER: ("#e07a1f", "s"),
    losses.PPO: ("#1d4e89", "^"),
    FLOOR: ("#777777", "v"),
}


def plot(path: Path) -> None:
    """Nanoseconds per token of loss and gradient, from the CSV."""
    with plots.figure(path.with_suffix(".png"), 2) as panels:
        for axes, rule in zip(panels, (DEFAULT, TOKEN), strict=False):
            plots.lines(axes, losses.nanoseconds(path, MIDDLE, rule), STYLES)
            axes.set_title(f"{rule}, {MIDDLE.tokens:,} tokens", loc="left", fontsize=11)
            axes.set_xlabel("objectives N (eager PPO: one)")
            axes.set_ylabel("nanoseconds per token, one thread (lower is better)")
            axes.label_outer()
