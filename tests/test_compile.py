"""torch.compile: one graph, shapes may change, the same bits as eager; and the operators' contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pama_kernels as pk
from pama_kernels.backends import operators
from pama_kernels.backends.inputs import TokenInputs

# torch.compile's own: it makes an instance while it traces any autograd.Function.
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
)

N = 3


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _batch(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    old = normal(rows, width) - 2
    return {
        "logprobs": (old + 0.3 * normal(rows, width)).to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": normal(rows, width, N).to(dtype),
        "mask": torch.rand(rows, width, generator=generator) < 0.8,
    }


# None is 0 or 1, for which torch.compile makes graphs of their own, nor N, which would be ambiguous.
SHAPES = ((4, 6), (5, 9), (17, 2), (8, 130))


def _leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, pk.ObjectiveStatistics):
        return [result.buffer]
    if isinstance(result, dict):
        return [result[key] for key in sorted(result)]
    return [leaf for part in result for leaf in _leaves(part)]


def _equal(found: Any, wanted: Any) -> None:
    for x, y in zip(_leaves(found), _leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        assert x.requires_grad == y.requires_grad
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def _same_in_one_graph(
    function: Callable[..., Any], calls: list[dict[str, Any]], *, dynamic: bool | None = True
) -> None:
    """Compiled once for all calls, without a graph break, to the same bits as eager."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for call in calls:
        _equal(compiled(**call), function(**call))
        counts.append(counter.frame_count)
    _settled(counts, dynamic)


def _settled(counts: list[int], dynamic: bool | None) -> None:
    """No compilation after the first shapes; after the second ones where the compiler has to guess.

    The first call itself may count twice: the compiler starts again when it finds a float constant.
    """
    known = counts[0 if dynamic else 1 :]
    assert known == [known[0]] * len(known), f"compiled again: {counts}"


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("weights_per", ["batch", "sequence", "token"])
def test_loss_with_gradient(weights_per: str, dynamic: bool | None) -> None:
    def step(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        result = pk.pama_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            weights_per=weights_per,
            regularization=0.1,
            dual_clip=3.0,
            ref_logprobs=old_logprobs - 0.1,
            kl_coef=0.1,
            aggregation="seq-mean-token-mean",
        )
        return result.loss, result.weights, result.optimum, result.metrics(["a", "b", "c"])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for seed, shape in enumerate(SHAPES):
        x = _batch(*shape, seed)
        gradients = []
        results = []
        for function in (compiled, step):
            logprobs = x["logprobs"].clone().requires_grad_()
            results.append(function(**{**x, "logprobs": logprobs}))
            (results[-1][0] * 3).backward()
            gradients.append(logprobs.grad)
        _equal(*results)
        assert torch.equal(*gradients)
        counts.append(counter.frame_count)
    _settled(counts, dynamic)


@pytest.mark.parametrize("layout", ["per sequence", "flat", "packed", "flat rows"])
def test_loss_of_other_layouts(layout: str) -> None:
    def step(**arguments: Any) -> Any:
        result = pk.pama_loss(
            weights_per="batch" if "flat" in layout else "sequence", noon=False, prior=[1, 2, 3], **arguments
        )
        return result.loss, result.weights, result.metrics()

    calls = []
    for seed, (rows, width) in enumerate(SHAPES):
        x: dict[str, Any] = _batch(rows, width, seed)
        if layout == "per sequence":
            x["advantages"] = x["advantages"][:, 0]
            x["objective_mask"] = x["advantages"] > -1
        else:
            x = {name: value.flatten(0, 1) for name, value in x.items()}
        if layout == "packed":
            x["cu_seqlens"] = torch.arange(rows + 1) * width
        if layout == "flat rows":
            x["objective_mask"] = x["advantages"] > -1
        x["logprobs"].requires_grad_()
        calls.append(x)
    _same_in_one_graph(step, calls)


def test_one_tensor_in_two_places() -> None:
    """The behaviour policy is the reference of the KL term: the same tensor twice."""

    def step(logprobs: Tensor, old_logprobs: Tensor, **others: Tensor) -> Any:
        result = pk.pama_loss(
            logprobs, old_logprobs, **others, weights_per="batch", ref_logprobs=old_logprobs, kl_coef=0.1
        )
        return result[:3]

    x = _batch(4, 6)
    x["logprobs"].requires_grad_()
    _same_in_one_graph(step, [x])


def test_loss_with_optional_tensors() -> None:
    def step(**arguments: Any) -> Any:
        return pk.pama_loss(weights_per="batch", **arguments)[:3]

    calls = []
    for seed, shape in enumerate(SHAPES):
        x = _batch(*shape, seed, torch.bfloat16)
        x["importance_weights"] = x["logprobs"].exp()
        x["normalizer"] = torch.tensor(float(shape[0]))
        x["weights"] = torch.tensor([0.2, 0.3, 0.5])
        x["logprobs"].requires_grad_()
        calls.append(x)
    _same_in_one_graph(step, calls)


@pytest.mark.parametrize("weights_per", ["batch", "sequence", "token"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_combine_advantages(weights_per: str, dynamic: bool | None) -> None:
    def step(advantages: Tensor, mask: Tensor) -> Any:
        result = pk.combine_advantages(advantages, mask, weights_per=weights_per, regularization=0.1)
        return result.advantages, result.weights, result.optimum, result.statistics.conflict, result.metrics()

    calls = [
        {name: x[name] for name in ("advantages", "mask")}
        for x in (_batch(*shape, seed) for seed, shape in enumerate(SHAPES))
    ]
    _same_in_one_graph(step, calls, dynamic=dynamic)


def test_combine_advantages_per_sequence_with_logprobs() -> None:
    """Weights per token of per-sequence advantages depend on the ratio: (B, T) results."""

    def step(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        return pk.combine_advantages(
            advantages[:, 0],
            mask,
            weights_per="token",
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            clip_range=(0.2, 0.3),
        )[:3]

    _same_in_one_graph(step, [_batch(*shape, seed) for seed, shape in enumerate(SHAPES)])


@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_pama_weights(regularization: float) -> None:
    def step(scores: Tensor) -> Any:
        return pk.pama_weights(scores, regularization=regularization, prior=[1, 2, 3])

    _same_in_one_graph(step, [{"scores": torch.randn(rows, N)} for rows, _ in SHAPES])


def test_pama_weights_with_tensors_as_settings() -> None:
    def step(scores: Tensor, prior: Tensor, scale: Tensor) -> Any:
        return pk.pama_weights(scores, regularization=0.1, prior=prior, scale=scale)

    prior = torch.tensor([0.25, 0.25, 0.5])
    _same_in_one_graph(
        step,
        [{"scores": torch.randn(rows, N), "prior": prior, "scale": torch.rand(rows)} for rows, _ in SHAPES],
    )


def test_min_norm_weights() -> None:
    def step(gram: Tensor) -> Any:
        solution = pk.min_norm_weights(gram, regularization=0.1, prior=[1, 2, 3])
        return *solution, pk.pareto_gap(gram, solution.weights)

    factors = [torch.randn(rows, N, N) for rows, _ in SHAPES]
    _same_in_one_graph(step, [{"gram": factor @ factor.mT} for factor in factors])


@pytest.mark.parametrize("gram", [False, True])
def test_objective_statistics(gram: bool) -> None:
    def step(**arguments: Any) -> Any:
        statistics = pk.objective_statistics(**arguments, gram=gram)
        merged = statistics + statistics
        return statistics.buffer, merged.buffer, merged.scores, merged.metrics()

    _same_in_one_graph(step, [_batch(*shape, seed) for seed, shape in enumerate(SHAPES)])


def test_statistics_returned_as_they_are() -> None:
    def step(**arguments: Any) -> Any:
        return pk.objective_statistics(**arguments, gram=True)

    _same_in_one_graph(step, [_batch(*shape, seed) for seed, shape in enumerate(SHAPES)])


def test_multi_objective_gae() -> None:
    def step(rewards: Tensor, values: Tensor, **others: Tensor) -> Any:
        return pk.multi_objective_gae(rewards, values, gamma=0.9, **others)

    calls = []
    for rows, width in SHAPES:
        calls.append(
            {
                "rewards": torch.randn(rows, width, N),
                "values": torch.randn(rows, width, N),
                "mask": torch.rand(rows, width) < 0.7,
                "dones": torch.rand(rows, width) < 0.2,
                "last_values": torch.randn(rows, N),
            }
        )
    _same_in_one_graph(step, calls)


@pytest.mark.parametrize("how", ["size", "ids", "all"])
def test_group_normalize(how: str) -> None:
    def step(rewards: Tensor, group_ids: Tensor | None = None) -> Any:
        return pk.group_normalize(rewards, group_size=2 if how == "size" else None, group_ids=group_ids)

    calls: list[dict[str, Any]] = []
    for rows in (4, 6, 18):
        rewards = torch.randn(rows, N)
        rewards[1, 0] = float("nan")
        calls.append({"rewards": rewards})
        if how == "ids":
            calls[-1]["group_ids"] = torch.randint(-3, 3, (rows,))
    _same_in_one_graph(step, calls)


@pytest.mark.parametrize("what", ["combine", "loss", "weights", "statistics", "gae", "normalize"])
def test_nothing_but_logprobs_is_differentiable(what: str) -> None:
    """Inputs that require gradients (values of a value head) give results that don't, as in eager."""
    x = _batch(4, 6)

    def step(y: Tensor) -> Any:
        return {
            "combine": lambda: pk.combine_advantages(y, weights_per="batch")[:3],
            "loss": lambda: pk.pama_loss(x["logprobs"], y[..., 0], y, weights_per="batch")[:3],
            "weights": lambda: pk.pama_weights(y),
            "statistics": lambda: pk.objective_statistics(None, None, y).buffer,
            "gae": lambda: pk.multi_objective_gae(y, y),
            "normalize": lambda: pk.group_normalize(y[:, 0]),
        }[what]()

    y = x["advantages"].requires_grad_()
    _equal(torch.compile(step, fullgraph=True, backend="aot_eager")(y), step(y))


def test_no_grad_and_modules() -> None:
    module = pk.PamaLoss(weights_per="batch", regularization=0.1)
    x = _batch(4, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _equal(compiled(**x)[:3], module(**x)[:3])
    x["logprobs"].requires_grad_()
    _equal(compiled(**x)[:3], module(**x)[:3])


def test_module_with_momentum() -> None:
    """The running mean is updated inside the graph, too."""
    eager, compiled = (pk.PamaLoss(weights_per="batch", momentum=0.9, regularization=0.1) for _ in range(2))
    first = _batch(4, 6)
    for module in (eager, compiled):
        module(**first)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, shape in enumerate(SHAPES):
        x = _batch(*shape, seed)
        _equal(step(**x)[:3], eager(**x)[:3])
    assert eager.batches == compiled.batches == 1 + len(SHAPES)
    torch.testing.assert_close(eager.running_statistics, compiled.running_statistics, rtol=1e-12, atol=0)


def test_module_with_momentum_from_the_first_batch() -> None:
    eager, compiled = (pk.PamaLoss(weights_per="batch", momentum=0.9) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in range(3):
        x = _batch(4, 6, seed)
        _equal(step(**x)[:3], eager(**x)[:3])
    assert compiled.batches == 3


def test_bad_input_raises_while_compiling() -> None:
    def step(advantages: Tensor) -> Any:
        return pk.combine_advantages(advantages, weights_per="tokens").advantages

    with pytest.raises(Exception, match=r"weights_per|ValueError"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(torch.ones(2, 3, 4))


def test_inductor() -> None:
    """The default backend, with the trainer's own code around the loss in the same graph."""

    def step(logits: Tensor, actions: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        combined = pk.combine_advantages(advantages, mask, weights_per="batch", regularization=0.1)
        loss = pk.pama_loss(logprobs, None, advantages, mask, weights_per="batch", weights=combined.weights)
        return loss.loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows, width in SHAPES[:2]:
        x = _batch(rows, width)
        logits = torch.randn(rows, width, 5, requires_grad=True)
        arguments = (torch.randint(5, (rows, width)), x["advantages"], x["mask"])
        found = torch.autograd.grad(compiled(logits, *arguments), logits)[0]
        wanted = torch.autograd.grad(step(logits, *arguments), logits)[0]
        # The softmax is fused, and rounds differently.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# --- the operators -----------------------------------------------------------------------------------


def _prior(n: int = N) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def _rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    x = _batch(rows, width, dtype=dtype)
    return [x["logprobs"], x["old_logprobs"], x["advantages"], x["mask"]]


def _strided(rows: int, width: int) -> list[Any]:
    logprobs, old, advantages, mask = _rows(rows, width)
    return [
        logprobs.T.contiguous().T,
        old.repeat(1, 2)[:, :width],
        advantages.movedim(-1, 0).contiguous().movedim(0, -1),
        mask[:1].expand(rows, width),
    ]


CLIP = [0.2, 0.3, 5.0]
OFFSETS = torch.tensor([0, 4, 4, 12], dtype=torch.int32)


def _inputs(x: Sequence[Any], layout: list[int], noon: bool = True, **rest: Any) -> TokenInputs:
    optional = dict.fromkeys(("objective_mask", "importance_weights", "ref_logprobs", "cu_seqlens"))
    return TokenInputs(*x, **{**optional, **rest}, layout=layout, clip=CLIP, noon=noon)


def _statistics_samples() -> Iterator[tuple[Any, ...]]:
    for x in (_rows(4, 6), _rows(0, 6), _rows(4, 0), _strided(4, 6), _rows(2, 3, torch.bfloat16)):
        shape = list(x[0].shape)
        present = {"objective_mask": torch.ones(shape[0], N).bool(), "importance_weights": x[1]}
        yield *_inputs(x, [*shape, 0, 0]), False
        yield *_inputs(x, [*shape, 0, 1], False, **present), True
        yield *_inputs([*x[:2], x[2][:, :1].sum(1), x[3]], [*shape, 1, 0]), True
    flat = [y.flatten(0, 1) for y in _rows(2, 6)]
    packed = {"cu_seqlens": OFFSETS}
    yield *_inputs(flat, [3, 12, 0, 0], **packed), True
    yield *_inputs([None, None, flat[2], None], [1, 12, 0, 0]), False
    yield *_inputs([None, None, flat[2][:3], None], [3, -1, 1, 0], **packed), False


def _combine_samples() -> Iterator[tuple[Any, ...]]:
    for x in (_rows(4, 6), _rows(0, 6), _rows(4, 0), _strided(4, 6), _rows(2, 3, torch.float64)):
        shape = list(x[0].shape)
        tokens = _inputs(x, [*shape, 0, 0])
        for code in (1, 2, 3, 4):
            yield *tokens, None, _prior(), code, True, 0.1, None, True
        for given in (torch.rand(shape[0], N), torch.rand(N)):
            yield *tokens._replace(noon=False), given, _prior(), 0, True, 0.0, None, False
        rows = _inputs([*x[:2], x[2][:, :1].sum(1), x[3]], [*shape, 1, 0])
        yield *rows, None, _prior(), 3, True, 0.1, None, True
        yield *rows, None, _prior(), 4, True, 0.1, shape, True


def _loss_samples() -> Iterator[tuple[Any, ...]]:
    for x in (_rows(4, 6), _rows(0, 6), _rows(4, 0), _strided(4, 6), _rows(2, 3, torch.float16)):
        shape = list(x[0].shape)
        tokens = _inputs(x, [*shape, 0, 0])
        for code in (1, 2, 3, 4):
            for need in (True, False):
                yield *tokens, None, None, _prior(), code, True, 0.1, 0, -1.0, 0.0, need
        more = tokens._replace(noon=False, importance_weights=x[1], ref_logprobs=x[1])
        rest = (_prior(), 0, True, 0.0, 2, -1.0, 0.2, True)
        yield *more, torch.rand(N), torch.tensor(3.0).double(), *rest
        yield *more, torch.rand(shape[0], N), None, *rest
    flat = [y.flatten(0, 1) for y in _rows(2, 6)]
    packed = _inputs(flat, [3, 12, 0, 0], cu_seqlens=OFFSETS)
    yield *packed, None, None, _prior(), 3, True, 0.1, 1, -1.0, 0.0, True


def _batch_weights_samples() -> Iterator[tuple[Any, ...]]:
    for gram in (False, True):
        sums = pk.objective_statistics(**_batch(4, 6), gram=gram).buffer
        for wide in (False, True):
            yield sums, N, gram, _prior(), 0.1, wide


def _weights_samples() -> Iterator[tuple[Any, ...]]:
    for scores in (
        torch.randn(N),
        torch.randn(4, N),
        torch.randn(2, 3, N, dtype=torch.float64),
        torch.randn(0, N),
        torch.randn(2, 0, N),
        torch.randn(N, 5).T,
        torch.randn(1, N).expand(4, N),
        torch.randn(4, N).bfloat16(),
        torch.randn(4, 2 * N)[:, ::2],
    ):
        yield scores, _prior(), True, 0.0, None
        yield scores, _prior(), True, 0.1, None
        yield scores, _prior(), False, 0.1, torch.tensor(2.0).double()
        yield scores, _prior(), False, 0.1, torch.rand(scores.shape[:-1])
    yield torch.randn(3, 300), _prior(300), True, 0.1, None


def _gae_samples() -> Iterator[tuple[Any, ...]]:
    for rows, width in ((3, 5), (0, 5), (3, 0), (1, 1)):
        x, y = torch.randn(2, rows, width, N)
        yield x, y, None, None, None, 1.0, 0.95
        yield x, y.bfloat16(), torch.rand(rows, width) < 0.5, None, torch.randn(rows, N), 0.9, 0.95
        yield x.double(), y, None, torch.rand(rows, width) < 0.5, torch.randn(rows, N), 0.9, 0.5
        strided = x.movedim(-1, 0).contiguous().movedim(0, -1)
        yield strided, strided, torch.ones(rows, width).int(), None, None, 0.9, 0.5
        yield x.half(), y.half(), None, None, None, 0.9, 0.5


def _group_normalize_samples() -> Iterator[tuple[Any, ...]]:
    for x in (
        torch.randn(6, N),
        torch.randn(0, N),
        torch.randn(N, 6).T,
        torch.randn(6, 2 * N)[:, ::2],
        torch.randn(1, N).expand(6, N),
        torch.randn(6, N).bfloat16(),
        torch.randn(6, N).double(),
    ):
        rows = x.shape[0]
        yield x, rows, None, True, 1e-4
        yield x, 2, None, False, 1e-4
        yield x, rows, torch.arange(rows) % 2, True, 0.0


def _min_norm_samples() -> Iterator[tuple[Any, ...]]:
    for rows in ((), (4,), (2, 3), (0,)):
        for dtype in (torch.float32, torch.float64):
            factor = torch.randn(*rows, N, N + 1, dtype=dtype)
            gram = factor @ factor.mT
            for regularization in (0.0, 0.1):
                yield gram, _prior(), regularization
                yield gram.mT, _prior(), regularization


SAMPLES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "statistics": _statistics_samples,
    "batch_weights": _batch_weights_samples,
    "combine": _combine_samples,
    "loss": _loss_samples,
    "weights": _weights_samples,
    "min_norm": _min_norm_samples,
    "gae": _gae_samples,
    "group_normalize": _group_normalize_samples,
}


def test_every_operator_has_samples() -> None:
    assert set(SAMPLES) == set(operators.SCHEMAS)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.pama, name).default
    for sample in SAMPLES[name]():
        torch.library.opcheck(
            operator, sample, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_dynamic(name: str) -> None:
    """Slower: every third sample."""
    operator = getattr(torch.ops.pama, name).default
    for sample in list(SAMPLES[name]())[::3]:
        torch.library.opcheck(operator, sample, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_and_direct_call_agree(name: str) -> None:
    operator = getattr(torch.ops.pama, name).default
    for sample in SAMPLES[name]():
        found, wanted = operator(*sample), getattr(operators, name)(*sample)
        _equal(found, wanted)
        for x, y in zip(_leaves(found), _leaves(wanted), strict=True):
            assert x.stride() == y.stride()
