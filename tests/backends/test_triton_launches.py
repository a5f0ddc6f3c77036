"""Which Triton kernels a call launches, counted in the interpreter: a session with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import AGGREGATIONS, make

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad
from pama_kernels.backends.registry import ALL, find

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("PAMA_BACKEND") != "triton":
    reason = "counts launches in Triton's interpreter: PAMA_BACKEND=triton TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)
from pama_kernels.backends.triton import launch

pytestmark = pytest.mark.portable


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[str]:
    found: list[str] = []
    run = launch.run

    def counted(kernel: Any, *rest: Any) -> None:
        found.append(kernel.fn.__name__.removesuffix("_kernel"))
        run(kernel, *rest)

    monkeypatch.setattr(launch, "run", counted)
    call()
    monkeypatch.undo()
    return found


def test_public_functions_launch_the_expected_kernels() -> None:
    assert launch.INTERPRETED
    for name in ALL:
        assert find("cpu", name).__name__ == "pama_kernels.backends.triton"


# FIXED and SCORES are solved by the last program of the statistics, the matrices in a launch of their own.
BATCH_WEIGHTS = [
    (Fixed(), []),
    (Pama(bound="scores"), []),
    (Pama(), ["solve"]),
    (UPGrad(), ["solve"]),
]


@pytest.mark.parametrize(("rule", "solve"), BATCH_WEIGHTS, ids=str)
def test_launches_with_weights_of_the_batch(
    rule: Any, solve: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for layout, aggregations in (("padded", AGGREGATIONS), ("flat", AGGREGATIONS[:1])):
        p = make(layout, rows=3, width=5, objectives=2)
        for aggregation in aggregations:
            count = ["count"] if aggregation == "seq-mean-token-mean" else []
            options: dict[str, Any] = {"rule": rule, "aggregation": aggregation}
            loss = launches(monkeypatch, lambda o=options, p=p: pk.pama_loss(**p.loss_arguments(), **o))
            assert loss == [*count, "tokens", *solve, "tokens"]
        combine = lambda p=p: pk.combine_advantages(**p.combine_arguments(False), rule=rule)  # noqa: E731
        assert launches(monkeypatch, combine) == ["tokens", *solve, "tokens"]
    for layout in ("packed-per-sequence",):
        p = make(layout, rows=3, width=5, objectives=2)
        loss = launches(monkeypatch, lambda p=p: pk.pama_loss(**p.loss_arguments(), rule=rule))
        assert loss == ["row_sums", "rows", *solve, "rows", "tokens"]
        combine = lambda p=p: pk.combine_advantages(**p.combine_arguments(False), rule=rule)  # noqa: E731
        assert launches(monkeypatch, combine) == ["row_sums", "rows", *solve, "rows"]


@pytest.mark.parametrize("rule", [Pama("token"), SoftMin(1.0, "token")], ids=str)
def test_launches_with_weights_per_token(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("padded", "per-sequence"):
        p = make(layout, rows=3, width=5, objectives=2)
        for aggregation in AGGREGATIONS:
            count = [] if aggregation == "seq-mean-token-sum" else ["count"]
            options: dict[str, Any] = {"rule": rule, "aggregation": aggregation}
            loss = launches(monkeypatch, lambda o=options, p=p: pk.pama_loss(**p.loss_arguments(), **o))
            assert loss == [*count, "tokens"]


@pytest.mark.parametrize("rule", [Pama("sequence"), SoftMin()], ids=str)
def test_launches_with_weights_per_sequence(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = make("padded", rows=3, width=5, objectives=2)
    loss = launches(monkeypatch, lambda: pk.pama_loss(**p.loss_arguments(), rule=rule))
    assert loss == ["tokens", "row_weights", "tokens"]
    row = make("per-sequence", rows=3, width=5, objectives=2)
    combine = lambda: pk.combine_advantages(**row.combine_arguments(False), rule=rule)  # noqa: E731
    assert launches(monkeypatch, combine) == ["row_sums", "rows"]


def test_launches_of_the_other_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 3)
    gram = x @ x.mT
    wide = torch.randn(2, 3, 40)
    calls = {
        ("weights",): lambda: pk.pama_weights(x),
        ("gram",): lambda: pk.min_norm_weights(gram),
        ("gram", "gram"): lambda: (pk.upgrad_weights(gram[:1]), pk.upgrad_weights(gram[:1, :2, :2])),
        ("tokens",): lambda: pk.objective_statistics(None, None, x, pairs=True),
        ("tokens", "add_pairs"): lambda: pk.objective_statistics(None, None, wide, pairs=True),
        ("gae",): lambda: pk.multi_objective_gae(x, x),
        ("group_normalize",): lambda: pk.group_normalize(x[:, 0], group_size=2),
    }
    for names, call in calls.items():
        found = launches(monkeypatch, call)
        assert found[: len(names)] == list(names) or set(found) == {"tokens", "pairs", "add_pairs"}, found
