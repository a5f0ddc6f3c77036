"""The study's problems, rules, figures and criterion."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import pama_kernels as pk

pytest.importorskip("quadprog", reason="quadprog is not installed: pip install 'pama-kernels[study]'")

from study import criterion, measures, report, store, sweep, theory
from study.figures import whole_seeds
from study.problems import Answers, Softmax
from study.rules import RAW_ONLY, RULES, Combiner, CovarianceTargets, mgda_weights, variance_weights
from study.words import Words, whiten

CONFLICT = Answers((0.5, 0.5, 0.8), -0.4, prompts=6, drawn=4)
DISJOINT = Answers((0.5, 0.5), tasks=((0,), (1,)), prompts=6, drawn=4)


class FewWords(Words):
    """Small enough to enumerate every sequence."""

    words, longest, batch = 3, 3, 16


def moved(problem: Words | Softmax) -> None:
    """Some steps away from the start."""
    for _ in range(5):
        batch = problem.rollout()
        problem.update(batch.advantages[..., 0])


# --- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [2, 3])
def test_words_rewards_and_kl_are_those_of_enumeration(objectives: int) -> None:
    problem = FewWords(objectives, 2, [0.1])
    moved(problem)
    table, start = problem._log_policy().detach(), problem.start
    expected, kl = torch.zeros(2, objectives), torch.zeros(2)
    for length in range(problem.longest + 1):
        for written in itertools.product(range(problem.words), repeat=length):
            words = torch.full((problem.longest,), problem.words)
            words[:length] = torch.tensor(written, dtype=torch.long)
            mask = (torch.arange(problem.longest) <= length).float()
            log, log_start, last = torch.zeros(2), torch.zeros(2), problem.words
            for t, word in enumerate(words[mask.bool()].tolist()):
                log, log_start = log + table[:, t, last, word], log_start + start[:, t, last, word]
                last = word
            expected += log.exp()[:, None] * problem.score(words, mask)
            kl += log.exp() * (log - log_start)
    value, divergence = problem.value()
    torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)  # 40 float32 terms
    torch.testing.assert_close(divergence, kl, atol=2e-5, rtol=0)
    assert (kl > 0.01).all()


def test_whitening_equals_that_of_the_library() -> None:
    x, mask = torch.randn(3, 8, 5, 2), (torch.rand(3, 8, 5) < 0.7).float()
    x[1, ..., 1] = 0.5
    for run in range(3):
        expected = pk.masked_whiten(x[run], mask[run])
        torch.testing.assert_close(whiten(x, mask)[run], expected, atol=1e-5, rtol=1e-4)
    assert (whiten(x, mask)[1, ..., 1] == 0).all()


def test_gradients_of_the_softmax_policy_equal_autograd() -> None:
    problem = Softmax(CONFLICT, 2, [0.1])
    moved(problem)
    batch = problem.rollout()
    weights = problem.weights.clone().requires_grad_()
    x = problem.features[:, problem.drawn]
    log = torch.einsum("rpd,rdk->rpk", x, weights).log_softmax(-1)
    logprobs = log.gather(2, problem.chosen).flatten(1)
    found = problem._gradients(batch.advantages)
    for i in range(3):
        objective = (logprobs * batch.advantages[..., i]).mean(1).sum()
        expected = torch.autograd.grad(objective, weights, retain_graph=True)[0]
        torch.testing.assert_close(found[..., i], expected, atol=1e-6, rtol=1e-4)
    square = torch.zeros(2, 4, 8)
    for p, g in itertools.product(range(4), range(8)):
        for run in range(2):
            row = torch.nn.functional.one_hot(problem.chosen[run, p, g], 16) - log[run, p].exp()
            square[run, p, g] = row.square().sum()
    a = batch.advantages.double()
    expected = torch.einsum("rbi,rbj,rb->rij", a, a, square.flatten(1).double())
    torch.testing.assert_close(problem.block_gram(), expected, atol=1e-4, rtol=1e-4)


def test_start_rates_are_those_of_the_specification() -> None:
    spec = Answers((0.5, 0.95, 1.0, 0.5), -0.2, same=(0, 3))
    success, _ = spec.tables(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(success.mean((1, 2)), torch.tensor(spec.start).expand(3, 4), atol=1e-5, rtol=0)
    assert (success[..., 3] == success[..., 0]).all()
    batch = Softmax(spec, 2, [0.1]).rollout()
    assert (batch.advantages[..., 3] == batch.advantages[..., 0]).all()
    assert (batch.advantages[..., 2] == 0).all()


def test_a_reward_is_absent_at_the_prompts_of_other_tasks() -> None:
    problem = Softmax(DISJOINT, 2, [0.1])
    batch = problem.rollout()
    assert batch.present is not None
    assert (batch.present.sum(1) == 1).all()
    assert (batch.advantages * (1 - batch.present) == 0).all()
    combined, _ = Combiner("fixed", 2)(batch, problem)
    torch.testing.assert_close(combined, batch.advantages.sum(-1))  # its whole advantage


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RULES if name not in RAW_ONLY])
@pytest.mark.parametrize("make", [lambda: Softmax(CONFLICT, 2, [0.1]), lambda: Words(3, 2, [0.03])])
def test_every_rule_combines_and_learns(name: str, make: object) -> None:
    problem = make()  # type: ignore[operator]
    combine = Combiner(name, problem.runs)
    before, _ = problem.value()
    for _ in range(10):
        batch = problem.rollout()
        combined, weights = combine(batch, problem)
        assert combined.shape == batch.advantages.shape[:-1]
        assert combined.isfinite().all()
        if weights is not None and not name.startswith("paper-token"):
            torch.testing.assert_close(weights.sum(-1).double(), torch.ones(2).double())
        problem.update(combined)
    after, _ = problem.value()
    assert (after - before).abs().max() > 1e-4


def test_two_whitened_objectives_get_equal_weights() -> None:
    rows = [sweep.train("words-2", rule, [0.03], _small("words-2")) for rule in ("fixed", "cosines-r0.1")]
    for fixed, cosines in zip(*rows, strict=True):
        assert cosines["weight_0"] == pytest.approx(0.5, abs=1e-6)
        assert cosines["balance"] == pytest.approx(fixed["balance"], rel=1e-3)


def test_ctwa_raises_the_weight_of_an_objective_below_its_target() -> None:
    a = torch.randn(64, 3)
    a[:, 2] -= a[:, 0] + a[:, 1]
    rule = CovarianceTargets(target=0.5, rate=0.5)
    first = pk.combine_advantages(a, rule=rule).weights
    second = pk.combine_advantages(a, rule=rule).weights
    torch.testing.assert_close(first, torch.full((3,), 1 / 3))
    assert rule.mean is not None
    lag = int(rule.mean.argmin())
    assert second[lag] > first[lag]


def test_dvao_gives_a_group_without_variance_no_weight() -> None:
    problem = Softmax(CONFLICT, 2, [0.1])
    batch = problem.rollout()
    weights = variance_weights(batch, problem)
    dead = (batch.variances == 0) & (batch.variances.sum(-1, keepdim=True) > 0)
    assert dead.any()
    assert (weights[dead] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_mgda_leaves_out_an_objective_without_gradient() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)).unsqueeze(0)
    torch.testing.assert_close(
        mgda_weights(gram)[0], torch.tensor([0.75, 0.0, 0.25]).double(), atol=1e-5, rtol=0
    )


# --- runs and the criterion ----------------------------------------------------------------------


def _small(name: str) -> sweep.Setting:
    setting = sweep.SETTINGS[name]
    return sweep.Setting(setting.part, setting.make, (0.03, 0.1), 2, 10)


@pytest.mark.parametrize("name", ["grpo-conflict", "bandit-3-noisy"])
def test_a_run_does_not_depend_on_the_rates_beside_it(name: str) -> None:
    both = sweep.train(name, "upgrad", [0.03, 0.1], _small(name))
    alone = sweep.train(name, "upgrad", [0.1], _small(name))
    for one, other in zip(both[2:], alone, strict=True):
        assert one["seed"] == other["seed"]
        assert one["balance"] == pytest.approx(other["balance"], rel=1e-4)


def rows_of(values: dict[str, list[list[float]]], problem: str = "p") -> list[store.Row]:
    """rule: for each rate the balances of the seeds."""
    return [
        {
            "part": "x",
            "problem": problem,
            "rule": rule,
            "rate": 10.0**r,
            "seed": float(s),
            "step": store.FINAL,
            "balance": x,
        }
        for rule, rates in values.items()
        for r, seeds in enumerate(rates)
        for s, x in enumerate(seeds)
    ]


def test_the_criterion_pairs_seeds_and_rates() -> None:
    rows = rows_of({"fixed": [[0.1, 0.9], [0.3, 0.5]], "upgrad": [[0.2, 1.0], [0.5, 0.7]]})
    difference = criterion.paired(rows, "p", "upgrad")
    assert difference is not None
    assert (difference.mean, difference.half) == (pytest.approx(0.15), pytest.approx(0, abs=1e-12))
    assert criterion.paired(rows, "p", "cosines-r0.1") is None


def test_the_criterion_selects_the_best_rule_that_is_worse_on_no_problem() -> None:
    rows = rows_of({"fixed": [[0.5, 0.6]], "upgrad": [[0.52, 0.62]], "cosines-r0.1": [[0.6, 0.71]]})
    rows += rows_of({"fixed": [[0.5, 0.6]], "upgrad": [[0.5, 0.6]], "cosines-r0.1": [[0.49, 0.591]]}, "q")
    found = criterion.verdicts(rows, ["p", "q"])
    assert [v.failed for v in found] == [("q",), ()]
    assert criterion.selected(found) == "upgrad"
    assert criterion.selected(criterion.verdicts(rows, ["p"])) == "cosines-r0.1"
    worse = rows_of({"fixed": [[0.5, 0.6]], "upgrad": [[0.4, 0.5]], "cosines-r0.1": [[0.4, 0.5]]})
    assert criterion.selected(criterion.verdicts(worse, ["p"])) is None


def test_rates_are_added_beyond_an_edge_that_is_best() -> None:
    rising = {"fixed": [[0.1, 0.2], [0.3, 0.41], [0.5, 0.6]]}
    assert sweep.edges(rows_of(rising), "p") == [300.0]
    inside = {"fixed": [[0.1, 0.2], [0.5, 0.6], [0.3, 0.4]]}
    assert sweep.edges(rows_of(inside), "p") == []


def test_agreement_is_the_covariance_over_the_deviations() -> None:
    a = torch.randn(2, 40, 3, dtype=torch.float64)
    combined = a @ torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = sweep.agreement(a, combined, None)
    for run in range(2):
        full = np.cov(torch.cat([a[run], combined[run, :, None]], 1).T.numpy(), ddof=0)
        deviation = np.sqrt(full.diagonal()[:3])
        np.testing.assert_allclose(found[run], full[3, :3] / deviation / deviation.max(), rtol=1e-9)


def test_a_part_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.csv.gz"
    first = store.Store(path)
    one, two = rows_of({"fixed": [[0.123456789]]}), rows_of({"upgrad": [[0.5]]})
    first.add(one)
    path.write_bytes(path.read_bytes() + b"\x1f\x8b\x08\x00half a member")
    again = store.Store(path)
    assert again.has("p", "fixed", 1.0, 0)
    assert not again.has("p", "upgrad", 1.0, 0)
    again.add(two)
    again.finish()
    assert [row["balance"] for row in store.read(path)] == [0.12346, 0.5]
    other = store.Store(tmp_path / "y.csv.gz")
    other.add(two)
    other.add(one)
    other.finish()
    assert (tmp_path / "y.csv.gz").read_bytes() == path.read_bytes()


def test_a_seed_that_was_cut_off_is_left_out() -> None:
    rows = rows_of({"fixed": [[0.5, 0.6], [0.5, 0.6]], "upgrad": [[0.5], [0.7, 0.8]]})
    assert {(row["rate"], row["seed"]) for row in whole_seeds(rows)} == {(1, 0), (10, 0), (10, 1)}


def test_a_page_is_filled_and_filled_again() -> None:
    page = "a\n<!-- study:x -->\nold\n<!-- end -->\nb <!--study y/z-->old<!----> c"
    for _ in range(2):
        page = report.fill(page, {"x": lambda: "| new |"}, lambda name: f"<{name}>")
        assert page == "a\n<!-- study:x -->\n| new |\n<!-- end -->\nb <!--study y/z--><y/z><!----> c"
    with pytest.raises(KeyError):
        report.fill("<!-- study:unknown -->\n<!-- end -->", {}, str)


@pytest.mark.parametrize("name", report.PAGES)
def test_the_pages_say_what_the_committed_figures_say(name: str) -> None:
    page = (report.DOCS / name).read_text(encoding="utf-8")
    filled = report.filled(page, Path(report.__file__).parent / "results")
    assert filled == page, "run `python -m study report`"


# --- theorems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", theory.RULES)
def test_every_step_keeps_the_inequality_of_the_proof(rule: str) -> None:
    for size in theory.SIZES:
        rows = theory.theorem_2("bandit-3", rule, size, 4, 64)
        assert min(row["slack"] for row in rows) > -1e-12


def test_weights_from_scores_alone_need_not_converge() -> None:
    """Two arms, each serves one objective: every policy is stationary, yet the ascent oscillates."""
    rows = [theory.theorem_2("two-arms", rule, 1.0, 1, 512)[0] for rule in ("scores-r0", "scores-r0.1")]
    assert rows[0]["combined_norm"] > 0.1
    assert rows[1]["combined_norm"] < 1e-6


def test_natural_gram_is_the_covariance_and_no_rule_beats_the_least() -> None:
    assert max(row["value"] for row in theory.natural_gram(20)) < 1e-10
    for row in theory.theorem_1(50):
        limit = row["value"] < 1e-6 if row["rule"] == "quadprog" else not row["value"] < 1 - 1e-6
        assert limit


def test_min_norm_is_the_least_on_a_grid() -> None:
    gradients = np.random.default_rng(0).normal(size=(2, 5))
    norm, c = measures.min_norm(gradients @ gradients.T)
    shares = np.linspace(0, 1, 2001)[:, None]
    grid = np.linalg.norm(shares * gradients[0] + (1 - shares) * gradients[1], axis=1)
    assert norm == pytest.approx(grid.min(), rel=1e-5)
    assert c.sum() == pytest.approx(1.0)


def test_distance_to_a_front_that_is_known_by_hand() -> None:
    arms = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert measures.improvable([1 / 3, 1 / 3], arms) == pytest.approx(1 / 6)
    assert measures.improvable([0.3, 0.7], arms) == pytest.approx(0.0, abs=1e-9)
