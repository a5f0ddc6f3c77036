"""Every wrong argument raises an error that names it, the expected and the actual value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from argument_kinds import INF, NAN, OFFSETS, B, M, N, T, ones, solution
from argument_table import FUNCTIONS
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import operators
from pama_kernels.backends.registry import find


def came(value: Any, error: type[Exception]) -> str:
    """The part of the message that describes a wrong value; empty if it does not follow from the value."""
    if not isinstance(value, Tensor):
        if error is TypeError:
            return type(value).__name__
        return str(value) if isinstance(value, (int, float, str)) else ""
    if value.layout != torch.strided:
        return "sparse"
    if error is TypeError:
        return str(value.dtype)
    if value.device.type == "meta":
        return "meta"
    return (
        "(" + ", ".join(map(str, value.shape)) + ("," if value.dim() == 1 else "") + ")"
        if value.dim()
        else ""
    )


_LP, _TRUNCATED, _IDS = ones(B, T), ones(B, T), torch.zeros(6, dtype=torch.int64)
_FLAT = {"advantages": ones(M, N), "mask": ones(M)}
_PACKED = {**_FLAT, "cu_seqlens": OFFSETS}
_UNORDERED = {  # and the first wrong one
    "[2] = 5 after cu_seqlens[1] = 12": [0, 12, 5, 20],
    "[3] = 19 after cu_seqlens[2] = 12": [0, 5, 12, 19],
    "[3] = 21 after cu_seqlens[2] = 12": [0, 5, 12, 21],
    "[1] = 25 after cu_seqlens[0] = 0": [0, 25, 12, 20],
    "[0] = 1": [1, 5, 20],
    "[0] = -1": [-1, 5, 20],
    "[0] = 0": [0],
}
COMBINATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "combine_advantages": [
        ("old_logprobs", {"old_logprobs": _LP, "clip_range": 0.2}),
        ("clip_range", {"logprobs": _LP, "old_logprobs": _LP}),
        ("process_group", {"process_group": object(), "rule": "softmin"}),
        ("rule", {**_FLAT, "rule": "softmin"}),
        ("aggregation", {**_FLAT, "aggregation": "seq-mean-token-mean"}),
        *(
            (name, {**flat, name: ones(B, N)})
            for flat in (_FLAT, _PACKED)
            for name in ("weights", "objective_mask")
        ),
        *(("advantages", {**_PACKED, "advantages": ones(*shape)}) for shape in ((B, N), (M, 1, N))),
        ("mask", {**_PACKED, "mask": ones(B, T)}),
        ("objective_mask", {**_PACKED, "advantages": ones(3, N), "objective_mask": ones(M, N)}),
        *(("cu_seqlens", {**_PACKED, "cu_seqlens": torch.tensor(x)}) for x in _UNORDERED.values()),
        ("cu_seqlens", {"advantages": ones(3, N), "mask": None, "cu_seqlens": OFFSETS[[0, 2, 1, 3]]}),
    ],
    "pama_loss": [
        ("clip_range", {"clip_range": None}),
        *(("ref_logprobs", {"kl_coef": k, "ref_logprobs": None}) for k in (0.1, torch.tensor(0.1))),
        *(("dual_clip", {"dual_clip": 3.0, "clip_range": (0.2, high)}) for high in (2.5, INF)),
        ("process_group", {"process_group": object(), "rule": pk.Pama("token")}),
        ("logprobs", {"cu_seqlens": OFFSETS}),
    ],
    "objective_statistics": [("old_logprobs", {"logprobs": None})],
    "PamaLoss": [("momentum", {"momentum": 0.9, "rule": rule}) for rule in (pk.Pama("token"), "softmin")],
    "Pama": [("bound", {"bound": "gram", "weights_per": per}) for per in ("token", "sequence")],
    "multi_objective_gae": [
        ("final_values", {"truncated": _LP}),
        ("final_values", {"final_values": ones(B, T, N)}),
    ],
    "group_normalize": [("group_ids", {"group_ids": _IDS, "group_size": 2})],
}
Case = tuple[str, str, dict[str, Any], type[Exception], str]


def _cases() -> Iterator[Case]:
    for name, function in FUNCTIONS.items():
        for argument, kind in function.kinds.items():
            for error, values in ((ValueError, kind.values), (TypeError, kind.types)):
                for value in values:
                    what = "" if callable(value) or isinstance(value, tuple) else came(value, error)
                    yield name, argument, {argument: value}, error, what
        for argument, changes in COMBINATIONS.get(name, ()):
            yield name, argument, changes, ValueError, ""
    for argument in ("logprobs", "advantages"):
        yield "pama_loss", argument, {argument: None}, TypeError, "NoneType"


COMPUTED_FIRST = {"rule", "cu_seqlens"}  # a callable's result and offsets are checked when they are used


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_in_the_table(name: str) -> None:
    kinds = [set(f.kinds) for f in FUNCTIONS.values() if f.call is FUNCTIONS[name].call]
    assert set.union(*kinds) == set(inspect.signature(FUNCTIONS[name].call).parameters)


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: f"{case[0]}-{case[1]}-{case[4] or '?'}")
def test_error_names_the_wrong_argument(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name, argument, changes, error, what = case
    if argument not in COMPUTED_FIRST:

        def computed(*_: object, **__: object) -> None:
            raise AssertionError("computed before the arguments were checked")

        for operator in vars(operators).values():
            if isinstance(operator, operators._Operator):
                monkeypatch.setattr(operator, "call", computed)
                monkeypatch.setattr(operator, "operator", computed)
    function = FUNCTIONS[name]
    with pytest.raises(error) as caught:
        function.call(**{**function.good, **changes})
    message = str(caught.value)
    begin, _, rest = message.partition(":")
    begin = {"weights of the rule": "rule"}.get(begin, begin.partition(".")[0])
    # if two arguments do not fit each other, the error names one and mentions the other
    assert begin == argument or f" {argument}" in rest, message
    value = changes.get(argument)
    assert any(text in rest for text in (what, repr(value), type(value).__name__)), message
    assert "expected" in rest or "need" in rest, message
    assert "got" in rest, message


@pytest.mark.parametrize("function", ["apply", "statistics", "solve", "weights", "gae", "group_normalize"])
def test_error_names_a_device_without_a_backend(function: str) -> None:
    with pytest.raises(RuntimeError, match=rf"no backend.*'{function}'.*'xpu'.*pama_kernels info"):
        find("xpu", function)


def test_boundary_values_are_accepted() -> None:
    """Bounds of ranges are allowed, and so are unusual types that have a meaning."""

    def check(name: str, **changes: Any) -> None:
        function = FUNCTIONS[name]
        result = function.call(**{**function.good, **changes})
        assert torch.isfinite(result if isinstance(result, Tensor) else result[0]).all()

    for clip_range in (0, 1, 0.0, 1.0, (0, 0), (1.0, INF), (0.2, 5.0), [0.1, 0.3], (torch.tensor(0.1), 0.3)):
        check("pama_loss", clip_range=clip_range)
    for preference in (
        [0, 0, 1],
        (1, 2, 3),
        torch.tensor([1, 0, 3]),
        torch.ones(3).half(),
        [1e-300] * 3,
        np.ones(N),
    ):
        check("pama_loss", preference=preference)
    for normalizer in (
        3,
        0.5,
        np.float32(2),
        *(torch.tensor(3, dtype=d) for d in (torch.int64, torch.float64)),
    ):
        check("pama_loss", normalizer=normalizer)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16):
        check("pama_loss", mask=ones(B, T, dtype=dtype))
    for rule in ("pama", "upgrad", "fixed", "softmin", pk.Pama.paper("token"), lambda s: s.count * 0 + 1):
        check("pama_loss", rule=rule)
    check("pama_loss", dual_clip=1.2 + 1e-9)
    check("group_normalize", group_size=np.int64(2))
    check("pama_weights", scale=torch.tensor(2.0), regularization=1)
    check("multi_objective_gae", gamma=0, lam=1)
    for offsets in (OFFSETS, OFFSETS.int()):
        check("combine_advantages", **{**_PACKED, "cu_seqlens": offsets}, rule="softmin")


@pytest.mark.parametrize("got", _UNORDERED)
def test_the_first_wrong_offset_is_named(got: str) -> None:
    offsets = torch.tensor(_UNORDERED[got])
    message = re.escape(f"end at the number of tokens (20), got cu_seqlens{got}") + "$"
    for given in (offsets, offsets.int()):
        with pytest.raises(ValueError, match=message):
            pk.combine_advantages(**{**_PACKED, "cu_seqlens": given})
    with pytest.raises(
        ValueError, match=r"end at the number of tokens, got cu_seqlens\[2\] = 5 after .*= 7$"
    ):
        pk.combine_advantages(ones(3, N), cu_seqlens=torch.tensor([0, 7, 5, 9]))


@pytest.mark.parametrize("name", ["pama_weights", "min_norm_weights", "upgrad_weights"])
def test_out_is_not_written_by_a_call_that_raises(name: str) -> None:
    function, out = FUNCTIONS[name], solution((2, N))
    for x in out:
        x.fill_(7)
    with pytest.raises(ValueError, match="preference"):
        function.call(**function.good, out=out, preference=[1.0, NAN, 1.0])
    assert all((x == 7).all() for x in out)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a"], "abc", [], ["a", "b", "c", "d"]], ids=str)
def test_names_of_metrics(names: Any) -> None:
    for name in ("pama_loss", "combine_advantages", "objective_statistics"):
        result = FUNCTIONS[name].call(**FUNCTIONS[name].good)
        with pytest.raises(ValueError, match=r"^names: expected 3 different names, got"):
            result.metrics(names)


def test_statistics_of_different_objectives_cannot_be_added() -> None:
    three, two = (pk.objective_statistics(None, None, ones(B, T, n)) for n in (3, 2))
    for other in (two, pk.objective_statistics(None, None, ones(B, T, N), pairs=True)):
        with pytest.raises(ValueError, match=r"^statistics: expected.*got"):
            three + other
    with pytest.raises(TypeError):
        three + 1
    module = pk.PamaLoss(momentum=0.5)
    module(ones(B, T), None, ones(B, T, N))
    with pytest.raises(ValueError, match=r"^advantages: expected.*got"):
        module(ones(B, T), None, ones(B, T, 2))
