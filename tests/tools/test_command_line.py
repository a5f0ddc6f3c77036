"""`python -m pama_kernels`: info, inspect, plot."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pama_kernels as pk
from pama_kernels.__main__ import main
from pama_kernels.tools import pictures, plot
from pama_kernels.tools.inspect import RULES, SUM, Inspection, inspect_rewards
from pama_kernels.tools.read import Table, read_table
from pama_kernels.tools.report import findings, format_inspection
from pama_kernels.tools.runs import Run, read_run

ROOT = Path(__file__).parents[2]
pytestmark = [
    # Transformers' own, while it renames an argument that TRL sets
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


# --- inputs -------------------------------------------------------------------------------------------------


def small_table(rows: int = 48) -> dict[str, list[Any]]:
    """Groups of 8. `brief` is the opposite of `long`, `longer` its copy; `format` is saturated, `never`
    absent, `sometimes` applies to every second completion."""
    generator = torch.Generator().manual_seed(5)
    long = torch.rand(rows, generator=generator, dtype=torch.float64)
    helpful = torch.rand(rows, generator=generator, dtype=torch.float64)
    return {
        "prompt_id": [row // 8 for row in range(rows)],
        "helpful": helpful.tolist(),
        "long": long.tolist(),
        "longer": (2 * long + 1).tolist(),
        "brief": (-100 * long).tolist(),
        "format": [1.0] * rows,
        "never": [None] * rows,
        "sometimes": [value if row % 2 else None for row, value in enumerate(helpful.square().tolist())],
    }


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def inspected(columns: dict[str, list[Any]], **arguments: Any) -> Inspection:
    return inspect_rewards(Table("table", columns), **arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short training in TRL with four rewards: one saturated, one sometimes None."""
    pytest.importorskip("trl", reason="trl is not installed: pip install 'pama-kernels[trl]'")
    from integrations.trl_setup import REWARDS, PamaGRPOTrainer, constant, trainer

    folder = tmp_path_factory.mktemp("trl") / "run"
    rewards = [*REWARDS, constant(1.0, "format")]
    made = trainer(
        *(PamaGRPOTrainer, rewards, folder),
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        log_completions=True,
        num_completions_to_print=0,
        loss_type="grpo",  # every completion counts the same, as in `inspect`
    )
    made.train()
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "pama/optimum" in entry]


# --- inspect: what it computes ------------------------------------------------------------------------------


def test_what_the_trainer_logged(trained: Path) -> None:
    """From the completions that TRL wrote: the weights and covariances of that training, step by step."""
    found = inspect_rewards(read_table(trained))
    entries = history(trained)
    assert found.names == ["vowels", "short", "late", "format"]
    assert found.left_out == ["step", "prompt", "completion", "advantage"]
    assert (found.rows, found.groups, found.group_sizes, found.steps) == (48, 12, (4, 4), 6)
    effect = found.effects["pama"]
    assert effect.weights is not None
    for step, entry in enumerate(entries):
        for i, name in enumerate(found.names):
            for what, values in (("weight", effect.weights), ("covariance", effect.covariance)):
                logged = entry[f"pama/{what}/{name}"]
                ours = values[step, i].item()
                assert ours == pytest.approx(math.nan if logged is None else logged, abs=1e-6, nan_ok=True)
    means = torch.tensor([entry["rewards/late/mean"] for entry in entries])
    assert means.isfinite().all()
    assert 0 < found.applies[2] <= 1
    assert found.varies[3] == 0


def test_numbers_by_hand() -> None:
    """Two rewards in two groups of two: advantages are +-a, all statistics follow by hand."""
    found = inspected({"x": [0, 1, 0, 1], "y": [0, 1, 1, 0], "prompt": ["a", "a", "b", "b"]})
    size = 0.5 / (math.sqrt(0.5) + 1e-4)  # of every advantage
    assert found.groups == 2
    assert found.correlation[0, 1] == pytest.approx(0, abs=1e-12)
    fixed = found.effects["fixed"]
    assert fixed.mean_covariance.tolist() == pytest.approx([size**2 / 2] * 2)
    assert fixed.mean_weights is not None
    assert fixed.mean_weights.tolist() == [0.5, 0.5]
    # The sum is 0, 2 in the first group and constant in the second
    double = 1 / (math.sqrt(2) + 1e-4)
    assert found.effects[SUM].mean_covariance.tolist() == pytest.approx([size * double / 2] * 2)


@pytest.mark.parametrize("rule", list(RULES))
def test_covariance_of_every_rule(rule: str) -> None:
    """As the specification combines, over the completions to which the reward applies."""
    columns = small_table()
    found = inspected(columns)
    values = torch.tensor(
        [[math.nan if x is None else x for x in columns[name]] for name in found.names], dtype=torch.float64
    ).T
    present = ~values.isnan()
    advantages = pk.reference.group_normalize(values, group_size=8)
    expected = pk.reference.combine_advantages(advantages, rule=RULES[rule], objective_mask=present)
    for i in range(len(found.names)):
        here = present[:, i]
        if not here.any():
            assert found.effects[rule].covariance[0, i].isnan()
            continue
        stacked = torch.stack([advantages[here, i], expected.advantages[here]])
        # weights are promised to 1e-6 where the Gram matrix is singular, as here
        assert found.effects[rule].covariance[0, i] == pytest.approx(
            stacked.cov(correction=0)[0, 1].item(), abs=1e-6
        )


def test_each_step_is_solved_by_itself() -> None:
    columns = small_table()
    del columns["prompt_id"]
    steps = [row // 16 for row in range(48)]
    together = inspected({**columns, "step": steps}, group_size=8)
    assert together.steps == 3
    for step in range(3):
        rows = slice(16 * step, 16 * step + 16)
        alone = inspected({name: cells[rows] for name, cells in columns.items()}, group_size=8)
        for rule, effect in alone.effects.items():
            same = together.effects[rule].covariance[step]
            torch.testing.assert_close(same, effect.covariance[0], equal_nan=True, rtol=0, atol=0)


def test_groups_by_column_need_no_order() -> None:
    columns = small_table()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = {name: [cells[row] for row in order] for name, cells in columns.items()}
    for one, other in (
        (inspected(columns), inspected(shuffled)),
        (inspected(columns), inspected(columns, group_size=8)),
    ):
        torch.testing.assert_close(one.correlation, other.correlation, equal_nan=True, rtol=0, atol=1e-12)
        assert one.varies.nan_to_num().tolist() == other.varies.nan_to_num().tolist()


def test_preference() -> None:
    columns = {name: small_table()[name] for name in ("prompt_id", "helpful", "long")}
    weights = inspected(columns, preference=[3, 1]).effects["fixed"].mean_weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([0.75, 0.25])


# --- inspect: what it says ----------------------------------------------------------------------------------


def test_findings() -> None:
    said = "\n".join(findings(inspected(small_table())))
    assert "never never applied" in said
    assert "format is saturated" in said
    assert "long and longer are redundant (1.00)" in said
    assert "long and brief are in conflict (-1.00)" in said
    assert "sum sacrifices" in said
    assert re.search(r"sum sacrifices .*long", said)
    assert "helpful and sometimes are redundant" in said


def test_report_explains_itself() -> None:
    text = format_inspection(inspected(small_table()))
    assert "nan" not in text
    assert max(map(len, text.splitlines())) <= 100
    for words in ("applies ", "varies ", "below 0: it sacrifices it, marked !", *RULES):
        assert words in text
    row = next(line for line in text.split("What does each rule")[1].splitlines() if "brief" in line)
    assert len(re.findall(r"-?\d\.\d\d", row)) == 1 + len(RULES)


def test_many_rewards_list_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = {f"r{i}": torch.rand(64, generator=generator).tolist() for i in range(12)}
    text = format_inspection(inspected(columns, group_size=8))
    pairs = re.findall(r"^  r\d+ ~ r\d+ +(-?\d\.\d\d)", text, flags=re.MULTILINE)
    assert len(pairs) == 10
    assert [float(pair) for pair in pairs] == sorted(map(float, pairs))


def test_as_a_process(tmp_path: Path) -> None:
    write(tmp_path / "rewards.csv", small_table())
    command = [sys.executable, "-m", "pama_kernels", "inspect", "rewards.csv"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, code in ((["--group-size", "8"], 0), (["--group-size", "7"], 2)):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr == (
                "python -m pama_kernels inspect: error: group_size: expected a divisor of the 48 rows, "
                "at least 2, got 7\n"
            )
        else:
            assert "7 rewards, 48 completions in 6 groups of 8" in done.stdout
            assert not done.stderr


# --- inspect: files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_formats_agree(suffix: str, tmp_path: Path) -> None:
    columns = small_table()
    expected = inspect_rewards(read_table(write(tmp_path / "rewards.csv", columns)))
    found = inspect_rewards(read_table(write(tmp_path / f"rewards{suffix}", columns)))
    assert found.names == expected.names
    assert format_inspection(found).replace(suffix, ".csv") == format_inspection(expected)


def test_cells(tmp_path: Path) -> None:
    """Booleans are 1 and 0; empty cells, NaN, None and null are absent."""
    path = tmp_path / "rewards.csv"
    path.write_text("passed,score\nTrue,1\nfalse,nan\nTrue,\nFalse,None\nTRUE,null\nfalse,2e0\n")
    found = inspect_rewards(read_table(path), group_size=6)
    assert found.mean.tolist() == [0.5, 1.5]
    assert found.applies[1] == pytest.approx(1 / 3)


def test_folder_of_files(tmp_path: Path) -> None:
    """A column that a file lacks is absent there."""
    write(tmp_path / "a.csv", {"x": [1, 2], "y": [1, 3]})
    write(tmp_path / "b.csv", {"x": [1, 2]})
    found = inspect_rewards(read_table(tmp_path), group_size=2)
    assert found.rows == 4
    assert found.applies.tolist() == [1, 0.5]


FINE: dict[str, list[Any]] = {"a": [1, 2, 3, 4], "b": [4, 3, 1, 1], "text": ["w", "x", "y", "z"]}


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"text": ["a", "b"]}, {}, "rewards: expected numeric columns, found none among text"),
        ({"a": [1, 2], "step": [1, 1]}, {}, "rewards: expected at least two columns, got a;"),
        (FINE, {"rewards": ["a"]}, "rewards: expected at least two columns, got a;"),
        (FINE, {"rewards": ["a", "a"]}, "rewards: expected different columns, got a twice"),
        (FINE, {"rewards": ["a", "c"]}, "rewards: expected columns of table, got c; it has a, b, text"),
        (
            FINE,
            {"rewards": ["a", "text"], "group_size": 2},
            "text: expected finite numbers .* got 'w' in row 1",
        ),
        (
            {"a": [1, 2], "b": [1, "inf"]},
            {"group_size": 2},
            "b: expected finite numbers .* got 'inf' in row 2",
        ),
        (FINE, {}, r"group_size: expected the number .* \(--group-size\), or a column .* a, b, text"),
        (FINE, {"group_size": 3}, "group_size: expected a divisor of the 4 rows, at least 2, got 3"),
        (FINE, {"group_size": 1}, "group_size: expected a divisor"),
        (
            FINE,
            {"group_size": 2, "group_column": "text"},
            "group_column: expected None with group_size, got text",
        ),
        (FINE, {"group_column": "task"}, "group_column: expected a column of table, got task"),
        (FINE, {"group_column": "text"}, "group_column: expected several completions with the same text"),
        (FINE, {"group_size": 2, "step_column": "iter"}, "step_column: expected a column of table, got iter"),
        (
            {**FINE, "step": [1, 2, 2, 2]},
            {"group_size": 2},
            "group_size: expected the rows of a group in one step, got rows 1 to 2 with steps 1, 2",
        ),
        (FINE, {"group_size": 2, "preference": [1.0]}, "preference: expected 2 numbers, .* a, b, got 1"),
        (FINE, {"group_size": 2, "preference": [1.0, -1.0]}, "preference: "),
    ],
)
def test_wrong_tables(columns: dict[str, list[Any]], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspected(columns, **arguments)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.csv", None, "file: expected .* found no "),
        ("rewards.xlsx", "a", "file: expected a name that ends in .csv"),
        ("rewards.csv", "", "file: expected a header and at least one row, got an empty table"),
        ("rewards.csv", "a,b\n", "file: expected a header and at least one row"),
        ("rewards.csv", "a,a\n1,2\n", "file: expected different column names, got a, a"),
        ("rewards.csv", "a,b\n1,2\n1\n", "file: expected 2 cells as in the header, got 1 in line 3"),
        ("rewards.jsonl", '{"a": 1}\n{"a"\n', "file: expected a JSON object in line 2"),
        ("rewards.jsonl", "[1]\n", "file: expected a JSON object, got list in line 1"),
    ],
)
def test_wrong_files(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["inspect", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert re.match(f"python -m pama_kernels inspect: error: {message}", said.err)


@pytest.mark.parametrize(
    ("missing", "name", "message"),
    [
        ("pyarrow", "a.parquet", "a.parquet is Parquet, which needs pyarrow: pip install pyarrow"),
        ("tensorboard", "events.out.tfevents.1", "a TensorBoard folder needs the tensorboard package"),
        (
            "matplotlib",
            "trainer_state.json",
            r"a picture needs matplotlib: pip install 'pama-kernels\[plot\]'",
        ),
    ],
)
def test_missing_packages(
    missing: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / name).write_text("")
    command = "inspect" if missing == "pyarrow" else "plot"
    if missing == "tensorboard":
        monkeypatch.setattr(pictures, "check_picture", lambda path: None)
    assert main([command, str(tmp_path / name)]) == 2
    assert re.search(message, capsys.readouterr().err)


# --- plot ---------------------------------------------------------------------------------------------------


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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, as they are written."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'pama-kernels[plot]'")
    figures: list[Any] = []
    save = pictures.save

    def kept(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    for module in (pictures, plot):
        monkeypatch.setattr(module, "save", kept)
    return figures


def words(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_picture_of_a_training(trained: Path, tmp_path: Path, drawn: list[Any]) -> None:
    out = tmp_path / "new" / "picture.png"
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
    """It waits for the first log and draws only what is new."""
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


# --- info and the documentation -----------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["pama-kernels"] == pk.__version__
    assert main(["info"]) == 0
    assert "backend" in capsys.readouterr().out


def test_output_in_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/command_line.md shows what `inspect` prints for the file that its Python block writes."""
    pytest.importorskip("matplotlib")
    page = (ROOT / "docs" / "command_line.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    command = re.search(
        r"^python -m pama_kernels (inspect rewards\.csv --plot .*)$", page, flags=re.MULTILINE
    )
    shown = re.search(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert code
    assert command
    assert shown
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    assert main(command[1].split()) == 0
    assert capsys.readouterr().out == shown[1]
