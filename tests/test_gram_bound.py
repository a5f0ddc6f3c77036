"""bound="gram": statistics of pairs, and the weights that follow from them, wherever they are asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from certificates import KKT, OBJECTIVE, kkt_residual, prior_of, skewed
from problems import EPS32, EPS64, LAYOUTS, make, reference_gradient, solution_error
from torch import Tensor

import pama_kernels as pk
from pama_kernels import reference

NAN = math.nan


# --- statistics with pairs ---------------------------------------------------------------------------


def test_gram_conflict_and_overlap_are_what_numpy_says() -> None:
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(7, 30, 4, generator=g, dtype=torch.float64)
    advantages[..., 1] -= advantages[..., 0]
    advantages[..., 3] = -2 * advantages[..., 0]
    mask = torch.rand(7, 30, generator=g) < 0.7
    s = pk.objective_statistics(None, None, advantages, mask, gram=True)
    raw = advantages[mask].numpy()
    bound = np.maximum(raw, 0)
    assert s.gram is not None
    # sums over 150 tokens in float64
    close = {"rtol": 150 * EPS64, "atol": 150 * EPS64}
    np.testing.assert_allclose(s.gram.numpy(), bound.T @ bound / len(raw), **close)
    np.testing.assert_allclose(s.conflict, np.corrcoef(raw.T), **close)
    length = np.linalg.norm(bound, axis=0)
    np.testing.assert_allclose(s.overlap, bound.T @ bound / np.outer(length, length), **close)
    # opposite objectives: in conflict always, and no overlap at all after the clamp
    assert s.conflict[0, 3] == pytest.approx(-1, abs=150 * EPS64)
    assert s.overlap[0, 3] == 0
    raw_gram = pk.objective_statistics(None, None, advantages, mask, noon=False, gram=True).gram
    np.testing.assert_allclose(raw_gram, raw.T @ raw / len(raw), **close)


def test_metrics_name_pairs_weights_and_active_objectives() -> None:
    names = ["helpful", "short", "safe"]
    problem = make("padded", rows=4, width=9, seed=4)
    result = pk.combine_advantages(
        **problem.combine_arguments(), clip_range=0.2, weights_per="batch", bound="gram"
    )
    metrics = result.metrics(names)
    statistics = result.statistics
    for i, first in enumerate(names):
        assert torch.equal(metrics[f"pama/weight/{first}"], result.weights[i])
        assert metrics[f"pama/active/{first}"] == float(result.weights[i] > 0)
        for j in range(i + 1, 3):
            assert torch.equal(metrics[f"pama/conflict/{first}~{names[j]}"], statistics.conflict[i, j])
            assert torch.equal(metrics[f"pama/overlap/{first}~{names[j]}"], statistics.overlap[i, j])
    assert torch.equal(metrics["pama/optimum"], result.optimum)
    assert all(value.dim() == 0 for value in metrics.values())
    assert all(key.startswith("pama/") for key in metrics)
    plain = pk.objective_statistics(**problem.statistics_arguments()).metrics(names)
    assert not any("~" in key for key in plain)


# --- bound="gram" ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("absent", [None, torch.bool])
def test_combine_advantages_with_the_gram_bound(layout: str, noon: bool, absent: Any) -> None:
    for seed, n in enumerate((1, 2, 3, 6)):
        problem = make(layout, rows=4, width=7, objectives=n, seed=seed, objective_mask=absent)
        for prior, regularization in ((None, 0.0), (skewed(n), 0.1)):
            arguments: dict[str, Any] = {**problem.combine_arguments(), "clip_range": 0.2, "noon": noon}
            options: dict[str, Any] = {"weights_per": "batch", "prior": prior}
            options |= {"regularization": regularization, "bound": "gram"}
            got = pk.combine_advantages(**arguments, **options)
            wanted = reference.combine_advantages(**arguments, **options)
            m = wanted.statistics.gram
            largest = float(m.diagonal().max())
            assert torch.allclose(got.statistics.gram, m, rtol=8 * EPS64, atol=0)
            c = got.weights.double()
            there = wanted.statistics.present_count > 0
            assert (c[~there] == 0).all()
            p = prior_of(prior, n)[there].tolist() if prior_of(prior, n)[there].sum() > 0 else None
            residual = kkt_residual(m[there][:, there], c[there], p, regularization)
            # weights are stored in float32
            assert residual <= KKT + 2 * EPS32
            if regularization:
                error = solution_error(problem, options, problem.advantages.dtype)
                assert ((c - wanted.weights).abs() <= error).all()
            assert abs(float(got.optimum) - float(wanted.optimum)) <= (OBJECTIVE + 2 * EPS32) * largest
            # n products of weights and advantages up to 2
            given_weights = reference.combine_advantages(**arguments, weights_per="batch", weights=c)
            error = 8 * n * EPS32
            assert ((got.advantages - given_weights.advantages).abs() <= error).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noon", [True, False])
def test_pama_loss_with_the_gram_bound(layout: str, noon: bool) -> None:
    """Weights are certified for the reference's matrix; loss and gradient are those of these weights."""
    for seed, n in enumerate((2, 3, 5)):
        problem = make(
            layout,
            rows=4,
            width=7,
            objectives=n,
            seed=seed,
            dtype=torch.float64,
            objective_mask=torch.bool if seed else None,
            importance_weights=bool(seed % 2),
        )
        for regularization in (0.0, 0.1):
            options: dict[str, Any] = {"weights_per": "batch", "noon": noon, "clip_range": (0.2, 0.28)}
            solve: dict[str, Any] = {"regularization": regularization, "bound": "gram", "prior": skewed(n)}
            leaf = problem.logprobs.clone().requires_grad_()
            got = pk.pama_loss(**{**problem.loss_arguments(), "logprobs": leaf}, **options, **solve)
            got.loss.backward()
            full = reference.pama_loss(**problem.loss_arguments(), **options, **solve)
            m = full.statistics.gram
            assert torch.allclose(got.statistics.gram, m, rtol=8 * EPS64, atol=0)
            there = full.statistics.present_count > 0
            p = prior_of(skewed(n), n)[there]
            assert kkt_residual(m[there][:, there], got.weights[there], p.tolist(), regularization) <= KKT
            if regularization:
                error = solution_error(problem, options, torch.float64)
                assert ((got.weights - full.weights).abs() <= error).all()
            wanted, gradient = reference_gradient(problem, **options, weights=got.weights)
            # sums over at most 28 tokens and n objectives of terms up to 2 e^1.25 1.5 < 12
            tolerance = 8 * 28 * n * 12 * EPS64
            assert abs(float(got.loss.detach()) - float(wanted.loss)) <= tolerance
            assert leaf.grad is not None
            assert ((leaf.grad - gradient).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gram_bound_of_narrow_inputs(dtype: torch.dtype) -> None:
    """Sums on the grid are exact: the weights are those of float64 inputs."""
    problem, wide = make(rows=6, width=40, dtype=dtype), make(rows=6, width=40, dtype=torch.float64)
    options: dict[str, Any] = {"weights_per": "batch", "bound": "gram", "regularization": 0.1}
    s = pk.pama_loss(**problem.loss_arguments(), **options)
    t = pk.pama_loss(**wide.loss_arguments(), **options)
    assert torch.equal(s.weights, t.weights.float())
    assert torch.equal(s.optimum, t.optimum.float())


def test_an_objective_that_is_absent_everywhere_takes_no_part() -> None:
    """The others are solved as if it were not there; its values have no influence."""
    problem = make(rows=5, width=9, objectives=4, seed=2, dtype=torch.float64)
    here = torch.ones(5, 4, dtype=torch.bool)
    here[:, 2] = False
    advantages = problem.advantages.clone()
    advantages[..., 2] = NAN
    kept = [0, 1, 3]
    for bound_options in ({"regularization": 0.1}, {"regularization": 0.1, "prior": [1, 2, 3, 4]}):
        options: dict[str, Any] = {"weights_per": "batch", "bound": "gram", **bound_options}
        s = pk.combine_advantages(advantages, problem.mask, objective_mask=here, **options)
        if "prior" in options:
            options["prior"] = [options["prior"][i] for i in kept]
        t = pk.combine_advantages(advantages[..., kept], problem.mask, **options)
        assert s.weights[2] == 0
        # the same problem, gathered
        assert ((s.weights[kept] - t.weights).abs() <= 16 * EPS64 / 0.1).all()
        assert ((s.advantages - t.advantages).abs() <= 4 * 16 * EPS64 / 0.1 * 2).all()


@pytest.mark.parametrize("weights_per", ["batch"])
def test_the_gram_bound_without_a_valid_token(weights_per: str) -> None:
    for regularization in (0.0, 0.1):
        for shape in ((0, 3, 3), (3, 0, 3), (3, 4, 3)):
            leaf = torch.zeros(shape[:2], requires_grad=True)
            result = pk.pama_loss(
                leaf,
                None,
                torch.full(shape, NAN),
                torch.zeros(shape[:2]),
                weights_per=weights_per,
                bound="gram",
                prior=[1, 1, 2],
                regularization=regularization,
            )
            result.loss.backward()
            assert result.loss == 0
            assert result.weights.tolist() == [0.25, 0.25, 0.5]
            assert leaf.grad is not None
            assert (leaf.grad == 0).all()


def test_a_nan_makes_the_gram_weights_nan() -> None:
    problem = make(rows=3, width=5, mask=None)
    problem.advantages[1, 2, 0] = NAN
    for regularization in (0.0, 0.1):
        result = pk.pama_loss(
            **problem.loss_arguments(), weights_per="batch", bound="gram", regularization=regularization
        )
        assert result.weights.isnan().all()
        assert result.optimum.isnan()
        assert result.loss.isnan()


@pytest.mark.parametrize("weights_per", ["sequence", "token"])
def test_the_gram_bound_is_for_batch_weights(weights_per: str) -> None:
    problem = make()
    with pytest.raises(ValueError, match="bound"):
        pk.combine_advantages(
            **problem.combine_arguments(), clip_range=0.2, weights_per=weights_per, bound="gram"
        )
    with pytest.raises(ValueError, match="bound"):
        pk.pama_loss(**problem.loss_arguments(), weights_per=weights_per, bound="gram")


def test_gram_weights_from_merged_micro_batches() -> None:
    """s1 + s2 gives the weights of the whole batch."""
    problem = make(rows=6, width=9, objectives=3, seed=8, dtype=torch.float64)
    arguments = problem.statistics_arguments()
    whole = pk.combine_advantages(
        **problem.combine_arguments(), clip_range=0.2, weights_per="batch", bound="gram", regularization=0.1
    )
    parts = [
        pk.objective_statistics(
            **{k: None if x is None else x[rows] for k, x in arguments.items()}, gram=True
        )
        for rows in (slice(0, 2), slice(2, 6))
    ]
    merged = (parts[0] + parts[1]).gram
    assert torch.equal(merged, whole.statistics.gram)
    solution = pk.min_norm_weights(merged, regularization=0.1)
    # the same problem from M rounded in another way: n-term sums over rho = max M_ii / 10
    assert ((solution.weights - whole.weights).abs() <= 10 * 16 * 3 * EPS64).all()


@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("absent", [None, torch.bool])
def test_the_module_with_momentum_solves_the_running_mean(regularization: float, absent: Any) -> None:
    momentum = 0.75
    module = pk.PamaLoss(weights_per="batch", bound="gram", momentum=momentum, regularization=regularization)
    running: Tensor = torch.zeros(())
    for step in range(1, 5):
        problem = make(
            rows=5, width=8, objectives=3, seed=20 + step, dtype=torch.float64, objective_mask=absent
        )
        arguments = problem.loss_arguments()
        leaf = arguments["logprobs"].clone().requires_grad_()
        result = module(**{**arguments, "logprobs": leaf})
        sums = pk.objective_statistics(**problem.statistics_arguments(), gram=True).buffer
        running = momentum * running + (1 - momentum) * sums
        mean = pk.ObjectiveStatistics(running / (1 - momentum**step), 3, True)
        m = mean.gram
        assert m is not None
        # the mean rounded a few times: certified to what the rounding of M allows
        assert kkt_residual(m, result.weights.detach(), None, regularization) <= KKT
        wanted, gradient = reference_gradient(problem, weights_per="batch", weights=result.weights)
        # sums over at most 40 tokens and 3 objectives of terms below 8
        tolerance = 8 * 40 * 3 * 8 * EPS64
        assert abs(float(result.loss.detach()) - float(wanted.loss)) <= tolerance
        result.loss.backward()
        assert leaf.grad is not None
        assert ((leaf.grad - gradient).abs() <= tolerance).all()


@pytest.mark.filterwarnings(
    # torch.compile's own: it makes an instance while it traces any autograd.Function
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"
)
def test_the_gram_bound_compiles_to_one_graph() -> None:
    def step(logprobs: Tensor, advantages: Tensor, gram: Tensor) -> Any:
        result = pk.pama_loss(
            logprobs, logprobs.detach() - 0.1, advantages, weights_per="batch", bound="gram"
        )
        solution = pk.min_norm_weights(gram, prior=[1, 2, 3])
        metrics = result.metrics(["a", "b", "c"])
        return result.loss, result.weights, metrics["pama/conflict/a~c"], *solution

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5):
        leaf = torch.randn(rows, 6, requires_grad=True)
        advantages, factor = torch.randn(rows, 6, 3), torch.randn(rows, 3, 9)
        gram = factor @ factor.mT
        found, wanted = compiled(leaf, advantages, gram), step(leaf, advantages, gram)
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)
        assert torch.equal(torch.autograd.grad(found[0], leaf)[0], torch.autograd.grad(wanted[0], leaf)[0])
    torch._dynamo.reset()
