"""16-bit tensors give the results of float32 tensors with the same values, rounded once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import same
from torch import Tensor

import pama_kernels as pk

pytestmark = pytest.mark.cpu

ROWS, WIDTH, N = 6, 1101, 3  # three chunks a row, the last one not of whole vectors
HALVES = [torch.bfloat16, torch.float16]
WEIGHTS = torch.tensor([0.2, 0.3, 0.5])
CALLS: dict[str, dict[str, Any]] = {
    "UPGrad": {},
    "Noon": {"rule": pk.Pama.paper("batch")},
    "sequence": {"rule": pk.Pama("sequence"), "aggregation": "seq-mean-token-mean"},
    "given": {"weights": WEIGHTS},
    "given, no statistics": {"weights": WEIGHTS, "statistics": False},
    "given per sequence": {"weights": torch.linspace(0, 1, ROWS * N).reshape(ROWS, N)},
    "KL penalty": {"kl_coef": 0.1},
    "importance weights": {},
}


def _problem(dtype: torch.dtype) -> list[Tensor]:
    """logprobs, old, advantages, mask, a reference and importance weights."""
    g = torch.Generator().manual_seed(5)
    old = torch.randn(ROWS, WIDTH, generator=g) - 2
    logprobs = old + 0.3 * torch.randn(ROWS, WIDTH, generator=g)
    logprobs[:, :12] += torch.linspace(-30, 30, 12)  # some beyond the clamp of the log ratio
    advantages = torch.randn(ROWS, N, generator=g)
    mask = torch.rand(ROWS, WIDTH, generator=g) < 0.8
    reference = old + 0.1 * torch.randn(ROWS, WIDTH, generator=g)
    weights = torch.rand(ROWS, WIDTH, generator=g)
    return [x if x is mask else x.to(dtype) for x in (logprobs, old, advantages, mask, reference, weights)]


def _results(name: str, logprobs: Tensor, old: Tensor, *rest: Tensor) -> list[Tensor]:
    advantages, mask, reference, weights = rest
    settings = dict(CALLS[name])
    if name == "KL penalty":
        settings["ref_logprobs"] = reference
    if name == "importance weights":
        settings["importance_weights"] = weights
    leaf = logprobs.detach().requires_grad_()
    output = pk.pama_loss(leaf, old, advantages, mask, clip_range=(0.2, 0.3), dual_clip=2.0, **settings)
    output.loss.backward()
    assert leaf.grad is not None
    found = [leaf.grad, output.loss, output.weights]
    return found if output.statistics is None else [*found, output.statistics.buffer]


def _strided(x: Tensor) -> Tensor:
    """The same values, two elements apart."""
    return torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_float32_rounded_once(isa: str, name: str, dtype: torch.dtype) -> None:
    problem = _problem(dtype)
    logprobs, old, *rest = problem
    wanted = _results(name, *(x if x.dtype == torch.bool else x.float() for x in problem))
    variants = {
        "contiguous": problem,
        "strided": [_strided(logprobs), _strided(old), *rest],
        "strided in part": [logprobs, _strided(old), *rest],
        "old in float32": [logprobs, old.float(), *rest],
        "logprobs in float32": [logprobs.float(), old, *rest],
    }
    for variant, inputs in variants.items():
        for found, exact in zip(_results(name, *inputs), wanted, strict=True):
            assert same(found, exact.to(found.dtype)), variant


def _check_against_float32(name: str, problem: list[Tensor]) -> Tensor:
    """Returns the gradient."""
    wanted = _results(name, *(x if x.dtype == torch.bool else x.float() for x in problem))
    results = _results(name, *problem)
    for found, exact in zip(results, wanted, strict=True):
        expected = exact.to(found.dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert same(found.nan_to_num(), expected.nan_to_num())
    return results[0]


@pytest.mark.parametrize("name", CALLS)
def test_rows_of_any_size(isa: str, name: str) -> None:
    """Some of their gradients are computed in float64."""
    logprobs, old, advantages, *rest = _problem(torch.bfloat16)
    advantages *= torch.tensor([[1.0], [1e25], [1.0], [1e-25], [0.0], [1.0]])
    assert _check_against_float32(name, [logprobs, old, advantages, *rest]).isfinite().all()


@pytest.mark.parametrize("at", [700, WIDTH - 1])  # in a chunk of whole vectors, and in the last one
@pytest.mark.parametrize("name", CALLS)
def test_tokens_that_are_not_finite(isa: str, name: str, at: int) -> None:
    far, own, missing = (_problem(torch.bfloat16) for _ in range(3))
    for problem in (far, own, missing):
        problem[3][1, at] = True
    far[0][1, at], far[1][1, at] = 3e38, -3e38  # the difference is not
    own[0][1, at] = math.nan
    missing[4][1, at] = math.nan
    assert _check_against_float32(name, far)[1, at] == 0
    assert _check_against_float32(name, own)[1, at].isnan()
    gradient = _check_against_float32(name, missing)
    assert gradient.isnan().nonzero().tolist() == ([[1, at]] if name == "KL penalty" else [])


def test_gradients_in_bfloat16_do_not_depend_on_the_call_before(isa: str) -> None:
    """The memory of the ratios is used again, by larger and by smaller batches."""
    large = _problem(torch.bfloat16)
    small = [x[:2] for x in large]
    first, second, third, fourth = (_results("UPGrad", *x) for x in (small, large, small, large))
    assert all(map(same, first, third))
    assert all(map(same, second, fourth))


def test_bfloat16_is_rounded_to_nearest_even(isa: str) -> None:
    """Means of two numbers of 8 bits: half of them are ties."""
    g = torch.Generator().manual_seed(3)
    scale = 2.0 ** torch.randint(-130, 120, (3, 70, 1), generator=g)
    pairs = ((1 + torch.randint(0, 128, (3, 70, 2), generator=g) / 128) * scale).bfloat16()
    pairs *= torch.where(torch.rand(3, 70, 1, generator=g) < 0.5, -1, 1)
    pairs[0, 3], pairs[1, 40, 1], pairs[2, 65, 0] = math.nan, math.inf, -math.inf
    found = pk.combine_advantages(pairs, weights=torch.tensor([0.5, 0.5])).advantages
    wanted = pairs.double().mean(-1)
    assert found.dtype == torch.bfloat16
    finite = wanted.isfinite()
    assert torch.equal(found[finite], wanted[finite].bfloat16())
    assert found[~finite].isnan().all()
