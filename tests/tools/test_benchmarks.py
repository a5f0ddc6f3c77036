"""The benchmark suite: its check that contestants agree, its timing, and the tables it fills."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm", reason="the benchmarks need tqdm")

from benchmarks import (
    batches,
    harness,
    headline,
    losses,
    models,
    peers,
    pools,
    report,
    sequence,
    solvers,
    step,
    tokens,
)
from benchmarks.batches import PACKED, SEQUENCE, Case
from benchmarks.harness import Row, Session, read
from benchmarks.losses import DEFAULT, TOKEN
from benchmarks.timing import FLOOR, Contestant, interleaved, peak_memory

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TINY = models.Shape("tiny", 32, 2, 2, 64)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("part", tmp_path, quick=True, command="python -m benchmarks part", seconds=0.005)


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="models need transformers")
    monkeypatch.setattr(models, "CPU_SHAPES", (TINY,))
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))


# --- harness -----------------------------------------------------------------------------------------


def doubled(tolerance: float | None, factor: float = 2.0) -> Contestant:
    """A contestant that should double its input."""

    def check(c: Contestant) -> float:
        return max(float((c.call(x) - 2 * x).abs().max()) for x in c.inputs)

    return Contestant(
        f"x{factor:g}", lambda x: factor * x, [torch.ones(3), torch.arange(3.0)], check, tolerance
    )


def test_a_wrong_or_failing_peer_gets_no_time_and_the_rest_goes_on(session: Session) -> None:
    ours = Contestant("ours", lambda x: x + x, [torch.ones(3)])
    nan = Contestant("nan", ours.call, ours.inputs, lambda _: float("nan"), 1.0)
    broken = Contestant("broken", lambda x: x.no_such_name, ours.inputs)
    inexact = doubled(None, 2.5)
    rows = session.measure("double", "float32", 3, [ours, doubled(1e-6, 2.5), nan, broken, inexact])
    assert [r.microseconds is None for r in rows] == [False, True, True, True, False]
    assert "x2.5 differs by 1.00e+00, more than 1e-06" in rows[1].note
    assert rows[4].difference == 1
    assert len(session.failures) == 3
    assert "double, float32, N=3: broken: AttributeError" in session.failures[2]


def test_a_case_of_ours_that_is_wrong_has_no_rows(session: Session) -> None:
    wrong = doubled(1e-6, 2.5)
    right = Contestant("ours", lambda x: x + x, [torch.ones(3)])

    def work(x: Contestant) -> None:
        session.measure("double", "float32", 3, [x])

    session.each([functools.partial(work, x) for x in (wrong, right)])
    assert [r["contestant"] for r in read(session.csv)] == ["ours"]
    assert "Disagreement" in session.failures[0]


def test_a_part_is_measured_once_for_a_commit(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_commit", lambda: "abc")
    assert not session.measured()
    session.write()
    assert session.measured()
    monkeypatch.setattr(harness, "_commit", lambda: "def")
    assert not session.measured()


def test_rounds_use_all_inputs_in_turn() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        def call(x: int) -> None:
            seen[name].append(x)
            if order[-1:] != [name]:
                order.append(name)

        return Contestant(name, call, range(7))

    times = interleaved([contestant("a"), contestant("b")], 0.01)
    assert len(times[0]) == len(times[1]) >= 3
    assert set(seen["a"]) == set(seen["b"]) == set(range(7))
    assert order[:5] == ["a", "b", "a", "b", "a"]  # the estimate, then a round each way


def test_peak_memory_of_a_call() -> None:
    size = 1 << 26  # bytes; page tables and the allocator's own are far below a tenth of it
    taken = peak_memory(Contestant("takes", lambda x: torch.ones(x, dtype=torch.uint8), [size]))
    kept = peak_memory(Contestant("takes nothing", lambda x: None, [size]))
    if taken is None or kept is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 0.9 * size < taken < 1.5 * size
    assert kept < 0.1 * size


# --- parts -------------------------------------------------------------------------------------------


def test_solvers(session: Session) -> None:
    """Each compares with its peers, or with its own certificate."""
    solvers.scores(session, 4)
    for kind in (pools.REGULAR, pools.SINGULAR):
        solvers.gram(session, 4, kind)
        solvers.upgrad(session, 4, kind)
    assert {r.work for r in session.rows} == {"scores", "gram", "upgrad"}
    assert not session.failures


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("n", [1, 3])
def test_combined_advantages_of_sequences(session: Session, n: int, dtype: torch.dtype) -> None:
    sequence.combine(session, n, dtype, (8, 32))
    assert [r.contestant for r in session.rows] == [sequence.COMBINE, FLOOR]


EVERY = tuple(losses.RULES)
TINY_CASES = [
    (Case(128, 3, width=16), EVERY),
    (Case(128, 1, width=16), (DEFAULT, TOKEN)),
    (Case(128, 3, PACKED, width=16), EVERY),
    (Case(128, 3, SEQUENCE, width=16), EVERY),
    (Case(128, 3, dtype=torch.bfloat16, width=16), (DEFAULT, TOKEN)),
]


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "POOL_BYTES", 1e4)


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize(("case", "rules"), TINY_CASES, ids=lambda x: getattr(x, "name", ""))
def test_losses_agree_in_every_layout(session: Session, case: Case, rules: tuple[str, ...]) -> None:
    losses.loss(session, case, rules)
    assert not session.failures
    ours = [r for r in session.rows if r.contestant == losses.LOSS]
    assert len(ours) == len(rules)
    assert {r.contestant for r in session.rows} == {losses.LOSS, losses.EAGER, losses.PPO, FLOOR}
    for r in session.rows:
        assert r.size == 128
        assert r.microseconds is not None
        assert r.microseconds > 0
        reference = r.contestant == losses.LOSS and r.case.endswith(DEFAULT)
        compared = reference or r.contestant in (losses.EAGER, losses.PPO)
        assert not compared or (r.difference is not None and r.difference <= losses.TOLERANCE[case.dtype])


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize("rule", losses.EAGER_RULES)
def test_a_loss_of_another_rule_is_caught(
    session: Session, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped a little otherwise; then with the weights of another rule."""
    right = peers.eager_loss

    def clipped(per: str) -> peers.Loss:
        def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
            return right(per)(logprobs, old + 1e-3, advantages, mask)

        return loss

    other = "given" if losses.EAGER_RULES[rule] != "given" else "batch"
    for wrong in (clipped, lambda _: right(other)):
        monkeypatch.setattr(peers, "eager_loss", wrong)
        session.failures.clear()
        losses.loss(session, Case(128, 3, width=16), (rule,))
        assert f"{losses.EAGER}: Disagreement" in session.failures[0]


@pytest.mark.usefixtures("small_pool")
def test_variants_are_ours_beside_ours(session: Session) -> None:
    case = Case(128, 3, width=16)
    losses.variants(session, case, TOKEN, "a", {"b": (case, losses.TOKEN_REGULARIZED)})
    assert [r.contestant for r in session.rows] == ["a", "b"]
    assert session.rows[1].difference is not None


@pytest.mark.usefixtures("small_pool")
def test_statistics_beside_the_floor(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(256, 3, width=32)
    tokens.statistics(session, case)
    assert not session.failures
    # log-probabilities, old ones and three advantages of 4 bytes, a mask of 1
    assert batches.batch(case).bytes == 256 * (5 * 4 + 1)
    right = peers.eager_statistics

    def wrong(*tensors: Tensor) -> dict[str, Tensor]:
        sums = right(*tensors)
        return {**sums, "positive": sums["positive"] + 1}

    monkeypatch.setattr(peers, "eager_statistics", wrong)
    tokens.statistics(session, case)
    assert f"{tokens.EAGER}: Disagreement" in session.failures[0]


@pytest.mark.slow
@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize(
    ("package", "make", "dual_clip"),
    [
        ("trl", peers.trl_loss, None),
        ("verl", peers.verl_loss, peers.VERL_DUAL_CLIP),
        ("liger_kernel", peers.liger_loss, None),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the packages, while they are imported
def test_trainers_own_losses_compute_ours(
    package: str, make: Callable[[], peers.Loss], dual_clip: float | None
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    x = batches.batch(Case(128, 1, SEQUENCE, width=16))
    x = x.integer_mask() if package == "trl" else x
    loss = make()
    expected = losses.with_gradient(losses.our_single_loss(dual_clip))(x)
    found = losses.with_gradient(lambda x: loss(x.logprobs, x.old, x.one, x.mask))(x)
    assert losses.apart(expected, found) <= losses.TOLERANCE[torch.float32]


@pytest.mark.usefixtures("tiny_models")
def test_headline(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = models.policy(TINY, headline.WIDTH)
    headline.to_weights(session, policy, "tiny", 3)
    pama, mgda, shared = session.rows
    assert [r.contestant for r in (pama, mgda, shared)] == [headline.PAMA, headline.MGDA, headline.MGDA_UB]
    for r in (pama, mgda, shared):
        assert r.size == policy.size
        assert r.difference is not None
        assert r.difference <= headline.TOLERANCE
    monkeypatch.setattr(headline, "LARGEST", 2 * policy.size)
    headline.to_weights(session, policy, "tiny", 3)
    assert session.rows[-2].note == "missing: left out: takes too long"


@pytest.mark.usefixtures("tiny_models")
def test_step(session: Session) -> None:
    step.run(session)
    found = {r["contestant"]: float(r["ratio"]) for r in read(session.csv)}
    assert set(found) == {step.PAMA, step.SINGLE, step.MGDA, step.PAMA_SHARE, step.SINGLE_SHARE}
    assert 0 < found[step.PAMA_SHARE] < 1
    assert 0 < found[step.SINGLE_SHARE] < 1


# --- documentation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_marks_are_known(name: str) -> None:
    marks = [found[1] for found in report.MARKED.findall((ROOT / name).read_text(encoding="utf-8"))]
    assert set(marks) <= set(report.TABLES)
    assert name == "README.md" or marks


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_figures_in_the_documents_are_those_of_the_csvs(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.filled(text, RESULTS) == text, "run `python -m benchmarks --docs`"


def row(n: int, ratio: float | None) -> Row:
    return Row("double", "float32", n, "peer", 1, None if ratio is None else 1.0, 0.0, ratio, None, "")


def test_goals_are_held_against_the_worst_row(session: Session) -> None:
    session.rows = [row(2, 3.0), row(4, 1.5), row(8, None), row(16, 0.1)]
    session.write()

    def line(**options: Any) -> list[str]:
        return report.Goal("work", "peer", part="part", **options).line(session.out)[2:]

    faster = {"sign": ">=", "where": {"work": "double", "n": range(9)}}
    assert line(bound=2, **faster) == [">= 2x", "1.50x (N=4)", "no"]
    assert line(bound=1.5, **faster) == [">= 1.5x", "1.50x (N=4)", "yes"]
    share = {"where": {"n": 16}, "unit": "%"}
    assert line(sign=">=", bound=0.85, **share) == [">= 85%", "10%", "no"]
    assert line(sign="<=", bound=9, where={"n": 16}, inverse=True) == ["<= 9x", "10.0x", "no"]
    assert line(sign="<=", bound=9, where={"n": 3}) == ["<= 9x", "-", "not measured"]


@pytest.mark.parametrize("goal", report.GOALS, ids=lambda goal: f"{goal.work}, {goal.against}")
def test_goals_refer_to_rows(goal: report.Goal) -> None:
    if not (RESULTS / f"{goal.part}.csv").exists():
        pytest.skip(f"benchmarks/results/{goal.part}.csv is missing: python -m benchmarks {goal.part}")
    assert goal.line(RESULTS)[-1] in ("yes", "no")


# --- the GPU's, in a command of its own --------------------------------------------------------------


def test_a_wrong_option_of_the_gpu_benchmark_costs_no_build() -> None:
    """The package is built before the benchmark runs, for minutes where there is nvcc."""
    command = [sys.executable, str(ROOT / "tests" / "run_gpu.py"), "--device", "tpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "'tpu'" in ended.stderr
