"""Calls whose launches are repeated (`backends/triton/repeat.py`) launch what they would launch otherwise.

``python repeated_calls.py`` prints a line of JSON for each call: first on tensors of one size, until it is
recorded, then with other sizes, strides and settings, each once as if for the first time and once repeated.
"differences" counts the arguments of kernels that are not equal or, for memory that a call allocates, do not
correspond; "repeated" the calls that took recorded launches, "recorded" the functions that repeat them. The
last lines are about what must not be repeated, and what is kept. Nothing is compiled: a kernel is known by
what it would be compiled for.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import problems
import torch
from null_driver import NullDriver
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends.triton import launch, repeat

Launches = list[tuple[Any, int, list[Any]]]
Make = Callable[[int, int], problems.Problem]  # of rows and width
Call = Callable[[problems.Problem], Any]

RULES = {
    "gram": pk.Pama(),
    "scores": pk.Pama.paper("batch"),
    "token": pk.Pama.paper("token"),
    "sequence": pk.Pama("sequence"),
    "softmin": pk.SoftMin(0.5),
    "upgrad": pk.UPGrad(),
}
PROCESSORS = 10  # of the GPU that is pretended: programs are limited for some sizes
FIRST, TIMES = (4, 64), 12
chosen = random.Random(0)
EQUAL = torch.ones(3, dtype=torch.float64) / 3


class Watch:
    """What is launched, and how many calls are repeated."""

    def __init__(self) -> None:
        self.launches: Launches = []
        self.begins: set[int] = set()  # first launches of repeated functions of the backend
        self.repeated = 0
        again = repeat._Known.repeat

        def started(variant: launch.Variant, programs: int, values: list[Any]) -> None:
            self.launches.append((variant, programs, list(values)))

        def counted(known: Any, *given: Any) -> bool:
            first = len(self.launches)
            found = again(known, *given)
            if found:
                self.repeated += 1
                self.begins.add(first)
            return found

        launch.Variant.__call__ = started  # type: ignore[method-assign]
        repeat._Known.repeat = counted  # type: ignore[method-assign]

    def of(self, call: Callable[[], Any]) -> tuple[Any, Launches]:
        self.launches, self.begins = [], set()
        return call(), self.launches


def anywhere(x: Tensor) -> Tensor:
    """The same in a larger tensor, at an address that is not aligned."""
    host = torch.zeros([size + 3 for size in x.shape], dtype=x.dtype)
    view = host[tuple(slice(1, 1 + size) for size in x.shape)]
    view.copy_(x)
    return view


def makers() -> Iterator[tuple[str, bool, Make]]:
    """A name, whether all optional tensors are given, and what makes the tensors."""
    for layout in problems.LAYOUTS:
        for everything in (False, True):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for sliced in (False, True):

                    def make(
                        rows: int,
                        width: int,
                        layout: str = layout,
                        everything: bool = everything,
                        dtype: torch.dtype = dtype,
                        sliced: bool = sliced,
                    ) -> problems.Problem:
                        p = problems.make(
                            layout, rows=rows, width=width, objectives=3, ref_logprobs=everything,
                            objective_mask=torch.bool if everything else None, seed=rows + width,
                            dtype={"logprobs": dtype, "old_logprobs": dtype, "ref_logprobs": dtype},
                        )  # fmt: skip
                        if sliced:
                            p = replace(p, **{k: anywhere(x) for k, x in vars(p).items() if x is not None})
                        p.logprobs.requires_grad_(everything)
                        return p

                    what = f"{layout}, {'all' if everything else 'few'} tensors, {dtype}"
                    yield what + (", slices" if sliced else ""), everything, make


def settings(everything: bool) -> dict[str, Any]:
    """Others at every call."""
    clip = {"clip_range": (chosen.random(), chosen.random())}
    if not everything:
        return clip
    return {**clip, "preference": [1, 2, 3], "kl_coef": chosen.random(), "dual_clip": 2 + chosen.random()}


def calls() -> Iterator[tuple[str, Make, Call]]:
    for title, everything, make in makers():
        aggregations = problems.AGGREGATIONS[:1] if "flat" in title else problems.AGGREGATIONS
        rules = {k: v for k, v in RULES.items() if "flat" not in title or k not in ("sequence", "softmin")}

        def loss(p: problems.Problem, rule: Any, aggregation: str, everything: bool = everything) -> Any:
            given = {**p.loss_arguments(), **settings(everything)}
            return pk.pama_loss(**given, rule=rule, aggregation=aggregation)

        def normalized(p: problems.Problem) -> Any:
            return pk.pama_loss(**p.loss_arguments(), normalizer=1 + chosen.random(), statistics=False)

        for name, rule in rules.items():
            for aggregation in aggregations if name in ("gram", "token") else aggregations[:1]:
                yield (
                    f"loss {name} {aggregation}, {title}",
                    make,
                    lambda p, r=rule, a=aggregation, loss=loss: loss(p, r, a),
                )
        yield f"loss, normalizer, {title}", make, normalized
        yield f"combine, {title}", make, lambda p: pk.combine_advantages(**p.combine_arguments(False))
        yield f"statistics, {title}", make, lambda p: pk.objective_statistics(**p.statistics_arguments())
        yield (
            f"callable, {title}",
            make,
            lambda p: pk.combine_advantages(**p.combine_arguments(False), rule=lambda s: EQUAL),
        )

    def padded(rows: int, width: int) -> problems.Problem:
        return problems.make(rows=rows, width=width)

    yield "gae", padded, lambda p: pk.multi_objective_gae(p.advantages, p.advantages, p.mask)
    yield "gae of two", padded, lambda p: pk.multi_objective_gae(p.advantages, p.advantages.clone(), p.mask)
    yield "normalize", padded, lambda p: pk.group_normalize(p.advantages[0], group_size=1)
    yield "on-policy", padded, lambda p: pk.pama_loss(p.logprobs, p.logprobs.detach(), p.advantages, p.mask)
    yield "combine, normalized", padded, lambda p: pk.combine_advantages(p.advantages, normalize=True)
    yield (
        "many objectives",
        lambda b, t: problems.make(rows=b, width=t, objectives=20),
        lambda p: pk.pama_loss(**p.loss_arguments()),
    )
    # What torch's kernels compute would not be repeated.
    yield (
        "normalize by ids",
        padded,
        lambda p: pk.group_normalize(p.advantages[0], group_ids=torch.arange(len(p.advantages[0]))),
    )


def tensors_of(result: Any) -> list[Tensor]:
    fields = result if isinstance(result, tuple) else (result,)
    return [getattr(x, "buffer", x) for x in fields]


def differences(
    inputs: set[int], plain: Launches, again: Launches, begins: set[int], results: list[tuple[int, int]]
) -> int:
    """`inputs`: addresses in the memory of the arguments. Each address of an allocation of the repeated call
    stands for one of the other call's, until the next function `begins`, which may use freed memory."""
    if len(plain) != len(again):
        return max(len(plain), len(again))
    stands_for: dict[int, int] = {}
    wrong = 0
    for k, ((variant, programs, values), (own_variant, own_programs, own_values)) in enumerate(
        zip(plain, again, strict=True)
    ):
        if k in begins:
            stands_for = dict(results)
        wrong += variant is not own_variant or programs != own_programs or len(values) != len(own_values)
        for x, y in zip(values, own_values, strict=False):
            address = isinstance(x, int) and x > 1 << 32
            expected = stands_for.setdefault(y, x) if address and x not in inputs else y
            wrong += expected != x or type(x) is not type(y)
    return wrong


def compared(watch: Watch, make: Make, call: Call, normalized: bool) -> dict[str, int]:
    """`normalized`: torch's kernels compute the results from those of the launches."""
    repeat._known.clear()
    for _ in range(2):
        call(make(*FIRST))
    before = watch.repeated
    call(make(*FIRST))
    functions = watch.repeated - before  # of the backend, that the call takes
    repeated = wrong = 0
    for _ in range(TIMES):
        p = make(chosen.choice([1, 2, 3, 7, 40]), chosen.choice([1, 5, 33, 100, 128, 500]))
        inputs = {x.data_ptr() for x in (*vars(p).values(), EQUAL) if isinstance(x, Tensor)}
        state = chosen.getstate()
        with launch.watching(launch.start):
            result, plain = watch.of(lambda p=p: call(p))
        chosen.setstate(state)
        before = watch.repeated
        own_result, again = watch.of(lambda p=p: call(p))
        pairs = list(zip(tensors_of(own_result), tensors_of(result), strict=True))
        assert all(x.shape == y.shape and x.dtype == y.dtype and x.is_contiguous() for x, y in pairs)
        addresses = [(x.data_ptr(), y.data_ptr()) for x, y in pairs]
        if normalized or functions > 1:  # torch may have put results in memory that was freed before
            addresses = []
        if 0 < functions == watch.repeated - before:
            repeated += 1
            wrong += differences(inputs, plain, again, watch.begins, addresses)
    recorded = max(len(known.functions) for known in repeat._known.values())
    return {"differences": wrong, "repeated": repeated, "recorded": recorded}


def of_two_arguments(watch: Watch) -> dict[str, Any]:
    """Calls that were recorded with one tensor as two arguments, then get two, of one address or of
    several."""
    p = problems.make(rows=4, width=16)
    wide = torch.zeros(4, 32)
    mask = wide[:, :16] == 0
    for _ in range(3):
        pk.pama_loss(p.logprobs, p.logprobs, p.advantages, mask)
    missing = 0
    for old in (p.logprobs.clone(), p.logprobs.as_strided((4, 16), (8, 1))):
        with launch.watching(launch.start):
            _, plain = watch.of(lambda old=old: pk.pama_loss(p.logprobs, old, p.advantages, mask))
        _, again = watch.of(lambda old=old: pk.pama_loss(p.logprobs, old, p.advantages, mask))
        inputs = {x.data_ptr() for x in (p.logprobs, old, p.advantages, mask)}
        missing += differences(inputs, plain, again, watch.begins, [])
    return {"call": "two arguments", "differences": missing}


def kept() -> dict[str, Any]:
    """Tensors that stay when arguments and results are gone, and the signatures beyond the limit."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def step(objectives: int) -> None:
        for _ in range(3):
            p = problems.make(objectives=objectives)
            pk.combine_advantages(p.advantages, p.mask)

    step(3)
    before, repeat._MOST = alive(), len(repeat._known)
    for objectives in range(4, 24):
        step(objectives)
    return {"call": "many", "tensors": alive() - before, "signatures": len(repeat._known) - repeat._MOST}


def main() -> None:
    NullDriver()
    compiled = SimpleNamespace(run=None, function=None, packed_metadata=None)
    launch.compiled = lambda *_: compiled  # type: ignore[assignment]
    launch._place_of = lambda device: launch._Place(None, PROCESSORS)  # type: ignore[assignment]
    watch = Watch()
    for name, make, call in calls():
        print(json.dumps({"call": name, **compared(watch, make, call, "normalized" in name)}), flush=True)
    print(json.dumps(of_two_arguments(watch)), flush=True)
    print(json.dumps(kept()), flush=True)


if __name__ == "__main__":
    main()
