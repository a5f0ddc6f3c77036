"""Sums off the grid: any magnitude, small and large log ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from _rough import close, rough
from _sums import sizes, sums
from _tables import loss_of
from problems import AGGREGATIONS, EPS32, SUM_ERROR, Problem

import pama_kernels as pk
from pama_kernels import reference


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("noon", [True, False])
def test_sums_off_the_grid(layout: str, aggregation: str, noon: bool) -> None:
    problem = rough(layout, width=400, importance_weights=True, objective_mask=torch.bool)
    arguments, options = problem.statistics_arguments(), {"aggregation": aggregation}
    found = sums(pk.objective_statistics(**arguments, noon=noon, **options))
    wanted = sums(reference.objective_statistics(**arguments, noon=noon, **options))
    size, _ = sizes(problem, **options)
    for name, value in wanted.items():
        # float32 over 256 tokens; d is rounded too, which 5 eps |logp| relative to u covers
        close(found[name], value, SUM_ERROR * EPS32 * size[name])


@pytest.mark.parametrize("k", [1e-38, 1e-30, 1e-22, 1e-10, 1e10, 1e22, 1e30, 1e37])
@pytest.mark.parametrize("layout", ["padded", "per-sequence"])
def test_sums_of_any_magnitude(layout: str, k: float) -> None:
    """Advantages whose squares are out of float32's range, for all objectives or for one."""
    base = rough(layout, rows=2, width=120, n=3, seed=2)
    for scale in ([k, k, k], [1.0, k, 1.0], [k, 1.0, k]):
        problem = replace(base, advantages=base.advantages * torch.tensor(scale))
        for noon in (True, False):
            got = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, pairs=True)
            wanted = reference.objective_statistics(**problem.statistics_arguments(), noon=noon)
            size, pair_size = sizes(problem)
            # a product may be subnormal in float32: half of 1.4e-45 each, 240 tokens
            subnormal = 240 * 1.5e-45 * (k < 1e-20)
            for name, value in sums(wanted).items():
                squared = name in ("bound_square_sum", "advantage_square_sum")
                tolerance = SUM_ERROR * EPS32 * size[name] + subnormal * (not squared)
                close(sums(got)[name], value, tolerance)
            root = wanted.second_moments.sqrt()
            close(
                got.gram, wanted.gram, SUM_ERROR * EPS32 * torch.maximum(pair_size, torch.outer(root, root))
            )
            assert torch.equal(got.signal, wanted.signal)


def test_small_log_ratios_keep_the_digits_of_the_divergence() -> None:
    """e^d - 1 - d does not cancel: to the behaviour policy, and in the penalty of the loss."""
    for d in (1e-3, 1e-5, 1e-8, -1e-5, -0.25, 0.3, 0.4, 1.0, -3.0, 19.9, -19.9):
        for dtype in (torch.float32, torch.float64):
            logp, zero = torch.full((1, 5), d, dtype=dtype), torch.zeros(1, 5, dtype=dtype)
            kl = pk.objective_statistics(logp, zero, torch.ones(1, 5, 2, dtype=dtype)).approx_kl
            penalty = pk.pama_loss(zero, None, torch.zeros(1, 5, 2).to(dtype), ref_logprobs=logp, kl_coef=1.0)
            x = float(logp[0, 0])
            # Taylor series below 1/8, where the difference of the reference cancels
            wanted = math.expm1(x) - x
            if abs(x) <= 0.125:
                wanted = sum(x**k / math.factorial(k) for k in range(2, 14))
            # 16 roundings of the term, of u where that is larger: above |d| = log(2)/2
            size = wanted if abs(x) < 0.34 else wanted + math.exp(x) + 1 + abs(x)
            for found in (kl, penalty.loss):
                assert abs(float(found) - wanted) <= 16 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_are_clamped_without_a_gradient(dtype: torch.dtype) -> None:
    """Beyond 20, in the ratio and in the penalty; differences that overflow are no exception."""
    d = torch.tensor([[-1e4, -100.0, -20.5, -19.5, 19.5, 20.5, 100.0, 1e4, 3e38]], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0]).to(dtype).expand(1, 9, 2)
    zero = torch.zeros_like(d)
    for options in ({}, {"clip_range": (1.0, math.inf)}, {"kl_coef": 1.0, "ref_logprobs": zero}):
        ref = options.pop("ref_logprobs", None)
        for weights in (torch.tensor([1.0, 0.5]), torch.zeros(2)):
            problem = Problem(d, zero, advantages, ref_logprobs=ref)
            output, gradient = loss_of(problem, weights=weights, **options)
            leaf = d.double().requires_grad_()
            wide = {**problem.loss_arguments(), "logprobs": leaf}
            wanted = reference.pama_loss(**wide, weights=weights, **options).loss
            (exact,) = torch.autograd.grad(wanted, leaf)
            # exponentials of up to 20: 20 eps of each, 9 terms
            eps = torch.finfo(dtype).eps
            assert abs(float(output.loss) - float(wanted.detach())) <= 64 * eps * 9 * 3 * math.exp(20)
            assert torch.allclose(gradient.double(), exact, rtol=64 * eps, atol=eps)
            assert (gradient[d.abs() > 20] == 0).all()
    far = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    s = pk.objective_statistics(far, -far, torch.ones(1, 4, 2))
    assert torch.equal(s.clip_fraction, torch.tensor([0.75, 0.75]).double())
    assert torch.isfinite(s.approx_kl)
