"""`python -m pama_kernels plot`, and the picture of `inspect`."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command_line_setup import history, small_table, words, write

from pama_kernels.__main__ import main
from pama_kernels.tools import plot
from pama_kernels.tools.inspect import RULES, SUM
from pama_kernels.tools.runs import Run, read_run

# Transformers' own, while it renames an argument that TRL sets
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def test_trl_state(trained: Path) -> None:
    """The run's folder, a checkpoint's and the file hold the same; values are those that were logged."""
    run = read_run(trained)
    last = trained / "checkpoint-6"
    assert run == read_run(last) == read_run(last / "trainer_state.json")
    assert (run.source, run.unit) == ("run", "step")
    assert max(step for step, _ in read_run(trained / "checkpoint-3").weight["short"]) == 3
    entries = history(trained)
    assert [step for step, _ in run.weight["short"]] == [1, 2, 3, 4, 5, 6]
    for what, series in (("weight", run.weight), ("covariance", run.covariance), ("signal", run.signal)):
        assert set(series) == {"vowels", "short", "late", "format"}
        assert [value for _, value in series["late"]] == [entry[f"pama/{what}/late"] for entry in entries]
    assert [value for _, value in run.reward["short"]] == [entry["rewards/short/mean"] for entry in entries]
    assert len(run.conflict) == 6
    assert all(math.isnan(value) for _, value in run.conflict["short~format"])


def scalars() -> dict[str, list[float]]:
    """What the trainers' names are in a TensorBoard or CSV logger."""
    return {
        "rollout/reward/speed": [1.0, 2.0, 3.0],
        "rollout/reward/energy": [-1.0, -2.0, -1.5],
        "pama/weight/speed": [0.5, 0.6, 0.7],
        "pama/weight/energy": [0.5, 0.4, 0.3],
        "pama/covariance/speed": [0.2, 0.1, -0.1],
        "pama/covariance/energy": [0.1, 0.1, 0.1],
        "train/loss": [1.0, 1.0, 1.0],
    }


def check_speed(run: Run, steps: list[int]) -> None:
    assert sorted(run.names) == ["energy", "speed"]
    for series, values in (
        (run.reward, [1, 2, 3]),
        (run.weight, [0.5, 0.6, 0.7]),
        (run.covariance, [0.2, 0.1, -0.1]),
    ):
        assert [step for step, _ in series["speed"]] == steps
        assert [value for _, value in series["speed"]] == pytest.approx(values)


def test_sb3_csv(tmp_path: Path) -> None:
    logger = pytest.importorskip("stable_baselines3.common.logger")
    output = logger.CSVOutputFormat(str(tmp_path / "progress.csv"))
    for i in range(3):
        values = {tag: numbers[i] for tag, numbers in scalars().items()}
        if i == 0:
            values.pop("train/loss")  # SB3 then adds a column later
        output.write({**values, "time/total_timesteps": 64 * (i + 1)}, dict.fromkeys(values, ()))
    output.close()
    check_speed(read_run(tmp_path), [64, 128, 192])
    assert read_run(tmp_path).unit == "step of the environments"


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_tensorboard(prefix: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs" / "Nov26")) as writer:
        for tag, values in scalars().items():
            trl = re.sub(r"rollout/reward/(.*)", r"rewards/\1/mean", tag) if prefix else tag
            for step, value in enumerate(values):
                writer.add_scalar(prefix + trl, value, step)
    check_speed(read_run(tmp_path), [0, 1, 2])


def test_picture_of_a_training(trained: Path, tmp_path: Path, drawn: list[Any]) -> None:
    out = tmp_path / "new" / "picture.png"
    out.parent.mkdir()
    assert main(["plot", str(trained), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(out.parent) == ["picture.png"]
    said = words(drawn[0])
    for text in ("run", "Reward", "Weight", "vowels", "late", "saturated in 100%", "vowels ~ short", "step"):
        assert text in said
    assert not [text for text in said if "~ format" in text]  # a saturated reward is in conflict with none
    shown = drawn[0].axes[0].get_lines()[0].get_ydata().tolist()
    assert shown == [value for _, value in read_run(trained).reward[read_run(trained).names[0]]]


@pytest.mark.parametrize("points", [1, 2, 300])
def test_pictures_of_any_length(points: int, tmp_path: Path, drawn: list[Any]) -> None:
    """Rewards without weights (plain TRL), one step only, many steps with a gap."""
    entries = [
        {"step": step, "rewards/a/mean": step**0.5, "rewards/b/mean": None if step < 9 else 1.0}
        for step in range(points)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.svg")]) == 0
    assert ("no value" in words(drawn[0])) == (points < 9)
    assert "Weight" not in words(drawn[0])


def test_picture_of_rewards(tmp_path: Path, drawn: list[Any]) -> None:
    path = write(tmp_path / "rewards.csv", small_table())
    assert main(["inspect", str(path), "--plot", str(tmp_path / "a.png")]) == 0
    said = words(drawn[0])
    assert {"helpful (1)", "brief (4)", *RULES, SUM} <= set(said)
    assert said.count("-1.00") == 4  # brief with long and longer, both ways


@pytest.mark.parametrize("command", ["plot", "inspect"])
def test_wrong_picture(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    option = "--out" if command == "plot" else "--plot"
    assert main([command, str(tmp_path), option, "a.docx"]) == 2
    assert "picture: expected a name that ends in .png, .svg, .pdf, got a.docx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, None, "run: expected trainer_state.json .* found none"),
        ("trainer_state.json", "{", "run: expected the log_history of a trainer state"),
        ("trainer_state.json", '{"log_history": []}', "run: expected metrics .* got nothing in"),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "loss": 2}]}',
            "run: expected metrics .* got step, loss in",
        ),
        (
            "progress.csv",
            "time/fps,train/loss\n1,2\n",
            "run: expected metrics .* got time/fps, train/loss in",
        ),
    ],
)
def test_wrong_runs(name: str | None, text: str, message: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run: expected a folder, .* found no "):
        read_run(tmp_path / "gone")


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It waits for the first log and draws again only if there is new data."""
    pytest.importorskip("matplotlib")
    state = tmp_path / "trainer_state.json"
    entries = [{"step": step, "rewards/a/mean": 1.0, "pama/conflict/worst": None} for step in range(3)]
    contents = ["{half", entries[:1], entries[:1], entries]
    looked = []

    def sleep(seconds: float) -> None:
        looked.append(seconds)
        if not contents:
            raise KeyboardInterrupt
        now = contents.pop(0)
        state.write_text(now if isinstance(now, str) else json.dumps({"log_history": now}))

    monkeypatch.setattr(plot.time, "sleep", sleep)
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "a.png"), "--watch", "7"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["waiting:", "waiting:", "wrote", "wrote"]
    assert looked == [7] * 5
    assert main(["plot", str(tmp_path), "--watch", "0"]) == 2
