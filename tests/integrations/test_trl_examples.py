"""The code of docs/trl.md and the example script."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from trl_setup import TINY, dataset, model, tokenizer

from pama_kernels.integrations import trl as integration

ROOT = Path(__file__).parent.parent.parent


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/trl.md runs as it is printed, with a tiny model and on the CPU."""
    text = (ROOT / "docs/trl.md").read_text(encoding="utf-8")
    mark = r"^<!-- run by: tests/integrations/test_trl_examples.py -->\n```python\n(.*?)^```$"
    blocks = re.findall(mark, text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for kind in (integration.PamaGRPOConfig, integration.PamaRLOOConfig):
        tiny = lambda kind=kind, **named: kind(**TINY, **named)  # noqa: E731
        monkeypatch.setattr(integration, kind.__name__, tiny)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {"model": model(), "tokenizer": tokenizer(), "dataset": dataset()})


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", "--steps", "2", "--every", "1"])
    runpy.run_path(str(ROOT / "examples/trl_grpo.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] in (["1"], ["2"]) for line in lines) == 2
    assert any("weight vowels" in line for line in lines)
