"""`python -m pama_kernels`: results and report of `inspect`, `info`, the documentation."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line_setup import history, inspected, small_table, write

import pama_kernels as pk
from pama_kernels.__main__ import main
from pama_kernels.tools.inspect import RULES, SUM, inspect_rewards
from pama_kernels.tools.read import read_table
from pama_kernels.tools.report import findings, format_inspection

ROOT = Path(__file__).parents[2]
# Transformers' own, while it renames an argument that TRL sets
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


# --- inspect: what it computes ------------------------------------------------------------------------------


def test_inspect_equals_what_the_trainer_logged(trained: Path) -> None:
    """From the completions that TRL wrote: the weights and covariances of that training, step by step."""
    found = inspect_rewards(read_table(trained))
    entries = history(trained)
    assert found.names == ["vowels", "short", "late", "format"]
    assert found.left_out == ["step", "prompt", "completion", "advantage"]
    assert (found.rows, found.groups, found.group_sizes, found.steps) == (48, 12, (4, 4), 6)
    effect = found.effects["upgrad"]
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


def test_example_by_hand() -> None:
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


def test_each_step_is_solved_separately() -> None:
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


def test_rounding_errors_are_no_reward() -> None:
    table = small_table()
    errors = [1.0 - 1e-7 * value for value in table["long"]]
    said, wanted = inspected({**table, "format": errors}), inspected(table)
    assert findings(said) == findings(wanted)
    for rule in RULES:
        torch.testing.assert_close(said.effects[rule].weights, wanted.effects[rule].weights, equal_nan=True)


def test_report_explains_itself() -> None:
    text = format_inspection(inspected(small_table()))
    assert "nan" not in text
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "applies ",
        "varies ",
        "below 0: it falls; below -0.015 (marked !) it is sacrificed",
        *RULES,
    ):
        assert words in text
    row = next(line for line in text.split("Effect of each rule")[1].splitlines() if "brief" in line)
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
