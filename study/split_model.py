"""A pretrained decoder whose top layers are trained; the trunk below runs once for all uses.

Sampling keeps the trunk's output. The log-probabilities under the trained layers and under their copy at the
start then need the top layers only. Prompts run once for all their completions, and rows that have ended are
dropped from sampling. With a `padded` length of prompts, sampling runs at fixed sizes instead (decode.py).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from .decode import Decoder, draw


class Rollout(NamedTuple):
    """R completions for each of G prompts, B = G R rows, in the order of the prompts."""

    prompt_mask: Tensor  # (G, P), prompts are padded on the left
    prompt_hidden: Tensor  # (G, P, D), the trunk's output
    hidden: Tensor  # (B, T, D), of the completion's tokens
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T), True up to and including the token that ends the completion

    def ids(self) -> list[list[int]]:
        """The tokens of each completion, with the one that ends it."""
        return [row[mask].tolist() for row, mask in zip(self.tokens.cpu(), self.mask.cpu(), strict=True)]

    def of_prompts(self, first: int, last: int) -> Rollout:
        """Only the completions of the prompts from `first` to before `last`."""
        each = len(self.mask) // len(self.prompt_mask)
        rows = slice(first * each, last * each)
        return Rollout(
            *(x[first:last] for x in (self.prompt_mask, self.prompt_hidden)),
            *(x[rows] for x in (self.hidden, self.tokens, self.mask)),
        )


class SplitModel:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ends: set[int],
        trained: int,
        temperature: float,
        padded: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.ends = torch.tensor(sorted(ends), device=self.device)
        self.padded, self.decoders = padded, dict[tuple[int, int], Decoder]()
        layers = list(model.model.layers)
        self.trunk, self.top = layers[:-trained], layers[-trained:]
        self.start = copy.deepcopy(self.top)
        for layer in self.start:
            layer.requires_grad_(False)
        self.temperature = temperature

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.top for p in layer.parameters()]

    def to_start(self) -> None:
        """Undo the training."""
        with torch.no_grad():
            for layer, start in zip(self.top, self.start, strict=True):
                for p, value in zip(layer.parameters(), start.parameters(), strict=True):
                    p.copy_(value)
                    p.grad = None

    def _through(
        self, layers: list[nn.Module], hidden: Tensor, positions: Tensor, mask: Tensor, cache: Any
    ) -> Tensor:
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits.float() / self.temperature

    @torch.no_grad()
    def sample(self, prompts: list[str], each: int, width: int, uniform: Tensor | None) -> Rollout:
        """`each` completions of at most `width` tokens for every prompt.

        `uniform` (B, T) in [0, 1) decides the tokens (by inverse transform, so that equal numbers give equal
        completions where the probabilities are equal); None is greedy.
        """
        fixed = self.padded is not None and uniform is not None
        batch = self.tokenizer(
            prompts,
            return_tensors="pt",
            padding="max_length" if fixed else True,
            max_length=self.padded if fixed else None,
            padding_side="left",
            add_special_tokens=False,
        ).to(self.device)
        valid, size = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
        positions, attention = prompt_attention(valid)
        cache = DynamicCache(config=self.model.config)
        embed = self.model.model.embed_tokens
        trunk = self._through(self.trunk, embed(batch["input_ids"]), positions, attention, cache)
        logits = self._logits(self._through(self.top, trunk, positions, attention, cache)[:, -1])
        if fixed:
            decoder = self._decoder(len(prompts) * each, size, width)
            tokens, hidden = decoder.sample(cache, logits, valid, uniform.to(self.device))
            ended = torch.isin(tokens, self.ends)
            return cut(valid, trunk, hidden, tokens, ended.cumsum(1) - ended.long() == 0)
        cache.batch_repeat_interleave(each)
        logits, lengths = logits.repeat_interleave(each, 0), valid.sum(1).repeat_interleave(each)
        number = len(prompts) * each
        keys = F.pad(valid.repeat_interleave(each, 0), (0, width), value=True)
        tokens = self.ends[:1].repeat(number, width)
        mask = torch.zeros(number, width, dtype=torch.bool, device=self.device)
        hidden = trunk.new_zeros(number, width, trunk.shape[-1])
        rows = torch.arange(number, device=self.device)  # those that go on: the cache holds no others
        for t in range(width):
            if uniform is None:
                token = logits.argmax(-1)
            else:
                token = draw(logits, uniform.to(self.device)[rows, t, None])
            tokens[rows, t], mask[rows, t] = token, True
            going = ~torch.isin(token, self.ends)
            if t + 1 == width or not going.any():
                break
            if not going.all():
                rows, token = rows[going], token[going]
                cache.batch_select_indices(going)
            position = (lengths[rows] + t)[:, None]
            allowed = keys[rows, None, None, : size + t + 1]
            step = self._through(self.trunk, embed(token[:, None]), position, allowed, cache)
            hidden[rows, t] = step[:, 0]
            logits = self._logits(self._through(self.top, step, position, allowed, cache)[:, 0])
        return cut(valid, trunk, hidden, tokens, mask)

    def _decoder(self, rows: int, size: int, width: int) -> Decoder:
        if (rows, width) not in self.decoders:
            self.decoders[rows, width] = Decoder(
                self.model, len(self.trunk), rows, size, width, self.temperature
            )
        return self.decoders[rows, width]

    def logits(self, rollout: Rollout, *, start: bool = False) -> Tensor:
        """(K, V) for the K tokens under the mask, in the order of `tokens[mask]`."""
        layers = self.start if start else self.top
        valid, mask = rollout.prompt_mask, rollout.mask
        each, width = len(mask) // len(valid), mask.shape[1]
        positions, attention = prompt_attention(valid)
        cache = DynamicCache(config=self.model.config)
        last = self._through(layers, rollout.prompt_hidden, positions, attention, cache)[:, -1:]
        states = last.repeat_interleave(each, 0)
        if width > 1:
            cache.batch_repeat_interleave(each)
            steps = torch.arange(width - 1, device=self.device)
            lengths = valid.sum(1).repeat_interleave(each)
            keys = valid.repeat_interleave(each, 0)[:, None, None].expand(-1, 1, width - 1, -1)
            causal = (steps[None] <= steps[:, None]).expand(len(mask), 1, -1, -1)
            attention = torch.cat([keys, causal], -1)
            replies = self._through(
                layers, rollout.hidden[:, :-1], lengths[:, None] + steps, attention, cache
            )
            states = torch.cat([states, replies], 1)
        return self._logits(states[mask])

    def logprobs(self, rollout: Rollout, logits: Tensor) -> Tensor:
        """(B, T), 0 where masked."""
        chosen = -F.cross_entropy(logits, rollout.tokens[rollout.mask], reduction="none")
        return torch.zeros_like(rollout.mask, dtype=chosen.dtype).masked_scatter(rollout.mask, chosen)


def cut(valid: Tensor, trunk: Tensor, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Rollout:
    """Without the columns after the longest completion."""
    used = int(mask.sum(1).max())
    return Rollout(valid, trunk, hidden[:, :used], tokens[:, :used], mask[:, :used])


def prompt_attention(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (G, P) and attention mask (G, 1, P, P) of prompts padded on the left."""
    size = valid.shape[1]
    causal = torch.ones_like(valid[:1], dtype=torch.bool).expand(size, size).tril()
    # A padding token attends to itself: a row without any key would be NaN.
    allowed = valid[:, None, :] & causal | torch.eye(size, dtype=torch.bool, device=valid.device)
    return (valid.cumsum(1) - 1).clamp(min=0), allowed[:, None]
