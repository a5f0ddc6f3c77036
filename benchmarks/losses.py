"""`pama_loss` with its gradient compared with eager PyTorch and the losses of TRL, verl and Liger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import pama_kernels as pk

from . import peers, plots
from .batches import PACKED, SEQUENCE, Batch, Case, batch, pool
from .harness import Session, read
from .timing import Contestant, Missing, floor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}  # float32 sums; one rounding of the gradient
LOSS, WORK = "pama_loss", "loss and gradient"
EAGER, COMPILED = "eager PyTorch, same rule", "torch.compile, same rule"
PPO, TRL, VERL, LIGER = (f"{name}, one objective" for name in ("eager PPO", "TRL", "verl", "Liger"))
TRAINERS = (TRL, VERL, LIGER)
CHECKED = 2**20  # advantages that are compared with the reference, where a batch is larger
CHECKED_ROWS = 2**9  # the same where the reference solves a problem for each token, one after the other

DEFAULT, PAMA, GIVEN = "UPGrad (default)", "Pama", "given weights"
BARE = f"{GIVEN}, no statistics"
BATCH, SCALAR, TOKEN = (f"paper, per {per}" for per in ("batch", "sequence", "token"))
TOKEN_REGULARIZED = f"{TOKEN}, regularization 0.1"
RULES: dict[str, pk.Pama | pk.UPGrad] = {
    DEFAULT: pk.UPGrad(),
    PAMA: pk.Pama(),
    GIVEN: pk.Pama.paper("batch"),
    BARE: pk.Pama.paper("batch"),
    BATCH: pk.Pama.paper("batch"),
    SCALAR: pk.Pama.paper("sequence"),
    TOKEN: pk.Pama.paper("token"),
    TOKEN_REGULARIZED: pk.Pama("token", noon=True, regularization=0.1),
}
# The paper's rule has an eager form to compare with; what has none is compared with the reference.
EAGER_RULES = {GIVEN: "given", BARE: "given", BATCH: "batch", SCALAR: "sequence", TOKEN: "token"}
TWO_PASSES = (DEFAULT, PAMA, BATCH)  # weights of the batch need all inputs before the first gradient

NOTES = (
    "microseconds: median over rounds of ours and one peer in turns; spread: interquartile range over it",
    "ratio: median over rounds of the contestant's time over ours; of the floor: our share of its speed",
    "floor: reading the inputs once (twice for weights of the batch) and writing the result once",
    "difference, loss: larger of that of the losses and the relative one of the gradients, from ours",
    "peak_megabytes: resident during one call, beyond what was before it",
)

Loss = Callable[[Batch], Tensor]
Result = tuple[Tensor, Tensor]


def our_loss(rule: str) -> Loss:
    def loss(x: Batch) -> Tensor:
        n = x.advantages.shape[-1]
        return pk.pama_loss(
            *(x.logprobs, x.old, x.advantages, x.mask),
            rule=RULES[rule],
            weights=_equal(n) if EAGER_RULES.get(rule) == "given" else None,
            clip_range=peers.CLIP,
            cu_seqlens=x.cu_seqlens,
            statistics=rule != BARE,
        ).loss

    return loss


@functools.cache
def _equal(n: int) -> Tensor:
    return torch.full((n,), 1 / n)


def reference_loss(rule: str) -> Loss:
    def loss(x: Batch) -> Tensor:
        return pk.reference.pama_loss(
            *(x.logprobs, x.old, x.advantages, x.mask),
            rule=RULES[rule],
            clip_range=peers.CLIP,
            cu_seqlens=x.cu_seqlens,
        ).loss

    return loss


def our_single_loss(dual_clip: float | None) -> Loss:
    """One objective, signed: the loss to which those of the trainers are compared."""

    def loss(x: Batch) -> Tensor:
        return pk.pama_loss(
            *(x.logprobs, x.old, x.single.unsqueeze(-1), x.mask),
            rule="fixed",
            clip_range=peers.CLIP,
            dual_clip=dual_clip,
            cu_seqlens=x.cu_seqlens,
        ).loss

    return loss


def with_gradient(loss: Loss) -> Callable[[Batch], Result]:
    def call(x: Batch) -> Result:
        x.logprobs.grad = None
        value = loss(x)
        value.backward()
        gradient = x.logprobs.grad
        assert gradient is not None
        return value.detach(), gradient

    return call


def apart(expected: Result, found: Result) -> float:
    """Advantages have deviation 1 or more: the loss is compared absolutely, the gradient relatively."""
    exact = expected[1].double()
    value = float((found[0].double() - expected[0].double()).abs())
    return max(value, float((found[1].double() - exact).norm() / exact.norm()))


def small(case: Case, rule: str) -> Batch:
    """A case of the same kind, small enough for the reference."""
    tokens = (CHECKED_ROWS if rule == TOKEN_REGULARIZED else CHECKED) // case.n
    return batch(Case(min(case.tokens, tokens), case.n, case.layout, case.dtype, width=case.width))


def ours(case: Case, rule: str, batches: list[Batch], name: str = LOSS) -> Contestant:
    """`pama_loss`, compared with the reference if no peer computes the same."""
    call = with_gradient(our_loss(rule))
    own = Contestant(name, call, batches, threads=case.threads)
    passes = 1 + (rule in TWO_PASSES)
    own.moved = float(batches[0].bytes * passes + batches[0].gradient_bytes)
    if rule not in EAGER_RULES:

        def check(c: Contestant) -> float:
            x = small(case, rule)
            return apart(with_gradient(reference_loss(rule))(x), call(x))

        own.check, own.tolerance = check, TOLERANCE[case.dtype]
    return own


@functools.cache
def trainer_loss(name: str) -> peers.Loss | str:
    """The loss, or the reason why it is missing."""
    make = {TRL: peers.trl_loss, VERL: peers.verl_loss, LIGER: peers.liger_loss}[name]
    try:
        return make()
    except ImportError as error:
        return str(error)


def loss(
    session: Session,
    case: Case,
    rules: Sequence[str],
    trainers: Sequence[str] = (),
    compiled: bool = False,
) -> None:
    """Every rule compared with eager PPO and the floor; the first also with the trainers' losses."""
    batches = pool(case)
    first = batches[0]
    for rule in rules:
        own = ours(case, rule, batches)
        passes = 1 + (rule in TWO_PASSES)
        contestants: list[Contestant | Missing] = [
            own,
            beside(case, batches, PPO, peers.ppo_loss, our_single_loss(None)),
            floor(first.bytes, first.gradient_bytes, len(batches), passes, case.threads),
        ]
        if rule in EAGER_RULES and not (case.layout == PACKED and rule == SCALAR):
            same = peers.eager_loss(EAGER_RULES[rule])
            contestants.append(beside(case, batches, EAGER, same, our_loss(rule)))
        if compiled and rule == BATCH:
            contestants.append(compiled_contestant(case, batches, rule))
        if rule == rules[0]:
            contestants += [trainer(case, batches, name) for name in trainers]
        large = first.bytes if case.tokens >= 2**18 else None
        session.measure(
            WORK, f"{case.name}, {rule}", case.n, contestants, size=case.tokens, input_bytes=large
        )


def beside(
    case: Case, batches: list[Batch], name: str, loss: peers.Loss, same: Loss, note: str = ""
) -> Contestant:
    """A peer; `same` is the call of this library that computes the same."""
    objectives = name in (EAGER, COMPILED)

    def on(x: Batch) -> Tensor:
        return loss(x.logprobs, x.old, x.objectives if objectives else x.one, x.mask)

    inputs = [x.integer_mask() for x in batches] if name == TRL else batches
    expected = with_gradient(same)

    def check(c: Contestant) -> float:
        return apart(expected(batches[0]), c.call(inputs[0]))

    return Contestant(name, with_gradient(on), inputs, check, TOLERANCE[case.dtype], note, case.threads)


def compiled_contestant(case: Case, batches: list[Batch], rule: str) -> Contestant | Missing:
    try:
        return beside(case, batches, COMPILED, peers.compiled_loss(EAGER_RULES[rule]), our_loss(rule))
    except ImportError as error:
        return Missing(COMPILED, str(error))


def trainer(case: Case, batches: list[Batch], name: str) -> Contestant | Missing:
    if name == LIGER and case.layout != SEQUENCE:
        return Missing(name, "takes advantages per sequence only")
    found = trainer_loss(name)
    if isinstance(found, str):
        return Missing(name, found)
    dual_clip = peers.VERL_DUAL_CLIP if name == VERL else None
    return beside(case, batches, name, found, our_single_loss(dual_clip), "with the metrics it always takes")


def variants(session: Session, case: Case, rule: str, name: str, others: dict[str, tuple[Case, str]]) -> None:
    """This library on other inputs or with another rule, all checked."""
    contestants: list[Contestant | Missing] = [ours(case, rule, pool(case), name)]
    contestants += [ours(x, y, pool(x), other) for other, (x, y) in others.items()]
    session.measure("variants", f"{case.name}, {rule}", case.n, contestants, size=case.tokens)


def nanoseconds(path: Path, case: Case, rule: str) -> plots.Series:
    """Draws the time of each contestant per token against N, from the CSV."""
    series: plots.Series = {}
    wanted = (WORK, f"{case.name}, {rule}", str(case.tokens))
    for r in read(path):
        if r["microseconds"] and (r["work"], r["case"], r["size"]) == wanted:
            point = float(r["n"]), float(r["microseconds"]) * 1e3 / case.tokens
            series.setdefault(r["contestant"], []).append(point)
    return series
