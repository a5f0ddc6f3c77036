"""Several Python threads at once, any number of threads inside, and the GIL released for large inputs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

N = 4


def _batch(rows: int, width: int, seed: int = 0, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, width, generator=generator) - 2
    return {
        "logprobs": old + 0.2 * torch.randn(rows, width, generator=generator),
        "old_logprobs": old,
        "advantages": torch.randn(rows, width, n, generator=generator),
        "mask": torch.rand(rows, width, generator=generator) < 0.9,
    }


def _everything(x: dict[str, Tensor]) -> list[Tensor]:
    """Every public computation once."""
    results: list[Tensor] = []
    for weights_per in ("batch", "sequence", "token"):
        logprobs = x["logprobs"].clone().requires_grad_()
        arguments = {**x, "logprobs": logprobs}
        output = pk.pama_loss(**arguments, weights_per=weights_per, regularization=0.1, noon=False)
        output.loss.backward()
        assert logprobs.grad is not None
        results += [output.loss.detach(), *output[1:3], output.statistics.buffer, logprobs.grad]
        combined = pk.combine_advantages(x["advantages"], x["mask"], weights_per=weights_per)
        results += [*combined[:3], combined.statistics.buffer]
    results.append(pk.objective_statistics(**x, gram=True).buffer)
    flat = x["advantages"].flatten(0, 1)
    results += [*pk.pama_weights(flat), *pk.pama_weights(flat, regularization=0.1)]
    results += pk.multi_objective_gae(x["advantages"], x["advantages"].roll(1, 0), x["mask"])
    results.append(pk.group_normalize(flat, group_size=x["mask"].shape[1]))
    return results


def _equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("rows", "width"), [(3, 5), (64, 700), (1, 40_000), (40_000, 1)], ids=["small", "wide", "one", "tall"]
)
def test_any_number_of_threads_gives_the_same_bits(rows: int, width: int) -> None:
    x = _batch(rows, width)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = _everything(x)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            _equal(_everything(x), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inner", [1, 2])
def test_calls_from_several_threads_at_once(inner: int) -> None:
    """Small calls and calls that start threads of their own, each with its own data."""
    before = torch.get_num_threads()
    torch.set_num_threads(inner)
    try:
        batches = [_batch(*shape, seed) for seed, shape in enumerate([(4, 6), (64, 300), (7, 33), (3, 9000)])]
        wanted = [_everything(x) for x in batches]
        outer = 4
        start = threading.Barrier(outer)

        def work(worker: int) -> None:
            start.wait(30)
            for step in range(6):
                which = (worker + step) % len(batches)
                _equal(_everything(batches[which]), wanted[which])

        with ThreadPoolExecutor(outer) as pool:
            for future in [pool.submit(work, worker) for worker in range(outer)]:
                future.result(120)
    finally:
        torch.set_num_threads(before)


def test_first_calls_at_once() -> None:
    """What is set up on first use (priors, the backend) may be set up by several threads."""
    scores = torch.randn(5, 23)
    wanted = pk.reference.pama_weights(scores, prior=range(1, 24)).optimum
    start = threading.Barrier(8)

    def work(_: int) -> Tensor:
        start.wait(30)
        return pk.pama_weights(scores, prior=list(range(1, 24))).optimum

    with ThreadPoolExecutor(8) as pool:
        for optimum in pool.map(work, range(8)):
            torch.testing.assert_close(optimum.double(), wanted, rtol=1e-6, atol=1e-7)


def test_one_module_in_several_threads() -> None:
    """Without momentum a module holds nothing that changes."""
    module = pk.PamaLoss(weights_per="sequence", regularization=0.1)
    batches = [_batch(8, 50, seed) for seed in range(4)]
    wanted = [module(**x).loss for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, loss in zip(pool.map(lambda x: module(**x).loss, batches), wanted, strict=True):
                assert torch.equal(found, loss)


def test_errors_in_threads_leave_the_others_alone() -> None:
    x = _batch(6, 40)
    wanted = pk.pama_loss(**x, weights_per="batch").loss
    flat = {name: value.flatten(0, 1) for name, value in x.items()}

    def work(worker: int) -> Any:
        if worker % 2:
            return pk.pama_loss(**x, weights_per="batch").loss
        with pytest.raises(ValueError, match="cu_seqlens"):
            pk.pama_loss(**flat, weights_per="batch", cu_seqlens=torch.tensor([0, 7, 5, 240]))
        return wanted

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(loss, wanted) for loss in pool.map(work, range(40)))


class _Ticker(threading.Thread):
    """A Python thread that notes the time whenever it gets to run."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ticks: list[float] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.001):
            self.ticks.append(time.perf_counter())


def _large(what: str, size: int) -> Callable[[], Any]:
    rows, width = 64 * size, 512
    if what == "weights":
        scores = torch.randn(rows * width // 16, 64)
        return lambda: pk.pama_weights(scores, regularization=0.1)
    if what == "gae":
        x = torch.randn(rows, width, N)
        return lambda: pk.multi_objective_gae(x, x)
    if what == "normalize":
        x = torch.randn(rows * width, N)
        return lambda: pk.group_normalize(x, group_size=width)
    x = _batch(rows, width)
    if what == "loss":
        return lambda: pk.pama_loss(**x, weights_per="token", regularization=0.1, noon=False)
    if what == "combine":
        return lambda: pk.combine_advantages(x["advantages"], x["mask"], weights_per="token")
    return lambda: pk.objective_statistics(**x, gram=True)


@pytest.mark.parametrize("what", ["loss", "combine", "statistics", "weights", "gae", "normalize"])
def test_the_gil_is_released_while_a_large_input_runs(what: str) -> None:
    """Another thread runs in the middle half of most calls; with the GIL held it could not.

    The edges are left out: there the call is still, or again, in Python. A busy machine may let a call
    pass before it wakes the other thread, and may stretch the edges: so the half of the calls is asked for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    call = _large(what, 16)
    call()
    ticker = _Ticker()
    ticker.start()
    calls, seen = 20, 0
    try:
        for _ in range(calls):
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            quarter = (end - start) / 4
            seen += any(start + quarter < tick < end - quarter for tick in list(ticker.ticks))
    finally:
        ticker.stop.set()
        ticker.join(10)
        torch.set_num_threads(before)
    assert seen >= calls / 2, f"another thread ran inside {seen} of {calls} calls"
