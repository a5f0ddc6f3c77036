"""The records of an operator's call, and their fields as its flat arguments. A `Number` is two arguments: a
float, or None and a 0-d tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pama_kernels._call import Number, Outputs, Rule, Tokens

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "bool": "bool",
    "float": "float",
    "Number": "float?",
    "Number | None": "float?",
}


class Weights(NamedTuple):
    scores: Tensor
    preference: Tensor | None
    regularization: Number
    scale: Tensor | None


class MinNorm(NamedTuple):
    gram: Tensor
    preference: Tensor | None
    regularization: Number


class UPGrad(NamedTuple):
    gram: Tensor
    preference: Tensor | None


class Gae(NamedTuple):
    rewards: Tensor
    values: Tensor
    mask: Tensor | None
    dones: Tensor | None
    truncated: Tensor | None
    last_values: Tensor | None
    final_values: Tensor | None
    gamma: Number
    lam: Number


class GroupNormalize(NamedTuple):
    rewards: Tensor
    group_size: int
    group_ids: Tensor | None
    scale: bool
    eps: Number


class Statistics(NamedTuple):
    pairs: bool


class Solve(NamedTuple):
    sums: Tensor
    preference: Tensor | None
    objectives: int


class Apply(NamedTuple):
    preference: Tensor | None
    weights: Tensor | None


# --- records as flat arguments ------------------------------------------------------------------------


# The declared types of each record's fields.
KINDS: dict[Any, tuple[str, ...]] = {
    record: tuple(str(getattr(kind, "__forward_arg__", kind)) for kind in record.__annotations__.values())
    for record in (
        Tokens,
        Rule,
        Outputs,
        Statistics,
        Solve,
        Apply,
        Weights,
        MinNorm,
        UPGrad,
        Gae,
        GroupNormalize,
    )
}


def _getter(kinds: Sequence[str], tensors: bool) -> Callable[[Any], Sequence[Any]]:
    """Returns the fields of a record that may be tensors, or the others, as a tuple."""
    places = [k for k, kind in enumerate(kinds) if ("Tensor" in kind or "Number" in kind) is tensors]
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


TENSORS = {record: _getter(kinds, True) for record, kinds in KINDS.items()}
OTHERS = {record: _getter(kinds, False) for record, kinds in KINDS.items()}


def schema(records: Sequence[Any], returns: str) -> str:
    arguments: dict[str, str] = {}
    for record in records:
        for name, kind in zip(record._fields, KINDS[record], strict=True):
            name = f"{record.__name__.lower()}_{name}" if name in arguments else name
            arguments[name] = _TYPES[kind]
            if kind.startswith("Number"):
                arguments[f"{name}_tensor"] = "Tensor?"
    return "(" + ", ".join(f"{kind} {name}" for name, kind in arguments.items()) + f") -> {returns}"


def flat(*records: Any) -> list[Any]:
    compiling = torch.compiler.is_compiling()
    result: list[Any] = []
    for record in records:
        for kind, value in zip(KINDS[type(record)], record, strict=True):
            if not kind.startswith("Number"):
                result.append(value)
            elif isinstance(value, Tensor):
                result += [None, value]
            elif compiling and value is not None:
                # A float argument of an operator would become a constant of the graph, which would then be
                # valid for this value only. torch.full would have the same effect, because the compiler
                # cannot turn it into an operation on tensors.
                result += [None, torch.ones((), dtype=torch.float64, device="cpu") * value]
            else:
                result += [value, None]
    return result


def records_of(types: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The inverse of `flat`; numbers in host memory become floats."""
    queue = iter(arguments)
    result = []
    for kind in types:
        values = []
        for field in KINDS[kind]:
            value = next(queue)
            if field.startswith("Number"):
                tensor = next(queue)
                value = value if tensor is None else _host(tensor)
            values.append(value)
        result.append(kind(*values))
    return result


def _host(number: Tensor) -> Number:
    if number.device.type != "cpu" or isinstance(number, torch._subclasses.FakeTensor):
        return number
    return float(number.item())
