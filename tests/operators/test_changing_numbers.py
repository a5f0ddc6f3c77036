"""Settings that change from step to step: no graph per value, and right results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from operator_table import assert_same, leaves, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pama_kernels as pk

pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
)
X = tokens(4, 6)
LOSS = {name: X[name] for name in ("logprobs", "old_logprobs", "advantages", "mask", "ref_logprobs")}
A = X["advantages"]
GRAM = torch.diag(torch.tensor([1.0, 2.0, 4.0]))

Number = Any  # float or 0-d tensor
STEPS = 6


def _loss(**options: Any) -> Any:
    return pk.pama_loss(**LOSS, **options)[:3]


def _combine(rule: Any) -> Any:
    return pk.combine_advantages(A, rule=rule)[:3]


# Everything that a schedule may change, as a function of a number in (0, 0.2).
SCHEDULES: dict[str, Callable[[Number], Any]] = {
    "kl_coef": lambda k: _loss(kl_coef=k),
    "clip_range": lambda k: _loss(clip_range=k),
    "clip_range, lower": lambda k: _loss(clip_range=(k, 0.3)),
    "clip_range, upper": lambda k: _loss(clip_range=(0.2, k)),
    "clip_range, both": lambda k: _loss(clip_range=(k, 2 * k)),
    "clip_range, infinite": lambda k: _loss(clip_range=(k, float("inf"))),
    "dual_clip": lambda k: _loss(dual_clip=2 + k),
    "normalizer": lambda k: _loss(normalizer=10 * k),
    "regularization of Pama": lambda k: _combine(pk.Pama(regularization=k)),
    "regularization, scores": lambda k: _combine(pk.Pama("sequence", regularization=k)),
    "temperature": lambda k: _combine(pk.SoftMin(k)),
    "clip_range of combine": lambda k: pk.combine_advantages(
        A, logprobs=X["logprobs"], old_logprobs=X["old_logprobs"], clip_range=k
    )[:3],
    "clip_range of statistics": lambda k: (
        pk.objective_statistics(X["logprobs"], X["old_logprobs"], A, clip_range=k, dual_clip=2 + k).buffer
    ),
    "regularization of pama_weights": lambda k: pk.pama_weights(A, regularization=k),
    "regularization of min_norm_weights": lambda k: pk.min_norm_weights(GRAM, regularization=k),
    "gamma": lambda k: pk.multi_objective_gae(A, A, gamma=1 - k),
    "lam": lambda k: pk.multi_objective_gae(A, A, lam=1 - k),
}
each = pytest.mark.parametrize("name", SCHEDULES)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(function: Callable[[Number], Any], as_tensor: bool) -> int:
    """How many graphs torch.compile makes for a schedule; every result is checked."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for step in range(STEPS):
        value = 0.03 * (step + 1)
        number = torch.tensor(value, dtype=torch.float64) if as_tensor else value
        assert_same(compiled(number), function(value))
    return int(counter.frame_count)


@cache
def plain_graphs() -> int:
    """Those of plain torch: two, since the first value is taken for a constant. torch 2.11 makes one for each
    value where the compiled function calculates with the float."""
    return graphs(lambda k: A * (1 - k), as_tensor=False)


@each
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_two_graphs_at_most(name: str, as_tensor: bool) -> None:
    assert graphs(SCHEDULES[name], as_tensor) <= (2 if as_tensor else plain_graphs())


@pytest.mark.parametrize(
    "function",
    [
        lambda k: pk.combine_advantages(A, preference=[k, *[1.0] * (A.shape[-1] - 1)])[:3],
        lambda k: _loss(rule="fixed", preference=[k, *[0.5 - k] * (A.shape[-1] - 1)]),
        lambda k: pk.upgrad_weights(GRAM, preference=(k, 0.5, 2 * k)),
    ],
    ids=["combine_advantages", "pama_loss", "upgrad_weights"],
)
def test_a_scheduled_preference(function: Callable[[float], Any]) -> None:
    assert graphs(function, as_tensor=False) <= plain_graphs()


@each
def test_a_tensor_is_its_number(name: str) -> None:
    """Bitwise equal in float64; in float32 equal to the rounded number."""
    function, value = SCHEDULES[name], 0.125  # exact in both
    wanted = function(value)
    for number in (torch.tensor(value), torch.tensor(value, dtype=torch.float64)):
        assert_same(function(number), wanted)
        assert_same(function(number.requires_grad_()), wanted)


@each
def test_two_values_differ(name: str) -> None:
    """Results depend on the number; otherwise the other tests would pass trivially."""
    first, second = (leaves(SCHEDULES[name](k)) for k in (0.03, 0.18))
    assert not all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_schedule_through_the_gradient() -> None:
    """kl_coef by step, with the gradient that belongs to it."""

    def step(logprobs: Tensor, kl_coef: Tensor) -> Tensor:
        return pk.pama_loss(**{**LOSS, "logprobs": logprobs}, kl_coef=kl_coef).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    logprobs = X["logprobs"].clone().requires_grad_()
    for value in (0.0, 0.1, 0.5):
        k = torch.tensor(value)
        found, wanted = (torch.autograd.grad(f(logprobs, k), logprobs) for f in (compiled, step))
        assert_same(found, wanted)
