"""Guarantees of the native CPU backend: the same bits for any number of threads, concurrent calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _tables import RULES, assert_agrees, loss_of, weighting
from problems import FLOATS, Problem, make
from torch import Tensor

import pama_kernels as pk
from pama_kernels.rules import resolve_rule

pytestmark = pytest.mark.cpu
N = 4


def batch(rows: int, width: int, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, width, generator=g) - 2
    return Problem(
        logprobs=old + 0.2 * torch.randn(rows, width, generator=g),
        old_logprobs=old,
        advantages=torch.randn(rows, width, N, generator=g),
        mask=torch.rand(rows, width, generator=g) < 0.9,
        ref_logprobs=old - 0.1,
    )


def everything(x: Problem) -> list[Tensor]:
    """Every public computation once, with advantages per token and per sequence."""
    results: list[Tensor] = []
    row = Problem(x.logprobs, x.old_logprobs, x.advantages[:, 0], x.mask, ref_logprobs=x.ref_logprobs)
    for name in (
        "cosines",
        "upgrad",
        "paper batch",
        "sequence",
        "token",
        "softmin",
        "softmin token",
        "given",
    ):
        for problem in (x, row):
            options = weighting(name, problem)
            output, gradient = loss_of(problem, **options, kl_coef=0.1, aggregation="seq-mean-token-mean")
            combined = pk.combine_advantages(problem.advantages, problem.mask, **options)
            results += [*output[:3], output.statistics.buffer, gradient]
            results += [*combined[:3], combined.statistics.buffer]
    for problem in (x, row):
        results.append(pk.objective_statistics(**problem.statistics_arguments(), pairs=True).buffer)
    flat = x.advantages.flatten(0, 1)
    some = x.advantages[:999, :8].double()
    gram = some.mT @ some
    results += [*pk.pama_weights(flat), *pk.pama_weights(flat, regularization=0.1)]
    results += [*pk.min_norm_weights(gram), *pk.upgrad_weights(gram)]
    results += pk.multi_objective_gae(x.advantages, x.advantages.roll(1, 0), x.mask)
    results.append(pk.group_normalize(flat, group_size=len(x.mask[0])))
    return results


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("rows", "width"), [(3, 5), (64, 700), (1, 40_000), (40_000, 1)], ids=["small", "wide", "one", "tall"]
)
def test_any_number_of_threads_gives_the_same_bits(rows: int, width: int) -> None:
    x = batch(rows, width)
    wanted = everything(x)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert same(everything(x), wanted)


def test_each_instruction_set_agrees_with_the_reference(isa: str) -> None:
    for n in (1, 2, 3, 4, 5, 8):
        for dtype in FLOATS:
            optional: dict[str, Any] = {"importance_weights": True, "ref_logprobs": True, "seed": n}
            for layout, width in (("padded", 11), ("per-sequence", 70)):
                problem = make(layout, rows=2, width=width, objectives=n, dtype=dtype, **optional)
                assert_agrees(problem, kl_coef=0.1, dual_clip=3.0)
            small = make(rows=2, width=5, objectives=n, dtype=dtype, **optional, overflow=True)
            for name in ("sequence", "token", "paper token", "softmin token"):
                assert_agrees(small, rule=RULES[name])
        packed = make("packed", rows=7, width=90, objectives=n, objective_mask=torch.bool)
        assert_agrees(packed, rule="upgrad", aggregation="seq-mean-token-mean")


def test_each_instruction_set_gives_the_same_bits_for_any_number_of_threads(isa: str) -> None:
    x = batch(40, 300)
    wanted = everything(x)
    torch.set_num_threads(3)
    assert same(everything(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_instruction_set_reads_16_bit_values_exactly(isa: str, dtype: torch.dtype) -> None:
    """The same bits as of float32 inputs with these values, subnormal ones included."""
    for n in (1, 2, 3, 4, 8, 16, 32):
        g = torch.Generator().manual_seed(n)
        old = (torch.randn(3, 77, generator=g) - 2).to(dtype)
        logprobs = (old + 0.2 * torch.randn(3, 77, generator=g)).to(dtype)
        advantages = torch.randn(3, 77, n, generator=g).to(dtype)
        advantages[0, :, 0] *= torch.finfo(dtype).smallest_normal / 4
        mask = torch.rand(3, 77, generator=g) < 0.9
        results = []
        for inputs in ((logprobs, old, advantages), (logprobs.float(), old.float(), advantages.float())):
            leaf = inputs[0].detach().requires_grad_()
            given = torch.full((n,), 1 / n)
            output = pk.pama_loss(leaf, *inputs[1:], mask, weights=given, statistics=False)
            output.loss.backward()
            assert leaf.grad is not None
            statistics = pk.objective_statistics(*inputs, mask, pairs=True)
            results.append([statistics.buffer, leaf.grad.to(dtype), output.loss.to(dtype)])
        assert same(*results), (n, dtype)


def test_weights_of_given_statistics_are_the_same_on_every_instruction_set() -> None:
    """So that ranks of a mixed cluster have equal weights: those are solved from merged sums."""
    from pama_kernels._solve import solve_batch
    from pama_kernels.backends import _cpu

    sizes = (1, 2, 3, 5, 8, 12, 16, 17, 33, 64)
    advantages = [torch.randn(200, n) for n in sizes]
    advantages += [torch.randn(200, n // 2) @ torch.randn(n // 2, n) for n in sizes if n > 2]  # singular
    statistics = [pk.objective_statistics(None, None, a, pairs=True) for a in advantages]
    names = ("cosines", "gram", "scores", "paper batch", "upgrad", "fixed")
    rules = [resolve_rule(RULES[name]) for name in names]
    found: dict[str, list[Tensor]] = {}
    for isa in ("portable", "avx2", "avx512"):
        used = _cpu.use_isa(isa)
        found[used] = [x for s in statistics for rule in rules for x in solve_batch(s, rule, None)]
    _cpu.use_isa("best")
    wanted = next(iter(found.values()))
    assert all(same(results, wanted) for results in found.values())


# --- several Python threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [1, 2])
def test_calls_from_several_threads_at_once(inner: int) -> None:
    """Small calls and calls that start threads of their own, each with its own data."""
    torch.set_num_threads(inner)
    batches = [batch(*shape, seed) for seed, shape in enumerate([(4, 6), (64, 300), (7, 33), (3, 9000)])]
    wanted = [everything(x) for x in batches]
    outer = 4
    start = threading.Barrier(outer)

    def work(worker: int) -> None:
        start.wait(30)
        for step in range(4):
            which = (worker + step) % len(batches)
            assert same(everything(batches[which]), wanted[which])

    with ThreadPoolExecutor(outer) as pool:
        for future in [pool.submit(work, worker) for worker in range(outer)]:
            future.result(120)


def test_first_calls_at_once() -> None:
    """What is set up on first use (preferences, the backend) may be set up by several threads."""
    scores = torch.randn(5, 23)
    wanted = pk.reference.pama_weights(scores, preference=range(1, 24)).optimum
    start = threading.Barrier(8)

    def work(_: int) -> Tensor:
        start.wait(30)
        return pk.pama_weights(scores, preference=list(range(1, 24))).optimum

    with ThreadPoolExecutor(8) as pool:
        for optimum in pool.map(work, range(8)):
            torch.testing.assert_close(optimum.double(), wanted, rtol=1e-6, atol=1e-7)


def test_one_module_in_several_threads_and_errors_in_others() -> None:
    """Without momentum a module holds nothing that changes; an error leaves the others alone."""
    module = pk.PamaLoss(rule=RULES["sequence"])
    x = batch(6, 40)
    wanted = module(**x.loss_arguments()).loss
    flat = {k: v.flatten(0, 1) for k, v in x.statistics_arguments().items() if v is not None}

    def work(worker: int) -> Any:
        if worker % 2:
            return module(**x.loss_arguments()).loss
        with pytest.raises(ValueError, match="cu_seqlens"):
            pk.pama_loss(**flat, cu_seqlens=torch.tensor([0, 7, 5, 240]))
        return wanted

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(loss, wanted) for loss in pool.map(work, range(40)))


class Ticker(threading.Thread):
    """A Python thread that notes the time whenever it gets to run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ticks: list[float] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.001):
            self.ticks.append(time.perf_counter())

    def ran_inside(self, call: Callable[[], Any]) -> bool:
        """Whether this thread runs in the middle half of the call."""
        self.ticks.clear()
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        quarter = (end - start) / 4
        return any(start + quarter < tick < end - quarter for tick in list(self.ticks))


def large(what: str) -> Callable[[], Any]:
    rows, width = 1024, 512
    if what == "weights":
        scores = torch.randn(rows * width // 16, 64)
        return lambda: pk.pama_weights(scores, regularization=0.1)
    if what == "normalize":
        x = torch.randn(rows * width, N)
        return lambda: pk.group_normalize(x, group_size=width)
    p = batch(rows, width)
    if what == "gae":
        return lambda: pk.multi_objective_gae(p.advantages, p.advantages)
    if what == "loss":
        return lambda: pk.pama_loss(**p.statistics_arguments(), rule=RULES["token"])
    if what == "combine":
        return lambda: pk.combine_advantages(p.advantages, p.mask, rule=RULES["paper token"])
    return lambda: pk.objective_statistics(**p.statistics_arguments(), pairs=True)


@pytest.mark.parametrize("what", ["loss", "combine", "statistics", "weights", "gae", "normalize"])
def test_the_gil_is_released_while_a_large_input_runs(what: str) -> None:
    """Another thread runs in the middle half of most calls; with the GIL held it could not.

    The edges are left out: there the call is still, or again, in Python. A busy machine may let a call
    pass before it wakes the other thread, and may stretch the edges: so the test requires half of the calls
    of one round. With the GIL held no round comes near that.
    """
    torch.use_deterministic_algorithms(False)  # which fills new memory while the GIL is held
    call = large(what)
    call()
    ticker = Ticker()
    ticker.start()
    calls, rounds = 12, []
    try:
        while len(rounds) < 10 and max(rounds, default=0) < calls / 2:
            rounds.append(sum(ticker.ran_inside(call) for _ in range(calls)))
    finally:
        ticker.stop.set()
        ticker.join(10)
    assert max(rounds) >= calls / 2, f"another thread ran inside {rounds} of {calls} calls each"
