"""torch.compile, export, tracing, function transforms: one graph for all shapes, the bits of eager mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_table import CALLS, EVERY, SHAPES, N, Tensors, assert_same, leaves, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pama_kernels as pk
from pama_kernels.backends import arguments, operators

# torch.compile's own: it makes an instance while it traces any autograd.Function.
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
)
OPERATORS = ("statistics", "solve", "apply", "weights", "min_norm", "upgrad", "gae", "group_normalize")
every_call = pytest.mark.parametrize("name", EVERY)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _with_gradient(tensors: Tensors) -> Tensors:
    return {k: v.requires_grad_() if k in ("logprobs", "values") else v for k, v in tensors.items()}


# --- torch.compile -----------------------------------------------------------------------------------


def one_graph(function: Callable[..., Any], calls: list[Tensors], dynamic: bool | None = True) -> None:
    """Compiled once for all calls, without a graph break, to the bits of eager mode, gradients included."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for call in calls:
        found, wanted = compiled(**call), function(**call)
        assert_same(found, wanted)
        loss = leaves(found)[0]
        if loss.requires_grad:
            gradients = [torch.autograd.grad(3 * leaves(r)[0], call["logprobs"]) for r in (found, wanted)]
            assert_same(*gradients)
        counts.append(counter.frame_count)
    # the compiler may guess once that a size is fixed
    assert counts[-1] == counts[0 if dynamic else 1], f"compiled again: {counts}"


@every_call
def test_one_graph_for_all_shapes(name: str) -> None:
    one_graph(EVERY[name].run, [_with_gradient(EVERY[name].tensors(*shape)) for shape in SHAPES])


@pytest.mark.parametrize("name", ["pama_loss", "combine_advantages", "pama_weights"])
def test_data_dependent_shapes(name: str) -> None:
    one_graph(EVERY[name].run, [_with_gradient(EVERY[name].tensors(*shape)) for shape in SHAPES], None)


def test_one_tensor_in_two_places() -> None:
    """The behaviour policy is the reference of the KL term."""

    def step(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Any:
        return pk.pama_loss(logprobs, old_logprobs, advantages, ref_logprobs=old_logprobs, kl_coef=0.1)[:3]

    x = tokens(4, 6)
    one_graph(step, [_with_gradient({k: x[k] for k in ("logprobs", "old_logprobs", "advantages")})])


def test_modules() -> None:
    """The running mean is updated inside the graph, too, from the first batch on."""
    eager, compiled = (pk.PamaLoss(momentum=0.9, objectives=N) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=True)
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    for shape in SHAPES:
        x = _with_gradient({k: v for k, v in tokens(*shape).items() if k in names})
        assert_same(step(**x)[:3], eager(**x)[:3])
    assert eager.batches == compiled.batches == len(SHAPES)
    # sums of the same numbers in the order that the compiler chooses
    torch.testing.assert_close(eager.running_statistics, compiled.running_statistics, rtol=1e-12, atol=0)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.tensor(2.0))[0],
    "grad_and_value": lambda f: lambda x: torch.func.grad_and_value(f)(x)[0],
    "of a product": lambda f: torch.func.grad(lambda x: f(3 * x)),
}


def _loss_of_logprobs(x: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda logprobs: pk.pama_loss(logprobs, x["old_logprobs"], x["advantages"], x["mask"]).loss


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_gradients(name: str) -> None:
    """The compiler does not know that an argument of torch.func.grad is differentiated."""
    x = tokens(4, 6)
    transformed = TRANSFORMS[name](_loss_of_logprobs(x))
    wanted = transformed(x["logprobs"])
    assert wanted.any()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x["logprobs"]), wanted)


def test_functional_forward_mode_is_an_error() -> None:
    x = tokens(4, 6)

    def tangent(logprobs: Tensor) -> Tensor:
        return torch.func.jvp(_loss_of_logprobs(x), (logprobs,), (logprobs,))[1]

    with pytest.raises(NotImplementedError, match=r"pama_loss: forward-mode .* use reverse mode"):
        torch.compile(tangent, backend="aot_eager")(x["logprobs"])


def test_bad_input_raises_while_compiling() -> None:
    step = torch.compile(
        lambda x: pk.combine_advantages(x, rule="wrong")[0], fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"rule|ValueError"):
        step(torch.ones(2, 3, 4))


@pytest.mark.slow
def test_inductor() -> None:
    """The default backend, with the trainer's own code around the loss in the same graph."""

    def step(logits: Tensor, actions: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        combined = pk.combine_advantages(advantages, mask)
        return pk.pama_loss(logprobs, None, advantages, mask, weights=combined.weights).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows, width in SHAPES[:2]:
        x = tokens(rows, width)
        logits = torch.randn(rows, width, 5, requires_grad=True)
        arguments = (torch.randint(5, (rows, width)), x["advantages"], x["mask"])
        found = torch.autograd.grad(compiled(logits, *arguments), logits)[0]
        wanted = torch.autograd.grad(step(logits, *arguments), logits)[0]
        # the softmax is fused, and rounds differently
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# --- torch.export ------------------------------------------------------------------------------------


class _Module(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.run = EVERY[name].run

    def forward(self, **x: Tensor) -> list[Tensor]:
        return leaves(self.run(**x))[:2]  # without figures that take long to compile


@pytest.mark.parametrize(
    "name", ["pama_loss, bare", *(pytest.param(name, marks=pytest.mark.slow) for name in CALLS)]
)
def test_a_package_of_ahead_of_time_inductor_loads(name: str, tmp_path: Path) -> None:
    """For a server without Python. An operator with an infinite argument would not load."""
    module, x = _Module(name), EVERY[name].tensors(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on the way
        exported = torch.export.export(module, (), kwargs=x)
        assert_same(exported.module()(**x), module(**x))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{tmp_path}/module.pt2")
        loaded = torch._inductor.aoti_load_package(package)
    for found, wanted in zip(loaded(**x), module(**x), strict=True):
        # figures that follow from the statistics are fused: a few roundings
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


# --- other recorders ---------------------------------------------------------------------------------


def _plain(name: str, shape: tuple[int, int] = (4, 6), shift: float = 0.0) -> Tensors:
    tensors = EVERY[name].tensors(*shape)
    return {k: v + shift if v.is_floating_point() and v.dim() > 1 else v for k, v in tensors.items()}


@every_call
def test_make_fx_and_functionalize(name: str) -> None:
    run, x, y = EVERY[name].run, _plain(name), _plain(name, shift=0.25)
    keys = list(x)

    def flat(*values: Tensor) -> list[Tensor]:
        return leaves(run(**dict(zip(keys, values, strict=True))))

    if "gram" not in x and "packed" not in name:
        graph = make_fx(flat)(*x.values())
        assert_same(graph(*y.values()), flat(*y.values()))
    assert_same(torch.func.functionalize(flat)(*y.values()), flat(*y.values()))


@every_call
def test_jit_trace_is_right_or_an_error(name: str) -> None:
    """Used by the older ONNX exporter and by TensorBoard. Uninitialized memory would be recorded."""
    run, x, y = EVERY[name].run, _plain(name), _plain(name, shift=0.25)
    keys = list(x)

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaves(run(**dict(zip(keys, values, strict=True)))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(flat, tuple(x.values()), check_trace=False)
        except RuntimeError:
            return
        if "gram" in x:  # shifted, it would not be semidefinite
            y = x
        assert_same(traced(*y.values()), flat(*y.values()))


@every_call
def test_fake_tensors(name: str) -> None:
    """Shapes and dtypes equal those of real results, and no cache keeps a fake tensor."""
    x = EVERY[name].tensors(4, 6)
    with FakeTensorMode() as mode:
        fake = leaves(EVERY[name].run(**{k: mode.from_tensor(v) for k, v in x.items()}))
    real = leaves(EVERY[name].run(**x))
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]
    assert all(type(r) is Tensor for r in real)


@every_call
def test_meta_tensors(name: str) -> None:
    """Shapes without memory, as for a dry run of a model that does not fit."""
    x = _with_gradient(EVERY[name].tensors(4, 6))
    on_meta = {k: v.detach().to("meta").requires_grad_(v.requires_grad) for k, v in x.items()}
    meta = leaves(EVERY[name].run(**on_meta))
    real = leaves(EVERY[name].run(**x))
    assert all(m.is_meta for m in meta)
    assert [(m.shape, m.dtype, m.stride()) for m in meta] == [(r.shape, r.dtype, r.stride()) for r in real]
    for found in meta:
        if found.requires_grad:
            found.backward()  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name, call in EVERY.items() if call.batched])
def test_vmap_is_a_loop(name: str) -> None:
    call, x = EVERY[name], EVERY[name].tensors(4, 6)
    values = torch.stack([x[call.batched], x[call.batched].flip(0)])

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaves(call.run(**{**x, call.batched: value})))

    wanted = [torch.stack(parts) for parts in zip(*map(run, values), strict=True)]
    assert_same(torch.func.vmap(run)(values), wanted)


# --- the operators -----------------------------------------------------------------------------------


def _variants() -> Iterator[tuple[Callable[..., Any], Tensors]]:
    """All calls, on other layouts, dtypes and sizes, too."""
    for call in EVERY.values():
        x = call.tensors(4, 6)
        yield call.run, x
        strided = {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in x.items()}
        yield call.run, strided
        for dtype in (torch.float64, torch.bfloat16):
            yield call.run, {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}
        if call.batched and "loss" not in str(call.run):
            yield call.run, call.tensors(0, 6)
            yield call.run, call.tensors(4, 0)


@pytest.fixture(scope="module")
def samples() -> dict[str, list[tuple[Any, ...]]]:
    """What the table's calls hand to each operator."""
    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in OPERATORS}
    patch = pytest.MonkeyPatch()
    for quick in ("quick_weights", "quick_min_norm", "quick_upgrad"):
        patch.setattr(operators, quick, lambda *_: None)
    patch.setattr(operators, "_direct", lambda records: False)
    for name in OPERATORS:
        operator = getattr(operators, name)

        def record(*arguments: Any, real: Any = operator.operator, name: str = name) -> Any:
            found[name].append(tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments))
            return real(*arguments)

        patch.setattr(operator, "operator", record)
    for run, x in _variants():
        run(**x)
    patch.undo()
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, samples: dict[str, list[tuple[Any, ...]]]) -> None:
    operator = getattr(torch.ops.pama, name).default
    assert samples[name]
    for i, sample in enumerate(samples[name]):
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if i % 8 == 0:
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, sample, test_utils=checks)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_direct_call_agree(name: str, samples: dict[str, list[tuple[Any, ...]]]) -> None:
    operator = getattr(operators, name)
    for sample in samples[name]:
        records = arguments.records_of(operator.records, sample)
        direct = operators._plain_tuple(operator(*records), records)
        found, wanted = leaves(operator.operator(*sample)), leaves(direct)
        assert_same(found, wanted)
        assert [x.stride() for x in found] == [x.stride() for x in wanted]


def test_every_operator_is_known() -> None:
    made = {name for name, value in vars(operators).items() if isinstance(value, operators._Operator)}
    assert made == set(OPERATORS)
