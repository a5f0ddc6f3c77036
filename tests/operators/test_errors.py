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
Bad = tuple[Any, type[Exception], str]  # a value, its error, and what the message says came


def _ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# --- kinds of arguments: what is wrong with which value ----------------------------------------------


def _sizes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Near misses of a shape."""
    yield ()
    yield (*shape, 1)
    yield shape[:-1]
    for axis in range(len(shape)):
        yield tuple(size + (i == axis) for i, size in enumerate(shape))


class Floats(NamedTuple):
    """A floating-point tensor; `wrong`: shapes that don't fit. `first`: its device is that of the call."""

    shape: tuple[int, ...]
    wrong: tuple[tuple[int, ...], ...] | None = None
    first: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.bool, torch.complex64)

    def bad(self) -> Iterator[Bad]:
        for dtype in self.dtypes:
            yield _ones(*self.shape, dtype=dtype), TypeError, str(dtype)
        for value in ([[1.0]], 1.5, _ones(*self.shape).numpy(), "x"):
            yield value, TypeError, type(value).__name__
        yield _ones(*self.shape, dtype=_good(self.dtypes)).to_sparse(), TypeError, "sparse"
        wrong = _sizes(self.shape) if self.wrong is None else self.wrong
        for shape in wrong:
            if shape != self.shape:
                sizes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
                yield _ones(*shape, dtype=_good(self.dtypes)), ValueError, f"({sizes})"
        if not self.first:
            yield _ones(*self.shape, dtype=_good(self.dtypes), device="meta"), ValueError, "meta"


def _good(wrong: tuple[torch.dtype, ...]) -> torch.dtype:
    return next(d for d in (torch.float32, torch.int64) if d not in wrong)


def mask(shape: tuple[int, ...], wrong: tuple[tuple[int, ...], ...] | None = None) -> Floats:
    return Floats(shape, wrong, dtypes=(torch.complex64,))


class Number(NamedTuple):
    wrong: tuple[float, ...]  # beyond the range
    tensors: bool = True  # may be a 0-d tensor
    none: bool = False

    def bad(self) -> Iterator[Bad]:
        for value in (*self.wrong, NAN):
            yield value, ValueError, str(value)
            if self.tensors:
                yield torch.tensor(value), ValueError, str(value)
        for value in (True, "0.1", [], *(() if self.none else (None,))):
            yield value, TypeError, type(value).__name__
        if self.tensors:
            yield _ones(1), ValueError, "(1,)"
            yield _ones(dtype=torch.bool), TypeError, "bool"
            yield _ones(dtype=torch.complex64), TypeError, "complex64"


class Values(NamedTuple):
    """Just these."""

    values: tuple[Bad, ...]

    def bad(self) -> Iterator[Bad]:
        yield from self.values


FLAG = Values(tuple((value, TypeError, repr(value)) for value in ("no", "false", 0, None)))
CHOICE = Values(tuple((value, ValueError, repr(value)) for value in ("wrong", None, 3)))
PREFERENCE = Values(
    (
        ([1.0, -0.5, 1.0], ValueError, "-0.5"),
        ([1.0, 1.0], ValueError, "2"),
        ([], ValueError, "0"),
        ([0.0, 0.0, 0.0], ValueError, "0.0, 0.0"),
        ([0.5, NAN, 0.5], ValueError, "nan"),
        ([0.5, INF, 0.5], ValueError, "inf"),
        (torch.tensor([1.0, -0.5, 1.0]), ValueError, "-0.5"),
        (torch.tensor([0.5, NAN, 0.5]), ValueError, "nan"),
        (torch.zeros(3), ValueError, "0.0, 0.0"),
        (torch.ones(4), ValueError, "(4,)"),
        (torch.ones(1, 3), ValueError, "(1, 3)"),
        (torch.ones(3, device="meta"), ValueError, "meta"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.ones(3, dtype=torch.bool), TypeError, "bool"),
        (torch.ones(3).to_sparse(), TypeError, "sparse"),
        ("abc", TypeError, "str"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, TypeError, "dict"),
        ({1.0, 2.0, 3.0}, TypeError, "set"),
        (0.5, TypeError, "float"),
        ([None, 1.0, 1.0], TypeError, "None"),
        ([[1.0], [1.0], [1.0]], TypeError, "[[1.0]"),
    )
)
CLIP = Values(
    (
        *((value, ValueError, str(value)) for value in (-0.1, 1.5, NAN, INF)),
        *(((low, 0.2), ValueError, str(low)) for low in (-0.1, 1.1)),
        *(((0.2, high), ValueError, str(high)) for high in (-0.1, NAN)),
        ((0.2,), ValueError, "1"),
        ((0.1, 0.2, 0.3), ValueError, "3"),
        (torch.tensor(-0.1), ValueError, "-0.1"),
        (torch.ones(2), ValueError, "(2,)"),
        (True, TypeError, "bool"),
        ((0.2, False), TypeError, "bool"),
        ("0.2", TypeError, "str"),
    )
)
RULE = Values(
    (
        ("wrong", ValueError, "'wrong'"),
        (pk.Pama, TypeError, "Pama"),
        (3, TypeError, "3"),
        (lambda s: s.scores[:2], ValueError, "(2,)"),
        (lambda s: [1.0, 2.0, 3.0], TypeError, "list"),
        (lambda s: s.scores.long(), TypeError, "int64"),
    )
)
GROUP = Values(((True, TypeError, "bool"), ("gloo", TypeError, "str")))
OFFSETS = torch.tensor([0, 5, 12, 20])
CU_SEQLENS = Values(
    (
        (OFFSETS.float(), TypeError, "float32"),
        (OFFSETS.to(torch.int16), TypeError, "int16"),
        ([0, 5, 12, 20], TypeError, "list"),
        (OFFSETS.reshape(2, 2), ValueError, "(2, 2)"),
        (OFFSETS[0], ValueError, "()"),
        (OFFSETS[:0], ValueError, "(0,)"),
        (OFFSETS.to("meta"), ValueError, "meta"),
    )
)


def _solution(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> pk.WeightSolution:
    return pk.WeightSolution(torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=dtype))


OUT = Values(
    (
        (_ones(2, N), TypeError, "Tensor"),
        ((_ones(2, N), _ones(2)), TypeError, "tuple"),
        (_solution((3, N)), ValueError, "(3, 3)"),
        (_solution((2, N), torch.float64), ValueError, "float64"),
        (pk.WeightSolution(_ones(2, N), _ones(2, 1)), ValueError, "(2, 1)"),
        (pk.WeightSolution(_ones(N, 2).T, _ones(2)), ValueError, "(2, 3)"),
        (pk.WeightSolution(_ones(2, N).requires_grad_(), _ones(2)), ValueError, "requires_grad"),
        (pk.WeightSolution(None, _ones(2)), TypeError, "NoneType"),  # type: ignore[arg-type]
        ((lambda x: pk.WeightSolution(x, x[:, 0]))(_ones(2, N)), ValueError, "share"),
    )
)

# --- the table ---------------------------------------------------------------------------------------

PADDED = (B, T)
BESIDE = (*_sizes(PADDED), (T, B), (M,), (1, T))
ADVANTAGES = Floats(
    (B, T, N),
    ((N,), (), (B, T, N, 1), (B, T + 1, N), (B + 1, T, N), (N, B, T), (B + 1, N), (M, N), (B, T, 0)),
)
WEIGHTS = Floats((N,), ((N + 1,), (1,), (), (B, N + 1), (B + 1, N), (1, N), (B, T, N)))
PER_TOKEN = {
    "mask": mask(PADDED, BESIDE),
    "objective_mask": mask((B, N), ((N,), (B,), (B, N + 1), (B + 1, N), (N, B), (B, T, N), (M, N))),
    "aggregation": CHOICE,
    "clip_range": CLIP,
    "cu_seqlens": CU_SEQLENS,
}
RULES = {"rule": RULE, "preference": PREFERENCE, "weights": WEIGHTS, "process_group": GROUP}
LOGPROBS = Floats(PADDED, ((B, T, N), ()), first=True)
DUAL_CLIP = Number((1.1, 1.0, -3.0), none=True)
REGULARIZATION = Number((-0.1, INF))
GRAM = Floats((2, N, N), ((), (N,), (N, 2), (2, N, N + 1), (0, 0)), first=True)
FLAT = {"advantages": _ones(M, N)}


class Function(NamedTuple):
    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, Any]


_TOKENS = {
    "logprobs": _ones(B, T),
    "old_logprobs": _ones(B, T),
    "advantages": _ones(B, T, N),
    "mask": _ones(B, T),
}
FUNCTIONS = {
    "combine_advantages": Function(
        pk.combine_advantages,
        {"advantages": _ones(B, T, N), "mask": _ones(B, T)},
        {
            **PER_TOKEN,
            **RULES,
            "mask": mask(PADDED, ((), (B, T + 1), (B + 1, T), (T, B), (B, T, 1), (1, T))),
            "advantages": ADVANTAGES,
            "logprobs": Floats(PADDED, first=True),
            "old_logprobs": Values(()),
            "normalize": FLAG,
        },
    ),
    "pama_loss": Function(
        pk.pama_loss,
        {**_TOKENS, "ref_logprobs": _ones(B, T)},
        {
            **PER_TOKEN,
            **RULES,
            "logprobs": LOGPROBS,
            "old_logprobs": Floats(PADDED, BESIDE),
            "advantages": ADVANTAGES,
            "importance_weights": Floats(PADDED, BESIDE),
            "ref_logprobs": Floats(PADDED, BESIDE),
            "dual_clip": DUAL_CLIP,
            "kl_coef": Number((-0.1, INF)),
            "normalizer": Values(
                (
                    *((value, ValueError, str(value)) for value in (0.0, -2.0, NAN, INF)),
                    *((torch.tensor(value), ValueError, str(value)) for value in (-2.0, NAN)),
                    (True, TypeError, "bool"),
                    ("7", TypeError, "str"),
                    (torch.ones(1), ValueError, "(1,)"),
                    (torch.ones((), dtype=torch.bool), TypeError, "bool"),
                    (torch.ones((), device="meta"), ValueError, "meta"),
                )
            ),
        },
    ),
    "PamaLoss": Function(
        pk.PamaLoss,
        {},
        {
            "rule": Values(RULE.values[:3]),
            "preference": Values(
                tuple(bad for bad in PREFERENCE.values if type(bad[0]) in (str, dict, set, float))
            ),
            "clip_range": CLIP,
            "dual_clip": DUAL_CLIP,
            "aggregation": CHOICE,
            "kl_coef": Number((-0.1, INF)),
            "momentum": Number((-0.1, 1.0, 1.5), tensors=False),
            "objectives": Values(((0, ValueError, "0"), (-1, ValueError, "-1"), (2.0, TypeError, "float"))),
            "process_group": GROUP,
        },
    ),
    "objective_statistics": Function(
        pk.objective_statistics,
        _TOKENS,
        {
            **PER_TOKEN,
            "logprobs": LOGPROBS,
            "old_logprobs": Floats(PADDED, BESIDE),
            "advantages": ADVANTAGES,
            "importance_weights": Floats(PADDED, BESIDE),
            "noon": FLAG,
            "dual_clip": DUAL_CLIP,
            "pairs": FLAG,
        },
    ),
    "pama_weights": Function(
        pk.pama_weights,
        {"scores": _ones(2, N)},
        {
            "scores": Floats((2, N), ((), (4, 0)), first=True),
            "preference": PREFERENCE,
            "regularization": REGULARIZATION,
            "scale": Values(
                (
                    *((value, ValueError, str(value)) for value in (0.0, -1.0, NAN, INF)),
                    (True, TypeError, "bool"),
                    ("1", TypeError, "str"),
                    (_ones(3), ValueError, "(3,)"),
                    (_ones(2, 1), ValueError, "(2, 1)"),
                    (_ones(2, dtype=torch.int64), TypeError, "int64"),
                    (_ones(2, device="meta"), ValueError, "meta"),
                    (_ones(2).to_sparse(), TypeError, "sparse"),
                )
            ),
            "out": OUT,
        },
    ),
    "min_norm_weights": Function(
        pk.min_norm_weights,
        {"gram": torch.eye(N).repeat(2, 1, 1)},
        {"gram": GRAM, "preference": PREFERENCE, "regularization": REGULARIZATION, "out": OUT},
    ),
    "upgrad_weights": Function(
        pk.upgrad_weights,
        {"gram": torch.eye(N).repeat(2, 1, 1)},
        {"gram": GRAM, "preference": PREFERENCE, "out": OUT},
    ),
    "pareto_gap": Function(
        pk.pareto_gap,
        {"gram": torch.eye(N).repeat(2, 1, 1), "weights": _ones(2, N) / N},
        {"gram": GRAM._replace(wrong=GRAM.wrong[:4]), "weights": Floats((2, N))},
    ),
    "multi_objective_gae": Function(
        pk.multi_objective_gae,
        {"rewards": _ones(B, T, N), "values": _ones(B, T, N)},
        {
            "rewards": Floats((B, T, N), ((B, T), (B, T, N, 1), (N,)), first=True),
            "values": Floats((B, T, N)),
            "mask": mask(PADDED),
            "dones": mask(PADDED),
            "truncated": Values(()),
            "last_values": Floats((B, N), (*_sizes((B, N)), (B, T), (B, T, N), (B, 1, N))),
            "final_values": Values(((_ones(B, T, N), ValueError, "a tensor"),)),
            "gamma": Number((-0.1, 1.1)),
            "lam": Number((-0.1, 1.1)),
        },
    ),
    "multi_objective_gae, truncated": Function(
        pk.multi_objective_gae,
        {
            "rewards": _ones(B, T, N),
            "values": _ones(B, T, N),
            "truncated": _ones(B, T),
            "final_values": _ones(B, T, N),
        },
        {"truncated": mask(PADDED), "final_values": Floats((B, T, N))},
    ),
    "group_normalize": Function(
        pk.group_normalize,
        {"rewards": _ones(6, N)},
        {
            "rewards": Floats((6, N), ((6,), (6, N, 1), ()), first=True),
            "group_size": Values(
                (
                    *((value, ValueError, str(value)) for value in (4, 0, -2, 12)),
                    *((value, TypeError, type(value).__name__) for value in (2.0, True, "2")),
                )
            ),
            "group_ids": Floats((6,), ((5,), (6, 1)), dtypes=(torch.float32, torch.complex64)),
            "scale": FLAG,
            "eps": Number((-1.0, INF), tensors=False),
        },
    ),
    "masked_whiten": Function(
        pk.masked_whiten,
        {"advantages": _ones(B, T, N), "mask": _ones(B, T)},
        {
            "advantages": ADVANTAGES,
            "mask": mask(PADDED, ((B, T, N), (T, B))),
            "objective_mask": PER_TOKEN["objective_mask"],
            "process_group": GROUP,
        },
    ),
    "Pama": Function(
        pk.Pama,
        {},
        {
            "weights_per": CHOICE,
            "bound": Values(CHOICE.values[::2]),
            "noon": FLAG,
            "regularization": REGULARIZATION,
        },
    ),
    "SoftMin": Function(pk.SoftMin, {}, {"temperature": Number((0.0, -1.0, INF)), "weights_per": CHOICE}),
}


def _same(f: str) -> str:
    return f.split(",")[0]


# What no single argument has wrong: function, changes, error, argument, what came.
_LP, _IDS = _ones(B, T), torch.zeros(6, dtype=torch.int64)
_NONE = dict.fromkeys(("logprobs", "old_logprobs", "mask", "ref_logprobs"))
_PACKED = {"advantages": _ones(M, N), "mask": _ones(M), "cu_seqlens": OFFSETS}
COMBINATIONS: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
    ("combine_advantages", {"old_logprobs": _LP, "clip_range": 0.2}, ValueError, "old_logprobs", "tensor"),
    ("objective_statistics", {"logprobs": None}, ValueError, "old_logprobs", "tensor"),
    ("combine_advantages", {"logprobs": _LP, "old_logprobs": _LP}, ValueError, "clip_range", "None"),
    ("pama_loss", {"clip_range": None}, ValueError, "clip_range", "None"),
    ("pama_loss", {"logprobs": None}, TypeError, "logprobs", "NoneType"),
    ("pama_loss", {"advantages": None}, TypeError, "advantages", "NoneType"),
    ("pama_loss", {"kl_coef": 0.1, "ref_logprobs": None}, ValueError, "ref_logprobs", "None"),
    ("pama_loss", {"kl_coef": torch.tensor(0.1), "ref_logprobs": None}, ValueError, "ref_logprobs", "None"),
    ("pama_loss", {"dual_clip": 3.0, "clip_range": (0.2, 2.5)}, ValueError, "dual_clip", "3.0"),
    ("pama_loss", {"dual_clip": 3.0, "clip_range": (0.2, INF)}, ValueError, "dual_clip", "3.0"),
    (
        "pama_loss",
        {"process_group": object(), "rule": pk.Pama("token")},
        ValueError,
        "process_group",
        "several",
    ),
    (
        "combine_advantages",
        {"process_group": object(), "rule": "softmin"},
        ValueError,
        "process_group",
        "several",
    ),
    ("combine_advantages", {**FLAT, "mask": _ones(M), "rule": "softmin"}, ValueError, "rule", "none"),
    (
        "combine_advantages",
        {**FLAT, "mask": _ones(M), "aggregation": "seq-mean-token-mean"},
        ValueError,
        "aggregation",
        "none",
    ),
    (
        "combine_advantages",
        {**FLAT, "mask": _ones(M), "weights": _ones(B, N)},
        ValueError,
        "weights",
        "(4, 3)",
    ),
    (
        "combine_advantages",
        {**FLAT, "mask": _ones(M), "objective_mask": _ones(B, N)},
        ValueError,
        "objective_mask",
        "(4, 3)",
    ),
    ("combine_advantages", {**_PACKED, "advantages": _ones(B, N)}, ValueError, "advantages", "(4, 3)"),
    ("combine_advantages", {**_PACKED, "advantages": _ones(M, 1, N)}, ValueError, "advantages", "(20, 1, 3)"),
    ("combine_advantages", {**_PACKED, "mask": _ones(B, T)}, ValueError, "mask", "(4, 5)"),
    (
        "combine_advantages",
        {**_PACKED, "objective_mask": _ones(B, N)},
        ValueError,
        "objective_mask",
        "(4, 3)",
    ),
    (
        "combine_advantages",
        {**_PACKED, "advantages": _ones(3, N), "objective_mask": _ones(M, N)},
        ValueError,
        "objective_mask",
        "(20, 3)",
    ),
    ("combine_advantages", {**_PACKED, "weights": _ones(B, N)}, ValueError, "weights", "(4, 3)"),
    ("pama_loss", {"cu_seqlens": OFFSETS}, ValueError, "logprobs", "(4, 5)"),
    ("PamaLoss", {"momentum": 0.9, "rule": pk.Pama("token")}, ValueError, "momentum", "token"),
    ("PamaLoss", {"momentum": 0.9, "rule": "softmin"}, ValueError, "momentum", "sequence"),
    ("Pama", {"bound": "gram", "weights_per": "token"}, ValueError, "bound", "'token'"),
    ("Pama", {"bound": "gram", "weights_per": "sequence"}, ValueError, "bound", "'sequence'"),
    ("multi_objective_gae", {"truncated": _ones(B, T)}, ValueError, "final_values", "None"),
    ("group_normalize", {"group_ids": _IDS, "group_size": 2}, ValueError, "group_ids", "both"),
    *(
        ("combine_advantages", {**_PACKED, "cu_seqlens": torch.tensor(wrong)}, ValueError, "cu_seqlens", "")
        for wrong in (
            [0, 12, 5, 20],
            [0, 5, 12, 19],
            [0, 5, 12, 21],
            [1, 5, 20],
            [-1, 5, 20],
            [0],
            [0, 25, 12, 20],
        )
    ),
    (
        "combine_advantages",
        {"advantages": _ones(3, N), "mask": None, "cu_seqlens": OFFSETS[[0, 2, 1, 3]]},
        ValueError,
        "cu_seqlens",
        "",
    ),
]
CASES = [
    *(
        (f, {argument: value}, error, argument, came)
        for f, function in FUNCTIONS.items()
        for argument, kind in function.kinds.items()
        for value, error, came in kind.bad()
    ),
    *COMBINATIONS,
]
COMPUTED_FIRST = {"rule", "cu_seqlens"}  # a callable's result, and offsets, are seen when they are used


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_its_kind(name: str) -> None:
    kinds = [set(f.kinds) for other, f in FUNCTIONS.items() if _same(other) == _same(name)]
    assert set.union(*kinds) == set(inspect.signature(FUNCTIONS[name].call).parameters)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}-{case[4] or '?'}")
def test_a_bad_argument_is_named(
    case: tuple[str, dict[str, Any], type[Exception], str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, error, argument, came = case
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
    assert came in rest, message
    assert "expected" in rest or "need" in rest, message


@pytest.mark.parametrize(
    "name", [name for name, f in FUNCTIONS.items() if any("first" in str(k) for k in f.kinds.values())]
)
def test_a_device_without_a_backend_is_named(name: str) -> None:
    function = FUNCTIONS[name]
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in function.good.items()}
    if name in ("pareto_gap", "masked_whiten"):  # plain torch: any device
        function.call(**moved)
        return
    with pytest.raises(RuntimeError, match=r"no backend.*meta.*pama_kernels\.info"):
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
    function, out = FUNCTIONS[name], _solution((2, N))
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
