"""Every bad argument raises an error that names it, what was expected and what came.

One table: each public function with a good call, and the kind of every argument; a kind knows what is wrong.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import operators

B, T, N, M = 4, 5, 3, 20
INF, NAN = math.inf, math.nan
Shapes = tuple[tuple[int, ...], ...]


def _ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def came(value: Any, error: type[Exception]) -> str:
    """What the message says about a bad value; nothing where that cannot be told from the value."""
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


# --- kinds of arguments: what is wrong with which value ----------------------------------------------


class Kind(NamedTuple):
    """Bad values: of a wrong range, shape or device, and of a wrong type or dtype."""

    values: tuple[Any, ...] = ()
    types: tuple[Any, ...] = ()

    def __add__(self, other: Kind) -> Kind:  # type: ignore[override]
        return Kind(self.values + other.values, self.types + other.types)


def near_misses(shape: tuple[int, ...]) -> Shapes:
    wider = (tuple(size + (i == axis) for i, size in enumerate(shape)) for axis in range(len(shape)))
    return ((), (*shape, 1), shape[:-1], *wider)


def floats(
    shape: tuple[int, ...],
    wrong: Shapes | None = None,
    first: bool = False,
    bad: tuple[torch.dtype, ...] = (torch.int64, torch.bool, torch.complex64),
) -> Kind:
    """A floating-point tensor; `wrong` shapes don't fit; the `first` one's device is that of the call."""
    good = next(dtype for dtype in (torch.float32, torch.int64) if dtype not in bad)
    shapes = near_misses(shape) if wrong is None else wrong
    values = [_ones(*size, dtype=good) for size in shapes if size != shape]
    values += [] if first else [_ones(*shape, dtype=good, device="meta")]
    types = [_ones(*shape, dtype=dtype) for dtype in bad]
    return Kind(
        tuple(values), (*types, _ones(*shape, dtype=good).to_sparse(), [[1.0]], 1.5, np.ones(shape), "x")
    )


def mask(shape: tuple[int, ...], wrong: Shapes | None = None) -> Kind:
    return floats(shape, wrong, bad=(torch.complex64,))


def number(*wrong: float, tensors: bool = True, none: bool = False) -> Kind:
    """`wrong` are beyond the range; `tensors`: it may be a 0-d tensor."""
    values, types = [*wrong, NAN], [True, "0.1", [], *([] if none else [None])]
    if tensors:
        values += [*map(torch.tensor, wrong), _ones(1)]
        types += [_ones(dtype=torch.bool), _ones(dtype=torch.complex64)]
    return Kind(tuple(values), tuple(types))


SPARSE, COMPLEX = torch.ones(3).to_sparse(), torch.ones(3, dtype=torch.complex64)
FLAG = Kind((), ("no", "false", 0, None))
CHOICE = Kind(("wrong", None, 3))
CLIP = Kind(
    (
        -0.1,
        1.5,
        NAN,
        INF,
        (-0.1, 0.2),
        (1.1, 0.2),
        (0.2, -0.1),
        (0.2, NAN),
        (0.2,),
        (0.1, 0.2, 0.3),
        torch.ones(2),
    ),
    (True, "0.2"),
) + Kind((torch.tensor(-0.1),))
PREFERENCE_TYPES = ("abc", {0: 1.0, 1: 1.0, 2: 1.0}, {1.0, 2.0, 3.0}, 0.5)
PREFERENCE = Kind(
    (
        *([1.0, -0.5, 1.0], [1.0, 1.0], [], [0.0] * 3, [0.5, NAN, 0.5], [0.5, INF, 0.5], torch.ones(4)),
        *(torch.ones(1, 3), torch.ones(3, device="meta"), torch.ones(())),
    ),
    (*PREFERENCE_TYPES, COMPLEX, torch.ones(3, dtype=torch.bool), SPARSE),
)
RULE = Kind(("wrong",), (pk.Pama, 3))
CALLABLES = Kind((lambda s: s.scores[:2],), (lambda s: [1.0, 2.0, 3.0], lambda s: s.scores.long()))
GROUP = Kind((), (True, "gloo"))
OFFSETS = torch.tensor([0, 5, 12, 20])
CU_SEQLENS = Kind(
    (OFFSETS.reshape(2, 2), OFFSETS[0], OFFSETS[:0], OFFSETS.to("meta")),
    (OFFSETS.float(), OFFSETS.to(torch.int16), OFFSETS.tolist()),
)


def solution(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> pk.WeightSolution:
    return pk.WeightSolution(torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=dtype))


_TAKEN = _ones(2, N)
OUT = Kind(
    (
        *(solution((3, N)), solution((2, N), torch.float64), pk.WeightSolution(_TAKEN, _TAKEN[:, 0])),
        *(pk.WeightSolution(x, _ones(2)) for x in (_ones(N, 2).T, _ones(2, N).requires_grad_())),
        pk.WeightSolution(_ones(2, N), _ones(2, 1)),
    ),
    (_ones(2, N), (_ones(2, N), _ones(2)), pk.WeightSolution(None, _ones(2))),  # type: ignore[arg-type]
)

# --- the table ---------------------------------------------------------------------------------------

PADDED = (B, T)
BESIDE: Shapes = (*near_misses(PADDED), (T, B), (M,), (1, T))
PER_TOKEN = floats(PADDED, BESIDE)
ADVANTAGES = floats(
    (B, T, N),
    ((N,), (), (B, T, N, 1), (B, T + 1, N), (B + 1, T, N), (N, B, T), (B + 1, N), (M, N), (B, T, 0)),
)
OBJECTIVE_MASK = mask((B, N), ((N,), (B,), (B, N + 1), (B + 1, N), (N, B), (B, T, N), (M, N)))
TOKENS = {
    "advantages": ADVANTAGES,
    "mask": mask(PADDED, BESIDE),
    "objective_mask": OBJECTIVE_MASK,
    "aggregation": CHOICE,
    "clip_range": CLIP,
    "cu_seqlens": CU_SEQLENS,
}
WEIGHTS = floats((N,), ((N + 1,), (1,), (), (B, N + 1), (B + 1, N), (1, N), (B, T, N)))
RULES = {"rule": RULE + CALLABLES, "preference": PREFERENCE, "weights": WEIGHTS, "process_group": GROUP}
LOGPROBS = floats(PADDED, ((B, T, N), ()), first=True)
DUAL_CLIP = number(1.1, 1.0, -3.0, none=True)
POSITIVE, COEFFICIENT, FRACTION = number(0.0, -1.0, INF), number(-0.1, INF), number(-0.1, 1.1)
GRAM = floats((2, N, N), ((), (N,), (N, 2), (2, N, N + 1), (0, 0)), first=True)
GAE_MASK, STEPS = mask(PADDED), floats((B, T, N))


class Function(NamedTuple):
    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, Kind]


_ALL = {
    "logprobs": _ones(B, T),
    "old_logprobs": _ones(B, T),
    "advantages": _ones(B, T, N),
    "mask": _ones(B, T),
}
_EYES = {"gram": torch.eye(N).repeat(2, 1, 1)}
_STEPS = {"rewards": _ones(B, T, N), "values": _ones(B, T, N)}
FUNCTIONS = {
    "combine_advantages": Function(
        pk.combine_advantages,
        {"advantages": _ones(B, T, N), "mask": _ones(B, T)},
        {**TOKENS, **RULES, "logprobs": floats(PADDED, first=True), "old_logprobs": Kind(), "normalize": FLAG}
        | {"mask": mask(PADDED, ((), (B, T + 1), (B + 1, T), (T, B), (B, T, 1), (1, T)))},
    ),
    "pama_loss": Function(
        pk.pama_loss,
        {**_ALL, "ref_logprobs": _ones(B, T)},
        {**TOKENS, **RULES, "logprobs": LOGPROBS, "dual_clip": DUAL_CLIP, "kl_coef": COEFFICIENT}
        | dict.fromkeys(("old_logprobs", "importance_weights", "ref_logprobs"), PER_TOKEN)
        | {
            "normalizer": Kind(
                (0.0, -2.0, NAN, INF, torch.tensor(-2.0), _ones(1), _ones(device="meta")), (True, "7")
            )
        },
    ),
    "PamaLoss": Function(
        pk.PamaLoss,
        {},
        {"rule": RULE, "preference": Kind((), PREFERENCE_TYPES), "clip_range": CLIP, "dual_clip": DUAL_CLIP}
        | {"aggregation": CHOICE, "kl_coef": COEFFICIENT, "process_group": GROUP}
        | {"momentum": number(-0.1, 1.0, 1.5, tensors=False), "objectives": Kind((0, -1), (2.0, True))},
    ),
    "objective_statistics": Function(
        pk.objective_statistics,
        _ALL,
        {**TOKENS, "logprobs": LOGPROBS, "noon": FLAG, "dual_clip": DUAL_CLIP, "pairs": FLAG}
        | dict.fromkeys(("old_logprobs", "importance_weights"), PER_TOKEN),
    ),
    "pama_weights": Function(
        pk.pama_weights,
        {"scores": _ones(2, N)},
        {"scores": floats((2, N), ((), (4, 0)), first=True), "preference": PREFERENCE, "out": OUT}
        | {"regularization": COEFFICIENT}
        | {
            "scale": Kind((0.0, -1.0, NAN, INF), (True, "1"))
            + floats((2,), ((3,), (2, 1)))._replace(types=(SPARSE,))
        },
    ),
    "min_norm_weights": Function(
        pk.min_norm_weights,
        _EYES,
        {"gram": GRAM, "preference": PREFERENCE, "regularization": COEFFICIENT, "out": OUT},
    ),
    "upgrad_weights": Function(
        pk.upgrad_weights, _EYES, {"gram": GRAM, "preference": PREFERENCE, "out": OUT}
    ),
    "pareto_gap": Function(
        pk.pareto_gap,
        {**_EYES, "weights": _ones(2, N) / N},
        {"gram": GRAM._replace(values=GRAM.values[:4]), "weights": floats((2, N))},
    ),
    "multi_objective_gae": Function(
        pk.multi_objective_gae,
        _STEPS,
        {
            "rewards": floats((B, T, N), ((B, T), (B, T, N, 1), (N,)), first=True),
            "values": STEPS,
            "mask": GAE_MASK,
        }
        | {"dones": GAE_MASK, "last_values": floats((B, N), (*near_misses((B, N)), (B, T), (B, T, N)))}
        | {"gamma": FRACTION, "lam": FRACTION},
    ),
    "multi_objective_gae, truncated": Function(
        pk.multi_objective_gae,
        {**_STEPS, "truncated": _ones(B, T), "final_values": _ones(B, T, N)},
        {"truncated": GAE_MASK, "final_values": STEPS},
    ),
    "group_normalize": Function(
        pk.group_normalize,
        {"rewards": _ones(6, N)},
        {"rewards": floats((6, N), ((6,), (6, N, 1), ()), first=True), "scale": FLAG}
        | {"group_size": Kind((4, 0, -2, 12), (2.0, True, "2")), "eps": number(-1.0, INF, tensors=False)}
        | {"group_ids": floats((6,), ((5,), (6, 1)), bad=(torch.float32, torch.complex64))},
    ),
    "masked_whiten": Function(
        pk.masked_whiten,
        {"advantages": _ones(B, T, N), "mask": _ones(B, T)},
        {
            "advantages": ADVANTAGES,
            "mask": mask(PADDED, ((B, T, N), (T, B))),
            "objective_mask": OBJECTIVE_MASK,
        }
        | {"process_group": GROUP},
    ),
    "Pama": Function(
        pk.Pama,
        {},
        {"weights_per": CHOICE, "bound": Kind(("wrong", 3)), "noon": FLAG, "regularization": COEFFICIENT},
    ),
    "SoftMin": Function(pk.SoftMin, {}, {"temperature": POSITIVE, "weights_per": CHOICE}),
}

# --- what no single argument has wrong, by function: the argument that is named, and the changes -------

_LP, _TRUNCATED, _IDS = _ones(B, T), _ones(B, T), torch.zeros(6, dtype=torch.int64)
_FLAT = {"advantages": _ones(M, N), "mask": _ones(M)}
_PACKED = {**_FLAT, "cu_seqlens": OFFSETS}
_UNORDERED = ([0, 12, 5, 20], [0, 5, 12, 19], [0, 5, 12, 21], [1, 5, 20], [-1, 5, 20], [0], [0, 25, 12, 20])
COMBINATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "combine_advantages": [
        ("old_logprobs", {"old_logprobs": _LP, "clip_range": 0.2}),
        ("clip_range", {"logprobs": _LP, "old_logprobs": _LP}),
        ("process_group", {"process_group": object(), "rule": "softmin"}),
        ("rule", {**_FLAT, "rule": "softmin"}),
        ("aggregation", {**_FLAT, "aggregation": "seq-mean-token-mean"}),
        *(
            (name, {**flat, name: _ones(B, N)})
            for flat in (_FLAT, _PACKED)
            for name in ("weights", "objective_mask")
        ),
        *(("advantages", {**_PACKED, "advantages": _ones(*shape)}) for shape in ((B, N), (M, 1, N))),
        ("mask", {**_PACKED, "mask": _ones(B, T)}),
        ("objective_mask", {**_PACKED, "advantages": _ones(3, N), "objective_mask": _ones(M, N)}),
        *(("cu_seqlens", {**_PACKED, "cu_seqlens": torch.tensor(wrong)}) for wrong in _UNORDERED),
        ("cu_seqlens", {"advantages": _ones(3, N), "mask": None, "cu_seqlens": OFFSETS[[0, 2, 1, 3]]}),
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
        ("final_values", {"final_values": _ones(B, T, N)}),
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


COMPUTED_FIRST = {"rule", "cu_seqlens"}  # a callable's result, and offsets, are seen when they are used


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_its_kind(name: str) -> None:
    kinds = [set(f.kinds) for f in FUNCTIONS.values() if f.call is FUNCTIONS[name].call]
    assert set.union(*kinds) == set(inspect.signature(FUNCTIONS[name].call).parameters)


@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: f"{case[0]}-{case[1]}-{case[4] or '?'}")
def test_a_bad_argument_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # of two that don't fit each other either is named, and the other beside it
    assert begin == argument or f" {argument}" in rest, message
    value = changes.get(argument)
    assert any(text in rest for text in (what, repr(value), type(value).__name__)), message
    assert "expected" in rest or "need" in rest, message
    assert "got" in rest, message


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.good])
def test_a_device_without_a_backend_is_named(name: str) -> None:
    function = FUNCTIONS[name]
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in function.good.items()}
    if name in ("pareto_gap", "masked_whiten"):  # plain torch: any device
        function.call(**moved)
        return
    with pytest.raises(RuntimeError, match=r"no backend.*meta.*pama_kernels info"):
        function.call(**moved)


def test_neighbours_of_bad_arguments_pass() -> None:
    """The bounds themselves are allowed, and so is what looks odd but has a meaning."""

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
        check("pama_loss", mask=_ones(B, T, dtype=dtype))
    for rule in ("pama", "upgrad", "fixed", "softmin", pk.Pama.paper("token"), lambda s: s.count * 0 + 1):
        check("pama_loss", rule=rule)
    check("pama_loss", dual_clip=1.2 + 1e-9)
    check("group_normalize", group_size=np.int64(2))
    check("pama_weights", scale=torch.tensor(2.0), regularization=1)
    check("multi_objective_gae", gamma=0, lam=1)
    for offsets in (OFFSETS, OFFSETS.int()):
        check("combine_advantages", **{**_PACKED, "cu_seqlens": offsets}, rule="softmin")


@pytest.mark.parametrize("name", ["pama_weights", "min_norm_weights", "upgrad_weights"])
def test_out_stays_untouched_by_a_bad_call(name: str) -> None:
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


def test_statistics_of_different_objectives_do_not_add() -> None:
    three, two = (pk.objective_statistics(None, None, _ones(B, T, n)) for n in (3, 2))
    for other in (two, pk.objective_statistics(None, None, _ones(B, T, N), pairs=True)):
        with pytest.raises(ValueError, match=r"^statistics: expected.*got"):
            three + other
    with pytest.raises(TypeError):
        three + 1
    module = pk.PamaLoss(momentum=0.5)
    module(_ones(B, T), None, _ones(B, T, N))
    with pytest.raises(ValueError, match=r"^advantages: expected.*got"):
        module(_ones(B, T), None, _ones(B, T, 2))
