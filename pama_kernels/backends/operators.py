"""The operators `torch.ops.pama.*`: definition, fake kernels, allocation of the results, and dispatch.

In eager mode a call on plain tensors calls the backend directly. Calls that torch's dispatcher must transform
go through the operator: tracing (torch.compile, make_fx, torch.jit.trace), tensor subclasses, functorch's
wrappers, negated views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from pama_kernels._call import (
    Outputs,
    Results,
    Rule,
    Tokens,
    gradient_dtype,
    one_result_per_row,
    result_dtype,
    statistics_size,
    weights_by_row,
)
from pama_kernels._validate import traced

from .arguments import (
    KINDS,
    TENSORS,
    Apply,
    Gae,
    GroupNormalize,
    MinNorm,
    Solve,
    Statistics,
    UPGrad,
    Weights,
    flat,
    records_of,
    schema,
)
from .native import NoMemory
from .registry import Functions, Solution, find

_LIBRARY: Any = torch.library.Library("pama", "DEF")  # type: ignore[no-untyped-call]

# --- fake kernels -------------------------------------------------------------------------------------


def _fake_statistics(tokens: Tokens, asked: Statistics) -> Tensor:
    return tokens.advantages.new_empty(statistics_size(tokens.objectives, asked.pairs), dtype=torch.float64)


def _fake_solve(problem: Solve, rule: Rule) -> tuple[Tensor, ...]:
    sums, n = problem.sums, problem.objectives
    return sums.new_empty(n), sums.new_empty(()), sums.new_empty(n)


def _fake_apply(tokens: Tokens, rule: Rule, problem: Apply, outputs: Outputs) -> Results:
    return empty_results(tokens, rule, problem.weights, outputs)


def _empty_weights(problem: Weights) -> Solution:
    scores, dtype = problem.scores, result_dtype(problem.scores)
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)


def _empty_solution(problem: MinNorm | UPGrad) -> Solution:
    gram, dtype = problem.gram, result_dtype(problem.gram)
    return gram.new_empty(gram.shape[:-1], dtype=dtype), gram.new_empty(gram.shape[:-2], dtype=dtype)


def _fake_gae(problem: Gae) -> tuple[Tensor, Tensor]:
    rewards, dtype = problem.rewards, torch.promote_types(problem.rewards.dtype, problem.values.dtype)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _fake_group_normalize(problem: GroupNormalize) -> Tensor:
    return problem.rewards.new_empty(problem.rewards.shape)


# A shared placeholder for results that were not requested: an allocation costs as much as a launch.
NOTHING = torch.empty(0, device="cpu")


def dtype_of_results(tokens: Tokens, outputs: Outputs) -> torch.dtype:
    """The dtype of weights, optimum and loss."""
    logprobs = None if outputs.advantages else tokens.logprobs
    return result_dtype(tokens.advantages if logprobs is None else logprobs)


def empty_loss(tokens: Tokens, outputs: Outputs, like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the loss, like a 0-d tensor, and its gradient."""
    loss = torch.empty_like(like) if outputs.loss else NOTHING
    if not outputs.gradient:
        return loss, NOTHING
    source = tokens.advantages if tokens.logprobs is None else tokens.logprobs
    kind = gradient_dtype(source)
    return loss, torch.empty_like(source, dtype=kind, memory_format=torch.contiguous_format)


def empty_results(tokens: Tokens, rule: Rule, weights: Tensor | None, outputs: Outputs) -> Results:
    """Allocates the results of `apply`."""
    advantages, n = tokens.advantages, tokens.objectives
    # Each of these is the fastest way to make its tensor; a torch.Size as argument costs as much as a tensor.
    optimum = torch.empty_strided((), (), dtype=dtype_of_results(tokens, outputs), device=advantages.device)
    combined = square_sum = NOTHING
    if outputs.advantages:
        per_token = tokens.per_sequence and not one_result_per_row(tokens, rule)
        shape = tokens.logprobs.shape if per_token and tokens.logprobs is not None else advantages.shape[:-1]
        combined = advantages.new_empty(*shape)
        square_sum = torch.empty_like(optimum, dtype=torch.float64)
    loss, gradient = empty_loss(tokens, outputs, optimum)
    sums = optimum.new_empty(statistics_size(n, outputs.pairs), dtype=torch.float64)
    if weights_by_row(rule, weights):
        given, optimum = optimum.new_empty(tokens.rows, n), optimum.new_empty(tokens.rows)
    else:
        given = optimum.new_empty(n)
    return Results(combined, loss, gradient, given, optimum, sums, square_sum)


def _without_nothing(results: Results, tokens: Tokens) -> Results:
    """Replaces shared placeholders by new tensors, since the results of an operator must not share memory."""
    like = tokens.advantages if tokens.logprobs is None else tokens.logprobs
    dtypes = {
        "advantages": tokens.advantages.dtype,
        "loss": result_dtype(like),
        "gradient": gradient_dtype(like),
        "square_sum": torch.float64,
    }
    missing = [name for name in dtypes if getattr(results, name) is NOTHING]
    return results._replace(**{name: like.new_empty(0, dtype=dtypes[name]) for name in missing})


# --- definition and dispatch --------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Operator(Generic[_P, _R]):
    """One operator. Called with its records, it calls the backend directly or through `torch.ops.pama`."""

    def __init__(
        self,
        name: str,
        records: tuple[Any, ...],
        returns: str,
        fake: Callable[_P, object],
        call: Callable[Concatenate[Functions, _P], _R],
        wrap: Callable[..., _R] | None = None,
    ) -> None:
        self.name, self.records, self.call, self.wrap = name, records, call, wrap
        self.numbers = tuple(
            (i, j)
            for i, record in enumerate(records)
            for j, kind in enumerate(KINDS[record])
            if kind.startswith("Number")
        )
        compute: Callable[..., object] = call
        shape_only: Callable[..., object] = fake

        def run(*arguments: Any) -> object:
            unpacked: Any = records_of(records, arguments)
            return _plain_tuple(compute(self.backend(unpacked), *unpacked), unpacked)

        def fake_run(*arguments: Any) -> object:
            unpacked: Any = records_of(records, arguments)
            return _plain_tuple(shape_only(*unpacked), unpacked)

        _LIBRARY.define(name + schema(records, returns), tags=(torch.Tag.needs_exact_strides,))
        _LIBRARY.impl(name, run, "CPU")
        _LIBRARY.impl(name, run, "CUDA")
        # No result has a gradient here; `_autograd._Loss` attaches that of the loss.
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"pama::{name}", fake_run, lib=_LIBRARY)
        self.operator = getattr(torch.ops.pama, name).default

    def backend(self, records: Sequence[Any]) -> Functions:
        first: Tensor = records[0][0]
        if first.is_cpu:
            return find("cpu", self.name)
        tensors = any(isinstance(records[i][j], Tensor) for i, j in self.numbers)
        return find(first.device.type, self.name, tensors)

    def __call__(self, *records: _P.args, **none: _P.kwargs) -> _R:
        if traced() or not _direct(records):
            return self._through_operator(records)
        try:
            return self.call(self.backend(records), *records, **none)
        except (NoMemory, RuntimeError) as error:
            # A wrapped tensor, as in torch.vmap and functionalize: the dispatcher unwraps it. For tensors on
            # the meta device it has the fake kernels.
            if not (isinstance(error, NoMemory) or _is_wrapped(str(error)) or _is_meta(records)):
                raise
            return self._through_operator(records)

    def _through_operator(self, records: Sequence[Any]) -> _R:
        result = self.operator(*flat(*records))
        wrapped: _R = result if self.wrap is None else self.wrap(*result)
        return wrapped


def _plain_tuple(result: object, records: Sequence[Any]) -> object:
    if isinstance(result, Results):
        result = _without_nothing(result, records[0])
    return tuple(result) if isinstance(result, tuple) else result


def _is_wrapped(message: str) -> bool:
    return "data pointer" in message or "access storage" in message


def _is_meta(records: Sequence[Any]) -> bool:
    return bool(records[0][0].is_meta)


def _direct(records: Sequence[Any]) -> bool:
    """Whether a backend can read the memory of every tensor as it is."""
    for record in records:
        for x in TENSORS[type(record)](record):
            if x is None or type(x) is float:
                continue
            if type(x) in _PLAIN:
                if x.is_neg():
                    return False
            elif isinstance(x, Tensor):
                return False
    return True


def _statistics(backend: Functions, tokens: Tokens, asked: Statistics) -> Tensor:
    return backend.statistics(tokens, asked.pairs)


def _solve(backend: Functions, problem: Solve, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    return backend.solve(problem.sums, rule, problem.preference, problem.objectives)


def _apply(backend: Functions, tokens: Tokens, rule: Rule, problem: Apply, outputs: Outputs) -> Results:
    return backend.apply(tokens, rule, problem.preference, problem.weights, outputs)


def _weights(backend: Functions, problem: Weights) -> Solution:
    result = _empty_weights(problem)
    backend.weights(*problem, *result)
    return result


def _min_norm(backend: Functions, problem: MinNorm) -> Solution:
    result = _empty_solution(problem)
    backend.min_norm(*problem, *result)
    return result


def _upgrad(backend: Functions, problem: UPGrad) -> Solution:
    result = _empty_solution(problem)
    backend.upgrad(*problem, *result)
    return result


def _gae(backend: Functions, problem: Gae) -> tuple[Tensor, Tensor]:
    return backend.gae(problem)


def _group_normalize(backend: Functions, p: GroupNormalize) -> Tensor:
    return backend.group_normalize(p.rewards, p.group_size, p.group_ids, p.scale, float(p.eps))


_PAIR = "(Tensor, Tensor)"
_SEVEN = "(" + ", ".join("Tensor" for _ in Results._fields) + ")"
statistics = _Operator("statistics", (Tokens, Statistics), "Tensor", _fake_statistics, _statistics)
solve = _Operator("solve", (Solve, Rule), "(Tensor, Tensor, Tensor)", _fake_solve, _solve)
apply = _Operator("apply", (Tokens, Rule, Apply, Outputs), _SEVEN, _fake_apply, _apply, Results)
weights = _Operator("weights", (Weights,), _PAIR, _empty_weights, _weights)
min_norm = _Operator("min_norm", (MinNorm,), _PAIR, _empty_solution, _min_norm)
upgrad = _Operator("upgrad", (UPGrad,), _PAIR, _empty_solution, _upgrad)
gae = _Operator("gae", (Gae,), _PAIR, _fake_gae, _gae)
group_normalize = _Operator(
    "group_normalize", (GroupNormalize,), "Tensor", _fake_group_normalize, _group_normalize
)


# --- whole calls for plain tensors and default options --------------------------------------------------


def _quick(name: str) -> Callable[[Tensor, float], Solution | None]:
    """The CPU backend's fast path for a plain tensor; it returns None for inputs that it does not handle."""
    on_cpu: Any = None

    def call(x: Tensor, regularization: float) -> Solution | None:
        nonlocal on_cpu
        if (
            type(x) is not Tensor
            or not x.is_cpu
            or traced()
            or x.is_neg()
            or not math.isfinite(regularization)
        ):
            return None
        if on_cpu is None:
            on_cpu = getattr(find("cpu", name.removeprefix("quick_")), name, lambda *_: None)
        try:
            solution: Solution | None = on_cpu(x, regularization, torch.get_num_threads())
        except Exception:
            return None  # the validating path then raises an error that names the argument
        return solution

    return call


quick_weights = _quick("quick_weights")
quick_min_norm = _quick("quick_min_norm")
quick_upgrad = _quick("quick_upgrad")


@functools.cache
def _quick_loss() -> Callable[..., Results | None]:
    found: Callable[..., Results | None] = getattr(find("cpu", "apply"), "quick_loss", lambda *_: None)
    return found


def quick_loss(
    tensors: tuple[Tensor | None, ...], rule: Rule, clip_range: float, noon: bool, outputs: Outputs
) -> Results | None:
    """`apply` for logprobs, old_logprobs, advantages and mask that the CPU backend checks itself; None for
    others, which the validating path then takes."""
    for x in tensors:
        if x is not None and (type(x) is not Tensor or x.is_neg()):
            return None
    threads = torch.get_num_threads()
    try:
        return _quick_loss()(tensors, rule, clip_range, noon, outputs, Results, NOTHING, threads)
    except Exception:
        return None
