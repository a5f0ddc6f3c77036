"""Tests that need a GPU: graphs, streams, devices, sizes beyond 2^31; and the same bits every time.

`PAMA_TEST_DEVICE=cpu` runs what does not need a GPU on small sizes, so that this file is known to work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import registry

DEVICE = torch.device(os.environ.get("PAMA_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.gpu  # skipped where there is none
LARGE = 3_000_000_000 if ON_GPU else 300_000  # tokens; a multiple of 1000


def batch(seed: int, n: int = 4, rows: int = 64, width: int = 512) -> dict[str, Tensor]:
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    logprobs = -torch.rand(rows, width, generator=g, device=DEVICE)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.2 * torch.randn(rows, width, generator=g, device=DEVICE),
        "advantages": torch.randn(rows, width, n, generator=g, device=DEVICE),
        "mask": torch.rand(rows, width, generator=g, device=DEVICE) < 0.8,
    }


def without_logprobs(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return x["advantages"], x["mask"]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, pk.ObjectiveStatistics):
        return [result.buffer]
    return [x for part in result for x in flat(part)]


def gradient(x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaf = x["logprobs"].detach().requires_grad_()
    output = pk.pama_loss(**{**x, "logprobs": leaf}, **options)
    (grad,) = torch.autograd.grad(output.loss, leaf)
    return [*flat(output), grad]


RULES: dict[str, Any] = {
    "fixed": pk.Fixed(),
    "gram": None,
    "scores": pk.Pama(bound="scores"),
    "upgrad": pk.UPGrad(),
    "sequence": pk.Pama("sequence"),
    "softmin": pk.SoftMin(),
    "token": pk.Pama("token"),
    "paper": pk.Pama.paper("token"),
}
CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "statistics": lambda x: pk.objective_statistics(**x),
    "statistics with pairs": lambda x: pk.objective_statistics(**x, pairs=True),
    **{f"loss {name}": lambda x, r=rule: gradient(x, rule=r) for name, rule in RULES.items()},
    **{
        f"combine {name}": lambda x, r=rule: pk.combine_advantages(*without_logprobs(x), rule=r)
        for name, rule in RULES.items()
    },
    "loss per sequence": lambda x: gradient({**x, "advantages": x["advantages"][:, 0]}),
    "combine per sequence": lambda x: pk.combine_advantages(x["advantages"][:, 0], x["mask"], normalize=True),
    "weights": lambda x: pk.pama_weights(x["advantages"]),
    "min-norm": lambda x: pk.min_norm_weights(x["advantages"].mT @ x["advantages"]),
    "upgrad": lambda x: pk.upgrad_weights(x["advantages"].mT @ x["advantages"]),
    "gae": lambda x: pk.multi_objective_gae(x["advantages"], x["advantages"].abs(), x["mask"]),
    "normalize": lambda x: pk.group_normalize(x["advantages"][:, 0], group_size=8),
    "whiten": lambda x: pk.masked_whiten(*without_logprobs(x)),
}
each_call = pytest.mark.parametrize("name", list(CALLS))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_gpu
def test_the_selected_backend_is_used() -> None:
    forced = os.environ.get("PAMA_BACKEND") or "triton"
    assert registry.find(DEVICE.type, "statistics").__name__ == f"pama_kernels.backends.{forced}"


@each_call
def test_same_bits_every_time(name: str) -> None:
    x = batch(0)
    first = flat(CALLS[name](x))
    assert all(torch.isfinite(y).all() for y in first)
    for _ in range(20 if ON_GPU else 2):
        assert same(flat(CALLS[name](x)), first)


@each_call
def test_later_calls_compute_on_their_own_tensors(name: str) -> None:
    """Triton repeats launches that it recorded with other tensors."""
    first = flat(CALLS[name](batch(5)))
    for seed in range(6, 12 if ON_GPU else 7):
        assert not same(flat(CALLS[name](batch(seed))), first)
    assert same(flat(CALLS[name](batch(5))), first)


@needs_gpu
@each_call
def test_no_call_synchronises_with_the_device(name: str) -> None:
    x = batch(1)
    CALLS[name](x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_new_preference_does_not_synchronise() -> None:
    scores = batch(1)["advantages"][0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = pk.pama_weights(scores, preference=[0.125, 0.5, 0.25, 0.125], regularization=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    preference = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64, device=DEVICE)
    wanted = pk.pama_weights(scores, preference=preference, regularization=0.1)
    assert torch.equal(found.weights, wanted.weights)


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_every_kernel_runs_once(case: str) -> None:
    """What compute-sanitizer watches, which then finds the kernels compiled."""
    script = Path(__file__).with_name("sanitized.py")
    environment = {**os.environ, "PAMA_TEST_DEVICE": DEVICE.type}
    command = [sys.executable, str(script), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_gpu
@each_call
def test_a_graph_replays_on_changed_inputs(name: str) -> None:
    x, other = batch(2), batch(3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            CALLS[name](x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(CALLS[name](x))
    for wanted_of in (other, batch(4), other):
        for key, value in wanted_of.items():
            x[key].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, flat(CALLS[name](wanted_of)))


@needs_gpu
@pytest.mark.parametrize(
    "name", ["statistics", "loss gram", "loss token", "combine scores", "loss per sequence"]
)
def test_streams_are_independent(name: str) -> None:
    inputs = [batch(seed, rows=256) for seed in range(4)]
    wanted = [flat(CALLS[name](x)) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[list[Tensor]]] = [[] for _ in inputs]
    for _ in range(25):
        for k, (x, stream) in enumerate(zip(inputs, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[k].append(flat(CALLS[name](x)))
    torch.cuda.synchronize()
    for k, found in enumerate(results):
        assert all(same(y, wanted[k]) for y in found)


@needs_gpu
def test_graphs_replay_side_by_side() -> None:
    """Captured on one stream, replayed on several at once: no counter is shared."""
    inputs = [batch(seed, rows=256) for seed in range(4)]
    wanted = [flat(CALLS["loss gram"](x)) for x in inputs]
    graphs, captured = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(flat(CALLS["loss gram"](x)))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_tensors_on_several_devices() -> None:
    x = batch(5)
    wanted = [y.cpu() for y in flat(CALLS["loss gram"](x))]
    with torch.cuda.device(0):
        moved = {name: y.to("cuda:1") for name, y in x.items()}
        found = flat(CALLS["loss gram"](moved))
        assert torch.cuda.current_device() == 0
    assert all(y.device.index == 1 for y in found)
    assert same([y.cpu() for y in found], wanted)


def test_more_than_2_31_tokens() -> None:
    """Multiples of 1/8 add up exactly in float64, so the sums are known to the last bit."""
    rows, width = 1000, LARGE // 1000
    if ON_GPU and torch.cuda.mem_get_info()[0] < 5 * LARGE:
        pytest.skip(f"needs {5 * LARGE >> 30} GiB of GPU memory")
    advantages = torch.empty(rows, width, 1, dtype=torch.bfloat16, device=DEVICE)
    total, square, positive = 0.0, 0.0, 0
    for row in advantages:  # in pieces: the whole would need many times the memory in float64
        row.copy_(torch.randint(-8, 9, row.shape, device=DEVICE, dtype=torch.int8))
        row.div_(8)
        kept = row.float().clamp(min=0)
        total += float(kept.sum(dtype=torch.float64))
        square += float(kept.square().sum(dtype=torch.float64))
        positive += int((row > 0).sum())
    found = pk.objective_statistics(None, None, advantages, noon=True)
    assert int(found.token_count) == LARGE
    assert float(found.scores[0]) == total / LARGE
    assert float(found.second_moments[0]) == square / LARGE
    assert float(found.positive_fraction[0]) == positive / LARGE
    # The last token alone, so that its place is known to be read.
    advantages.zero_()
    advantages[-1, -1] = 2.0
    assert float(pk.objective_statistics(None, None, advantages).buffer[1]) == 2.0


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
@pytest.mark.parametrize("name", ["gram", "upgrad", "token"])
def test_compiles_without_a_graph_break(name: str) -> None:
    def step(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        output = pk.pama_loss(logprobs, old_logprobs, advantages, mask, rule=RULES[name])
        return output.loss + output.weights.sum()

    x = batch(6, rows=4, width=32)
    x["logprobs"].requires_grad_()
    wanted = step(**x)
    (wanted_gradient,) = torch.autograd.grad(wanted, x["logprobs"])
    backend = "inductor" if ON_GPU else "aot_eager"
    found = torch.compile(step, fullgraph=True, backend=backend)(**x)
    (found_gradient,) = torch.autograd.grad(found, x["logprobs"])
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(found, wanted, rtol=4 * eps, atol=4 * eps)
    assert torch.allclose(found_gradient, wanted_gradient, rtol=4 * eps, atol=0)


@needs_gpu
@pytest.mark.parametrize(
    ("name", "launches"),
    [("fixed", 2), ("scores", 2), ("gram", 3), ("upgrad", 3)],  # statistics, the matrix problem, the loss
)
def test_launches_of_one_loss(name: str, launches: int) -> None:
    x = batch(7)
    call = lambda: pk.pama_loss(**x, rule=RULES[name])  # noqa: E731
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [
        event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert len(kernels) == launches, kernels


@needs_gpu
def test_settings_that_change_stay_on_the_device() -> None:
    """0-d tensors: neither read by the host nor a reason to compile again."""
    x = batch(8)
    wanted = flat(pk.pama_loss(**x, rule=pk.Pama(regularization=0.25), clip_range=0.3))
    number = lambda value: torch.tensor(value, device=DEVICE)  # noqa: E731
    regularization, clip_range = number(0.25), number(0.3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = flat(pk.pama_loss(**x, rule=pk.Pama(regularization=regularization), clip_range=clip_range))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # 0.3 rounded to float32
