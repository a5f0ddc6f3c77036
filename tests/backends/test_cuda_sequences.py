"""`apply` of the CUDA backend and its kernel for advantages per sequence, run on the host: a session with the
plugin `cuda_emulation`, which lets the CPU backend write what the pass over the tokens writes.
"""

from __future__ import annotations

import functools
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
from pama_kernels._call import Outputs, Tokens
from pama_kernels._layout import check_tokens
from pama_kernels._validate import MASKS
from pama_kernels.backends import registry
from pama_kernels.rules import record

if "PAMA_CUDA_EMULATED" not in os.environ:
    reason = "needs PAMA_CUDA_EMULATED, the module that cuda_emulation.py builds"
    pytest.skip(reason, allow_module_level=True)
from pama_kernels.backends import cuda

pytestmark = pytest.mark.portable
RULES: tuple[Any, ...] = (pk.Fixed(), pk.UPGrad(), pk.Pama(), pk.Pama(noon=True), pk.Pama(bound="scores"))


def test_apply_calls_the_second_pass_of_the_next_backend() -> None:
    assert registry.find("cpu", "apply") is cuda
    following = registry.find("cpu", registry.SOLVED, after="cuda")
    assert following is registry.load("cpu", "cpu")
    with pytest.raises(RuntimeError, match=r"behind cpu, which leaves it to the next; triton: "):
        registry.find("cpu", registry.SOLVED, after="cpu")


def _preferences(n: int) -> list[Tensor | None]:
    rising, last = torch.arange(1.0, n + 1).double(), torch.eye(n).double()[-1]
    return [None, rising / rising.sum(), last]


def _tokens(problem: Any, **settings: Any) -> Tokens:
    given: dict[str, Any] = {"clip_range": 0.2, "aggregation": "token-mean"}
    names = ("objective_mask", "logprobs", "old_logprobs", "cu_seqlens")
    given |= {name: getattr(problem, name) for name in names}
    return check_tokens(problem.advantages, problem.mask, **given | settings)[0]


def _outputs(advantages: bool, **asked: Any) -> Outputs:
    given = {"loss": False, "gradient": False, "statistics": True, "pairs": True, "normalize": False}
    return Outputs(advantages, **given | asked, normalizer=None, kl_coef=0.0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_weights_of_apply_are_those_of_its_statistics(rule: Any) -> None:
    for layout, n in itertools.product(("padded", "per-sequence", "packed"), (1, 2, 3, 4, 6, 17)):
        problem = make(layout, rows=20, width=13, objectives=n)
        problem.advantages[..., 0] = 0
        tokens = _tokens(problem)
        for p in _preferences(n):
            result = cuda.apply(tokens, record(rule), p, None, _outputs(True))
            assert torch.equal(result.sums, cuda.statistics(tokens, True))
            c, optimum, _ = cuda.solve(result.sums, record(rule), p, n)
            torch.testing.assert_close(result.weights, c.float(), rtol=0, atol=1e-6)
            torch.testing.assert_close(result.optimum, optimum.float(), rtol=0, atol=1e-6)


# --- advantages per sequence: one launch ----------------------------------------------------------------


def _launches(call: Any) -> tuple[int, Any]:
    before = cuda.build_info()["launches"]
    result = call()
    return cuda.build_info()["launches"] - before, result


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask", [None, *MASKS], ids=str)
def test_combined_advantages_in_one_launch(mask: torch.dtype | None, normalize: bool) -> None:
    for seed, (rows, width, n) in enumerate(((1, 1, 1), (3, 200, 2), (40, 5, 3), (20, 67, 5), (33, 16, 16))):
        problem = make("per-sequence", rows=rows, width=width, objectives=n, seed=seed)
        given = None if mask is None else problem.mask.to(mask)
        if given is not None and given.is_floating_point():
            given = torch.where(given > 0, given, -0.0)  # which is zero too
        here = torch.rand(rows, n) < 0.7
        for rule, aggregation, present in itertools.product(
            RULES, ("token-mean", "seq-mean-token-mean"), (None, here)
        ):
            if n > rows and isinstance(rule, pk.UPGrad):
                continue  # more than one point may be optimal
            asked: dict[str, Any] = {"rule": rule, "aggregation": aggregation, "normalize": normalize}
            asked["objective_mask"] = present
            launches, x = _launches(
                functools.partial(pk.combine_advantages, problem.advantages, given, **asked)
            )
            assert launches == 1
            y = reference.combine_advantages(problem.advantages, given, **asked)
            near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
            if getattr(rule, "regularization", 1.0) > 0:
                torch.testing.assert_close(x.weights, y.weights, **near)
                torch.testing.assert_close(x.advantages, y.advantages, **near)
            torch.testing.assert_close(x.optimum, y.optimum, **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_combined_advantages_in_their_own_dtype(dtype: torch.dtype) -> None:
    problem = make("per-sequence", rows=9, width=30, objectives=3)
    given = problem.advantages.to(dtype)
    for normalize in (False, True):
        x = pk.combine_advantages(given.T.contiguous().T, problem.mask, normalize=normalize)
        y = reference.combine_advantages(given, problem.mask, normalize=normalize)
        assert x.advantages.dtype == dtype
        assert x.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(x.advantages.double(), y.advantages.double(), **near)


def test_sequences_without_a_token_and_nan() -> None:
    problem = make("per-sequence", rows=12, width=9, objectives=3)
    problem.mask[4] = 0
    wanted = pk.combine_advantages(problem.advantages, problem.mask, normalize=True)
    problem.advantages[4] = math.nan
    result = pk.combine_advantages(problem.advantages, problem.mask, normalize=True)
    assert float(result.advantages[4]) == 0
    for x, y in zip(result[:3], wanted[:3], strict=True):
        assert torch.equal(x, y)
    problem.advantages[5, 1] = math.nan
    result = pk.combine_advantages(problem.advantages, problem.mask)
    assert bool(result.weights.isnan().all())
    assert bool(result.advantages[problem.mask.bool().any(1)].isnan().all())


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("layout", ["per-sequence", "packed-per-sequence"])
def test_factors_of_the_loss(layout: str, aggregation: str) -> None:
    """The pass over the tokens needs no objective: up, down and the token weight of each sequence."""
    for rows, noon in itertools.product((2, 11, 40), (False, True)):
        problem = make(layout, rows=rows, width=70, objectives=4)
        tokens = _tokens(problem, aggregation=aggregation, noon=noon)
        found = cuda._sequences(tokens, record(pk.Pama()), None, (True, True, False, True, False))
        assert found is not None
        combined, c, _, sums, _, factors = found
        assert c is not None
        assert torch.equal(sums, cuda.statistics(tokens, True))
        assert problem.mask is not None
        valid = problem.mask.double()
        if problem.cu_seqlens is None:
            count = valid.sum(1)
        else:
            total = torch.cat([torch.zeros(1).double(), valid.cumsum(0)])
            count = total[problem.cu_seqlens.long()].diff()
        a, c = problem.advantages.double(), c.double()
        up, down = (c * a.clamp(min=0)).sum(1), (c * a.clamp(max=0)).sum(1) * (0 if noon else 1)
        omega = 1 / count.clamp(min=1) if aggregation == "seq-mean-token-mean" else torch.ones_like(count)
        wanted = torch.stack([up, down, omega], 1) * (count > 0)[:, None]
        torch.testing.assert_close(factors, wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(combined, (wanted[:, 0] + wanted[:, 1]).float(), rtol=1e-6, atol=1e-6)


def test_many_objectives_take_the_general_path() -> None:
    problem = make("per-sequence", rows=3, width=2, objectives=17)
    launches, x = _launches(lambda: pk.combine_advantages(problem.advantages, problem.mask))
    assert launches > 1
    y = reference.combine_advantages(problem.advantages, problem.mask)
    torch.testing.assert_close(x.advantages.double(), y.advantages.double(), rtol=1e-4, atol=1e-4)
