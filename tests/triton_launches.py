"""Which Triton kernels a call launches, counted in the interpreter: run by `test_triton.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import AGGREGATIONS, make

import pama_kernels as pk
from pama_kernels.backends.triton import launch

SCORES = pk.Pama(bound="scores")


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_of_a_loss(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token one pass where nothing else is needed, per batch two; a matrix is solved in between."""
    arguments = make("padded", rows=3, width=5, objectives=2).loss_arguments()
    rows, means = aggregation == "seq-mean-token-mean", aggregation == "token-mean"
    first = ["count"] if rows else []
    wanted = {
        SCORES: [*first, "tokens", "tokens"],
        pk.Pama(): [*first, "tokens", "solve", "tokens"],
        pk.UPGrad(): [*first, "tokens", "solve", "tokens"],
        pk.Pama("token"): ["count", "tokens"] if rows or means else ["tokens"],
        pk.SoftMin(): [*first, "tokens", "row_weights", "tokens"],
    }
    for rule, kernels in wanted.items():
        call = lambda r=rule: pk.pama_loss(**arguments, rule=r, aggregation=aggregation)  # noqa: E731
        assert launches(monkeypatch, call) == kernels, rule


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (SCORES, ["row_sums", "rows", "rows", "tokens"]),
        (pk.Pama(), ["row_sums", "rows", "solve", "rows", "tokens"]),
        (pk.SoftMin(), ["row_sums", "rows", "tokens"]),
    ],
)
def test_of_advantages_per_sequence(rule: Any, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    p = make("per-sequence", rows=3, width=5, objectives=2)
    assert launches(monkeypatch, lambda: pk.pama_loss(**p.loss_arguments(), rule=rule)) == wanted
    combine = lambda: pk.combine_advantages(**p.combine_arguments(False), rule=rule)  # noqa: E731
    assert launches(monkeypatch, combine) == wanted[:-1]


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("padded", ["tokens", "pairs", "add_pairs"]),
        ("per-sequence", ["row_sums", "rows", "row_pairs", "add_pairs"]),
    ],
)
def test_of_many_pairs(layout: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    p = make(layout, rows=3, width=5, objectives=9)
    gram = lambda: pk.objective_statistics(**p.statistics_arguments(), pairs=True)  # noqa: E731
    assert launches(monkeypatch, gram) == wanted


def test_one_launch_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 3)
    calls = {
        "weights": lambda: pk.pama_weights(x),
        "gram": lambda: pk.min_norm_weights(x @ x.mT),
        "gae": lambda: pk.multi_objective_gae(x, x),
        "group_normalize": lambda: pk.group_normalize(x[:, 0], group_size=2),
    }
    for name, call in calls.items():
        assert launches(monkeypatch, call) == [name]
    assert launches(monkeypatch, lambda: pk.upgrad_weights(x @ x.mT)) == ["gram"]
