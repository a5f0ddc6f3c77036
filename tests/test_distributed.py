"""Two and three processes: equal weights bit for bit on all ranks, as of one process, by one all-reduce."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pama_kernels as pk

N = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "regularized": {"regularization": 0.1, "prior": [1.0, 2.0, 3.0]},
    "all": {"regularization": 0.1, "noon": False},
}
# Packed rows of every rank; with three processes the middle rank has no valid token.
LENGTHS = {2: ([5, 9, 1], [130]), 3: ([700, 40], [6, 3], [17, 1, 0, 2])}


def _rank_batch(world: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * world + rank)
    lengths = LENGTHS[world][rank]
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    old = normal(tokens) - 2
    # Every rank has its own trade-off: local weights would differ.
    advantages = normal(tokens, N) + torch.eye(N)[rank] - 0.3
    mask = torch.rand(tokens, generator=generator) < (0.0 if (world, rank) == (3, 1) else 0.8)
    return {
        "logprobs": old + 0.3 * normal(tokens),
        "old_logprobs": old,
        "advantages": advantages,
        "mask": mask,
        "objective_mask": torch.rand(tokens, N, generator=generator) < 0.9,
    }


def _packed(batch: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    return {**batch, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def _merged(world: int) -> dict[str, Tensor]:
    batches = [_rank_batch(world, rank) for rank in range(world)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return _packed(whole, [length for lengths in LENGTHS[world] for length in lengths])


class _Collectives:
    """Counts every collective that is started by way of torch.distributed."""

    names = (
        *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast"),
        *("reduce", "reduce_scatter", "barrier", "all_to_all", "gather", "scatter"),
    )

    def __init__(self) -> None:
        self.calls: list[str] = []
        for name in self.names:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*arguments: Any, **settings: Any) -> Any:
            self.calls.append(name)
            return function(*arguments, **settings)

        return counted

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


def _scenarios(world: int, rank: int, collectives: _Collectives) -> dict[str, Any]:
    group = dist.group.WORLD
    batch = _packed(_rank_batch(world, rank), LENGTHS[world][rank])
    combine = {name: batch[name] for name in batch if "logprobs" not in name}
    found: dict[str, Any] = {}

    for name, settings in SETTINGS.items():
        result = pk.combine_advantages(**combine, weights_per="batch", process_group=group, **settings)
        found[f"combine {name}"] = (*result[:3], result.statistics.buffer)
        found[f"combine {name} calls"] = collectives.take()

        logprobs = batch["logprobs"].clone().requires_grad_()
        output = pk.pama_loss(
            **{**batch, "logprobs": logprobs}, weights_per="batch", process_group=group, **settings
        )
        output.loss.backward()
        found[f"loss {name}"] = (
            output.loss.detach(),
            output.weights,
            output.optimum,
            output.statistics.buffer,
            logprobs.grad,
        )
        found[f"loss {name} calls"] = collectives.take()
        found[f"loss {name} metrics"] = output.metrics()
        collectives.take()

    given = torch.tensor([0.2, 0.3, 0.5])
    result = pk.combine_advantages(**combine, weights_per="batch", weights=given, process_group=group)
    found["given"] = (result.weights, result.optimum, result.statistics.buffer)
    found["given calls"] = collectives.take()

    local = pk.objective_statistics(**batch, gram=True)
    before = local.buffer.clone()
    found["statistics"] = local.all_reduce(group).buffer
    found["statistics again"] = local.all_reduce().buffer
    found["statistics untouched"] = torch.equal(local.buffer, before)
    found["statistics calls"] = collectives.take()

    module = pk.PamaLoss(weights_per="batch", momentum=0.5, regularization=0.1, process_group=group)
    steps = [module(**batch)]
    steps.append(module(**{**batch, "advantages": -batch["advantages"]}))
    found["momentum"] = [(step.weights, step.optimum, step.statistics.buffer) for step in steps]
    found["momentum state"] = module.state_dict()
    found["momentum calls"] = collectives.take()

    normalizer = _merged(world)["mask"].sum()
    output = pk.pama_loss(**batch, weights_per="batch", process_group=group, normalizer=normalizer)
    found["global denominator"] = output.loss
    collectives.take()

    # One rank sees a NaN: all of them get the same answer.
    poisoned = {**batch, "advantages": batch["advantages"].clone()}
    if rank == 0:
        poisoned["advantages"][batch["mask"].nonzero()[0, 0], 1] = float("nan")
        poisoned["objective_mask"] = torch.ones_like(batch["objective_mask"])
    found["nan"] = pk.pama_loss(**poisoned, weights_per="batch", process_group=group).weights
    collectives.take()

    def refused(weights_per: str) -> str:
        try:
            pk.pama_loss(**batch, weights_per=weights_per, process_group=group)
        except ValueError as error:
            return str(error)
        return "not refused"

    found["refused"] = [refused("sequence"), refused("token")]
    found["refused calls"] = collectives.take()
    result = pk.combine_advantages(**combine, weights_per="batch", bound="gram", process_group=group)
    found["gram"] = (result.weights, result.optimum, result.statistics.buffer)
    return found


def _work(world: int, rank: int) -> dict[str, Any]:
    return _scenarios(world, rank, _Collectives())


@pytest.fixture(scope="module", params=sorted(LENGTHS))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found: the processes run once for all tests."""
    return processes.run(_work, request.param, tmp_path_factory.mktemp("world"))


def _all_equal(values: list[Tensor]) -> Tensor:
    for value in values[1:]:
        assert torch.equal(value, values[0])
    return values[0]


def _close(found: Tensor, wanted: Tensor) -> None:
    """Sums of the same terms in another order, in blocks of float32: a few roundings."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_combine_advantages(ranks: list[dict[str, Any]], name: str) -> None:
    world = len(ranks)
    whole = _merged(world)
    arguments = {key: whole[key] for key in whole if "logprobs" not in key}
    one = pk.combine_advantages(**arguments, weights_per="batch", **SETTINGS[name])
    results = [rank[f"combine {name}"] for rank in ranks]
    for index, wanted in ((1, one.weights), (2, one.optimum), (3, one.statistics.buffer)):
        _close(_all_equal([result[index] for result in results]), wanted)
    _close(torch.cat([result[0] for result in results]), one.advantages)
    assert [rank[f"combine {name} calls"] for rank in ranks] == [["all_reduce"]] * world


@pytest.mark.parametrize("name", SETTINGS)
def test_loss(ranks: list[dict[str, Any]], name: str) -> None:
    """The weights are global, the denominator is local."""
    world = len(ranks)
    whole = _merged(world)
    one = pk.pama_loss(**whole, weights_per="batch", **SETTINGS[name])
    results = [rank[f"loss {name}"] for rank in ranks]
    for index, wanted in ((1, one.weights), (2, one.optimum), (3, one.statistics.buffer)):
        _close(_all_equal([result[index] for result in results]), wanted)
    assert [rank[f"loss {name} calls"] for rank in ranks] == [["all_reduce"]] * world
    weights = results[0][1]
    for rank, result in enumerate(results):
        batch = _rank_batch(world, rank)
        logprobs = batch["logprobs"].requires_grad_()
        alone = pk.pama_loss(
            **batch, weights_per="batch", weights=weights, noon=SETTINGS[name].get("noon", True)
        )
        alone.loss.backward()
        assert torch.equal(result[0], alone.loss.detach())
        assert torch.equal(result[4], logprobs.grad)
    metrics = [rank[f"loss {name} metrics"] for rank in ranks]
    for key in metrics[0]:
        if key != "pama/loss":
            _all_equal([rank[key] for rank in metrics])


def test_rank_without_a_valid_token(ranks: list[dict[str, Any]]) -> None:
    empty = [rank for rank in range(len(ranks)) if not _rank_batch(len(ranks), rank)["mask"].any()]
    assert empty == ([1] if len(ranks) == 3 else [])
    for rank in empty:
        loss, weights, _, _, gradient = ranks[rank]["loss plain"]
        assert loss == 0
        assert not gradient.any()
        assert torch.equal(weights, ranks[0]["loss plain"][1])
        assert not torch.equal(weights, torch.full((N,), 1 / N))


def test_global_denominator(ranks: list[dict[str, Any]]) -> None:
    """With the number of all valid tokens as `normalizer` the ranks' losses add up."""
    one = pk.pama_loss(**_merged(len(ranks)), weights_per="batch")
    _close(sum(rank["global denominator"] for rank in ranks), one.loss)


def test_given_weights(ranks: list[dict[str, Any]]) -> None:
    """They are used as they are; the statistics are still those of all ranks."""
    whole = _merged(len(ranks))
    arguments = {key: whole[key] for key in whole if "logprobs" not in key}
    given = torch.tensor([0.2, 0.3, 0.5])
    one = pk.combine_advantages(**arguments, weights_per="batch", weights=given)
    assert torch.equal(_all_equal([rank["given"][0] for rank in ranks]), given)
    _close(_all_equal([rank["given"][1] for rank in ranks]), one.optimum)
    _close(_all_equal([rank["given"][2] for rank in ranks]), one.statistics.buffer)
    assert all(rank["given calls"] == ["all_reduce"] for rank in ranks)


def test_statistics(ranks: list[dict[str, Any]]) -> None:
    one = pk.objective_statistics(**_merged(len(ranks)), gram=True)
    found = _all_equal([rank["statistics"] for rank in ranks])
    _close(found, one.buffer)
    assert torch.equal(found[:N], one.buffer[:N]), "counts are exact"
    for rank in ranks:
        assert torch.equal(rank["statistics again"], found)
        assert rank["statistics untouched"]
        assert rank["statistics calls"] == ["all_reduce"] * 2
    merged = pk.ObjectiveStatistics(found, N, True)
    _close(merged.scores, one.scores)
    assert torch.equal(merged.token_count, one.token_count)


def test_momentum(ranks: list[dict[str, Any]]) -> None:
    whole = _merged(len(ranks))
    module = pk.PamaLoss(weights_per="batch", momentum=0.5, regularization=0.1)
    steps = [module(**whole), module(**{**whole, "advantages": -whole["advantages"]})]
    for k, step in enumerate(steps):
        wanted = (step.weights, step.optimum, step.statistics.buffer)
        for index in range(3):
            _close(_all_equal([rank["momentum"][k][index] for rank in ranks]), wanted[index])
    for name, value in module.state_dict().items():
        _close(_all_equal([rank["momentum state"][name] for rank in ranks]), value)
    assert all(rank["momentum calls"] == ["all_reduce"] * 2 for rank in ranks)


def test_a_nan_on_one_rank_is_seen_by_all(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["nan"].isnan().all() for rank in ranks)


def test_only_batch_weights_take_a_group(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["refused"]) == 2
        assert all(message.startswith("process_group: ") for message in rank["refused"])
        assert not rank["refused calls"]


def test_gram_bound(ranks: list[dict[str, Any]]) -> None:
    whole = _merged(len(ranks))
    arguments = {key: whole[key] for key in whole if "logprobs" not in key}
    one = pk.combine_advantages(**arguments, weights_per="batch", bound="gram")
    weights = _all_equal([rank["gram"][0] for rank in ranks])
    # The solution moves by the condition of the Gram matrix (below 10 here) times the roundings.
    torch.testing.assert_close(weights, one.weights, rtol=0, atol=1e-4)
    _close(_all_equal([rank["gram"][1] for rank in ranks]), one.optimum)
