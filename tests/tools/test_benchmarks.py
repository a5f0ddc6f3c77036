"""The benchmark suite: its records, its check that contestants agree, goals, and the tables it fills."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm", reason="the benchmarks need tqdm")

from benchmarks import goals, headline, models, peers, report, solvers, step, tokens
from benchmarks.harness import Contestant, Missing, Row, Session, interleaved, peak_memory, read

ROOT = Path(__file__).parent.parent
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


def test_csv_holds_what_was_measured(session: Session) -> None:
    ours = Contestant("ours", lambda x: x + x, [torch.ones(3)], moved=24.0)
    gone = Missing("gone", "no module named gone")
    session.measure("double", "float32", 3, [ours, doubled(0.0), gone], size=3, input_bytes=12)
    session.write()
    text = session.csv.read_text(encoding="utf-8")
    for key in ("command", "date", "commit", "processor", "kernels", "versions"):
        assert f"# {key}: " in text
    own, peer, missing = read(session.csv)
    assert list(own) == [
        *(
            "work",
            "case",
            "n",
            "contestant",
            "threads",
            "microseconds",
            "spread",
            "ratio",
            "difference",
            "note",
        ),
        *("size", "gigabytes_per_second", "peak_megabytes", "input_megabytes"),
    ]
    assert float(own["ratio"]) == 1
    assert float(own["microseconds"]) > 0
    assert float(own["gigabytes_per_second"]) == pytest.approx(24e-3 / float(own["microseconds"]), rel=1e-3)
    assert float(peer["ratio"]) > 0
    assert float(peer["difference"]) == 0
    assert peer["size"] == "3"
    assert missing["note"] == "missing: no module named gone"
    assert missing["microseconds"] == ""


def test_wrong_peer_stops_the_run(session: Session) -> None:
    ours = Contestant("ours", lambda x: x + x, [torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"double, float32, N=3: x2.5 differs from ours by 1.00e\+00"):
        session.measure("double", "float32", 3, [ours, doubled(1e-6, 2.5)])
    assert not session.rows
    nan = Contestant("nan", ours.call, ours.inputs, lambda _: float("nan"), 1.0)
    with pytest.raises(RuntimeError, match="nan differs"):
        session.measure("double", "float32", 3, [ours, nan])
    known_to_be_inexact = doubled(None, 2.5)
    assert session.measure("double", "float32", 3, [ours, known_to_be_inexact])[1].difference == 1


def test_wrong_ours_stops_the_run_too(session: Session) -> None:
    with pytest.raises(RuntimeError, match=r"x2.5 differs"):
        session.measure("double", "float32", 3, [doubled(1e-6, 2.5), doubled(1e-6)])


def test_rounds_go_in_turns_through_the_whole_pool() -> None:
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


def test_peak_memory_sees_what_a_call_takes() -> None:
    size = 1 << 26  # bytes; page tables and the allocator's own are far below a tenth of it
    taken = peak_memory(Contestant("takes", lambda x: torch.ones(x, dtype=torch.uint8), [size]))
    kept = peak_memory(Contestant("takes nothing", lambda x: None, [size]))
    if taken is None or kept is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 0.9 * size < taken < 1.5 * size
    assert kept < 0.1 * size


# --- parts -------------------------------------------------------------------------------------------


def test_solvers(session: Session) -> None:
    solvers.scores(session, 4)
    by_name = {r.contestant: r for r in session.rows}
    assert by_name["pama_weights"].ratio == 1
    assert by_name["eager PyTorch"].difference is not None
    assert by_name["eager PyTorch"].difference <= 1e-2


TINY_CASES = [
    tokens.Case(
        128, 3, width=16, trainers=False, forward=True, weights_per=("batch", "token", "sequence", "given")
    ),
    tokens.Case(128, 1, width=16, trainers=False),
    tokens.Case(128, 3, "packed", width=16, trainers=False, weights_per=("batch", "token", "sequence")),
    tokens.Case(128, 3, "per sequence", width=16, trainers=False, weights_per=("batch", "token", "given")),
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
    assert len(ours) == len(case.weights_per) + case.forward
    peers_seen = {r.contestant for r in session.rows} - {tokens.LOSS}
    assert peers_seen == {tokens.EAGER, tokens.PPO}
    for r in session.rows:
        assert r.size == 128
        assert r.microseconds is not None
        assert r.microseconds > 0
        if r.contestant in peers_seen:
            assert r.difference is not None
            assert r.difference <= tokens.TOLERANCE[case.dtype]


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize("weights_per", ["batch", "token", "sequence", "given"])
def test_a_loss_of_another_rule_is_caught(
    session: Session, weights_per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped a little otherwise; then with the weights of another rule."""
    case = tokens.Case(128, 3, width=16, trainers=False, weights_per=(weights_per,))
    right = peers.eager_loss

    def clipped(per: str) -> peers.Loss:
        def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
            return right(per)(logprobs, old + 1e-3, advantages, mask)

        return loss

    other = "given" if weights_per != "given" else "batch"
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


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match="no_such_trainer"):
        peers._named("no_such_trainer", "no_such_trainer.losses", "loss")
    assert "no_such_trainer" in tokens.available(lambda: peers._named(*["no_such_trainer"] * 3))


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


# --- goals -------------------------------------------------------------------------------------------


def solver_row(
    work: str, n: int, contestant: str, ratio: float | str, case: str = "regular"
) -> dict[str, str]:
    return {
        "work": work,
        "n": str(n),
        "contestant": contestant,
        "ratio": str(ratio),
        "case": case,
        "size": "",
    }


@pytest.mark.parametrize(("ratio", "met"), [(10.0, "yes"), (9.99, "no"), ("", "not measured")])
def test_goal_is_met_from_its_bound_on(ratio: float | str, met: str) -> None:
    goal = goals.GOALS[0]
    assert goal.least == 10
    verdict = goals.judge(goal, [solver_row("scores", 4, "eager PyTorch", ratio)], "avx512")
    assert verdict.met == met
    assert verdict.goal == ">= 10x faster"


def test_every_n_counts() -> None:
    """The worst N decides; a singular pool and another solver do not."""
    goal = next(g for g in goals.GOALS if g.work.startswith("min_norm_weights, every N from 2"))
    rows = [solver_row("gram", n, "DAQP", 3.0) for n in (2, 4, 8)]
    others = [solver_row("gram", 4, "DAQP", 0.1, "singular"), solver_row("gram", 4, "quadprog", 0.1)]
    assert goals.judge(goal, rows + others, "avx512").met == "yes"
    assert goals.judge(goal, [*rows, solver_row("gram", 16, "DAQP", 0.9)], "avx512").met == "no"


def test_bounds_follow_the_instructions() -> None:
    goal = next(g for g in goals.GOALS if g.work.startswith("objective_statistics"))
    row = solver_row("statistics", 4, tokens.READ, 0.5, "padded, float32") | {"size": str(2**18)}
    assert goals.judge(goal, [row], "avx512 (built: ...)").met == "no"
    assert goals.judge(goal, [row], "avx2 (built: ...)").met == "yes"


def test_goals_come_from_the_csvs(tmp_path: Path) -> None:
    session = Session("tokens", tmp_path, True, "-", 0.005)
    times = (1.0, 0.0, 0.7, None, "")
    session.add([Row("statistics", "padded, float32", 4, tokens.READ, 1, *times, 2**18)])
    session.write()
    judged = goals.verdicts(tmp_path)
    assert len(judged) == len(goals.GOALS)
    with goals.write(tmp_path, judged).open(encoding="utf-8") as file:
        written = {r["work"]: r for r in csv.DictReader(file)}
    found = written["objective_statistics, 262,144 tokens, N=4, cold"]
    assert found["measured"] == "70% of its speed"
    assert [v.met for v in judged].count("not measured") == len(judged) - 1
    assert "objective_statistics" in goals.table(judged)


def test_memory_bounds_what_a_loss_can_reach() -> None:
    """Twice as fast as the peer at a quarter of the bandwidth: 8 times is all there is, 4 with two passes."""
    case, size = "padded, float32, ", 2**18
    for weights, limit in (("given weights", "8x faster"), ("weights per batch", "4x faster")):
        goal = next(g for g in goals.GOALS if g.part == "tokens" and g.work.endswith(weights))
        common = {"n": "8", "size": str(size), "ratio": "2.0", "gigabytes_per_second": "2.5"}
        rows = [
            common | {"work": "loss and gradient", "case": case + weights, "contestant": name}
            for name in (tokens.LOSS, tokens.PPO)
        ]
        assert goals.judge(goal, rows, "avx512").limit == ""
        rows.append(
            common | {"work": "bandwidth", "case": "", "contestant": "read", "gigabytes_per_second": "10.0"}
        )
        assert goals.judge(goal, rows, "avx512").limit == limit


# --- documentation -----------------------------------------------------------------------------------


def test_marked_places_are_rewritten_and_nothing_else(tmp_path: Path) -> None:
    judged = [goals.Verdict("a", "b", ">= 2x faster", "3x faster", "yes")]
    goals.write(tmp_path, judged)
    text = "before\n<!-- benchmark: goals -->\nold\n<!-- end -->\nafter\n"
    filled = report.filled(text, tmp_path)
    assert filled.startswith("before\n<!-- benchmark: goals -->\n| work |")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "| a | b | >= 2x faster | 3x faster | yes |  |" in filled
    assert "old" not in filled
    assert report.filled(filled, tmp_path) == filled


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_marks_are_known(name: str) -> None:
    marks = [found[1] for found in report.MARKED.findall((ROOT / name).read_text(encoding="utf-8"))]
    assert set(marks) <= set(report.TABLES)
    assert name == "README.md" or marks


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_figures_in_the_documents_are_those_of_the_csvs(name: str) -> None:
    if not (RESULTS / "goals.csv").is_file():
        pytest.skip("no results are committed: run `python -m benchmarks --out benchmarks/results`")
    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.filled(text, RESULTS) == text, "run `python -m benchmarks --docs`"


def test_committed_results_measure_every_goal() -> None:
    if not (RESULTS / "goals.csv").is_file():
        pytest.skip("no results are committed: run `python -m benchmarks --out benchmarks/results`")
    judged = goals.verdicts(RESULTS)
    assert [v.work for v in judged if v.met == "not measured"] == []
    assert [tuple(r.values()) for r in read(RESULTS / "goals.csv")] == [
        tuple(vars(v).values()) for v in judged
    ]


# --- the GPU's, in a command of its own --------------------------------------------------------------


def test_a_wrong_option_of_the_gpu_benchmark_costs_no_build() -> None:
    """The package is built before the benchmark runs, for minutes where there is nvcc."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run_gpu.py"), "--device", "tpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "'tpu'" in ended.stderr
