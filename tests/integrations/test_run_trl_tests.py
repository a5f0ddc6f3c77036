"""The script that runs TRL's own tests: which differences it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import run_trl_tests
import trl_setup  # noqa: F401  skips where TRL is missing
import trl_standins

GOOD, BAD = ("passed", ""), ("failed", "assert 1 == 2")


@pytest.mark.parametrize(
    ("plain", "pama", "good"),
    [
        ({"f::a": GOOD, "f::b": BAD}, {"f::a": GOOD}, True),
        ({"f::a": GOOD}, {"f::a": BAD}, False),
        ({"f::a": GOOD}, {}, False),
        ({"f::a": BAD}, {}, False),  # nothing was compared
        ({"f::C::test_refused[x]": GOOD, "f::a": GOOD}, {"f::C::test_refused[x]": BAD, "f::a": GOOD}, True),
    ],
)
def test_compare(
    plain: Any, pama: Any, good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_trl_tests, "REFUSED", {"refused": "by design"})
    assert run_trl_tests.compare("grpo", plain, pama) == good
    assert ("LOST" in capsys.readouterr().out) == (not good and run_trl_tests.passed(plain) != [])


@pytest.mark.slow  # four processes that import TRL
@pytest.mark.timeout(900)
def test_one_test_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout with two tests, one of which passes with TRL's trainer only."""
    tests = tmp_path / "trl" / "tests"
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    (tests / "test_grpo_trainer.py").write_text(
        "from datasets import load_dataset\n"
        "from trl import GRPOConfig, GRPOTrainer\n"
        "class TestGRPOTrainer:\n"
        "    def test_trains(self, tmp_path):\n"
        "        data = load_dataset('trl-internal-testing/zen', 'standard_prompt_only', split='train')\n"
        "        arguments = dict(per_device_train_batch_size=3, num_generations=3, max_steps=1)\n"
        "        args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=4, "
        "report_to='none', **arguments)\n"
        "        reward = lambda completions, **_: [float(len(x)) for x in completions]\n"
        "        model = 'trl-internal-testing/tiny-Qwen2ForCausalLM-2.5'\n"
        "        GRPOTrainer(model, reward, args, train_dataset=data).train()\n"
        "    def test_name(self):\n"
        "        assert GRPOTrainer.__name__ == 'GRPOTrainer'\n"
    )
    monkeypatch.setattr(trl_standins, "MODELS", {"tiny-Qwen2ForCausalLM-2.5": "qwen2_5"})
    line = ["run_trl_tests.py", str(tmp_path / "trl"), "--trainers", "grpo"]
    monkeypatch.setattr(run_trl_tests.sys, "argv", line)
    assert run_trl_tests.main() == 1
    monkeypatch.setattr(run_trl_tests.sys, "argv", [*line, "-k", "trains"])
    assert run_trl_tests.main() == 0
