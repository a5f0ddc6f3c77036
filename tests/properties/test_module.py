"""`PamaLoss`: the function with stored settings, and the running mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _batches import B, N, batch, same_state, state_of
from problems import EPS32
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference
from pama_kernels._call import statistics_size

NAN, INF = float("nan"), float("inf")
BATCH_RULES = (Pama(), Pama(regularization=0.0), Pama(bound="scores", noon=True), UPGrad(), Fixed())


def poisoned(value: float) -> dict[str, Tensor]:
    x = batch(99)
    x["advantages"][0, 1, 2] = value
    return x


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": Pama("sequence"), "aggregation": "seq-mean-token-mean"},
        {"rule": Pama("token", regularization=0.0), "clip_range": (0.1, 0.3), "dual_clip": 3.0},
        {"rule": UPGrad(), "preference": [1.0, 2.0, 3.0], "kl_coef": 0.2},
        {"rule": SoftMin(0.5)},
        {"rule": lambda s: s.scores.softmax(0)},
    ],
)
def test_equals_the_function(settings: dict[str, Any]) -> None:
    x = batch()
    others: dict[str, Any] = {
        "importance_weights": x["logprobs"].exp(),
        "ref_logprobs": x["old_logprobs"] - 0.1,
        "objective_mask": torch.rand(B, N) < 0.9,
        "normalizer": 5.0,
    }
    found = []
    module = pk.PamaLoss(**settings)
    for function in (module, lambda *a, **k: pk.pama_loss(*a, **k, **settings)):
        logprobs = x["logprobs"].clone().requires_grad_()
        result = function(logprobs, x["old_logprobs"], x["advantages"], x["mask"], **others)
        result.loss.backward()
        assert isinstance(result, pk.PamaLossOutput)
        found.append([*(y.detach() for y in result[:3]), result.statistics.buffer, logprobs.grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert not module.state_dict()  # nothing is kept without momentum
    assert not list(module.parameters())


def test_a_preference_follows_the_module() -> None:
    preference = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    module = torch.nn.Sequential(pk.PamaLoss(preference=preference, momentum=0.5)).to("meta", torch.bfloat16)
    x = {name: value.to("meta") for name, value in batch().items()}
    result = module[0](x["logprobs"], x["old_logprobs"], x["advantages"])
    assert result.weights.is_meta
    assert module[0].preference.dtype == torch.float64
    assert not preference.is_meta  # the caller's


def test_given_weights_do_not_update_the_running_mean() -> None:
    module, weights = pk.PamaLoss(momentum=0.5), torch.tensor([0.2, 0.3, 0.5])
    result = module(**batch(), weights=weights)
    assert torch.equal(result.weights, weights)
    assert not module.state_dict()
    assert torch.equal(result.loss, pk.pama_loss(**batch(), weights=weights).loss)


def test_representation_shows_the_settings() -> None:
    text = repr(pk.PamaLoss(rule=Pama(regularization=0.25), momentum=0.9))
    for part in ("PamaLoss", "regularization=0.25", "momentum=0.9", "clip_range=0.2"):
        assert part in text


# --- momentum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rule", BATCH_RULES, ids=str)
def test_weights_follow_the_bias_corrected_running_mean(momentum: float, rule: Any) -> None:
    """m_k = momentum m_(k-1) + (1 - momentum) s_k, m_0 = 0; weights of m_k / (1 - momentum^k)."""
    module = pk.PamaLoss(rule=rule, momentum=momentum)
    pairs = getattr(rule, "bound", "gram" if isinstance(rule, UPGrad) else "") == "gram"
    noon = getattr(rule, "noon", False)
    mean = torch.zeros(statistics_size(N, pairs), dtype=torch.float64)
    for k in range(1, 5):
        x = batch(k)
        s = pk.objective_statistics(**x, noon=noon, pairs=pairs)
        mean = momentum * mean + (1 - momentum) * s.buffer
        corrected = pk.ObjectiveStatistics(mean / (1 - momentum**k), N, pairs)
        if isinstance(rule, Fixed):
            wanted = torch.full((N,), 1 / N).double()
        elif isinstance(rule, UPGrad):
            wanted = reference.upgrad_weights(corrected.gram).weights
        elif pairs:
            wanted = reference.min_norm_weights(corrected.cosines, regularization=rule.regularization).weights
        else:
            scale = corrected.second_moments.max()
            settings = {"regularization": rule.regularization, "scale": scale}
            wanted = reference.pama_weights(corrected.scores, **settings).weights
        leaf = x["logprobs"].clone().requires_grad_()
        result = module(**{**x, "logprobs": leaf})
        result.loss.backward()
        # float32 weights of float64 statistics, of well-conditioned problems
        torch.testing.assert_close(result.weights.double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(result.statistics.buffer, s.buffer), "the statistics are those of the batch"
        given = x["logprobs"].clone().requires_grad_()
        c = result.weights.double()
        fixed = lambda _, c=c: c  # noqa: E731
        fixed.noon, fixed.pairs = noon, False  # type: ignore[attr-defined]
        alone = pk.pama_loss(**{**x, "logprobs": given}, rule=fixed)
        alone.loss.backward()
        # weights rounded to float32 once more
        torch.testing.assert_close(result.loss, alone.loss, rtol=8 * EPS32, atol=8 * EPS32)
        torch.testing.assert_close(leaf.grad, given.grad, rtol=8 * EPS32, atol=EPS32)
    assert not any(value.requires_grad for value in module.state_dict().values())


@pytest.mark.parametrize("rule", BATCH_RULES, ids=str)
def test_the_first_batch_is_not_biased(rule: Any) -> None:
    found = pk.PamaLoss(rule=rule, momentum=0.999)(**batch()).weights
    torch.testing.assert_close(found, pk.pama_loss(**batch(), rule=rule).weights, rtol=0, atol=1e-6)


def test_a_callable_gets_the_running_mean() -> None:
    seen: list[pk.ObjectiveStatistics] = []

    def rule(s: pk.ObjectiveStatistics) -> Tensor:
        seen.append(s)
        return torch.full((N,), 1 / N)

    module = pk.PamaLoss(rule=rule, momentum=0.5)
    for k in (1, 2):
        module(**batch(k))
    one, two = (pk.objective_statistics(**batch(k), pairs=True).buffer for k in (1, 2))
    torch.testing.assert_close(seen[-1].buffer, (one / 4 + two / 2) / 0.75, rtol=1e-14, atol=1e-14)
    assert seen[-1].has_pairs


def test_an_objective_saturated_in_one_batch_keeps_its_running_mean() -> None:
    """The mean has a signal where any of its batches had one."""
    module = pk.PamaLoss(momentum=0.5)
    module(**batch(1))
    x = batch(2)
    x["advantages"][..., 1] = 0
    assert pk.pama_loss(**x).weights[1] == 0
    assert module(**x).weights[1] > 0


def test_updated_in_training_mode_only() -> None:
    module = pk.PamaLoss(momentum=0.5).eval()
    alone = module(**batch(1))
    torch.testing.assert_close(
        alone.weights, pk.pama_loss(**batch(1)).weights, rtol=0, atol=1e-6
    )  # no mean yet
    trained = module.train()(**batch(2))
    before = state_of(module)
    frozen = module.eval()(**batch(3))
    same_state(state_of(module), before)
    assert torch.equal(frozen.weights, trained.weights)
    module.train()(**batch(3))
    assert not torch.equal(module.running_statistics, before["running_statistics"])
    assert module.batches == 2


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("objectives", [None, N])
def test_non_finite_batches_do_not_change_the_running_mean(
    value: float, first: bool, objectives: int | None
) -> None:
    module, clean = (pk.PamaLoss(momentum=0.5, objectives=objectives) for _ in range(2))
    if not first:
        module(**batch(1))
        clean(**batch(1))
    assert module(**poisoned(value)).loss.isnan() or not first
    found, wanted = module(**batch(2)), clean(**batch(2))
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.loss, wanted.loss)
    same_state(state_of(module), state_of(clean))


def test_a_batch_without_a_valid_token() -> None:
    module, x = pk.PamaLoss(momentum=0.5), batch()
    x["mask"] = torch.zeros_like(x["mask"])
    result = module(**x)
    assert result.loss == 0
    assert torch.equal(result.weights, torch.full((N,), 1 / N))
    assert torch.isfinite(module(**batch(1)).loss)


def test_another_number_of_objectives_is_an_error() -> None:
    module = pk.PamaLoss(momentum=0.5)
    module(**batch())
    with pytest.raises(ValueError, match=r"^advantages: expected the objectives of the running mean"):
        module(**batch(n=4))


@pytest.mark.parametrize(
    "momentum", [-0.1, 1.0, 1.5, float("nan"), float("inf"), torch.tensor(0.5).expand(2)], ids=str
)
def test_the_error_names_the_range_of_momentum(momentum: Any) -> None:
    with pytest.raises(ValueError, match=r"^momentum: expected a number in \[0, 1\), got "):
        pk.PamaLoss(momentum=momentum)
