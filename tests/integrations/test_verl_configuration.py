"""Configurations for verl: the example, wrong ones, and the trainers that verl constructs from them."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
from verl_setup import EXAMPLE, KEYS, ROOT, composed, needs_verl

from pama_kernels.integrations import _verl_trainers as trainers


@needs_verl
def test_example_configuration(verl: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """It passes verl's own validation and the checks of both trainers."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = composed()
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.loss_mode == "pama"
    verl.check(config)
    verl.check(composed("trainer.use_v1=false", "trainer.v1.trainer_mode=sync"))
    reward = config.reward.custom_reward_function
    assert config.algorithm.pama.reward_keys == KEYS
    spec = importlib.util.spec_from_file_location("reward", ROOT / reward.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    returned = getattr(module, reward.name)("source", "Thanks, it is 42", "42")
    assert set(KEYS) < set(returned)
    assert getattr(module, reward.name)("source", "Hm", "")["correct"] is None


@needs_verl
def test_example_command() -> None:
    """The command line in the example's head, stopped after the configuration."""
    line = ["-m", "verl.trainer.main_ppo", "--config-dir", "examples/verl", "--config-name", "pama_grpo"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *line, "--cfg", "job", "actor_rollout_ref.model.path=MODEL"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "trainer_mode: pama_sync" in done.stdout
    assert " ".join(line) in (EXAMPLE / "pama_grpo.yaml").read_text()


VANILLA = ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla",)
WRONG_CONFIGS: dict[str, tuple[tuple[str, ...], str]] = {
    "trainer": (
        ("trainer.v1.trainer_mode=sync",),
        r"trainer\.v1\.trainer_mode: expected pama_sync, .* got 'sync'",
    ),
    "preference": (
        ("algorithm.pama.preference=[1,2]",),
        r"algorithm\.pama\.preference: expected 3 numbers, got 2",
    ),
    "kl": (("algorithm.use_kl_in_reward=true",), r"algorithm\.use_kl_in_reward: expected false"),
    "group": (("actor_rollout_ref.rollout.n=1",), r"actor_rollout_ref\.rollout\.n: expected 2 or more"),
    "loss": (VANILLA, r"actor_rollout_ref\.actor\.policy_loss\.loss_mode: expected 'pama'.* got 'vanilla'"),
}


@needs_verl
def test_vanilla_loss_is_accepted_where_it_is_exact(
    verl: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """It is exact with Noon; the older trainer can pass only one number per token, and logs a warning."""
    verl.check(composed(*VANILLA, "algorithm.pama.noon=true"))
    assert not caplog.records
    verl.check(composed(*VANILLA, "trainer.use_v1=false", "trainer.v1.trainer_mode=sync"))
    assert "clips each combined advantage according to its own sign." in caplog.text


@needs_verl
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_token_weights_of_the_loss(verl: ModuleType, mode: str) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    trainer = get_trainer_cls("pama_sync")(composed(f"actor_rollout_ref.actor.loss_agg_mode={mode}"))
    wanted = mode if mode == "seq-mean-token-mean" else "token-mean"
    assert trainer.config.algorithm.pama.aggregation == wanted


@needs_verl
@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configuration_is_an_error_at_construction(verl: ModuleType, case: str) -> None:
    """In verl's own trainers as well as in ours: before a model is loaded or anything generated."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1 import get_trainer_cls

    overrides, message = WRONG_CONFIGS[case]
    config = composed(*overrides)
    with pytest.raises(ValueError, match=f"^{message}"):
        verl.check(config)
    older = functools.partial(
        RayPPOTrainer, tokenizer=None, role_worker_mapping={}, resource_pool_manager=None
    )
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode) if config.trainer.use_v1 else older
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(config)


@needs_verl
def test_other_estimators_are_unchanged(verl: ModuleType) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = composed("algorithm.adv_estimator=grpo", "trainer.v1.trainer_mode=sync")
    trainer = get_trainer_cls("sync")(config)
    assert trainer.trainer_mode == "sync"
    with pytest.raises(ValueError, match=r"^algorithm\.adv_estimator: expected 'pama', got 'grpo'"):
        get_trainer_cls("pama_sync")(config)


@needs_verl
@pytest.mark.parametrize("mode", trainers.MODES)
def test_trainers_differ_from_verls_only_in_the_name(verl: ModuleType, mode: str) -> None:
    """Buffers and sections that verl selects by the name of the mode are those of the original mode."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    separate = [
        "data.train_batch_size=256",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    ]
    overrides = separate if mode == "separate_async" else []
    ours = get_trainer_cls(f"pama_{mode}")(composed(f"trainer.v1.trainer_mode=pama_{mode}", *overrides))
    theirs = get_trainer_cls(mode)(
        composed("algorithm.adv_estimator=grpo", f"trainer.v1.trainer_mode={mode}", *overrides)
    )
    assert isinstance(ours, type(theirs))
    assert ours.trainer_mode == mode
    assert type(ours.replay_buffer) is type(theirs.replay_buffer)
    assert ours.parameter_sync_step == theirs.parameter_sync_step
