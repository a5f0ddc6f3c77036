"""The study's measures, problems and rules: exact where they claim to be, and the same as the library's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from study import measures, store, sweep, theory
from study.problems import SPECS, Batch, Sequences, build
from study.rules import BY_NAME, RULES, Losses, Rule, gradient_weights

TINY = sweep.Budget(bandit_runs=2, words_runs=2, steps=4, halvings=0, rates=(0.1,), problems=("bandit-2",))


class FewWords(Sequences):
    """Small enough to enumerate every sequence."""

    words, longest, batch = 3, 3, 16

    def everything(self) -> list[tuple[Tensor, Tensor]]:
        """Every sequence (T,) with its mask, the end included where it comes before the limit."""
        found = []
        for length in range(self.longest + 1):
            for written in itertools.product(range(self.words), repeat=length):
                words = torch.full((self.longest,), self.words)
                words[:length] = torch.tensor(written, dtype=torch.long)
                found.append((words, (torch.arange(self.longest) <= length).float()))
        return found


# --- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hypervolume_is_that_of_inclusion_and_exclusion(n: int) -> None:
    generator = np.random.default_rng(n)
    for k in (1, 3, 6):
        points, reference = generator.random((k, n)), 0.3 * generator.random(n)
        expected = 0.0
        for size in range(1, k + 1):
            for some in itertools.combinations(points, size):
                sides = np.clip(np.min(some, axis=0) - reference, 0, None)
                expected -= (-1) ** size * float(sides.prod())
        assert measures.hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_of_no_point_above_the_reference_is_0() -> None:
    assert measures.hypervolume([[1.0, -1.0]], [0.0, 0.0]) == 0.0


def test_distance_to_a_front_that_is_known_by_hand() -> None:
    arms = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert measures.improvable([1 / 3, 1 / 3], arms) == pytest.approx(1 / 6)
    assert measures.improvable([0.3, 0.7], arms) == pytest.approx(0.0, abs=1e-9)
    assert measures.improvable(np.zeros(16), np.eye(16)) == pytest.approx(1 / 16)
    assert measures.front_of_two([*arms, [0.6, 0.6], [0.5, 0.5]]).tolist() == [[0, 1], [0.6, 0.6], [1, 0]]


def test_corners_and_edges_are_the_front_and_everything_else_is_not() -> None:
    points = np.random.default_rng(0).random((40, 2))
    corners = measures.front_of_two(points)
    on_front = [*corners, *((corners[:-1] + corners[1:]) / 2)]
    assert all(abs(measures.improvable(p, points)) < 1e-9 for p in on_front)
    inside = [p for p in points if not (p == corners).all(1).any()]
    assert all(measures.improvable(p, points) > 1e-6 for p in inside)


def test_min_norm_is_the_least_on_a_grid() -> None:
    gradients = np.random.default_rng(0).normal(size=(2, 5))
    norm, c = measures.min_norm(gradients @ gradients.T)
    shares = np.linspace(0, 1, 2001)[:, None]
    grid = np.linalg.norm(shares * gradients[0] + (1 - shares) * gradients[1], axis=1)
    assert norm == pytest.approx(grid.min(), rel=1e-5)
    assert c.sum() == pytest.approx(1.0)


# --- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [2, 3])
def test_words_are_worth_exactly_what_enumeration_says(objectives: int) -> None:
    problem = FewWords(2, objectives)
    table = problem.log_policy().exp()
    expected = torch.zeros(2, objectives)
    for words, mask in problem.everything():
        probability, last = torch.ones(2), problem.words
        for t, word in enumerate(words[mask.bool()].tolist()):
            probability = probability * table[:, t, last, word]
            last = word
        expected += probability[:, None] * problem.score(words, mask)
    torch.testing.assert_close(problem.exact(), expected, atol=2e-6, rtol=0)  # 40 float32 terms


@pytest.mark.parametrize("objectives", [2, 3])
def test_front_of_words_is_that_of_all_sequences(objectives: int) -> None:
    problem = FewWords(1, objectives)
    every = [problem.score(*sequence).double().numpy() for sequence in problem.everything()]
    front = measures.nondominated(np.round(every, 6))
    assert {tuple(p) for p in np.round(problem.vertices(), 6)} == {tuple(p) for p in front}


def test_rollout_is_drawn_from_the_policy_and_scored_as_written() -> None:
    problem = Sequences(2, 3, white=False)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(100):
        batch = problem.rollout(generator)
        torch.testing.assert_close(problem.logprobs(batch), batch.old_logprobs)
        # With values at 0, gamma 1 and the score at the end, the last advantage is the score.
        last = batch.mask.sum(-1).long() - 1
        means.append(batch.advantages.gather(2, last[..., None, None].expand(-1, -1, 1, 3)).mean((1, 2)))
    deviation = torch.stack(means).std(0) / 10
    assert ((torch.stack(means).mean(0) - problem.exact()).abs() < 5 * deviation).all()


@pytest.mark.parametrize("name", SPECS)
def test_every_start_is_inside_of_its_front(name: str) -> None:
    problem = build(name, 2)
    value = problem.exact().detach().double().numpy()
    assert value.shape == (2, SPECS[name].objectives)
    # A constant objective leaves nothing to gain for all at once.
    gain = [measures.improvable(value[run], problem.vertices(run)) for run in range(2)]
    assert all(abs(x) < 1e-6 if name == "bandit-dead" else x > 1e-4 for x in gain)


def test_true_gradients_of_a_bandit_are_those_of_the_formula() -> None:
    problem = build("bandit-3", 2)
    torch.nn.init.normal_(problem.parameters[0])
    value, gram = sweep.true_gradients(problem)
    policy = problem.parameters[0].detach().softmax(-1)
    grads = theory.gradients(policy, problem.means)  # type: ignore[union-attr]
    torch.testing.assert_close(value, torch.einsum("sk,skn->sn", policy, problem.means))  # type: ignore[union-attr]
    torch.testing.assert_close(gram.float(), grads @ grads.mT, atol=1e-6, rtol=1e-5)


# --- rules ---------------------------------------------------------------------------------------


def rollout(runs: int = 3) -> tuple[Sequences, Batch]:
    """A batch of a policy that has moved since, so that some tokens are clipped."""
    problem = Sequences(runs, 3)
    batch = problem.rollout(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x in problem.parameters:
            x += 0.15 * torch.randn_like(x)
    return problem, batch


@pytest.mark.parametrize("rule", [r for r in RULES if not r.gradients], ids=lambda rule: rule.name)
def test_each_run_is_one_call_of_the_specification(rule: Rule) -> None:
    problem, batch = rollout()
    logprobs = problem.logprobs(batch).detach().requires_grad_()
    args = (batch.old_logprobs, batch.advantages, batch.mask)
    loss, weights = Losses(rule, 3, 0.2)(logprobs, *args)
    loss.backward()
    assert logprobs.grad is not None
    total = 0.0
    for run in range(3):
        own = logprobs[run].detach().double().requires_grad_()
        out = pk.reference.pama_loss(own, *(x[run] for x in args), rule=rule.rule)
        out.loss.backward()
        assert own.grad is not None
        torch.testing.assert_close(logprobs.grad[run].double(), own.grad, atol=1e-7, rtol=1e-4)
        expected = out.weights if out.weights.dim() == 1 else out.weights.mean(0)
        torch.testing.assert_close(weights[run].double(), expected, atol=1e-5, rtol=0)
        total += out.loss.item()
    assert loss.item() == pytest.approx(total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("by", ["mgda", "mgda-ub"])
def test_mgda_weighs_the_gradients_that_autograd_finds(by: str) -> None:
    problem, batch = rollout()
    logprobs = problem.logprobs(batch)
    args = (batch.old_logprobs, batch.advantages, batch.mask)
    losses = Losses(BY_NAME[by], 3, 0.2)
    loss, weights = losses(logprobs, *args, problem.parameters, problem.representation)
    found = torch.autograd.grad(loss, problem.parameters)
    inputs = problem.parameters if by == "mgda" else [problem.representation]
    for run in range(3):
        each = []
        for i in range(3):
            logprobs = problem.logprobs(batch)
            inputs = problem.parameters if by == "mgda" else [problem.representation]
            one = torch.eye(3)[i]
            out = pk.pama_loss(logprobs[run], *(x[run] for x in args), weights=one)
            grads = torch.autograd.grad(out.loss, [*inputs, *problem.parameters])
            each.append([g[run].flatten() for g in grads])
        chosen = torch.stack([torch.cat(g[: len(inputs)]) for g in each]).double()
        _, c = measures.min_norm((chosen @ chosen.T).numpy())
        np.testing.assert_allclose(weights[run], c, atol=1e-4)
        whole = torch.stack([torch.cat(g[len(inputs) :]) for g in each])
        combined = torch.cat([g[run].flatten() for g in found])
        torch.testing.assert_close(combined, weights[run] @ whole, atol=1e-6, rtol=1e-4)


def test_gradient_weights_of_equal_and_opposite_gradients_are_even() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    losses = torch.stack([x.sum(-1), -x.sum(-1)], -1)
    np.testing.assert_allclose(gradient_weights(losses, [x]).flatten(), [0.5, 0.5], atol=1e-6)


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_is_the_same_each_time_and_learns() -> None:
    budget = replace(TINY, steps=40)
    first, again = (sweep.train("bandit-2", BY_NAME["fixed"], 0.1, budget, 0) for _ in range(2))
    assert [store._text(row) for row in first] == [store._text(row) for row in again]
    assert sweep.score(first) > 1.2 * sweep.score([row for row in first if row["step"] == 0])


def test_three_arms_by_the_papers_rule_per_token_never_leave_the_start() -> None:
    budget = replace(TINY, steps=20)
    rows = sweep.train("three-arms", BY_NAME["paper-token"], 0.1, budget, 0)
    assert all(row["reward_0"] == pytest.approx(1 / 3) and row["true_min_norm"] > 0.4 for row in rows)
    moved = sweep.train("three-arms", BY_NAME["cosines-r0.1"], 0.1, budget, 0)
    assert max(row["improvable"] for row in moved if row["step"] == 20) < 0.15


def test_a_study_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    made: list[int] = []

    def job(number: int) -> store.Job:
        def make() -> store.Rows:
            if number == 2 and len(made) == 2:
                raise KeyboardInterrupt
            made.append(number)
            return [{"number": number, "value": 1 / 3, "name": "x"}]

        return tmp_path / "deep" / f"{number}.csv", make

    jobs = [job(number) for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        store.run(jobs, "first")
    assert made == [0, 1]
    made.append(-1)
    store.run(jobs, "second")
    assert made == [0, 1, -1, 2, 3]
    assert store.read(tmp_path / "deep" / "3.csv") == [{"number": 3.0, "value": 0.3333, "name": "x"}]
    assert not list(tmp_path.rglob("*.unfinished"))


def test_sweep_leaves_one_log_for_each_rule_and_is_not_repeated(tmp_path: Path) -> None:
    budget = replace(TINY, problems=("three-arms",))
    for words, name in sweep.TUNED_ON.items():
        for rule in sweep.rules(SPECS[name].objectives, words):
            store.write(sweep.tuning_path(tmp_path, name, rule, 0.1), [{"step": 1, "reward_0": 0.5}])
    sweep.run(tmp_path, budget)
    logs = sorted((tmp_path / "three-arms").glob("*.csv"))
    assert len(logs) == len(sweep.rules(2, False))
    before = [path.stat().st_mtime_ns for path in logs]
    sweep.run(tmp_path, budget)
    assert before == [path.stat().st_mtime_ns for path in logs]


# --- theorems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", theory.RULES)
def test_every_step_keeps_the_inequality_of_the_proof(rule: str) -> None:
    budget = theory.Budget(runs=4, steps=64)
    for size in (1.0, 1.9):
        rows = theory.descend("bandit-3", rule, size, "fixed", budget)
        assert min(row["slack"] for row in rows) > -1e-12
        last = [row for row in rows if row["step"] == 64]
        first = [row for row in rows if row["step"] == 0]
        assert sum(row["improvable"] for row in last) < sum(row["improvable"] for row in first)


def test_weights_of_scores_alone_need_not_come_to_rest() -> None:
    """Two arms, each serves one objective: every policy is stationary, yet the ascent goes to and fro."""
    budget = theory.Budget(steps=512)
    unrest, rest = (
        theory.descend("two-arms", rule, 1.0, "fixed", budget)[-1]["combined_norm"]
        for rule in ("scores-r0", "scores-r0.1")
    )
    assert unrest > 0.1
    assert rest < 1e-6


def test_closed_form_is_quadprogs_answer() -> None:
    for row in theory.theorem_1(theory.Budget(rows=50)):
        assert row["optimum"] == pytest.approx(row["by_quadprog"], abs=1e-6)
        assert all(row[rule] >= 1 - 1e-6 for rule in theory.SHOWN)
