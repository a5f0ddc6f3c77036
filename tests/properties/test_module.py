"""PamaLoss: the function with its settings held, and weights from a running mean of the statistics."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from problems import EPS32
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import pama_kernels as pk
from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference
from pama_kernels._call import statistics_size

B, T, N = 6, 7, 3
NAN, INF = float("nan"), float("inf")
BATCH_RULES = (Pama(), Pama(regularization=0.0), Pama(bound="scores", noon=True), UPGrad(), Fixed())


def batch(seed: int = 0, n: int = N) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(B, T, generator=g) - 2
    mask = torch.rand(B, T, generator=g) < 0.8
    mask[0] = True
    return {
        "logprobs": old + 0.3 * torch.randn(B, T, generator=g),
        "old_logprobs": old,
        "advantages": torch.randn(B, T, n, generator=g),
        "mask": mask,
    }


def poisoned(value: float) -> dict[str, Tensor]:
    x = batch(99)
    x["advantages"][0, 1, 2] = value
    return x


def state_of(module: pk.PamaLoss) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


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


def test_given_weights_are_used_and_leave_the_mean_alone() -> None:
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


def test_a_callable_sees_the_running_mean() -> None:
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


def test_a_saturated_objective_of_one_batch_keeps_its_memory() -> None:
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
def test_a_batch_that_is_not_finite_never_enters(value: float, first: bool, objectives: int | None) -> None:
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


def test_another_number_of_objectives_is_refused() -> None:
    module = pk.PamaLoss(momentum=0.5)
    module(**batch())
    with pytest.raises(ValueError, match=r"^advantages: expected the objectives of the running mean"):
        module(**batch(n=4))


# --- checkpoints and copies ------------------------------------------------------------------------------


def trained() -> pk.PamaLoss:
    module = pk.PamaLoss(momentum=0.9)
    for k in range(3):
        module(**batch(k))
    return module


def continues_like(copied: pk.PamaLoss, module: pk.PamaLoss) -> None:
    same_state(state_of(copied), state_of(module))
    found, wanted = copied(**batch(7)), module(**batch(7))
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.loss, wanted.loss)
    same_state(state_of(copied), state_of(module))


@pytest.mark.parametrize("kind", ["fresh", "used", "known size"])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_state_dict_round_trip(kind: str, through_a_file: bool) -> None:
    module = trained()
    state = module.state_dict()
    assert set(state) == {"running_statistics", "batches"}
    assert all(value.dtype == torch.float64 for value in state.values())
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    fresh = pk.PamaLoss(momentum=0.9, objectives=N if kind == "known size" else None)
    if kind == "used":
        fresh(**batch(50))
    result = fresh.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    before = state_of(module)
    continues_like(fresh, trained())
    same_state(state_of(module), before)  # loading copies


def test_a_saved_state_does_not_change_later() -> None:
    """state_dict() hands out the buffers themselves; an update replaces them."""
    module = trained()
    state = module.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    module(**batch(8))
    same_state(state, before)
    module.load_state_dict(pk.PamaLoss(momentum=0.9).state_dict(), strict=True)
    assert not module.state_dict()  # an untrained state resets


def test_as_a_part_of_a_trainer() -> None:
    class Trainer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = torch.nn.Linear(3, 3)
            self.loss = pk.PamaLoss(momentum=0.9)

    trainer, fresh = Trainer(), Trainer()
    trainer.loss(**batch())
    assert "loss.running_statistics" in trainer.state_dict()
    fresh.load_state_dict(trainer.state_dict(), strict=True)
    continues_like(fresh.loss, trainer.loss)
    assert not fresh.eval().loss.training


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    module = trained()
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    continues_like(copied, module)


@pytest.mark.parametrize("settings", [{"objectives": N}, {"preference": [1.0, 1.0, 1.0]}], ids=str)
def test_an_averaged_copy_from_before_the_first_batch_follows(settings: dict[str, Any]) -> None:
    class Trainer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = torch.nn.Linear(3, 3)
            self.loss = pk.PamaLoss(momentum=0.5, **settings)

    trainer = Trainer()
    copied = AveragedModel(trainer, use_buffers=True)
    seen = []
    for k in (1, 2):
        trainer.loss(**batch(k))
        copied.update_parameters(trainer)
        seen.append(trainer.loss.running_statistics)
    averaged = copied.module.loss
    torch.testing.assert_close(averaged.running_statistics, (seen[0] + seen[1]) / 2)
    assert averaged.running_statistics.dtype == torch.float64
    assert torch.isfinite(averaged.eval()(**batch(3)).loss)
    plain = AveragedModel(trainer)  # buffers are then copied
    plain.update_parameters(trainer)
    assert torch.equal(plain.module.loss.running_statistics, trainer.loss.running_statistics)


@pytest.mark.parametrize("how", ["half", "bfloat16", "float", "double", "to", "to twice"])
def test_statistics_stay_float64_when_the_model_is_cast(how: str) -> None:
    """Counts of more than 65,504 tokens do not fit in float16, nor 257 batches in bfloat16."""
    module = trained()
    if how == "to":
        module.to(torch.float16)
    elif how == "to twice":
        module.to("cpu", torch.bfloat16).to(torch.float32)
    else:
        getattr(module, how)()
    continues_like(module, trained())
    for fresh in (pk.PamaLoss(momentum=0.9).half(), pk.PamaLoss(momentum=0.9, objectives=N).half()):
        fresh(**batch())
        assert fresh.running_statistics is not None
        assert fresh.running_statistics.dtype == torch.float64
    advantages, logprobs = torch.rand(300_000, 2), torch.zeros(300_000)
    module = pk.PamaLoss(momentum=0.5)
    module(logprobs, None, advantages)
    assert torch.isfinite(module.half()(logprobs, None, advantages).weights).all()


def test_statistics_pickle_and_merge() -> None:
    one, two = (pk.objective_statistics(**batch(k), pairs=True) for k in (1, 2))
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert torch.equal((copied + two).buffer, (one + two).buffer)
        assert (copied.objectives, copied.has_pairs) == (N, True)
    assert torch.equal(sum([one, two]).buffer, (one + two).buffer)
    with pytest.raises(ValueError, match="both sides"):
        one + pk.objective_statistics(**batch(1))


def test_a_state_from_before_the_first_batch() -> None:
    """It resets a running mean whose size is known, and does not take it away."""
    module = pk.PamaLoss(momentum=0.9, objectives=3)
    module(torch.randn(2, 4), None, torch.randn(2, 4, 3))
    module.load_state_dict(pk.PamaLoss(momentum=0.9).state_dict())
    assert module.running_statistics is not None
    assert not module.running_statistics.any()
    assert module.batches == 0


def test_a_state_of_other_objectives_is_refused() -> None:
    other = pk.PamaLoss(momentum=0.9, objectives=3).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for running_statistics"):
        pk.PamaLoss(momentum=0.9, objectives=2).load_state_dict(other)
    with pytest.raises(RuntimeError, match="running_statistics"):
        pk.PamaLoss().load_state_dict(other)


@pytest.mark.parametrize("preference", [[1.0, 2.0], torch.tensor([-1.0, 2.0, 3.0]), torch.tensor(1.0)])
def test_a_bad_preference_is_named_when_the_module_is_made(preference: object) -> None:
    with pytest.raises(ValueError, match=r"^preference: expected"):
        pk.PamaLoss(preference=preference, objectives=3)  # type: ignore[arg-type]
