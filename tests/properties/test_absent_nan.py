"""NaN weights and NaN advantages beside objectives that are absent."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from _tables import loss_of
from problems import make
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, UPGrad


@pytest.mark.portable
@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
def test_a_nan_weight_is_visible_at_tokens_where_its_objective_is_absent(layout: str) -> None:
    """0 times NaN, as in the specification; 0 where no objective is present and where the token is masked."""
    problem = make(layout, rows=12, width=7, objective_mask=torch.bool, seed=3)

    def rule(s: pk.ObjectiveStatistics) -> Tensor:
        return torch.tensor([math.nan, 0.5, 0.5], device=s.scores.device)

    arguments = problem.combine_arguments(False)
    got = pk.combine_advantages(**arguments, rule=rule).advantages
    wanted = pk.reference.combine_advantages(**arguments, rule=rule).advantages
    assert got.isnan().tolist() == wanted.isnan().tolist()
    assert set(wanted.isnan().flatten().tolist()) == {False, True}
    output, gradient = loss_of(problem, rule=rule)
    assert bool(output.loss.isnan())
    whole = loss_of(replace(problem, objective_mask=None), rule=rule)[1]
    present = problem.objective_mask
    assert present is not None
    some = present.any(-1)[:, None] if present.dim() == 2 else present.any(-1)
    assert torch.equal(gradient.isnan(), whole.isnan() & some)


@pytest.mark.portable
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (3, 2)], ids=str)
def test_a_nan_where_the_objectives_present_have_no_preference(
    place: tuple[int, int], per_sequence: bool
) -> None:
    """The weights are 0 there, whatever they are elsewhere; 0 times a NaN advantage is NaN."""
    advantages = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.5], [2.0, 1.0, -1.0], [-3.0, 1.0, 2.0]])
    present = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]]).bool()
    advantages[place] = math.nan
    given = advantages if per_sequence else advantages[:, None].expand(4, 2, 3).contiguous()
    mask = torch.ones(4, 2, dtype=torch.bool)
    for rule in (Fixed(), Pama(), UPGrad(), lambda s: s.scores.new_full((3,), math.nan)):
        arguments: dict[str, Any] = {"rule": rule, "objective_mask": present, "preference": [0.0, 0.5, 0.5]}
        got = pk.combine_advantages(given, mask, **arguments).advantages
        wanted = pk.reference.combine_advantages(given, mask, **arguments).advantages
        assert got.isnan().tolist() == wanted.isnan().tolist()
        assert bool(wanted[0].isnan().any()) is (place == (0, 0))
        output = pk.pama_loss(
            torch.zeros(4, 2), None, given, mask, **arguments, aggregation="seq-mean-token-sum"
        )
        assert bool(output.loss.isnan()) is bool(wanted.isnan().any())
