"""Nothing that is made while a graph is captured is used after it, where no GPU is: a capture is pretended.

What is allocated in a capture belongs to the graph: it holds nothing before the first replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels import _stream
from pama_kernels.backends import _counter

pytestmark = pytest.mark.portable
CPU = torch.device("cpu")


class Streams:
    """Streams of a pretended device, for tensors on the CPU."""

    current: int | None = 1
    capturing = False


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(_stream, "stream_of", lambda device: made.current)
    monkeypatch.setattr(_stream, "capturing", lambda device: made.capturing)
    for name in ("_pools", "_of_stream", "_captured"):
        monkeypatch.setattr(_counter, name, {})
    return made


def tensors() -> dict[int, Tensor]:
    """All that are alive; they stay so, and their numbers theirs, as long as the result does."""
    gc.collect()
    return {id(x): x for x in gc.get_objects() if type(x) is Tensor}


ADVANTAGES, PREFERENCE = torch.randn(4, 3, 2), [0.3, 0.7]
CALLS: dict[str, Callable[[Any], Any]] = {
    "combine": lambda p: pk.combine_advantages(ADVANTAGES, preference=p),
    "combine per sequence": lambda p: pk.combine_advantages(ADVANTAGES[:, 0], preference=p),
    "loss": lambda p: pk.pama_loss(
        ADVANTAGES[..., 0].clone().requires_grad_(), None, ADVANTAGES, preference=p
    ),
    "loss per token": lambda p: pk.pama_loss(
        ADVANTAGES[..., 0], None, ADVANTAGES, preference=p, rule=pk.Pama("token")
    ),
    "fixed": lambda p: pk.combine_advantages(ADVANTAGES, preference=p, rule=pk.Fixed()),
    "weights": lambda p: pk.pama_weights(ADVANTAGES, preference=p),
    "min-norm": lambda p: pk.min_norm_weights(torch.eye(2), preference=p),
    "upgrad": lambda p: pk.upgrad_weights(torch.eye(2), preference=p),
    "statistics": lambda p: pk.objective_statistics(None, None, ADVANTAGES, pairs=True),
    "gae": lambda p: pk.multi_objective_gae(ADVANTAGES, ADVANTAGES),
    "normalize": lambda p: pk.group_normalize(ADVANTAGES[:, 0], group_size=2),
    "whiten": lambda p: pk.masked_whiten(ADVANTAGES),
}


@pytest.mark.parametrize("preference", [None, PREFERENCE], ids=["uniform", "given"])
@pytest.mark.parametrize("name", list(CALLS))
def test_no_tensor_of_a_capture_is_kept(name: str, preference: Any, streams: Streams) -> None:
    CALLS[name]([0.5, 0.5])  # what is made once, outside
    before = tensors()
    streams.capturing = True
    result = CALLS[name](preference)
    del result
    assert tensors().keys() <= before.keys()


def test_a_preference_of_a_capture_is_not_cached(streams: Streams) -> None:
    call = CALLS["weights"]
    streams.capturing = True
    call([0.125, 0.875])
    streams.capturing = False
    before = tensors()
    call([0.125, 0.875])
    kept = tensors().keys() - before.keys()
    assert len(kept) == 1  # now it is
    call([0.125, 0.875])
    assert tensors().keys() - before.keys() == kept


def test_counters_of_launches_that_may_overlap_differ(streams: Streams) -> None:
    """One for each stream, one for each captured launch, 16 bytes apart: at any other address Triton would
    compile a second variant, in the middle of the capture."""
    first = _counter.counter(CPU)
    assert _counter.counter(CPU) is first
    streams.current = 2
    second = _counter.counter(CPU)
    streams.capturing = True
    captured = [_counter.counter(CPU) for _ in range(20)]
    addresses = [x.data_ptr() for x in (first, second, *captured)]
    assert len(set(addresses)) == len(addresses)
    assert all(address % 16 == 0 for address in addresses)
    assert not any(captured)


def test_more_captured_launches_than_counters(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_counter, "_COUNTERS", 2)
    _counter.counter(CPU)
    streams.capturing = True
    found = [_counter.counter(CPU) for _ in range(4)]
    assert len({x.data_ptr() for x in found}) == 4
    assert all(x.numel() == 1 and x.dtype == torch.int32 and not x for x in found)


def test_the_first_call_may_be_captured(streams: Streams) -> None:
    streams.capturing = True
    assert not _counter.counter(CPU)
    streams.capturing = False
    assert not _counter._pools
    assert not _counter.counter(CPU)
