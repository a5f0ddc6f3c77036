"""Which Triton kernels a call launches, counted in the interpreter: run by `test_triton.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import AGGREGATIONS, LAYOUTS, make

import pama_kernels as pk
from pama_kernels.backends.triton import launch


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_launches_per_loss(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(layout, rows=3, width=5, objectives=2)
    for aggregation in AGGREGATIONS if layout != "flat" else AGGREGATIONS[:1]:
        by_row, parts = aggregation == "seq-mean-token-mean", aggregation == "token-mean"
        wanted = {
            "batch": ["statistics", "tokens"],
            "token": ["count", "tokens"] if by_row or parts else ["tokens"],
            "sequence": ["count", "rows"] if parts else ["rows"],
        }
        if layout == "flat":
            del wanted["sequence"]
        for weights_per, kernels in wanted.items():
            options = {"weights_per": weights_per, "aggregation": aggregation}
            found = launches(monkeypatch, lambda o=options: pk.pama_loss(**problem.loss_arguments(), **o))
            assert found == kernels, options
        fixed = {"weights_per": "batch", "weights": torch.ones(2) / 2, "aggregation": aggregation}
        found = launches(monkeypatch, lambda o=fixed: pk.pama_loss(**problem.loss_arguments(), **o))
        assert found == (["count", "tokens"] if by_row or parts else ["tokens"])


@pytest.mark.parametrize(("objectives", "pairs"), [(2, []), (9, ["pairs", "add_pairs"])])
def test_the_gram_matrix_adds_launches(
    objectives: int, pairs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make(rows=3, width=5, objectives=objectives)
    options = {"weights_per": "batch", "bound": "gram"}
    wanted = ["statistics", *pairs, "min_norm", "tokens"]
    calls = {
        "loss": lambda: pk.pama_loss(**problem.loss_arguments(), **options),
        "row means": lambda: pk.pama_loss(
            **problem.loss_arguments(), **options, aggregation="seq-mean-token-mean"
        ),
        "combine": lambda: pk.combine_advantages(**problem.combine_arguments(False), **options),
    }
    for name, call in calls.items():
        assert launches(monkeypatch, call) == wanted, name
    gram = lambda: pk.objective_statistics(**problem.statistics_arguments(), gram=True)  # noqa: E731
    assert launches(monkeypatch, gram) == ["statistics", *pairs]


@pytest.mark.parametrize(
    ("weights_per", "wanted"),
    [("batch", ["statistics", "tokens"]), ("token", ["tokens"]), ("sequence", ["rows"])],
)
def test_launches_of_a_combination(
    weights_per: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make(rows=3, width=5, objectives=2).combine_arguments(False)
    call = lambda: pk.combine_advantages(**arguments, weights_per=weights_per)  # noqa: E731
    assert launches(monkeypatch, call) == wanted


def test_one_launch_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 3)
    calls = {
        "weights": lambda: pk.pama_weights(x),
        "min_norm": lambda: pk.min_norm_weights(x[:, :3] @ x[:, :3].mT),
        "min_norm_pairs": lambda: pk.min_norm_weights(x[:, :2] @ x[:, :2].mT),
        "statistics": lambda: pk.objective_statistics(None, None, x),
        "gae": lambda: pk.multi_objective_gae(x, x),
        "group_normalize": lambda: pk.group_normalize(x[:, 0], group_size=2),
    }
    for name, call in calls.items():
        assert launches(monkeypatch, call) == [name]
