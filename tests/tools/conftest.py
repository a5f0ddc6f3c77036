"""A short training in TRL, and the figures that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pama_kernels.tools import pictures, plot


@pytest.fixture(scope="session")
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
