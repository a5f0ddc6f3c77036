"""Sampling with caches of fixed size: every step runs the same kernels on the same memory, so on a GPU one
step is captured as a CUDA graph and replayed, without waiting for the host.

The layers are written out for one token (Llama: RMS norms, rotary positions, grouped queries, gated MLP),
with the model's own parameters: updates in place are seen by the next replay.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Decoder:
    """`rows` completions of `width` tokens after prompts padded to `size`."""

    def __init__(self, model: Any, trunk: int, rows: int, size: int, width: int, temperature: float) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.trunk, self.temperature = model, trunk, temperature
        self.layers: list[Any] = list(model.model.layers)
        self.heads = config.num_key_value_heads
        self.head = config.hidden_size // config.num_attention_heads
        self.size, self.eps = size, config.rms_norm_eps
        total = -(-(size + width) // 16) * 16  # fused attention needs an aligned bias
        positions = torch.arange(total, device=weight.device)[None]
        cos, sin = model.model.rotary_emb(weight[None, :1], position_ids=positions)
        sin = torch.cat([-sin[..., : self.head // 2], sin[..., self.head // 2 :]], -1)
        self.rotary = cos[0], sin[0]  # (S, head), the sign of "rotate half" in the sines
        shape = len(self.layers), 2, rows, self.heads, total, self.head
        self.cache = weight.new_zeros(shape)
        self.bias = weight.new_zeros(rows, 1, 1, total)
        self.logits = torch.zeros(rows, config.vocab_size, device=weight.device)
        self.uniform = torch.zeros(rows, width, device=weight.device)
        self.tokens = torch.zeros(rows, width, dtype=torch.long, device=weight.device)
        self.hidden = weight.new_zeros(rows, width, config.hidden_size)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.time = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.graph = capture(self._step) if weight.is_cuda else None

    @torch.no_grad()
    def sample(self, cache: Any, logits: Tensor, valid: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T), the trunk's output for them; `cache` holds the prompts' keys and values (G, P)."""
        each = len(uniform) // len(valid)
        for mine, layer in zip(self.cache, cache.layers, strict=True):
            mine[0, :, :, : self.size] = layer.keys.repeat_interleave(each, 0)
            mine[1, :, :, : self.size] = layer.values.repeat_interleave(each, 0)
        allowed = F.pad(valid.repeat_interleave(each, 0), (0, self.bias.shape[-1] - self.size))
        self.bias.fill_(-torch.inf).masked_fill_(allowed[:, None, None], 0.0)
        self.logits.copy_(logits.repeat_interleave(each, 0))
        self.uniform.copy_(uniform)
        self.lengths.copy_(valid.sum(1).repeat_interleave(each))
        self.time.zero_()
        for _ in range(uniform.shape[1]):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
        return self.tokens.clone(), self.hidden.clone()

    def _step(self) -> None:
        """Draws the next token of every row and computes the logits after it; `time` counts the steps."""
        uniform = self.uniform.index_select(1, self.time)
        token = draw(self.logits, uniform)
        self.tokens.index_copy_(1, self.time, token[:, None])
        slot = self.time + self.size
        self.bias.index_fill_(3, slot, 0.0)
        position = self.lengths + self.time
        cos, sin = (table.index_select(0, position)[:, None] for table in self.rotary)
        hidden = F.embedding(token, self.model.model.embed_tokens.weight)
        for i, layer in enumerate(self.layers):
            if i == self.trunk:
                self.hidden.index_copy_(1, self.time, hidden[:, None])
            hidden = self._layer(layer, self.cache[i], hidden, cos, sin, slot)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.model.model.norm.weight, self.eps)
        self.logits.copy_(F.linear(hidden, self.model.lm_head.weight))
        self.logits.div_(self.temperature)
        self.time.add_(1)

    def _layer(
        self, layer: Any, cache: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, slot: Tensor
    ) -> Tensor:
        attention, mlp, rows = layer.self_attn, layer.mlp, len(hidden)
        x = F.rms_norm(hidden, hidden.shape[-1:], layer.input_layernorm.weight, self.eps)
        query, key = (
            rotated(projection(x).view(rows, -1, self.head), cos, sin)
            for projection in (attention.q_proj, attention.k_proj)
        )
        cache[0].index_copy_(2, slot, key[:, :, None])
        cache[1].index_copy_(2, slot, attention.v_proj(x).view(rows, self.heads, 1, self.head))
        # The queries that share a key's head take the place of a sequence.
        query = query.view(rows, self.heads, -1, self.head)
        bias = self.bias.expand(-1, self.heads, query.shape[2], -1)
        x = F.scaled_dot_product_attention(query, cache[0], cache[1], attn_mask=bias)
        hidden = hidden + attention.o_proj(x.reshape(rows, -1))
        x = F.rms_norm(hidden, hidden.shape[-1:], layer.post_attention_layernorm.weight, self.eps)
        output: Tensor = hidden + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return output


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """(B,): by inverse transform of uniform (B, 1)."""
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=cdf.shape[1] - 1)


def capture(step: Any) -> Any:
    """The step as a CUDA graph; None, with a message, where that fails: it then runs kernel by kernel."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads' calls do not break the capture.
        with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        print(f"decode: no CUDA graph, steps run kernel by kernel: {error}", file=sys.stderr, flush=True)
        return None
    return graph
