"""The control example: its tasks, evaluation and figures, and a run of it from the command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
for module in ("mo_gymnasium", "stable_baselines3", "matplotlib"):
    pytest.importorskip(module, reason=f"{module} is not installed (pip install 'pama-kernels[gym]')")
sys.path.insert(0, str(EXAMPLES))
import _control  # noqa: E402
import _control_report  # noqa: E402
import _fronts  # noqa: E402
import mo_gymnasium_compare as compare  # noqa: E402

sys.path.remove(str(EXAMPLES))

HOPPER, GATHERING, TREASURE = compare.METHODS
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")


# --- scales and intervals ------------------------------------------------------------------------


def test_distance_is_to_the_nearest_point_on_the_scale() -> None:
    front = np.array([[0.0, 20.0], [5.0, 0.0]])
    low, high = [0.0, 0.0], [5.0, 20.0]
    np.testing.assert_allclose(_fronts.distance(front, front, low, high), 0, atol=1e-12)
    np.testing.assert_allclose(_fronts.distance([[5.0, 5.0], [0.0, 0.0]], front, low, high), [0.25, 1.0])


def test_intervals_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in (2, 3, 5, 15, 30):
        values = np.random.default_rng(count).normal(size=count).tolist()
        mean, half = _fronts.mean_and_interval(values)
        low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
        # The table has three digits; beyond it the factor is approximated.
        assert (mean, half) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-2)
    assert np.isnan(_fronts.mean_and_interval([1.0])[1])


@pytest.mark.parametrize("env", [TREASURE, GATHERING])
def test_no_point_of_a_known_front_dominates_another(env: str) -> None:
    front = _fronts.front(env, _control.TASKS[env].gamma_of_returns)
    assert front is not None
    assert front.shape[1] == len(_control.TASKS[env].objectives)
    dominates = (front[:, None] >= front).all(-1) & (front[:, None] > front).any(-1)
    assert not dominates.any()


def rows_of(balances: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Runs of the first task whose second objective is at its best and whose first has this balance."""
    front = _fronts.front(TREASURE, 0.99)
    assert front is not None
    low, high = front.min(0), front.max(0)
    return [
        {"env": TREASURE, "method": method, "seed": float(seed), "steps": 1.0, "cpu_s": 1.0}
        | {"return_1": low[0] + x * (high[0] - low[0]), "return_2": high[1], "weight_1": 0.5, "weight_2": 0.5}
        for method, values in balances.items()
        for seed, x in enumerate(values)
    ]


def test_gains_are_paired_over_the_seeds_that_both_have() -> None:
    rows = rows_of({"fixed": [0.1, 0.5, 0.9], "fixed 0.7 0.3": [0.0, 0.1, 0.0], "pama": [0.2, 0.6]})
    (result,) = _control_report.results(rows, _control.TASKS)
    np.testing.assert_allclose(result.balance("fixed"), [0.1, 0.5, 0.9])
    assert result.gain("pama", "fixed") == pytest.approx((0.1, 0.0), abs=1e-9)
    text = _control_report.table(rows, _control.TASKS)
    assert "+0.10 ± 0.00" in text
    assert "in hindsight (fixed, equal): pama +0.10" in text


# --- tasks ---------------------------------------------------------------------------------------


def test_observations_are_one_hot() -> None:
    env = _control.make(GATHERING)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(np.flatnonzero(observation), [4, 6 + 2, 12, 18])  # (4, 2, 0, 0), levels 6
    assert env.observation_space.contains(observation)


def test_weights_by_hand_are_one_objective() -> None:
    """With the weights of Gymnasium's Hopper, its own reward, less the bonus that every objective has."""
    pytest.importorskip("mujoco", reason="mujoco is not installed (pip install 'pama-kernels[gym]')")
    weighted, own = _control.make(HOPPER, compare.GYMNASIUM), _control.gymnasium.make("Hopper-v5")
    weighted.reset(seed=0)
    own.reset(seed=0)
    action = np.array([0.3, -0.2, 0.1], dtype=np.float32)
    found, expected = weighted.step(action)[1], own.step(action)[1]
    assert found == pytest.approx(expected + 1e-3, rel=1e-5)  # 1 + 1e-3 times the bonus of 1
    model = _control.train(_control.Run(HOPPER, reward=compare.GYMNASIUM, steps=0))
    assert model.objective_names == ["0"]


def test_returns_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that always goes down finds the first treasure, of 0.7, in one step."""
    run = _control.Run(TREASURE, steps=0)
    model = _control.train(run)
    monkeypatch.setattr(model, "predict", lambda x, deterministic: (np.full(len(x), 1), None))
    assert _control.evaluate(model, run) == pytest.approx([0.7, -1.0])
    # To the right, and then down into the second one, of 8.2 after three steps.
    steps = iter([3, 1, 1])
    monkeypatch.setattr(model, "predict", lambda x, deterministic: (np.full(len(x), next(steps)), None))
    assert _control.evaluate(model, run) == pytest.approx([8.2 * 0.99**2, -(1 + 0.99 + 0.99**2)], rel=1e-5)


def test_runs_repeat_and_two_objectives_get_equal_weights() -> None:
    run = _control.Run(TREASURE, steps=2048)
    first, again, equal = (_control.measure(replace(run, rule=rule)) for rule in ("pama", "pama", "fixed"))
    for row in (first, again, equal):
        del row["cpu_s"], row["method"]
    assert first == again == equal
    assert first["weight_1"] == first["weight_2"] == 0.5
    assert first["steps"] == 2048


# --- runs ----------------------------------------------------------------------------------------


def test_the_study_pairs_all_methods_with_all_seeds() -> None:
    runs = compare.study(False, 3)
    assert len({(run.env, run.method, run.seed) for run in runs}) == len(runs)
    for env, methods in compare.METHODS.items():
        assert len({run.method for run in runs if run.env == env}) == len(methods)
    assert {run.steps for run in compare.study(True, 1)} == {0, 4_000}


def test_an_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # for the worker
    path = tmp_path / "mo_gymnasium.csv"
    runs = [_control.Run(TREASURE, seed=seed, steps=1024) for seed in (0, 1)]
    compare.train_all(runs[:1], path, 1)
    (first,) = compare.read(path)
    compare.write(tmp_path / "mo_gymnasium.csv.unfinished", [first | {"cpu_s": 12345.0}])
    compare.train_all(runs, path, 1)
    rows = compare.read(path)
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["cpu_s"] == 12345.0
    compare.train_all(runs[:1], path, 1)  # a finished study is made anew
    assert compare.read(path)[0]["cpu_s"] < 12345.0


def test_the_committed_figures_are_of_the_study(tmp_path: Path) -> None:
    rows = compare.read(EXAMPLES / "results" / "mo_gymnasium.csv")
    expected = {(run.env, run.method) for run in compare.study(False, 1)}
    assert {(row["env"], row["method"]) for row in rows} == expected
    _control_report.draw(tmp_path / "picture.png", rows, _control.TASKS)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_page_shows_the_committed_figures() -> None:
    """The table of docs/examples.md, the number of runs and the time."""
    rows = compare.read(EXAMPLES / "results" / "mo_gymnasium.csv")
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    lines = ([x.strip() for x in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|")
    table = {label: cells for label, *cells in lines if len(cells) == 3}
    labels = {'`"pama"`': "pama", '`"upgrad"`': "upgrad", "fixed, equal": "fixed"}
    for column, result in enumerate(_control_report.results(rows, _control.TASKS)):
        uneven = [x for x in result.by_hand if x.startswith("fixed ")]
        best = max(uneven, key=lambda x: float(result.balance(x).mean()))
        shown = {label: (result.balance, method) for label, method in labels.items() if method in result.rows}
        shown["fixed, the best other hand-tuned weights"] = (result.balance, best)
        for label, (values, method) in shown.items():
            expected = "{:.2f} ± {:.2f}".format(*_fronts.mean_and_interval(values(method).tolist()))
            assert table[label][column].startswith(expected), (result.env, label)
        for label in labels:
            over, method = table.get(f"{label} over equal"), labels[label]
            if over is not None and method in result.rows:
                mean, half = result.gain(method, "fixed")
                assert over[column] == (f"{mean:+.2f} ± {half:.2f}" if half > 0 else "0"), (result.env, label)
    cpu = sum(row["cpu_s"] for row in rows)
    assert f"{len(rows)} runs, {cpu:.0f} s of CPU time" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds: expected a positive number, got 0"),
        (["--jobs", "-1"], "jobs: expected a positive number, got -1"),
        (["--draw", "--out", "nowhere"], "--draw: expected nowhere/mo_gymnasium.csv"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mo_gymnasium_compare.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert message in capsys.readouterr().err + str(stopped.value)


@pytest.mark.slow
def test_quick_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("mujoco", reason="mujoco is not installed (pip install 'pama-kernels[gym]')")
    command = [sys.executable, str(EXAMPLES / "mo_gymnasium_compare.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "mo_gymnasium.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 7
    for env in compare.METHODS:
        assert env in done.stdout
