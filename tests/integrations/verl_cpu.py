"""Lets verl 0.9.1 train on a CPU, by verl's plug-in registries; loaded by VERL_USE_EXTERNAL_MODULES=verl_cpu.

verl knows CUDA, ROCm and NPU platforms, registers its FSDP engine for those devices, and its rollouts are
vLLM, SGLang and TensorRT-LLM. Here are a platform (`PlatformRegistry`), an engine (`EngineRegistry`: verl's
own FSDP engine, registered for one more device) and a rollout (`RolloutReplicaRegistry` and a `BaseRollout`)
that generates with transformers. Trainer, workers, agent loop, reward loop, loss and optimizer are verl's.
"""

# ruff: noqa: E402  The platform is set before what reads it is imported.
from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

NAME = "transformers"  # actor_rollout_ref.rollout.name


class Memory(ModuleType):
    """torch.cpu, with the memory statistics that verl logs."""

    def __getattr__(self, name: str) -> Any:
        if "memory" in name:
            return lambda *_: 0
        return getattr(torch.cpu, name)

    def empty_cache(self) -> None:
        pass

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 0, 0


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = Memory("torch.cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"  # verl moves tensors with .to(current_device()), where a number means CUDA

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        # verl requests the backends "cpu:gloo,DEVICE:NAME", an error in torch if DEVICE is cpu too;
        # verl keeps a process group that exists.
        if not torch.distributed.is_initialized() and "RANK" in os.environ:
            torch.distributed.init_process_group("gloo")
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # verl counts GPU or NPU only: ray_kwargs.ray_init.num_gpus says how many workers

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


set_platform(Cpu())

import verl.utils.import_utils

# verl patches a class of TRL's wherever TRL is installed; TRL 1.16 has it no longer, and no model would load.
verl.utils.import_utils.is_trl_available = lambda: False

import ray
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CpuEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine (FSDP2, gloo)."""


class Server:
    """A copy of the policy that answers the agent loop's requests; a Ray actor."""

    def __init__(self, path: str, response_length: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.asked: Counter[str] = Counter()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.length = response_length
        self.version: int | None = None

    async def update_weights(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        self.model.load_state_dict(weights)
        self.version = version

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        # Requests come in any order: the n-th response to a prompt is the same in every run.
        request = f"{self.version} {prompt_ids}"
        self.asked[request] += 1
        torch.manual_seed(zlib.crc32(f"{request} {self.asked[request]}".encode()))
        prompt = torch.tensor([prompt_ids])
        sampled = sampling_params["temperature"] > 0
        with torch.no_grad():
            done = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.length,
                do_sample=sampled,
                **({"temperature": sampling_params["temperature"], "top_k": 0} if sampled else {}),
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = done.sequences[0, len(prompt_ids) :]
        logprobs = torch.stack(
            [step[0].log_softmax(-1)[token] for step, token in zip(done.scores, tokens, strict=True)]
        )
        return TokenOutput(
            token_ids=tokens.tolist(),
            log_probs=logprobs.tolist(),
            stop_reason="completed",
            extra_fields={"global_steps": self.version},
        )

    async def sleep(self, **_: Any) -> None:
        """Nothing to free, and no request is ever half done."""

    wake_up = abort_all_requests = resume_generation = sleep


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        self._server_address = f"{NAME}{self.replica_rank}"
        self._server_handle = (
            ray.remote(Server)
            .options(name=self._server_address, num_cpus=1)
            .remote(self.model_config.path, self.config.response_length)
        )
        self.servers = [self._server_handle]


class Adapter(base.BaseRollout):
    """In the worker's process: passes its weights on to the server."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        wire_format: str = "named_tensors",
        **settings: Any,
    ) -> None:
        state = {name: tensor.detach().clone() for name, tensor in weights}
        rank = self.device_mesh["dp"].get_local_rank()
        await ray.get_actor(f"{NAME}{rank}").update_weights.remote(state, settings["global_steps"])


RolloutReplicaRegistry.register(NAME, lambda: Replica)
# verl's own table: the worker's side of a rollout has no function to register it
base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{Adapter.__name__}"
