"""Trainers derived from TRL's GRPOTrainer: the classes of docs/trl.md and docs/integrations.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from trl_setup import (
    REWARDS,
    GRPOTrainer,
    PamaGRPOTrainer,
    close,
    copies,
    late,
    logged,
    run,
    saved_model,
    short,
)


def documented(page: str, name: str) -> Any:
    """What a page of the documentation defines."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if re.search(rf"^(class|def) {name}\b", block, flags=re.MULTILINE)]
    namespace: dict[str, Any] = {"__name__": __name__}  # where dataclasses look types up
    exec(code, namespace)
    return namespace[name]


@pytest.mark.filterwarnings("ignore::UserWarning:trl.*")  # of experimental features
def test_gmpo(tmp_path: Path) -> None:
    """One objective, or the same three times, off-policy and with KL: GMPO's losses and gradients."""
    gmpo = pytest.importorskip("trl.experimental.gmpo", reason="this TRL has no GMPO")
    changes = {"num_iterations": 3, "max_steps": 3, "learning_rate": 0.5, "epsilon": 0.1, "beta": 0.1}
    kind = documented("trl.md", "PamaGMPOTrainer")
    for reward in (short, late):
        plain, expected = run(
            gmpo.GMPOTrainer, [reward], tmp_path, policy=saved_model(tmp_path / "p"), **changes
        )
        assert max(logged(plain, "clip_ratio/region_mean")) > 0.02
        for number in (1, 3):
            ours, gradients = run(
                kind, copies(reward, number), tmp_path, policy=saved_model(tmp_path / "p"), **changes
            )
            assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0, abs=1e-6)
            close(gradients, expected)
            assert len(logged(ours, f"pama/weight/{reward.__name__}0")) == 1


@pytest.mark.parametrize("rule", [None, "upgrad"])
def test_recipe(rule: str | None, tmp_path: Path) -> None:
    """On-policy, and where completions count the same, it is the adapter: gradients and weights."""
    made = documented("integrations.md", "with_pama")(GRPOTrainer, rule=rule)
    changes = {"loss_type": "grpo", "reward_weights": [1.0, 2.0, 1.0]}
    theirs, gradients = run(made, REWARDS, tmp_path, **changes)
    ours, expected = run(PamaGRPOTrainer, REWARDS, tmp_path, pama_rule=rule, **changes)
    close(gradients, expected)
    for name in ("pama/weight/short", "pama/conflict/vowels~short"):
        assert logged(theirs, name) == pytest.approx(logged(ours, name), abs=1e-6)
        assert len(logged(theirs, name)) == 2


def prompt_logprobs(made: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
    logprobs, *_ = made._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1] - 1)
    return (logprobs * mask[:, 1:]).mean()


class Rehearsing(GRPOTrainer):
    """Its loss evaluates the model twice: a term of the prompts is added."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss - prompt_logprobs(self, model, inputs)


def test_a_loss_that_evaluates_the_model_twice(tmp_path: Path) -> None:
    """The second evaluation is not taken for the first, in any part of the loss."""

    class Ours(PamaGRPOTrainer, Rehearsing): ...

    class Added(PamaGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            return super()._compute_loss(model, inputs) - prompt_logprobs(self, model, inputs)

    made, gradients = run(Ours, REWARDS, tmp_path, num_iterations=2)
    _, expected = run(Added, REWARDS, tmp_path, num_iterations=2)
    assert "pama_positive" in made._buffered_inputs[0]
    close(gradients, expected)
