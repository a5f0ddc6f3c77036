"""How verl loads the plug-in, and how failures are reported."""

from __future__ import annotations

from types import ModuleType

import pytest
from verl_setup import needs_verl, run_python

FAKE_VERSION = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name != "verl":
        return real(name)
    if {found!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {found!r}
metadata.version = version
from pama_kernels.integrations import verl
try:
    verl.check()
except RuntimeError as error:
    print(error)
"""


def test_an_unsupported_release_is_logged_and_raised() -> None:
    done = run_python(FAKE_VERSION.format(found="0.8.0"))
    wanted = "expected verl 0.9.1 to 0.9.1, found 0.8.0"
    assert wanted in done.stdout
    assert "pama_kernels is not registered with verl" in done.stderr  # without any logging set up
    assert wanted in done.stderr


def test_without_verl() -> None:
    done = run_python(FAKE_VERSION.format(found=None))
    assert done.stdout == "pama_kernels is not registered with verl: verl is not installed\n"
    assert not done.stderr


@needs_verl
def test_verl_loads_the_plug_in() -> None:
    """By the installed entry point, without importing pama_kernels."""
    code = """
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
print(get_adv_estimator_fn("pama").__name__, get_policy_loss_fn("pama").__name__)
from verl.trainer.ppo.v1 import get_trainer_cls
print(*(get_trainer_cls(f"pama_{mode}").__name__ for mode in ("sync", "colocate_async", "separate_async")))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("compute_pama_advantage", "compute_pama_policy_loss"),
        *("PamaPPOTrainerSync", "PamaPPOTrainerColocateAsync", "PamaPPOTrainerSeparateAsync"),
    ]


@needs_verl
def test_a_name_that_is_already_registered_is_reported() -> None:
    code = """
from verl.trainer.ppo.core_algos import register_adv_est
register_adv_est("pama")(print)
from pama_kernels.integrations import verl
try:
    verl.check()
except RuntimeError as error:
    print(error)
"""
    done = run_python(code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "not registered with verl: ValueError: Adv estimator pama has already been" in done.stdout
    assert "pama_kernels is not registered with verl" in done.stderr


@needs_verl
def test_check_reports_disabled_plug_ins(verl: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in is registered in this process, but would not be in verl's workers."""
    for chosen in ("none", "other, another"):
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", chosen)
        with pytest.raises(RuntimeError, match=f"^VERL_USE_EXTERNAL_PLUGINS: .* got {chosen}"):
            verl.check()
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other, PAMA")
    verl.check()
