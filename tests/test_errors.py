"""Every bad input raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import operators

B, T, N, M = 4, 5, 3, 20


def _ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _loss(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "logprobs": _ones(B, T),
        "old_logprobs": _ones(B, T),
        "advantages": _ones(B, T, N),
        "mask": _ones(B, T),
        "weights_per": "batch",
    }
    return pk.pama_loss(**{**arguments, **changes})


def _flat_loss(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "logprobs": _ones(M),
        "old_logprobs": _ones(M),
        "advantages": _ones(M, N),
        "mask": None,
        "weights_per": "batch",
    }
    return pk.pama_loss(**{**arguments, **changes})


def _combine(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "advantages": _ones(B, T, N),
        "mask": _ones(B, T),
        "weights_per": "batch",
    }
    return pk.combine_advantages(**{**arguments, **changes})


def _flat_combine(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"advantages": _ones(M, N), "mask": _ones(M), "weights_per": "batch"}
    return pk.combine_advantages(**{**arguments, **changes})


def _statistics(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "logprobs": _ones(B, T),
        "old_logprobs": _ones(B, T),
        "advantages": _ones(B, T, N),
        "mask": _ones(B, T),
    }
    return pk.objective_statistics(**{**arguments, **changes})


def _weights(**changes: Any) -> Any:
    return pk.pama_weights(**{"scores": _ones(2, N), **changes})


def _min_norm(**changes: Any) -> Any:
    return pk.min_norm_weights(**{"gram": torch.eye(N).expand(2, N, N), **changes})


def _gap(**changes: Any) -> Any:
    return pk.pareto_gap(**{"gram": torch.eye(N), "weights": _ones(N) / N, **changes})


def _gae(**changes: Any) -> Any:
    return pk.multi_objective_gae(**{"rewards": _ones(B, T, N), "values": _ones(B, T, N), **changes})


def _normalize(**changes: Any) -> Any:
    return pk.group_normalize(**{"rewards": _ones(6, N), **changes})


def _module(**changes: Any) -> Any:
    return pk.PamaLoss(**{"weights_per": "batch", **changes})


class Case(NamedTuple):
    function: Callable[..., Any]
    changes: dict[str, Any]
    error: type[Exception]
    argument: str  # the message starts with it
    came: str  # and says what came


META = "meta"
INF, NAN = math.inf, math.nan


def _solution(*shape: int, dtype: torch.dtype = torch.float32) -> pk.WeightSolution:
    return pk.WeightSolution(torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=dtype))


CASES: dict[str, Case] = {}


def _case(
    function: Callable[..., Any], error: type[Exception], argument: str, came: str, **changes: Any
) -> None:
    name = f"{function.__name__.lstrip('_')}-{argument}-{len(CASES)}"
    CASES[name] = Case(function, changes, error, argument, came)


# --- priors, wherever there is one -------------------------------------------------------------------

for _function in (_loss, _combine, _weights, _min_norm):
    for _prior, _error, _came in (
        ([1.0, -0.5, 1.0], ValueError, "-0.5"),
        ([1.0, 1.0], ValueError, "2"),
        ([1.0, 1.0, 1.0, 1.0], ValueError, "4"),
        ([], ValueError, "0"),
        ([0.0, 0.0, 0.0], ValueError, "0.0, 0.0"),
        ([0.5, NAN, 0.5], ValueError, "nan"),
        ([0.5, INF, 0.5], ValueError, "inf"),
        (torch.tensor([1.0, -0.5, 1.0]), ValueError, "-0.5"),
        (torch.tensor([0.0, 0.0, 0.0]), ValueError, "0.0, 0.0"),
        (torch.tensor([0.5, NAN, 0.5]), ValueError, "nan"),
        (torch.tensor([INF, 0.0, 0.5]), ValueError, "inf"),
        (torch.ones(4), ValueError, "(4,)"),
        (torch.ones(1, 3), ValueError, "(1, 3)"),
        (torch.ones(()), ValueError, "()"),
        (torch.ones(3, device=META), ValueError, "meta"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(3, dtype=torch.bool), TypeError, "bool"),
        ("abc", TypeError, "str"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, TypeError, "dict"),
        ({1.0, 2.0, 3.0}, TypeError, "set"),
        (0.5, TypeError, "float"),
        ([None, 1.0, 1.0], TypeError, "None"),
        ([[1.0], [1.0], [1.0]], TypeError, "[[1.0]"),
    ):
        _case(_function, _error, "prior", _came, prior=_prior)

# --- numbers -----------------------------------------------------------------------------------------

for _function in (_loss, _combine, _weights, _min_norm, _module):
    for _value, _error, _came in (
        (-0.1, ValueError, "-0.1"),
        (NAN, ValueError, "nan"),
        (INF, ValueError, "inf"),
        (True, TypeError, "bool"),
        (False, TypeError, "bool"),
        (None, TypeError, "NoneType"),
        ("0.1", TypeError, "str"),
        ([], TypeError, "list"),
        (torch.tensor(0.1), TypeError, "Tensor"),
    ):
        _case(_function, _error, "regularization", _came, regularization=_value)

for _function in (_loss, _statistics, _module, _combine):
    for _value, _error, _came in (
        (-0.1, ValueError, "-0.1"),
        (1.5, ValueError, "1.5"),
        (NAN, ValueError, "nan"),
        (INF, ValueError, "inf"),
        ((-0.1, 0.2), ValueError, "-0.1"),
        ((1.1, 0.2), ValueError, "1.1"),
        ((0.2, -0.1), ValueError, "-0.1"),
        ((0.2, NAN), ValueError, "nan"),
        ((0.2,), ValueError, "1"),
        ((0.1, 0.2, 0.3), ValueError, "3"),
        (True, TypeError, "bool"),
        ((0.2, False), TypeError, "bool"),
        ("0.2", TypeError, "str"),
        (torch.tensor(0.2), TypeError, "Tensor"),
    ):
        _case(_function, _error, "clip_range", _came, clip_range=_value)

for _function in (_loss, _statistics, _module):
    for _value, _error, _came in (
        (1.2, ValueError, "1.2"),
        (1.0, ValueError, "1.0"),
        (-3.0, ValueError, "-3.0"),
        (NAN, ValueError, "nan"),
        (True, TypeError, "bool"),
        ("3", TypeError, "str"),
    ):
        _case(_function, _error, "dual_clip", _came, dual_clip=_value)
    _case(_function, ValueError, "dual_clip", "3.0", dual_clip=3.0, clip_range=(0.2, 2.5))
    _case(_function, ValueError, "dual_clip", "3.0", dual_clip=3.0, clip_range=(0.2, INF))

for _function in (_loss, _module):
    _case(_function, ValueError, "kl_coef", "-0.1", kl_coef=-0.1)
    _case(_function, ValueError, "kl_coef", "nan", kl_coef=NAN)
    _case(_function, ValueError, "kl_coef", "inf", kl_coef=INF)
    _case(_function, TypeError, "kl_coef", "bool", kl_coef=True)
    _case(_function, TypeError, "kl_coef", "str", kl_coef="0.1")
_case(_loss, ValueError, "ref_logprobs", "None", kl_coef=0.1)

for _value, _error, _came in (
    (0, ValueError, "0"),
    (-2.0, ValueError, "-2.0"),
    (NAN, ValueError, "nan"),
    (INF, ValueError, "inf"),
    (True, TypeError, "bool"),
    ("7", TypeError, "str"),
    (torch.ones(1), ValueError, "(1,)"),
    (torch.ones((), dtype=torch.bool), TypeError, "bool"),
    (torch.ones((), dtype=torch.complex64), TypeError, "complex64"),
    (torch.ones((), device=META), ValueError, "meta"),
):
    _case(_loss, _error, "normalizer", _came, normalizer=_value)

for _value, _error, _came in (
    (0.0, ValueError, "0.0"),
    (-1.0, ValueError, "-1.0"),
    (NAN, ValueError, "nan"),
    (INF, ValueError, "inf"),
    (True, TypeError, "bool"),
    ("1", TypeError, "str"),
    (_ones(3), ValueError, "(3,)"),
    (_ones(2, 1), ValueError, "(2, 1)"),
    (_ones(2, dtype=torch.int64), TypeError, "int64"),
    (_ones(2, device=META), ValueError, "meta"),
):
    _case(_weights, _error, "scale", _came, scale=_value)

for _name in ("gamma", "lam"):
    for _value, _error, _came in (
        (-0.1, ValueError, "-0.1"),
        (1.1, ValueError, "1.1"),
        (NAN, ValueError, "nan"),
        (True, TypeError, "bool"),
        (None, TypeError, "NoneType"),
        (torch.tensor(0.9), TypeError, "Tensor"),
    ):
        _case(_gae, _error, _name, _came, **{_name: _value})

_case(_normalize, ValueError, "eps", "-1", eps=-1.0)
_case(_normalize, ValueError, "eps", "nan", eps=NAN)
_case(_normalize, ValueError, "eps", "inf", eps=INF)
_case(_normalize, TypeError, "eps", "bool", eps=False)
_case(_normalize, TypeError, "eps", "NoneType", eps=None)

for _value, _error, _came in (
    (-0.1, ValueError, "-0.1"),
    (1.0, ValueError, "1.0"),
    (1.5, ValueError, "1.5"),
    (NAN, ValueError, "nan"),
    (True, TypeError, "bool"),
    ("0.9", TypeError, "str"),
):
    _case(_module, _error, "momentum", _came, momentum=_value)
_case(_module, ValueError, "momentum", "'token'", momentum=0.9, weights_per="token")
_case(_module, ValueError, "momentum", "'sequence'", momentum=0.9, weights_per="sequence")

# --- choices -----------------------------------------------------------------------------------------

for _function in (_loss, _combine, _module):
    _case(_function, ValueError, "weights_per", "'tokens'", weights_per="tokens")
    _case(_function, ValueError, "weights_per", "None", weights_per=None)
    _case(_function, ValueError, "bound", "'grams'", bound="grams")
    _case(_function, ValueError, "bound", "None", bound=None)
    _case(_function, ValueError, "bound", "'sequence'", bound="gram", weights_per="sequence")
    _case(_function, ValueError, "bound", "'token'", bound="gram", weights_per="token")
for _function in (_loss, _module):
    _case(_function, ValueError, "aggregation", "'mean'", aggregation="mean")
    _case(_function, ValueError, "aggregation", "None", aggregation=None)
for _prior, _came in ((0.5, "float"), ("abc", "str"), ({1.0, 2.0}, "set")):
    _case(_module, TypeError, "prior", _came, prior=_prior)
for _function in (_loss, _combine, _module):
    _case(_function, TypeError, "process_group", "bool", process_group=True)
_case(_loss, ValueError, "process_group", "'token'", process_group=object(), weights_per="token")
_case(_combine, ValueError, "process_group", "'sequence'", process_group=object(), weights_per="sequence")

# --- flags: a word for no is true ----------------------------------------------------------------

for _value in ("no", "false", 0, None):
    for _function in (_loss, _combine, _statistics, _module):
        _case(_function, TypeError, "noon", repr(_value), noon=_value)
    _case(_statistics, TypeError, "gram", repr(_value), gram=_value)
for _value in ("none", "group", 0, None):
    _case(_normalize, TypeError, "scale", repr(_value), scale=_value)

# --- sequence-wise settings on flat tensors ----------------------------------------------------------

_case(_flat_loss, ValueError, "weights_per", "flat", weights_per="sequence")
_case(_flat_combine, ValueError, "weights_per", "flat", weights_per="sequence")
_case(_flat_loss, ValueError, "aggregation", "'seq-mean-token-sum'", aggregation="seq-mean-token-sum")
_case(_flat_loss, ValueError, "aggregation", "'seq-mean-token-mean'", aggregation="seq-mean-token-mean")
_case(_flat_loss, ValueError, "weights", "(4, 3)", weights=_ones(4, N))
_case(_flat_loss, ValueError, "objective_mask", "(4, 3)", objective_mask=_ones(4, N))
_case(_flat_loss, ValueError, "advantages", "(4, 3)", advantages=_ones(4, N))

# --- types and dtypes of tensors ---------------------------------------------------------------------

_FLOAT_ARGUMENTS = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "importance_weights")
for _name in _FLOAT_ARGUMENTS:
    _shape = (B, T, N) if _name == "advantages" else (B, T)
    for _dtype in (torch.int64, torch.int32, torch.bool, torch.complex64):
        _case(_loss, TypeError, _name, str(_dtype), **{_name: _ones(*_shape, dtype=_dtype)})
    _case(_loss, TypeError, _name, "list", **{_name: [[1.0]]})
    _case(_loss, TypeError, _name, "float", **{_name: 1.0})
    _case(_loss, TypeError, _name, "ndarray", **{_name: _ones(*_shape).numpy()})
_case(_loss, TypeError, "logprobs", "NoneType", logprobs=None)
_case(_loss, TypeError, "advantages", "NoneType", advantages=None)
_case(_statistics, TypeError, "logprobs", "int64", logprobs=_ones(B, T, dtype=torch.int64))
_case(_statistics, TypeError, "old_logprobs", "int64", old_logprobs=_ones(B, T, dtype=torch.int64))
_case(_combine, TypeError, "logprobs", "int64", logprobs=_ones(B, T, dtype=torch.int64))
for _function in (_loss, _combine, _statistics):
    _case(_function, TypeError, "mask", "complex64", mask=_ones(B, T, dtype=torch.complex64))
    _case(_function, TypeError, "mask", "list", mask=[[1]])
    _case(_function, TypeError, "objective_mask", "complex64", objective_mask=_ones(B, N).to(torch.complex64))
    _case(_function, TypeError, "objective_mask", "list", objective_mask=[[1]])
    _case(_function, TypeError, "advantages", "int64", advantages=_ones(B, T, N, dtype=torch.int64))
for _function in (_loss, _combine):
    _case(_function, TypeError, "weights", "int64", weights=_ones(N, dtype=torch.int64))
    _case(_function, TypeError, "weights", "list", weights=[0.5, 0.25, 0.25])
_case(_weights, TypeError, "scores", "int64", scores=_ones(N, dtype=torch.int64))
_case(_weights, TypeError, "scores", "list", scores=[1.0, 2.0])
_case(_gae, TypeError, "rewards", "int64", rewards=_ones(B, T, N, dtype=torch.int64))
_case(_gae, TypeError, "values", "int64", values=_ones(B, T, N, dtype=torch.int64))
_case(_gae, TypeError, "values", "NoneType", values=None)
_case(_gae, TypeError, "mask", "complex64", mask=_ones(B, T, dtype=torch.complex64))
_case(_gae, TypeError, "dones", "list", dones=[[0]])
_case(_gae, TypeError, "last_values", "int64", last_values=_ones(B, N, dtype=torch.int64))
_case(_normalize, TypeError, "rewards", "int64", rewards=_ones(6, N, dtype=torch.int64))
_case(_normalize, TypeError, "rewards", "list", rewards=[[1.0]])
_case(_normalize, TypeError, "group_ids", "float32", group_ids=_ones(6))
_case(_normalize, TypeError, "group_ids", "complex64", group_ids=_ones(6, dtype=torch.complex64))
_case(_normalize, TypeError, "group_ids", "list", group_ids=[0, 0, 1, 1, 2, 2])
_case(_normalize, TypeError, "group_size", "float", group_size=2.0)
_case(_normalize, TypeError, "group_size", "bool", group_size=True)
_case(_normalize, TypeError, "group_size", "str", group_size="2")

# --- shapes ------------------------------------------------------------------------------------------

for _name in ("mask", "old_logprobs", "ref_logprobs", "importance_weights"):
    for _shape in ((B, T + 1), (B + 1, T), (T, B), (B * T,), (B, T, 1), (1, T), ()):
        _case(_loss, ValueError, _name, str(_shape), **{_name: _ones(*_shape)})
for _shape in ((B, T, N), ()):
    _case(_loss, ValueError, "logprobs", str(_shape), logprobs=_ones(*_shape))
_case(_combine, ValueError, "mask", "(4, 5, 3)", mask=_ones(B, T, N))
_case(_combine, ValueError, "mask", "()", mask=_ones())
for _function in (_loss, _combine, _statistics):
    for _shape in ((N,), (), (B, T, N, 1), (B, T + 1, N), (B + 1, T, N), (N, B, T), (B + 1, N), (M, N)):
        _case(_function, ValueError, "advantages", str(_shape), advantages=_ones(*_shape))
    _case(_function, ValueError, "advantages", "(4, 5, 0)", advantages=_ones(B, T, 0))
    _case(_function, ValueError, "advantages", "(4, 5)", advantages=_ones(B, T))  # N == T or one objective
    for _shape in ((N,), (B,), (B, N + 1), (B + 1, N), (N, B), (B, T, N), (B * T, N)):
        _case(_function, ValueError, "objective_mask", str(_shape), objective_mask=_ones(*_shape))
for _function in (_loss, _combine):
    for _shape in ((N + 1,), (1,), (), (B, N + 1), (B + 1, N), (1, N), (B, T, N)):
        _case(_function, ValueError, "weights", str(_shape), weights=_ones(*_shape))
_case(_combine, ValueError, "old_logprobs", "tensor", old_logprobs=_ones(B, T), clip_range=0.2)
_case(_statistics, ValueError, "old_logprobs", "tensor", logprobs=None)
_case(_combine, ValueError, "clip_range", "None", logprobs=_ones(B, T), old_logprobs=_ones(B, T))
_case(_weights, ValueError, "scores", "()", scores=_ones())
_case(_weights, ValueError, "scores", "(4, 0)", scores=_ones(4, 0))
for _function in (_min_norm, _gap):
    for _shape in ((), (N,), (N, 2), (2, N, N + 1)):
        _case(_function, ValueError, "gram", str(_shape), gram=_ones(*_shape))
    _case(_function, TypeError, "gram", "int64", gram=torch.eye(N, dtype=torch.int64))
    _case(_function, TypeError, "gram", "list", gram=[[1.0]])
_case(_min_norm, ValueError, "gram", "(0, 0)", gram=_ones(0, 0))
_case(_gap, ValueError, "weights", "(4,)", weights=_ones(4))
_case(_gap, ValueError, "weights", "(2, 3)", weights=_ones(2, N))
_case(_gap, TypeError, "weights", "int64", weights=_ones(N, dtype=torch.int64))
_case(_gap, ValueError, "weights", "meta", weights=_ones(N, device=META))
for _shape in ((B, T), (B, T, N, 1), (N,)):
    _case(_gae, ValueError, "rewards", str(_shape), rewards=_ones(*_shape))
for _shape in ((B, T), (B, T + 1, N), (B, T, N + 1), (B, T, 1)):
    _case(_gae, ValueError, "values", str(_shape), values=_ones(*_shape))
for _name in ("mask", "dones"):
    for _shape in ((B,), (T, B), (B, T, N), (B, T + 1)):
        _case(_gae, ValueError, _name, str(_shape), **{_name: _ones(*_shape)})
for _shape in ((B,), (N,), (B, T), (B, T, N), (B, 1, N)):
    _case(_gae, ValueError, "last_values", str(_shape), last_values=_ones(*_shape))
for _shape in ((6,), (6, N, 1), ()):
    _case(_normalize, ValueError, "rewards", str(_shape), rewards=_ones(*_shape))
for _value in (4, 0, -2, 12):
    _case(_normalize, ValueError, "group_size", str(_value), group_size=_value)
_case(_normalize, ValueError, "group_ids", "(5,)", group_ids=torch.zeros(5, dtype=torch.int64))
_case(_normalize, ValueError, "group_ids", "(6, 1)", group_ids=torch.zeros(6, 1, dtype=torch.int64))
_case(_normalize, ValueError, "group_ids", "both", group_ids=torch.zeros(6, dtype=torch.int64), group_size=2)

# --- packed sequences --------------------------------------------------------------------------------

_OFFSETS = torch.tensor([0, 5, 12, 20])
for _function in (_flat_loss, _flat_combine):
    for _value, _error, _came in (
        (_OFFSETS.float(), TypeError, "float32"),
        (_OFFSETS.to(torch.int16), TypeError, "int16"),
        (_OFFSETS.bool(), TypeError, "bool"),
        ([0, 5, 12, 20], TypeError, "list"),
        (_OFFSETS.reshape(2, 2), ValueError, "(2, 2)"),
        (_OFFSETS[0], ValueError, "()"),
        (_OFFSETS[:0], ValueError, "(0,)"),
        (_OFFSETS.to(META), ValueError, "meta"),
    ):
        _case(_function, _error, "cu_seqlens", _came, cu_seqlens=_value)
    _case(_function, ValueError, "advantages", "(4, 3)", cu_seqlens=_OFFSETS, advantages=_ones(4, N))
    _case(_function, ValueError, "advantages", "(20, 1, 3)", cu_seqlens=_OFFSETS, advantages=_ones(M, 1, N))
    _case(_function, ValueError, "objective_mask", "(4, 3)", cu_seqlens=_OFFSETS, objective_mask=_ones(4, N))
    _case(_function, ValueError, "weights", "(4, 3)", cu_seqlens=_OFFSETS, weights=_ones(4, N))
_case(_loss, ValueError, "logprobs", "(4, 5)", cu_seqlens=_OFFSETS)
_case(_combine, ValueError, "mask", "(4, 5)", cu_seqlens=_OFFSETS)

# --- devices -----------------------------------------------------------------------------------------

for _name in ("old_logprobs", "ref_logprobs", "importance_weights", "mask"):
    _case(_loss, ValueError, _name, "meta", **{_name: _ones(B, T, device=META)})
_case(_loss, ValueError, "advantages", "meta", advantages=_ones(B, T, N, device=META))
for _function in (_loss, _combine, _statistics):
    _case(_function, ValueError, "objective_mask", "meta", objective_mask=_ones(B, N, device=META))
for _function in (_loss, _combine):
    _case(_function, ValueError, "weights", "meta", weights=_ones(N, device=META))
_case(_combine, ValueError, "mask", "meta", mask=_ones(B, T, device=META))
_case(_gae, ValueError, "values", "meta", values=_ones(B, T, N, device=META))
_case(_gae, ValueError, "mask", "meta", mask=_ones(B, T, device=META))
_case(_gae, ValueError, "dones", "meta", dones=_ones(B, T, device=META))
_case(_gae, ValueError, "last_values", "meta", last_values=_ones(B, N, device=META))
_case(_normalize, ValueError, "group_ids", "meta", group_ids=torch.zeros(6, dtype=torch.int64, device=META))

# --- out= --------------------------------------------------------------------------------------------

for _function in (_weights, _min_norm):
    _case(_function, TypeError, "out", "Tensor", out=_ones(2, N))
    _case(_function, TypeError, "out", "tuple", out=(_ones(2, N), _ones(2)))
    _case(_function, ValueError, "out.weights", "(3, 3)", out=_solution(3, N))
    _case(_function, ValueError, "out.weights", "float64", out=_solution(2, N, dtype=torch.float64))
    for _name, _came, _pair in (
        ("out.optimum", "(2, 1)", (_ones(2, N), _ones(2, 1))),
        ("out.weights", "(2, 3)", (_ones(N, 2).T, _ones(2))),  # not contiguous
        ("out.weights", "meta", (_ones(2, N, device=META), _ones(2))),
    ):
        _case(_function, ValueError, _name, _came, out=pk.WeightSolution(*_pair))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.device.type == "cpu" else []
    if isinstance(value, tuple):
        return [x for part in value for x in _tensors(part)]
    return []


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("computed before the arguments were checked")

    for name in operators.SCHEMAS:
        monkeypatch.setattr(operators, name, computed)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named(name: str) -> None:
    case = CASES[name]
    given = [x for value in case.changes.values() for x in _tensors(value)]
    before = [x.clone() for x in given]
    with pytest.raises(case.error) as caught:
        case.function(**case.changes)
    message = str(caught.value)
    assert message.startswith(case.argument + ":"), message
    what_came = message[len(case.argument) + 1 :]
    assert case.came in what_came, message
    says_expected = ("expected", "needs", "goes with", "ambiguous")
    assert any(word in message for word in says_expected), message
    for x, old in zip(given, before, strict=True):
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True)


def test_ambiguous_advantages_say_how_to_go_on() -> None:
    """(B, T) advantages with (B, T) log-probs: one objective, or one value per sequence with N == T?"""
    with pytest.raises(ValueError, match=r"^advantages: .*\(4, 5\).*ambiguous.*unsqueeze.*expand"):
        _loss(advantages=_ones(B, T))
    for settled in (_ones(B, T).unsqueeze(-1), _ones(B, T)[:, None].expand(B, T, T)):
        assert _loss(advantages=settled).loss.item() == pytest.approx(-1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "offsets",
    [[0, 12, 5, 20], [0, 5, 12, 19], [0, 5, 12, 21], [1, 5, 12, 20], [-1, 5, 12, 20], [0], [0, 25, 12, 20]],
    ids=str,
)
@pytest.mark.parametrize("function", [_flat_loss, _flat_combine])
@pytest.mark.parametrize("weights_per", ["batch", "sequence", "token"])
def test_offsets_are_checked(
    function: Callable[..., Any], offsets: list[int], dtype: torch.dtype, weights_per: str
) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected offsets.*\(20\).*got"):
        function(cu_seqlens=torch.tensor(offsets, dtype=dtype), weights_per=weights_per)


def test_offsets_are_checked_without_token_tensors() -> None:
    offsets = torch.tensor([0, 12, 5, 20])
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected offsets.*got"):
        pk.combine_advantages(_ones(3, N), weights_per="sequence", cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected offsets.*got"):
        pk.objective_statistics(None, None, _ones(3, N), cu_seqlens=offsets)


@pytest.mark.parametrize("value", [-1.0, -2.0])
def test_a_negative_normalizer_tensor_is_not_taken_for_none(value: float) -> None:
    """A tensor is not inspected: it divides the loss like any other number."""
    result = _loss(mask=None, normalizer=torch.tensor(value)).loss
    assert result.item() == pytest.approx(-20 / value, rel=1e-6)


def test_out_stays_untouched_by_a_bad_call() -> None:
    out = _solution(2, N)
    out.weights.fill_(7)
    out.optimum.fill_(7)
    for changes in ({"prior": [1.0, NAN, 1.0]}, {"regularization": -1.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            _weights(out=out, **changes)
    assert torch.equal(out.weights, torch.full((2, N), 7.0))
    assert torch.equal(out.optimum, torch.full((2,), 7.0))


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a"], "abc", [], ["a", "b", "c", "d"]], ids=str)
def test_names_of_metrics(names: Any) -> None:
    for result in (_loss(), _combine(), _statistics()):
        with pytest.raises(ValueError, match=r"^names: expected 3 different names, got"):
            result.metrics(names)


def test_statistics_of_different_objectives_do_not_add() -> None:
    three = _statistics()
    with pytest.raises(ValueError, match=r"expected.*got"):
        three + _statistics(advantages=_ones(B, T, 2))
    with pytest.raises(ValueError, match=r"expected.*got"):
        three + _statistics(gram=True)
    with pytest.raises(TypeError):
        three + 1


def test_running_mean_refuses_another_number_of_objectives() -> None:
    module = _module(momentum=0.5)
    module(_ones(B, T), None, _ones(B, T, N))
    with pytest.raises(ValueError, match=r"^advantages: expected.*got 2"):
        module(_ones(B, T), None, _ones(B, T, 2))


@pytest.mark.parametrize("function", [_loss, _combine, _weights, _statistics, _gae, _normalize])
def test_a_device_without_a_backend_is_named(function: Callable[..., Any]) -> None:
    shapes = {
        "logprobs": (B, T),
        "old_logprobs": (B, T),
        "advantages": (B, T, N),
        "mask": (B, T),
        "scores": (2, N),
        "rewards": (B, T, N) if function is _gae else (6, N),
        "values": (B, T, N),
    }
    names = {
        _loss: ("logprobs", "old_logprobs", "advantages", "mask"),
        _combine: ("advantages", "mask"),
        _weights: ("scores",),
        _statistics: ("logprobs", "old_logprobs", "advantages", "mask"),
        _gae: ("rewards", "values"),
        _normalize: ("rewards",),
    }[function]
    with pytest.raises(RuntimeError, match=r"no backend.*meta.*pama_kernels\.info"):
        function(**{name: _ones(*shapes[name], device=META) for name in names})


def test_good_neighbours_of_the_bad_inputs_pass() -> None:
    """The bounds themselves are allowed, and so is what looks odd but has a meaning."""
    for clip_range in (0, 1, 0.0, 1.0, (0, 0), (1.0, INF), (0.2, 5.0), [0.1, 0.3]):
        assert torch.isfinite(_loss(clip_range=clip_range).loss)
    assert torch.isfinite(_loss(dual_clip=1.2 + 1e-9).loss)
    for prior in ([0, 0, 1], (1, 2, 3), torch.tensor([1, 0, 3]), torch.ones(3).half(), [1e-300] * 3):
        assert torch.isfinite(_loss(prior=prior).loss)
    assert torch.isfinite(_loss(prior=np.ones(N)).loss)
    assert torch.isfinite(_normalize(group_size=np.int64(2))).all()
    for normalizer in (3, 0.5, torch.tensor(3), torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)):
        assert torch.isfinite(_loss(normalizer=normalizer).loss)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16):
        assert torch.isfinite(_loss(mask=_ones(B, T, dtype=dtype)).loss)
    assert torch.isfinite(_flat_loss(weights_per="sequence", cu_seqlens=_OFFSETS).loss)
    assert torch.isfinite(_flat_loss(weights_per="sequence", cu_seqlens=_OFFSETS.int()).loss)
    assert torch.isfinite(_weights(scale=torch.tensor(2.0), regularization=1).weights).all()
