"""PAMA in verl: an advantage estimator, a policy loss, and trainers that pass reward components to the
estimator.

verl loads this module automatically (entry-point group ``verl.plugins``). It registers

- the advantage estimator ``pama``: it combines the components of the reward into one advantage, with weights
  solved once per rollout in the driver process, which has all samples;
- the policy loss ``pama``, for rules without Noon: each objective is clipped according to its own sign;
- the trainers ``pama_sync``, ``pama_colocate_async`` and ``pama_separate_async``: verl's own trainers,
  extended to pass the components to the estimator. verl's older trainer (``trainer.use_v1=false``) is
  extended without a new name.

Settings, in ``algorithm.pama``, are `reward_keys` and the rule's: see docs/verl.md.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import ModuleType
from typing import Any

from ._verl_algorithms import NAME, Settings, compute_pama_advantage, compute_pama_policy_loss
from ._verl_trainers import check_config, extend_older_trainer, register_trainers

__all__ = ["Settings", "check", "compute_pama_advantage", "compute_pama_policy_loss"]

OLDEST, NEWEST = (0, 9, 1), (0, 9, 1)  # releases of verl that were tested
PLUGINS = "VERL_USE_EXTERNAL_PLUGINS"  # verl's switch: auto, none, or names of entry points

_log = logging.getLogger(__name__)
_failures: list[str] = []


def check(config: Any = None) -> None:
    """Checks that pama is registered with verl, including its trainers, and that a configuration can be used.

    Args:
        config: verl's whole configuration, as hydra composes it.

    Raises:
        RuntimeError: it is not registered, or will not be in verl's other processes; the message says why.
        ValueError, TypeError: `config` cannot be used; the message names the setting.
    """
    if not _failures:
        for name in EXTENSIONS:
            _attempt(functools.partial(importlib.import_module, name))
    if _failures:
        raise RuntimeError(f"pama_kernels is not registered with verl: {'; '.join(_failures)}")
    if NAME not in entry_points(group="verl.plugins").names:
        raise RuntimeError("pama_kernels is installed without its entry point: install it again")
    chosen = os.environ.get(PLUGINS, "auto").strip().lower()
    if chosen != "auto" and NAME not in (name.strip() for name in chosen.split(",")):
        raise RuntimeError(f"{PLUGINS}: expected auto or a list with {NAME}, got {chosen}")
    if config is not None:
        older = not config.trainer.get("use_v1", True)
        check_config(config, older or str(config.trainer.v1.trainer_mode).startswith(f"{NAME}_"))


def _attempt(action: Callable[[], object]) -> None:
    """verl logs errors of a plug-in at level DEBUG only: log them as errors, and keep them for `check`."""
    try:
        action()
    except Exception as error:
        _failures.append(f"{type(error).__name__}: {error}")
        _log.exception("pama_kernels is not registered with verl")


def _register_algorithms(core_algos: ModuleType) -> None:
    core_algos.register_adv_est(NAME)(compute_pama_advantage)
    core_algos.register_policy_loss(NAME)(compute_pama_policy_loss)


# These modules take seconds to import, and few of verl's processes need all of them: each is extended when
# verl imports it.
EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.core_algos": _register_algorithms,
    "verl.trainer.ppo.ray_trainer": extend_older_trainer,
    "verl.trainer.ppo.v1": register_trainers,
}


class _AfterImport:
    """An import finder that extends one module after its first import."""

    def __init__(self, name: str, extend: Callable[[ModuleType], None]) -> None:
        self.name, self.extend = name, extend

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _attempt(lambda: self.extend(module))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    found = version("verl")
    if not OLDEST <= tuple(int(part) for part in re.findall(r"\d+", found)[:3]) <= NEWEST:
        supported = "verl {}.{}.{} to {}.{}.{}".format(*OLDEST, *NEWEST)
        raise ImportError(f"pama_kernels.integrations.verl: expected {supported}, found {found}")
    for name, extend in EXTENSIONS.items():
        if name in sys.modules:
            extend(sys.modules[name])
        else:
            sys.meta_path.insert(0, _AfterImport(name, extend))


try:
    version("verl")
except PackageNotFoundError:
    _failures.append("verl is not installed")
else:
    _attempt(_register)
