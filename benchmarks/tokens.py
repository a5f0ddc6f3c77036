"""Statistics and loss over tokens: ours with weights per token, sequence or batch beside what people run.

statistics: `objective_statistics` beside a plain read of as many bytes, and eager PyTorch.
loss: `pama_loss` and its gradient beside eager PyTorch with the same rule (also under `torch.compile`), and
    beside what a trainer pays today for one objective: eager PPO, TRL's own loss, verl's own loss.
combine: `combine_advantages` of one advantage per sequence beside a read of the mask.

Inputs are rotated through more memory than the last-level cache holds, as far as `POOL_BYTES` allows. One
thread unless said. Gigabytes per second count what a call cannot avoid: inputs read once and the gradient
written once; a batch's weights take a second pass over them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pama_kernels as pk

from . import peers, plots
from .harness import Contestant, Missing, Session, available_threads, read

POOL_BYTES = 512e6  # at most; twice the last-level cache where that is less
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}  # float32 sums; one rounding of the gradient
PPO, TRL, VERL = "eager PPO, one objective", "TRL, one objective", "verl, one objective"
EAGER, COMPILED = "eager PyTorch, same rule", "torch.compile, same rule"
READ, COPY = "read of as many bytes", "copy"
LOSS = "pama_loss"
COMBINE = "combine_advantages"
MASK = "read of the mask"

# The paper's rule has an eager form to compare with; the other two are checked against the reference.
RULES: dict[str, pk.Pama | pk.UPGrad] = {
    **{f"weights per {per}": pk.Pama.paper(per) for per in ("batch", "sequence", "token")},
    "given weights": pk.Pama.paper("batch"),
    "default rule": pk.Pama(),
    "UPGrad": pk.UPGrad(),
}
EAGER_RULES = {f"weights per {per}": per for per in ("batch", "sequence", "token")} | {
    "given weights": "given"
}
BATCH, TOKEN, SEQUENCE, GIVEN, DEFAULT, UPGRAD = (
    *("weights per batch", "weights per token", "weights per sequence"),
    *("given weights", "default rule", "UPGrad"),
)


@dataclass(frozen=True)
class Case:
    tokens: int
    n: int
    layout: str = "padded"  # padded | packed | per sequence (advantages (B, N))
    dtype: torch.dtype = torch.float32
    rules: tuple[str, ...] = (BATCH, TOKEN)  # of RULES
    trainers: bool = True  # beside TRL and verl too
    compiled: bool = False  # beside torch.compile too
    forward: bool = False  # without the gradient too
    width: int = 1024

    @property
    def name(self) -> str:
        return f"{self.layout}, {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Batch:
    """The tensors of one call."""

    logprobs: Tensor  # requires a gradient
    old: Tensor
    advantages: Tensor
    single: Tensor  # the advantages of one objective
    mask: Tensor
    cu_seqlens: Tensor | None
    objectives: Tensor = field(init=False)  # the advantages as eager code broadcasts them
    one: Tensor = field(init=False)  # the same of one objective

    def __post_init__(self) -> None:
        expand = self.advantages.dim() == self.logprobs.dim() == 2
        self.objectives = self.advantages.unsqueeze(1) if expand else self.advantages
        self.one = self.single.unsqueeze(1) if expand else self.single

    def tensors(self) -> list[Tensor]:
        listed = (self.logprobs, self.old, self.advantages, self.mask, self.cu_seqlens)
        return [x for x in listed if x is not None]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def integer_mask(self) -> Batch:
        fresh = copy.copy(self)
        fresh.mask = self.mask.long()
        return fresh

    def clone(self) -> Batch:
        fresh = copy.copy(self)
        for name in ("old", "advantages", "single", "mask"):
            setattr(fresh, name, getattr(self, name).clone())
        fresh.logprobs = self.logprobs.detach().clone().requires_grad_()
        fresh.__post_init__()
        return fresh


def batch(case: Case) -> Batch:
    g = torch.Generator().manual_seed(case.tokens + case.n)
    width = min(case.width, case.tokens)
    rows = case.tokens // width
    old = torch.randn(rows, width, generator=g) - 2
    logprobs = old + 0.15 * torch.randn(rows, width, generator=g)
    shape = (rows, case.n) if case.layout == "per sequence" else (rows, width, case.n)
    # Of different scales, so that rounding does not decide which score is the smallest.
    advantages = torch.randn(shape, generator=g) * (1 + 0.5 * torch.arange(case.n))
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=g)
    mask = torch.arange(width) < lengths.unsqueeze(1)
    single = torch.randn(shape[:-1], generator=g)
    cu_seqlens = None
    if case.layout == "packed":
        old, logprobs, mask, single = (x.flatten() for x in (old, logprobs, mask, single))
        advantages = advantages.flatten(0, 1)
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * width
        mask = torch.ones_like(mask)
    old, logprobs, advantages, single = (x.to(case.dtype) for x in (old, logprobs, advantages, single))
    return Batch(logprobs.requires_grad_(), old, advantages, single, mask, cu_seqlens)


def pool(case: Case) -> list[Batch]:
    first = batch(case)
    size = min(POOL_BYTES, 2 * last_level_cache())
    return [first, *(first.clone() for _ in range(min(int(size / first.bytes), 2000)))]


def last_level_cache() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (ValueError, OSError):
        return 1 << 25


def run(session: Session) -> None:
    session.notes += [
        "microseconds: median over rounds of ours and one peer in turns; spread: interquartile range over it",
        "ratio: median over rounds of the contestant's time over ours (of a read: our share of its speed)",
        "difference, loss: larger of that of the losses and the relative one of the gradients, from ours",
        "difference, statistics: largest relative one of the sums that eager PyTorch takes",
        "gigabytes_per_second: inputs once and the gradient once, over the time",
        "peak_megabytes: resident during one call, beyond what was before it",
        f"inputs are rotated through {min(POOL_BYTES, 2 * last_level_cache()) / 1e6:.0f} MB",
    ]
    works: list[Callable[[], None]] = [functools.partial(bandwidth, session)]
    works += [functools.partial(statistics, session, case) for case in statistics_cases(session.quick)]
    works += [functools.partial(loss, session, case) for case in loss_cases(session.quick)]
    works += [functools.partial(combine, session, n) for n in ((8,) if session.quick else (1, 8, 64))]
    for work in session.works(works, len(works)):
        work()
    session.write()
    plot(session.csv)


def statistics_cases(quick: bool) -> Iterator[Case]:
    middle = Case(2**18, 4)
    yield middle
    if quick:
        return
    for n in (1, 2, 8, 16, 32):
        yield replace(middle, n=n)
    for tokens in (2**10, 2**14, 2**20, 2**24):
        yield replace(middle, tokens=tokens)
    yield replace(middle, dtype=torch.bfloat16)
    yield replace(middle, layout="per sequence")


def loss_cases(quick: bool) -> Iterator[Case]:
    overhead = Case(64, 4, width=16, trainers=False)
    middle = Case(2**18, 8, compiled=True)
    yield overhead
    if quick:
        yield replace(middle, rules=(BATCH, TOKEN, GIVEN, DEFAULT))
        return
    yield replace(middle, rules=(BATCH, TOKEN, SEQUENCE, GIVEN, DEFAULT, UPGRAD), forward=True)
    for n in (1, 2, 16, 32):
        yield Case(2**18, n, trainers=False)
    for tokens in (2**10, 2**14, 2**18, 2**20, 2**24):
        yield Case(tokens, 4, trainers=tokens < 2**24, compiled=tokens == 2**20)
    yield Case(2**18, 8, "packed", trainers=False)
    for n in (1, 8, 64):
        yield Case(2**18, n, "per sequence", rules=(BATCH, TOKEN, DEFAULT, UPGRAD), trainers=False)
    yield Case(2**18, 8, dtype=torch.bfloat16, trainers=False)


# --- bandwidth ---------------------------------------------------------------------------------------


def reader() -> Callable[[Tensor], Any]:
    """The fastest of PyTorch's reductions here: none reads faster, some read much slower."""
    from time import perf_counter

    x = torch.ones(1 << 24)

    def seconds(f: Callable[[Tensor], Any]) -> float:
        best = float("inf")
        for _ in range(5):
            start = perf_counter()
            f(x)
            best = min(best, perf_counter() - start)
        return best

    reductions: list[Callable[[Tensor], Any]] = [torch.sum, torch.amax, lambda x: torch.dot(x, x)]
    return min(reductions, key=seconds)


def bandwidth(session: Session) -> None:
    """Of one thread and of all, on 256 MB, in turns."""
    count = 1 << 26
    source, target = torch.ones(count), torch.zeros(count)
    pair = [(source, target)]
    reads = reader()
    contestants: list[Contestant | Missing] = []
    for threads in sorted({1, available_threads()}):
        suffix = f", {threads} threads" * (threads > 1)
        contestants += [
            Contestant(f"read{suffix}", lambda x: reads(x[0]), pair, threads=threads, moved=4.0 * count),
            Contestant(
                f"{COPY}{suffix}", lambda x: x[1].copy_(x[0]), pair, threads=threads, moved=8.0 * count
            ),
        ]
    session.measure("bandwidth", "268 MB, float32", 1, contestants, size=count)


# --- statistics --------------------------------------------------------------------------------------


def our_statistics(x: Batch) -> pk.ObjectiveStatistics:
    return pk.objective_statistics(
        x.logprobs.detach(), x.old, x.advantages, x.mask, clip_range=peers.CLIP, noon=True
    )


def statistics(session: Session, case: Case) -> None:
    batches = pool(case)
    moved = float(batches[0].bytes)
    buffers = [torch.ones(int(moved) // 4) for _ in batches]
    reads = reader()

    def eager(x: Batch) -> dict[str, Tensor]:
        logprobs, old, advantages = (t.float() for t in (x.logprobs.detach(), x.old, x.objectives))
        return peers.eager_statistics(logprobs, old, advantages, x.mask)

    def check(c: Contestant) -> float:
        return statistics_apart(eager(batches[0]), our_statistics(batches[0]))

    contestants: list[Contestant | Missing] = [
        Contestant("objective_statistics", our_statistics, batches, moved=moved),
        Contestant(READ, reads, buffers, moved=moved),
        Contestant(EAGER, eager, batches, check, TOLERANCE[torch.float32] * 10, moved=moved)
        if case.tokens <= 2**20
        else Missing(EAGER, "left out: takes too long"),
    ]
    if available_threads() > 1 and case.tokens >= 2**18 and case.layout == "padded":
        contestants.append(
            Contestant("objective_statistics, 2 threads", our_statistics, batches, threads=2, moved=moved)
        )
    session.measure(
        "statistics", case.name, case.n, contestants, size=case.tokens, input_bytes=batches[0].bytes
    )


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


# --- loss --------------------------------------------------------------------------------------------


def our_loss(case: Case, rule: str) -> Callable[[Batch], Tensor]:
    given = torch.full((case.n,), 1 / case.n) if rule == GIVEN else None

    def loss(x: Batch) -> Tensor:
        return pk.pama_loss(
            *(x.logprobs, x.old, x.advantages, x.mask),
            rule=RULES[rule],
            weights=given,
            clip_range=peers.CLIP,
            cu_seqlens=x.cu_seqlens,
        ).loss

    return loss


def reference_loss(rule: str) -> Callable[[Batch], Tensor]:
    def loss(x: Batch) -> Tensor:
        return pk.reference.pama_loss(
            *(x.logprobs, x.old, x.advantages, x.mask),
            rule=RULES[rule],
            clip_range=peers.CLIP,
            cu_seqlens=x.cu_seqlens,
        ).loss

    return loss


def our_single_loss(dual_clip: float | None) -> Callable[[Batch], Tensor]:
    """One objective, signed: what the trainers' own losses are held against."""

    def loss(x: Batch) -> Tensor:
        return pk.pama_loss(
            *(x.logprobs, x.old, x.single.unsqueeze(-1), x.mask),
            rule="fixed",
            clip_range=peers.CLIP,
            dual_clip=dual_clip,
            cu_seqlens=x.cu_seqlens,
        ).loss

    return loss


def with_gradient(loss: Callable[[Batch], Tensor]) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def call(x: Batch) -> tuple[Tensor, Tensor]:
        x.logprobs.grad = None
        value = loss(x)
        value.backward()
        gradient = x.logprobs.grad
        assert gradient is not None
        return value.detach(), gradient

    return call


def without_gradient(loss: Callable[[Batch], Tensor]) -> Callable[[Batch], tuple[Tensor, None]]:
    def call(x: Batch) -> tuple[Tensor, None]:
        with torch.no_grad():
            return loss(x), None

    return call


def apart(expected: tuple[Tensor, Tensor | None], found: tuple[Tensor, Tensor | None]) -> float:
    """Advantages have deviation 1 or more: the loss is compared as it is, the gradient relatively."""
    value, gradient = expected
    difference = float((found[0].double() - value.double()).abs())
    if gradient is not None and found[1] is not None:
        exact = gradient.double()
        difference = max(difference, float((found[1].double() - exact).norm() / exact.norm()))
    return difference


@functools.cache
def other_losses() -> dict[str, peers.Loss | str]:
    """The losses that may not be there, and else why."""
    return {TRL: available(peers.trl_loss), VERL: available(peers.verl_loss)}


def available(make: Callable[[], peers.Loss]) -> peers.Loss | str:
    try:
        return make()
    except ImportError as error:
        return str(error)


def loss(session: Session, case: Case) -> None:
    batches = pool(case)
    for rule in case.rules:
        loss_beside_peers(session, case, rule, batches, with_gradient, "loss and gradient")
    if case.forward:
        loss_beside_peers(session, case, BATCH, batches, without_gradient, "loss without gradient")


def loss_beside_peers(
    session: Session,
    case: Case,
    rule: str,
    batches: list[Batch],
    wrap: Callable[[Callable[[Batch], Tensor]], Callable[[Batch], Any]],
    work: str,
) -> None:
    tolerance = TOLERANCE[case.dtype]
    gradient_bytes = batches[0].logprobs.numel() * batches[0].logprobs.element_size()
    moved = float(batches[0].bytes + gradient_bytes * (wrap is with_gradient))
    ours = wrap(our_loss(case, rule))

    def beside(
        name: str, loss: peers.Loss, same: Callable[[Batch], Tensor] | None, single: bool, note: str = ""
    ) -> Contestant:
        """`same` is what of ours computes the same, if it is not what is timed."""

        def on(x: Batch) -> Tensor:
            return loss(x.logprobs, x.old, x.one if single else x.objectives, x.mask)

        call = wrap(on)
        expected = ours if same is None else wrap(same)
        inputs = [x.integer_mask() for x in batches] if name == TRL else batches
        return Contestant(
            name, call, inputs, lambda c: apart(expected(batches[0]), c.call(c.inputs[0])), tolerance, note
        )

    own = Contestant(LOSS, ours, batches, moved=moved)
    contestants: list[Contestant | Missing] = [own]
    if rule not in EAGER_RULES:
        own.check = lambda c: apart(wrap(reference_loss(rule))(batches[0]), c.call(batches[0]))
        own.tolerance = tolerance
    elif not (case.layout == "packed" and rule == SEQUENCE):
        contestants.append(beside(EAGER, peers.eager_loss(EAGER_RULES[rule]), None, False))
    contestants.append(beside(PPO, peers.ppo_loss, our_single_loss(None), True))
    shared = rule == BATCH and wrap is with_gradient
    if shared and case.compiled:
        try:
            contestants.append(beside(COMPILED, peers.compiled_loss(EAGER_RULES[rule]), None, False))
        except ImportError as error:
            contestants.append(Missing(COMPILED, str(error)))
    if shared and case.trainers:
        for name, dual_clip in ((TRL, None), (VERL, peers.VERL_DUAL_CLIP)):
            found = other_losses()[name]
            if isinstance(found, str):
                contestants.append(Missing(name, found))
            else:
                contestants.append(
                    beside(name, found, our_single_loss(dual_clip), True, "with the metrics it always takes")
                )
        if available_threads() > 1 and case.tokens >= 2**18:
            contestants.append(Contestant(f"{LOSS}, 2 threads", ours, batches, threads=2, moved=moved))
    session.measure(
        work,
        f"{case.name}, {rule}",
        case.n,
        contestants,
        size=case.tokens,
        input_bytes=batches[0].bytes if case.tokens >= 2**18 else None,
    )


# --- combined advantages -----------------------------------------------------------------------------


def combine(session: Session, n: int, rows: int = 512, width: int = 4096) -> None:
    """One advantage per sequence and objective, no log-probabilities: what GRPO hands over."""
    g = torch.Generator().manual_seed(n)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (rows, 1), generator=g)
    advantages = torch.randn(rows, n, generator=g)
    reads = reader()
    moved = float(mask.numel())

    def ours(x: tuple[Tensor, Tensor]) -> Tensor:
        return pk.combine_advantages(*x).advantages

    def check(c: Contestant) -> float:
        exact = pk.reference.combine_advantages(advantages, mask).advantages
        return float((c.call(c.inputs[0]).double() - exact).abs().max())

    copies = [(advantages.clone(), mask.clone()) for _ in range(8)]
    words = [x.view(torch.float32) for x in torch.ones(8, mask.numel() // 4)]
    contestants = [
        Contestant(COMBINE, ours, copies, check, TOLERANCE[torch.float32], moved=moved),
        Contestant(MASK, reads, words, moved=moved),
    ]
    session.measure("combine", f"per sequence, mask {rows} x {width}", n, contestants, size=mask.numel())


# --- plot --------------------------------------------------------------------------------------------

STYLES = {
    LOSS: (plots.OURS, "o"),
    EAGER: ("#e07a1f", "s"),
    PPO: ("#1d4e89", "^"),
    TRL: ("#2a9d8f", "v"),
    VERL: ("#7ab648", "D"),
}


def plot(path: Path) -> None:
    """Nanoseconds per token of loss and gradient, from the CSV."""
    records = [
        r
        for r in read(path)
        if r["work"] == "loss and gradient" and r["case"] == "padded, float32, weights per batch"
    ]
    with plots.figure(path.with_suffix(".png"), 2) as axes:
        if not axes:
            return

        def series(n: int | None, tokens: int | None, x: str) -> plots.Series:
            found: plots.Series = {}
            for r in records:
                if r["microseconds"] and n in (None, int(r["n"])) and tokens in (None, int(r["size"])):
                    nanoseconds = float(r["microseconds"]) * 1e3 / int(r["size"])
                    found.setdefault(r["contestant"], []).append((float(r[x]), nanoseconds))
            return found

        plots.lines(axes[0], series(4, None, "size"), STYLES)
        axes[0].set_title(
            "loss and gradient, 4 objectives, one weight vector per batch", loc="left", fontsize=11
        )
        axes[0].set_xscale("log", base=2)
        axes[0].set_xlabel("tokens")
        by_objectives = {name: STYLES[name] for name in (LOSS, EAGER, PPO)}
        plots.lines(axes[1], series(None, 2**18, "n"), by_objectives)
        axes[1].set_title("the same, 262,144 tokens", loc="left", fontsize=11)
        axes[1].set_xlabel("objectives N (eager PPO: one)")
        axes[0].set_ylabel("nanoseconds per token, one thread (lower is better)")
