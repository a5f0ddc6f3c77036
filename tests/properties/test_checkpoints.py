"""`PamaLoss` in checkpoints, copies and averaged models; statistics pickle."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from _batches import N, batch, same_state, state_of
from torch.optim.swa_utils import AveragedModel

import pama_kernels as pk


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
    """state_dict() returns the buffers, not copies; an update replaces them."""
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


def test_a_module_with_a_process_group_is_not_pickled() -> None:
    """A group is a connection between running processes. A shallow copy keeps it."""
    module = pk.PamaLoss()
    module.process_group = group = torch.distributed.ProcessGroup(0, 1)
    assert copy.copy(module).process_group is group
    for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        with pytest.raises(TypeError, match="process_group: expected None to pickle a PamaLoss"):
            save(module)
    module.process_group = None
    assert isinstance(pickle.loads(pickle.dumps(module)), pk.PamaLoss)


@pytest.mark.parametrize("settings", [{"objectives": N}, {"preference": [1.0, 1.0, 1.0]}], ids=str)
def test_an_averaged_copy_made_before_the_first_batch_is_updated(settings: dict[str, Any]) -> None:
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
    """It resets a running mean whose size is known, and does not remove it."""
    module = pk.PamaLoss(momentum=0.9, objectives=3)
    module(torch.randn(2, 4), None, torch.randn(2, 4, 3))
    module.load_state_dict(pk.PamaLoss(momentum=0.9).state_dict())
    assert module.running_statistics is not None
    assert not module.running_statistics.any()
    assert module.batches == 0


def test_a_state_of_other_objectives_is_an_error() -> None:
    other = pk.PamaLoss(momentum=0.9, objectives=3).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for running_statistics"):
        pk.PamaLoss(momentum=0.9, objectives=2).load_state_dict(other)
    with pytest.raises(RuntimeError, match="running_statistics"):
        pk.PamaLoss().load_state_dict(other)


@pytest.mark.parametrize("preference", [[1.0, 2.0], torch.tensor([-1.0, 2.0, 3.0]), torch.tensor(1.0)])
def test_wrong_preference_is_an_error_at_construction(preference: object) -> None:
    with pytest.raises(ValueError, match=r"^preference: expected"):
        pk.PamaLoss(preference=preference, objectives=3)  # type: ignore[arg-type]
