"""The CUDA kernels run on the host, thread by thread, against the specification: a session with the plugin
`cuda_emulation`, in which the portable properties run too.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from problems import make
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels.backends import registry
from pama_kernels.rules import record

if "PAMA_CUDA_EMULATED" not in os.environ:
    reason = "needs PAMA_CUDA_EMULATED, the module that cuda_emulation.py builds"
    pytest.skip(reason, allow_module_level=True)
from pama_kernels.backends import cuda

pytestmark = pytest.mark.portable
RULES: tuple[Any, ...] = (
    pk.Fixed(),
    pk.UPGrad(),
    pk.Pama(),
    pk.Pama(regularization=0.0),
    pk.Pama(bound="scores"),
    pk.Pama(bound="scores", regularization=0.0),
)


def test_the_emulated_backend_is_used() -> None:
    for name in ("statistics", "solve", "weights", "min_norm", "upgrad"):
        assert registry.find("cpu", name) is cuda


# --- weights of the batch -----------------------------------------------------------------------------


def _preferences(n: int) -> list[Tensor | None]:
    rising, last = torch.arange(1.0, n + 1).double(), torch.eye(n).double()[-1]
    return [None, rising / rising.sum(), last]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 18])
def test_weights_of_the_batch(n: int) -> None:
    for seed, noon in ((0, False), (1, True), (2, False)):
        here = torch.bool if seed == 1 else None
        problem = make(rows=4, width=15, objectives=n, seed=seed, objective_mask=here)
        if seed > 0:
            problem.advantages[..., seed % n] = 0  # no signal
        arguments = problem.statistics_arguments()
        sums = pk.objective_statistics(**arguments, noon=noon, pairs=True).buffer
        spelled = reference.objective_statistics(**arguments, noon=noon)
        for rule, p in itertools.product(RULES, _preferences(n)):
            c, optimum, effective = cuda.solve(sums, record(rule), p, n)
            wanted, wanted_optimum, wanted_effective = reference.batch_weights(spelled, rule, p, n)
            near: dict[str, Any] = {"rtol": 0, "atol": 2e-5}
            torch.testing.assert_close(effective, wanted_effective, **near)
            torch.testing.assert_close(optimum, wanted_optimum, **near)
            assert float(optimum) >= 0 or "scores" in str(rule) or isinstance(rule, pk.Fixed)
            if getattr(rule, "regularization", 1.0) > 0:  # else more than one point may be optimal
                torch.testing.assert_close(c, wanted, **near)
            assert abs(float(c.sum()) - 1) < 1e-12
            assert bool((c >= 0).all())


def sums_of(problem: Any) -> Tensor:
    return pk.objective_statistics(**problem.statistics_arguments(), pairs=True).buffer


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_signal_and_nan(rule: Any) -> None:
    n, p = 3, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    problem = make("padded", objectives=n)
    problem.advantages.zero_()
    c, optimum, effective = cuda.solve(sums_of(problem), record(rule), p, n)
    assert torch.equal(c, p)
    assert torch.equal(effective, p)
    assert float(optimum) == 0
    problem.advantages.fill_(math.nan)
    c, optimum, effective = cuda.solve(sums_of(problem), record(rule), p, n)
    assert torch.equal(effective, p)
    assert bool(optimum.isnan())
    assert isinstance(rule, pk.Fixed) or bool(c.isnan().all())


# --- many problems ------------------------------------------------------------------------------------


def _grams(n: int, seed: int, count: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(count, n, n + 2, generator=g, dtype=torch.float64)
    return factors @ factors.transpose(-1, -2)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 12, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_solvers(n: int, dtype: torch.dtype) -> None:
    gram = _grams(n, n).to(dtype)
    scores = torch.randn(6, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    near: dict[str, Any] = {
        "rtol": 1e-5,
        "atol": 1e-6 if dtype != torch.float64 else 1e-9,
        "check_dtype": False,
    }
    for preference in _preferences(n):
        for views in (gram, gram.transpose(-1, -2), gram[::2]):
            for r in (0.0, 0.1):
                x = pk.min_norm_weights(views, preference=preference, regularization=r)
                y = reference.min_norm_weights(views, preference=preference, regularization=r)
                torch.testing.assert_close(tuple(x), tuple(y), **near)
            x = pk.upgrad_weights(views, preference=preference)
            y = reference.upgrad_weights(views, preference=preference)
            torch.testing.assert_close(tuple(x), tuple(y), **near)
        for views in (scores, scores[::2], scores.T.contiguous().T):
            for r, scale in ((0.0, None), (0.1, None), (0.1, 2.0)):
                x = pk.pama_weights(views, preference=preference, regularization=r, scale=scale)
                y = reference.pama_weights(views, preference=preference, regularization=r, scale=scale)
                torch.testing.assert_close(tuple(x), tuple(y), **near)


@pytest.mark.parametrize("n", [2, 5])
def test_results_in_given_memory(n: int) -> None:
    gram, scores = _grams(n, 1), torch.randn(5, n, dtype=torch.float64)
    for solver, given in ((pk.min_norm_weights, gram), (pk.upgrad_weights, gram), (pk.pama_weights, scores)):
        out = pk.WeightSolution(torch.empty(5, n, dtype=torch.float64), torch.empty(5, dtype=torch.float64))
        solver(given, out=out)
        for x, y in zip(out, solver(given, preference=[1.0] * n), strict=True):
            assert torch.equal(x, y)


def test_a_nan_affects_only_its_matrix() -> None:
    gram = _grams(3, 2)
    gram[1, 0, 2] = math.nan
    for solver in (pk.min_norm_weights, pk.upgrad_weights):
        c, optimum = solver(gram, preference=[1.0, 1.0, 1.0])
        assert c.isnan().any(-1).tolist() == [False, True, False, False, False]
        assert optimum.isnan().tolist() == [False, True, False, False, False]
