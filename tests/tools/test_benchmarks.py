"""The benchmark suite: its check that contestants agree, its timing, and the tables it fills."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm", reason="the benchmarks need tqdm")

from benchmarks import headline, models, peers, report, solvers, step, tokens
from benchmarks.harness import Contestant, Session, interleaved, peak_memory, read

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


def test_a_wrong_contestant_stops_the_run(session: Session) -> None:
    ours = Contestant("ours", lambda x: x + x, [torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"double, float32, N=3: x2.5 differs from ours by 1.00e\+00"):
        session.measure("double", "float32", 3, [ours, doubled(1e-6, 2.5)])
    assert not session.rows
    nan = Contestant("nan", ours.call, ours.inputs, lambda _: float("nan"), 1.0)
    with pytest.raises(RuntimeError, match="nan differs"):
        session.measure("double", "float32", 3, [ours, nan])
    known_to_be_inexact = doubled(None, 2.5)
    assert session.measure("double", "float32", 3, [ours, known_to_be_inexact])[1].difference == 1


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
    """Each stops where a peer, or its own certificate, differs."""
    solvers.scores(session, 4)
    solvers.gram(session, 4, "singular")
    solvers.upgrad(session, 4)
    solvers.cost_of_gram(session, 4)
    assert {r.work for r in session.rows} == {"scores", "gram", "upgrad", "cost"}


@pytest.mark.parametrize("n", [1, 3])
def test_combined_advantages_of_sequences(session: Session, n: int) -> None:
    tokens.combine(session, n, rows=8, width=32)
    assert [r.contestant for r in session.rows] == [tokens.COMBINE, tokens.MASK]


EVERY = tuple(tokens.RULES)
TINY_CASES = [
    tokens.Case(128, 3, width=16, trainers=False, forward=True, rules=EVERY),
    tokens.Case(128, 1, width=16, trainers=False),
    tokens.Case(128, 3, "packed", width=16, trainers=False, rules=EVERY),
    tokens.Case(128, 3, "per sequence", width=16, trainers=False, rules=EVERY),
    tokens.Case(128, 3, dtype=torch.bfloat16, width=16, trainers=False),
]


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "POOL_BYTES", 1e4)


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: f"{case.name}, N={case.n}")
def test_losses_agree_in_every_layout(session: Session, case: tokens.Case) -> None:
    tokens.loss(session, case)
    ours = [r for r in session.rows if r.contestant == tokens.LOSS]
    assert len(ours) == len(case.rules) + case.forward
    peers_seen = {r.contestant for r in session.rows} - {tokens.LOSS}
    assert peers_seen == {tokens.EAGER, tokens.PPO}
    for r in session.rows:
        assert r.size == 128
        assert r.microseconds is not None
        assert r.microseconds > 0
        if r.contestant in peers_seen or r.case.endswith((tokens.DEFAULT, tokens.UPGRAD)):
            assert r.difference is not None
            assert r.difference <= tokens.TOLERANCE[case.dtype]


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize("rule", tokens.EAGER_RULES)
def test_a_loss_of_another_rule_is_caught(
    session: Session, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped a little otherwise; then with the weights of another rule."""
    case = tokens.Case(128, 3, width=16, trainers=False, rules=(rule,))
    right = peers.eager_loss

    def clipped(per: str) -> peers.Loss:
        def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
            return right(per)(logprobs, old + 1e-3, advantages, mask)

        return loss

    other = "given" if rule != tokens.GIVEN else "batch"
    for wrong in (clipped, lambda _: right(other)):
        monkeypatch.setattr(peers, "eager_loss", wrong)
        with pytest.raises(RuntimeError, match=f"{tokens.EAGER} differs"):
            tokens.loss(session, case)


@pytest.mark.usefixtures("small_pool")
def test_statistics_beside_a_read(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tokens.Case(256, 3, width=32)
    tokens.statistics(session, case)
    assert [r.contestant for r in session.rows] == ["objective_statistics", tokens.READ, tokens.EAGER]
    # log-probabilities, old ones and three advantages of 4 bytes, a mask of 1
    assert session.rows[0].input_megabytes == pytest.approx(256 * (5 * 4 + 1) * 1e-6)
    right = peers.eager_statistics

    def wrong(*tensors: Tensor) -> dict[str, Tensor]:
        sums = right(*tensors)
        return {**sums, "positive": sums["positive"] + 1}

    monkeypatch.setattr(peers, "eager_statistics", wrong)
    with pytest.raises(RuntimeError, match="differs from ours"):
        tokens.statistics(session, case)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize(
    ("package", "make", "dual_clip"),
    [("trl", peers.trl_loss, None), ("verl", peers.verl_loss, peers.VERL_DUAL_CLIP)],
)
@pytest.mark.filterwarnings("ignore")  # of the packages, while they are imported
def test_trainers_own_losses_compute_ours(
    package: str, make: Callable[[], peers.Loss], dual_clip: float | None
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    x = tokens.batch(tokens.Case(128, 1, width=16))
    x = x.integer_mask() if package == "trl" else x
    loss = make()
    expected = tokens.with_gradient(tokens.our_single_loss(dual_clip))(x)
    found = tokens.with_gradient(lambda x: loss(x.logprobs, x.old, x.single, x.mask))(x)
    assert tokens.apart(expected, found) <= tokens.TOLERANCE[torch.float32]


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
    assert set(found) == {step.PAMA, step.SINGLE, step.PAMA_SHARE, step.SINGLE_SHARE}
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


# --- the GPU's, in a command of its own --------------------------------------------------------------


def test_a_wrong_option_of_the_gpu_benchmark_costs_no_build() -> None:
    """The package is built before the benchmark runs, for minutes where there is nvcc."""
    command = [sys.executable, str(ROOT / "tests" / "run_gpu.py"), "--device", "tpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "'tpu'" in ended.stderr
