"""Two and three processes: equal weights bit for bit on all ranks, as of one process, by one collective."""

from __future__ import annotations

import copy
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pama_kernels as pk
from pama_kernels import Fixed, Pama, UPGrad
from pama_kernels.backends import operators

N = 3
P = [1.0, 2.0, 3.0]
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "cosines": {"rule": Pama()},
    "scores": {"rule": Pama(bound="scores", noon=True), "preference": P},
    "paper": {"rule": Pama.paper("batch")},
    "upgrad": {"rule": UPGrad(), "preference": P},
    "fixed": {"rule": Fixed(), "preference": P},
    "callable": {"rule": lambda s: s.scores.softmax(0)},
    "given": {"weights": torch.tensor([0.2, 0.3, 0.5])},
    "means": {"aggregation": "seq-mean-token-mean"},
}
# Packed rows of every rank; with three processes the middle rank has no valid token.
LENGTHS = {2: ([5, 9, 1], [130]), 3: ([700, 40], [6, 3], [17, 1, 0, 2])}


def rank_batch(world: int, rank: int, absent: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 * world + rank)
    lengths = LENGTHS[world][rank]
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    old = normal(tokens) - 2
    batch = {
        "logprobs": old + 0.3 * normal(tokens),
        "old_logprobs": old,
        # every rank has its own trade-off: local weights would differ
        "advantages": normal(tokens, N) + torch.eye(N)[rank] - 0.3,
        "mask": torch.rand(tokens, generator=g) < (0.0 if (world, rank) == (3, 1) else 0.8),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    here = torch.rand(tokens, N, generator=g) < 0.9
    return {**batch, "objective_mask": here} if absent else batch


def merged(world: int, absent: bool = True) -> dict[str, Tensor]:
    batches = [rank_batch(world, rank, absent) for rank in range(world)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    whole["cu_seqlens"] = torch.tensor([0, *(k for part in LENGTHS[world] for k in part)]).cumsum(0)
    return whole


def without_logprobs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if "logprobs" not in name}


def loss_of(batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    leaf = batch["logprobs"].clone().requires_grad_()
    output = pk.pama_loss(**{**batch, "logprobs": leaf}, **options)
    output.loss.backward()
    assert leaf.grad is not None
    return (output.loss.detach(), output.weights, output.optimum, output.statistics.buffer, leaf.grad)


class Collectives:
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


class Passes:
    """Counts how often a call computes statistics."""

    def __init__(self) -> None:
        self.count, self.statistics, self.apply = 0, operators.statistics, operators.apply
        vars(operators).update(statistics=self._statistics, apply=self._apply)

    def _statistics(self, *records: Any) -> Any:
        self.count += 1
        return self.statistics(*records)

    def _apply(self, *records: Any) -> Any:
        self.count += records[3].statistics
        return self.apply(*records)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def work(world: int, rank: int) -> dict[str, Any]:
    """The results of a rank; `calls` are the collectives of each step, `passes` those for statistics."""
    group, collectives, passes = dist.group.WORLD, Collectives(), Passes()
    batch, plain = rank_batch(world, rank), rank_batch(world, rank, absent=False)
    found: dict[str, Any] = {"calls": {}, "passes": {}}

    def note(name: str, result: Any) -> None:
        found[name] = result
        found["calls"][name], found["passes"][name] = collectives.take(), passes.take()

    for name, options in RULES.items():
        result = pk.combine_advantages(**without_logprobs(batch), process_group=group, **options)
        note(f"combine {name}", (*result[:3], result.statistics.buffer))
        note(f"loss {name}", loss_of(batch, process_group=group, **options))
        for what, given in (("plain", plain), ("absent", batch)):
            arguments = {**without_logprobs(given), **options, "process_group": group, "normalize": True}
            note(f"normalize {what} {name}", pk.combine_advantages(**arguments).advantages)
    local = pk.objective_statistics(**batch, pairs=True)
    before = local.buffer.clone()
    note("statistics", local.all_reduce(group).buffer)
    note("statistics of the default group", local.all_reduce().buffer)
    assert torch.equal(local.buffer, before)
    note("whitened", pk.masked_whiten(plain["advantages"], plain["mask"], process_group=group))
    constant = torch.cat([plain["advantages"][:, :2], torch.full((len(plain["mask"]), 1), 0.1)], 1)
    note("whitened constant", pk.masked_whiten(constant, plain["mask"], process_group=group))

    module = pk.PamaLoss(momentum=0.5, process_group=group)
    steps = [module(**batch), module(**{**batch, "advantages": -batch["advantages"]})]
    note("momentum", [(step.weights, step.optimum, step.statistics.buffer) for step in steps])
    found["state"] = {name: x.clone() for name, x in module.state_dict().items()}
    copied = copy.deepcopy(module)  # keeps the group, which cannot be copied
    note("copied", torch.equal(copied(**batch).weights, module(**batch).weights))

    normalizer = merged(world)["mask"].sum()
    note("global denominator", pk.pama_loss(**batch, process_group=group, normalizer=normalizer).loss)
    poisoned = {**batch, "advantages": batch["advantages"].clone()}
    if rank == 0:  # one rank sees a NaN: all of them get the same answer
        poisoned["advantages"][batch["mask"].nonzero()[0, 0], 1] = float("nan")
        poisoned["objective_mask"] = torch.ones_like(batch["objective_mask"])
    note("nan", pk.pama_loss(**poisoned, process_group=group).weights)
    saturated = {**batch, "advantages": batch["advantages"].clone()}
    saturated["advantages"][:, 1] *= rank == 0  # a signal on one rank is a signal
    note("saturated", pk.pama_loss(**saturated, process_group=group).weights)

    def refused(rule: Any) -> str:
        with pytest.raises(ValueError, match=r"^process_group: "):
            pk.pama_loss(**batch, rule=rule, process_group=group)
        return "refused"

    note("refused", [refused(rule) for rule in (Pama("sequence"), Pama("token"), pk.SoftMin())])
    return found


def on_mixed_processors(world: int, rank: int) -> dict[str, Any]:
    """Each rank with an instruction set of its own, as in a mixed cluster."""
    from pama_kernels.backends import _cpu

    used = _cpu.use_isa(("portable", "avx512")[rank])
    found: dict[str, Any] = {"isa": used}
    for n in (2, 5, 12, 16, 33):
        advantages = torch.randn(300, n, generator=torch.Generator().manual_seed(n + 100 * rank))
        for name, rule in (("default", None), ("pama", Pama()), ("scores", Pama(bound="scores"))):
            got = pk.combine_advantages(advantages, rule=rule, process_group=dist.group.WORLD)
            found[f"{name} {n}"] = (got.weights, got.optimum)
    return found


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=sorted(LENGTHS))
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The results of all ranks: the processes run once for all tests."""
    return processes.run(work, request.param, tmp_path_factory.mktemp("world"))


def all_equal(values: list[Tensor]) -> Tensor:
    for value in values[1:]:
        assert torch.equal(value, values[0])
    return values[0]


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    """Sums of the same terms in another order, in blocks of float32: a few roundings."""
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=2e-6, equal_nan=True)


def test_one_collective_for_each_call(ranks: Ranks) -> None:
    """Normalised, a second one where a local sum of squares is needed; whitening gathers once."""
    for rank in ranks:
        calls = dict(rank["calls"])
        assert calls.pop("whitened") == calls.pop("whitened constant") == ["all_gather"]
        assert calls.pop("momentum") == calls.pop("copied") == ["all_reduce"] * 2
        assert calls.pop("refused") == []
        for name, made in calls.items():
            local = "normalize" in name and (
                "absent" in name or any(k in name for k in ("scores", "paper", "given"))
            )
            assert made == ["all_reduce"] * (2 if local else 1), name


def test_one_pass_for_the_statistics_of_each_call(ranks: Ranks) -> None:
    for rank in ranks:
        for name, count in rank["passes"].items():
            if name.startswith(("combine", "loss", "normalize")):
                assert count == 1, name


@pytest.mark.parametrize("name", RULES)
def test_combine_advantages(ranks: Ranks, name: str) -> None:
    whole = without_logprobs(merged(len(ranks)))
    one = pk.combine_advantages(**whole, **RULES[name])
    results = [rank[f"combine {name}"] for rank in ranks]
    for index, wanted in ((1, one.weights), (2, one.optimum), (3, one.statistics.buffer)):
        close(all_equal([result[index] for result in results]), wanted)
    close(torch.cat([result[0] for result in results]), one.advantages)


@pytest.mark.parametrize("name", RULES)
def test_normalized(ranks: Ranks, name: str) -> None:
    """By the root mean square over all ranks, the same number on each of them."""
    for what, absent in (("plain", False), ("absent", True)):
        whole = without_logprobs(merged(len(ranks), absent))
        one = pk.combine_advantages(**whole, **RULES[name], normalize=True)
        close(torch.cat([rank[f"normalize {what} {name}"] for rank in ranks]), one.advantages, rtol=2e-5)


@pytest.mark.parametrize("name", RULES)
def test_loss(ranks: Ranks, name: str) -> None:
    """The weights are global, the denominator is local."""
    world, options = len(ranks), RULES[name]
    one = loss_of(merged(world), **options)
    results = [rank[f"loss {name}"] for rank in ranks]
    for index in (1, 2, 3):
        close(all_equal([result[index] for result in results]), one[index])
    if name in ("callable", "given"):
        return
    statistics = pk.ObjectiveStatistics(results[0][3], N, len(results[0][3]) > 9 * N + 2)
    for rank, result in enumerate(results):  # alone, with the statistics of all
        rule = options.get("rule", UPGrad())
        module = pk.PamaLoss(**{"rule": rule, **options}, momentum=0.5).eval()
        module.running_statistics, module.batches = statistics.buffer / 2, torch.ones(()).double()
        leaf = rank_batch(world, rank)["logprobs"].requires_grad_()
        alone = module(**{**rank_batch(world, rank), "logprobs": leaf})
        alone.loss.backward()
        close(result[0], alone.loss.detach())
        close(result[4], leaf.grad)


def test_a_rank_without_a_valid_token(ranks: Ranks) -> None:
    empty = [rank for rank in range(len(ranks)) if not rank_batch(len(ranks), rank)["mask"].any()]
    assert empty == ([1] if len(ranks) == 3 else [])
    for rank in empty:
        loss, weights, _, _, gradient = ranks[rank]["loss default"]
        assert loss == 0
        assert not gradient.any()
        assert torch.equal(weights, ranks[0]["loss default"][1])
        assert not torch.equal(weights, torch.full((N,), 1 / N))
        assert not ranks[rank]["whitened"].any()


def test_losses_of_ranks_add_up_with_a_global_normalizer(ranks: Ranks) -> None:
    one = pk.pama_loss(**merged(len(ranks)))
    close(sum(rank["global denominator"] for rank in ranks), one.loss)


def test_statistics(ranks: Ranks) -> None:
    one = pk.objective_statistics(**merged(len(ranks)), pairs=True)
    found = all_equal([rank["statistics"] for rank in ranks])
    assert torch.equal(all_equal([rank["statistics of the default group"] for rank in ranks]), found)
    close(found, one.buffer)
    assert torch.equal(found[:N], one.buffer[:N]), "counts are exact"
    whole = pk.ObjectiveStatistics(found, N, True)
    close(whole.scores, one.scores)
    assert torch.equal(whole.token_count, one.token_count)


def test_whitening(ranks: Ranks) -> None:
    whole = merged(len(ranks), absent=False)
    one = pk.masked_whiten(whole["advantages"], whole["mask"])
    close(torch.cat([rank["whitened"] for rank in ranks]), one)
    assert all((rank["whitened constant"][:, 2] == 0).all() for rank in ranks)


def test_momentum(ranks: Ranks) -> None:
    whole = merged(len(ranks))
    module = pk.PamaLoss(momentum=0.5)
    steps = [module(**whole), module(**{**whole, "advantages": -whole["advantages"]})]
    for k, step in enumerate(steps):
        for index, wanted in enumerate((step.weights, step.optimum, step.statistics.buffer)):
            close(all_equal([rank["momentum"][k][index] for rank in ranks]), wanted)
    for name, value in module.state_dict().items():
        close(all_equal([rank["state"][name] for rank in ranks]), value)
    assert all(rank["copied"] for rank in ranks)


def test_a_signal_on_one_rank_is_shared(ranks: Ranks) -> None:
    assert all(rank["nan"].isnan().all() for rank in ranks)
    assert all_equal([rank["saturated"] for rank in ranks])[1] > 0


def test_process_group_needs_weights_per_batch(ranks: Ranks) -> None:
    assert all(rank["refused"] == ["refused"] * 3 for rank in ranks)


@pytest.mark.cpu
def test_equal_weights_on_different_instruction_sets(tmp_path: Any) -> None:
    ranks = processes.run(on_mixed_processors, 2, tmp_path)
    if ranks[0]["isa"] == ranks[1]["isa"]:
        pytest.skip(f"this processor has {ranks[0]['isa']} only")
    for name in ranks[0]:
        if name != "isa":
            for pair in zip(*(rank[name] for rank in ranks), strict=True):
                assert torch.equal(*pair), name
