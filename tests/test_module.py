"""PamaLoss: the function with its settings held, and weights from a running mean of the statistics."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import pama_kernels as pk

B, T, N = 6, 7, 3


def _batch(seed: int = 0, dtype: torch.dtype = torch.float32, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(B, T) - 2
    mask = torch.rand(B, T, generator=generator) < 0.8
    mask[0] = True
    return {
        "logprobs": (old + 0.3 * normal(B, T)).to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": normal(B, T, n).to(dtype),
        "mask": mask,
    }


def _poisoned(value: float) -> dict[str, Tensor]:
    x = _batch(99)
    x["advantages"][0, 1, 2] = value
    return x


def _state(module: pk.PamaLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"weights_per": "batch"},
        {"weights_per": "sequence", "regularization": 0.1, "aggregation": "seq-mean-token-mean"},
        {"weights_per": "token", "noon": False, "clip_range": (0.1, 0.3), "dual_clip": 3.0},
        {"weights_per": "batch", "prior": [1.0, 2.0, 3.0], "kl_coef": 0.2, "regularization": 0.5},
    ],
)
def test_equals_the_function(settings: dict[str, Any]) -> None:
    x = _batch()
    others: dict[str, Any] = {
        "importance_weights": x["logprobs"].exp(),
        "ref_logprobs": x["old_logprobs"] - 0.1,
        "objective_mask": torch.rand(B, N) < 0.9,
        "normalizer": 5.0,
    }
    gradients = []
    results = []
    for function in (
        pk.PamaLoss(**settings),
        lambda *arguments, **rest: pk.pama_loss(*arguments, **rest, **settings),
    ):
        logprobs = x["logprobs"].clone().requires_grad_()
        result = function(logprobs, x["old_logprobs"], x["advantages"], x["mask"], **others)
        result.loss.backward()
        results.append(result)
        gradients.append(logprobs.grad)
    assert isinstance(results[0], pk.PamaLossOutput)
    for found, wanted in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(results[0].statistics.buffer, results[1].statistics.buffer)
    assert torch.equal(*gradients)


def test_given_weights_are_used_and_leave_the_mean_alone() -> None:
    module = pk.PamaLoss(weights_per="batch", momentum=0.5)
    weights = torch.tensor([0.2, 0.3, 0.5])
    result = module(**_batch(), weights=weights)
    assert torch.equal(result.weights, weights)
    assert not module.state_dict()
    assert torch.equal(result.loss, pk.pama_loss(**_batch(), weights_per="batch", weights=weights).loss)


def test_without_momentum_there_is_no_state() -> None:
    module = pk.PamaLoss(weights_per="batch")
    module(**_batch())
    assert not module.state_dict()
    assert not list(module.parameters())


def test_representation_shows_the_settings() -> None:
    text = repr(pk.PamaLoss(weights_per="batch", momentum=0.9, regularization=0.25))
    for part in ("PamaLoss", "weights_per='batch'", "momentum=0.9", "regularization=0.25"):
        assert part in text


# --- momentum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_weights_follow_the_bias_corrected_running_mean(momentum: float, regularization: float) -> None:
    """m_k = momentum m_(k-1) + (1 - momentum) s_k, m_0 = 0; weights of m_k / (1 - momentum^k)."""
    settings: dict[str, Any] = {"regularization": regularization, "prior": [1.0, 2.0, 2.0]}
    module = pk.PamaLoss(weights_per="batch", momentum=momentum, **settings)
    mean = torch.zeros(9 * N + 2, dtype=torch.float64)
    for k in range(1, 6):
        x = _batch(k)
        batch = pk.objective_statistics(**x)
        mean = momentum * mean + (1 - momentum) * batch.buffer
        corrected = pk.ObjectiveStatistics(mean / (1 - momentum**k), N, False)
        wanted = pk.pama_weights(corrected.scores, scale=corrected.second_moments.max(), **settings)
        result = module(**x)
        # Float32 weights of float64 statistics.
        torch.testing.assert_close(result.weights.double(), wanted.weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(result.optimum.double(), wanted.optimum, rtol=1e-6, atol=1e-7)
        assert torch.equal(result.statistics.buffer, batch.buffer), "the statistics are those of the batch"
        given = pk.pama_loss(**x, weights_per="batch", weights=result.weights)
        assert torch.equal(result.loss, given.loss)


def test_first_batch_is_not_biased() -> None:
    x = _batch()
    settings: dict[str, Any] = {"weights_per": "batch", "regularization": 0.1}
    found = pk.PamaLoss(momentum=0.999, **settings)(**x).weights
    torch.testing.assert_close(found, pk.pama_loss(**x, **settings).weights, rtol=0, atol=1e-6)


def test_gradient_with_momentum() -> None:
    x = _batch()
    module = pk.PamaLoss(weights_per="batch", momentum=0.9)
    logprobs = x["logprobs"].clone().requires_grad_()
    result = module(**{**x, "logprobs": logprobs})
    result.loss.backward()
    other = x["logprobs"].clone().requires_grad_()
    weights = result.weights
    pk.pama_loss(**{**x, "logprobs": other}, weights_per="batch", weights=weights).loss.backward()
    assert torch.equal(logprobs.grad, other.grad)
    assert not any(value.requires_grad for value in module.state_dict().values())


def test_updated_in_training_mode_only() -> None:
    module = pk.PamaLoss(weights_per="batch", momentum=0.5, regularization=0.1)
    module.eval()
    alone = module(**_batch(1))
    single = pk.pama_loss(**_batch(1), weights_per="batch", regularization=0.1)
    torch.testing.assert_close(alone.weights, single.weights, rtol=0, atol=1e-6)  # no mean yet
    module.train()
    trained = module(**_batch(2))
    before = _state(module)
    module.eval()
    frozen = module(**_batch(3))
    _same_state(_state(module), before)
    assert torch.equal(frozen.weights, trained.weights)
    module.train()
    module(**_batch(3))
    assert not torch.equal(module.running_statistics, before["running_statistics"])
    assert module.batches == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("first", [False, True])
def test_a_batch_that_is_not_finite_never_enters(value: float, first: bool) -> None:
    module, clean = (pk.PamaLoss(weights_per="batch", momentum=0.5, regularization=0.1) for _ in range(2))
    if not first:
        module(**_batch(1))
        clean(**_batch(1))
    assert module(**_poisoned(value)).loss.isnan()
    found, wanted = module(**_batch(2)), clean(**_batch(2))
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.loss, wanted.loss)
    _same_state(_state(module), _state(clean))


def test_a_batch_without_a_valid_token() -> None:
    module = pk.PamaLoss(weights_per="batch", momentum=0.5)
    x = _batch()
    x["mask"] = torch.zeros_like(x["mask"])
    result = module(**x)
    assert result.loss == 0
    assert torch.equal(result.weights, torch.full((N,), 1 / N))
    assert torch.isfinite(module(**_batch(1)).loss)


def test_gram_bound_with_momentum() -> None:
    """The pair sums are averaged with the rest."""
    module = pk.PamaLoss(weights_per="batch", bound="gram", momentum=0.5)
    results = [module(**_batch(k)) for k in (1, 2)]
    for result in results:
        assert result.weights.min() >= 0
        assert result.weights.sum().item() == pytest.approx(1, abs=1e-6)
    sums = [pk.objective_statistics(**_batch(k), gram=True).buffer for k in (1, 2)]
    mean = pk.ObjectiveStatistics((sums[0] / 4 + sums[1] / 2) / 0.75, N, True)
    wanted = pk.reference.min_norm_weights(mean.gram, regularization=module.settings["regularization"])
    torch.testing.assert_close(results[1].optimum.double(), wanted.optimum, rtol=1e-5, atol=1e-7)


# --- checkpoints and copies --------------------------------------------------------------------------


def _trained() -> pk.PamaLoss:
    module = pk.PamaLoss(weights_per="batch", momentum=0.9, regularization=0.1)
    for k in range(3):
        module(**_batch(k))
    return module


def _continues_like(copied: pk.PamaLoss, module: pk.PamaLoss) -> None:
    _same_state(_state(copied), _state(module))
    found, wanted = copied(**_batch(7)), module(**_batch(7))
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.loss, wanted.loss)
    _same_state(_state(copied), _state(module))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_state_dict_into_a_fresh_or_used_module(used: bool, through_a_file: bool) -> None:
    module = _trained()
    state = module.state_dict()
    assert set(state) == {"running_statistics", "batches"}
    assert all(value.dtype == torch.float64 for value in state.values())
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    fresh = pk.PamaLoss(weights_per="batch", momentum=0.9, regularization=0.1)
    if used:
        fresh(**_batch(50))
    result = fresh.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    _continues_like(fresh, module)


def test_loading_copies() -> None:
    module = _trained()
    fresh = pk.PamaLoss(weights_per="batch", momentum=0.9, regularization=0.1)
    fresh.load_state_dict(module.state_dict())
    before = _state(module)
    fresh(**_batch(8))
    _same_state(_state(module), before)


def test_a_saved_state_does_not_change_later() -> None:
    """state_dict() hands out the buffers themselves; an update replaces them."""
    module = _trained()
    state = module.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    module(**_batch(8))
    _same_state(state, before)


def test_an_untrained_state_resets() -> None:
    module = _trained()
    module.load_state_dict(pk.PamaLoss(weights_per="batch", momentum=0.9).state_dict(), strict=True)
    assert not module.state_dict()


def test_as_a_part_of_a_trainer() -> None:
    class Trainer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = torch.nn.Linear(3, 3)
            self.loss = pk.PamaLoss(weights_per="batch", momentum=0.9)

    trainer, fresh = Trainer(), Trainer()
    trainer.loss(**_batch())
    assert "loss.running_statistics" in trainer.state_dict()
    fresh.load_state_dict(trainer.state_dict(), strict=True)
    _continues_like(fresh.loss, trainer.loss)
    fresh.eval()
    assert not fresh.loss.training


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    module = _trained()
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    _continues_like(copied, module)


@pytest.mark.parametrize("how", ["half", "bfloat16", "float", "double", "to", "to twice"])
def test_statistics_stay_float64_when_the_model_is_cast(how: str) -> None:
    """Counts of more than 65,504 tokens do not fit in float16, nor 257 batches in bfloat16."""
    module, untouched = _trained(), _trained()
    untouched.load_state_dict(module.state_dict())
    if how == "to":
        module.to(torch.float16)
    elif how == "to twice":
        module.to("cpu", torch.bfloat16).to(torch.float32)
    else:
        getattr(module, how)()
    _continues_like(module, untouched)


def test_casting_before_the_first_batch() -> None:
    module = pk.PamaLoss(weights_per="batch", momentum=0.9).half()
    module(**_batch())
    assert module.running_statistics is not None
    assert module.running_statistics.dtype == torch.float64


def test_large_counts_survive_a_cast() -> None:
    module = pk.PamaLoss(weights_per="batch", momentum=0.5)
    advantages = torch.rand(300_000, 2)
    logprobs = torch.zeros(300_000)
    module(logprobs, None, advantages)
    module.half()
    assert torch.isfinite(module(logprobs, None, advantages).weights).all()


def test_statistics_pickle_and_merge() -> None:
    one, two = (pk.objective_statistics(**_batch(k), gram=True) for k in (1, 2))
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert torch.equal((copied + two).buffer, (one + two).buffer)
        assert (copied.objectives, copied.has_gram) == (N, True)
