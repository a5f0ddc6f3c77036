"""Calls whose launches are repeated (`backends/triton/repeat.py`) launch what they would launch otherwise.

``python repeated_calls.py`` prints a line of JSON for each call, made with a CUDA driver that does nothing
(`null_driver.py`): on tensors of its own until it is recorded, then on others, once as if for the first time
and once repeated. "differences" counts the arguments of kernels that are not equal or, for memory
that a call allocates, do not correspond; "repeated" the calls that took recorded launches. The last line is
about what is kept.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import problems
import torch
from null_driver import NullDriver
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends.triton import launch, repeat

Launches = list[tuple[Any, int, list[Any]]]
Call = Callable[[problems.Problem], Any]

RULES = {"gram": pk.Pama(), "token": pk.Pama.paper("token"), "sequence": pk.Pama("sequence")}


class Watch:
    """What is launched, and how many calls are repeated."""

    def __init__(self) -> None:
        self.launches: Launches = []
        self.repeated = 0
        start, again = launch.Variant.__call__, repeat._Recorded.repeat

        def started(variant: launch.Variant, programs: int, values: list[Any]) -> None:
            self.launches.append((variant, programs, list(values)))
            start(variant, programs, values)

        def counted(recorded: Any, addresses: list[int]) -> Any:
            self.repeated += 1
            return again(recorded, addresses)

        launch.Variant.__call__ = started  # type: ignore[method-assign]
        repeat._Recorded.repeat = counted  # type: ignore[method-assign]

    def of(self, call: Callable[[], Any]) -> tuple[Any, Launches]:
        self.launches = []
        return call(), self.launches


def calls() -> Iterator[tuple[str, Callable[[], problems.Problem], Call]]:
    """The name, what makes the tensors, and the call."""
    for layout in ("padded", "per-sequence", "packed-per-sequence"):
        for everything in (False, True):

            def make(layout: str = layout, everything: bool = everything) -> problems.Problem:
                present = torch.bool if everything else None
                p = problems.make(
                    layout, rows=4, width=64, objectives=3, ref_logprobs=everything, objective_mask=present
                )
                p.logprobs.requires_grad_(everything)
                return p

            extra: dict[str, Any] = {"kl_coef": 0.1, "preference": [1, 2, 3]} if everything else {}
            title = f"{layout}, {'all' if everything else 'few'} tensors"
            for name, rule in RULES.items():
                setting = {**extra, "rule": rule}
                yield (
                    f"loss {name}, {title}",
                    make,
                    lambda p, s=setting: pk.pama_loss(**p.loss_arguments(), **s),
                )
            yield f"combine, {title}", make, lambda p: pk.combine_advantages(**p.combine_arguments(False))
            yield f"statistics, {title}", make, lambda p: pk.objective_statistics(**p.statistics_arguments())
    padded = problems.make
    yield "gae", padded, lambda p: pk.multi_objective_gae(p.advantages, p.advantages, p.mask)
    yield "gae of two", padded, lambda p: pk.multi_objective_gae(p.advantages, p.advantages.clone(), p.mask)
    yield "normalize", padded, lambda p: pk.group_normalize(p.advantages[0])
    yield "on-policy", padded, lambda p: pk.pama_loss(p.logprobs, p.logprobs.detach(), p.advantages, p.mask)
    # What torch's kernels compute would not be repeated.
    yield "normalize by ids", padded, lambda p: pk.group_normalize(p.advantages[0], group_ids=torch.arange(5))
    yield "combine, normalized", padded, lambda p: pk.combine_advantages(p.advantages, normalize=True)


def tensors_of(result: Any) -> list[Tensor]:
    fields = result if isinstance(result, tuple) else (result,)
    return [getattr(x, "buffer", x) for x in fields]


def differences(inputs: set[int], plain: Launches, again: Launches, results: list[tuple[int, int]]) -> int:
    """`inputs`: addresses in the memory of the arguments. Each address of an allocation of the repeated call
    stands for one of the other call's."""
    if len(plain) != len(again):
        return max(len(plain), len(again))
    stands_for = dict(results)
    wrong = 0
    for (variant, programs, values), (own_variant, own_programs, own_values) in zip(
        plain, again, strict=True
    ):
        wrong += variant is not own_variant or programs != own_programs or len(values) != len(own_values)
        for x, y in zip(values, own_values, strict=False):
            address = isinstance(x, int) and x > 1 << 32
            expected = stands_for.setdefault(y, x) if address and x not in inputs else y
            wrong += expected != x or type(x) is not type(y)
    return wrong


def compared(watch: Watch, make: Callable[[], problems.Problem], call: Call) -> dict[str, int]:
    for _ in range(repeat.RECORDED):
        call(make())
    p = make()
    inputs = {x.data_ptr() for x in vars(p).values() if isinstance(x, Tensor)}
    with launch.watching(launch.start):
        result, plain = watch.of(lambda: call(p))
    before = watch.repeated
    own_result, again = watch.of(lambda: call(p))
    pairs = list(zip(tensors_of(own_result), tensors_of(result), strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype and x.is_contiguous() for x, y in pairs)
    addresses = [(x.data_ptr(), y.data_ptr()) for x, y in pairs]
    return {"differences": differences(inputs, plain, again, addresses), "repeated": watch.repeated - before}


def of_two_arguments(watch: Watch) -> dict[str, Any]:
    """A call that was recorded with one tensor as two arguments, then gets two."""
    p = problems.make()
    other = p.logprobs.clone()
    for _ in range(repeat.RECORDED + 1):
        pk.pama_loss(p.logprobs, p.logprobs, p.advantages, p.mask)
    _, launches = watch.of(lambda: pk.pama_loss(p.logprobs, other, p.advantages, p.mask))
    missing = sum(other.data_ptr() not in values for variant, _, values in launches if len(values) > 40)
    return {"call": "two arguments", "differences": missing, "repeated": 0}


def kept() -> dict[str, Any]:
    """Tensors that stay when arguments and results are gone, and the signatures beyond the limit."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def step(width: int) -> None:
        for _ in range(repeat.RECORDED + 1):
            p = problems.make(width=width)
            pk.combine_advantages(p.advantages, p.mask)

    step(9)
    known = pk.backends.triton.apply.known
    before, repeat._MOST = alive(), len(known)
    for width in range(10, 60):
        step(width)
    return {"call": "many", "tensors": alive() - before, "signatures": len(known) - repeat._MOST}


def main() -> None:
    NullDriver()
    watch = Watch()
    for name, make, call in calls():
        print(json.dumps({"call": name, **compared(watch, make, call)}), flush=True)
    print(json.dumps(of_two_arguments(watch)), flush=True)
    print(json.dumps(kept()), flush=True)


if __name__ == "__main__":
    main()
