"""`normalize`: divides combined advantages by their root mean square, for backends whose `apply` does not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pama_kernels._call import FIELDS, Outputs, Results, Rule, Tokens

# The smallest root mean square by which combined advantages are divided.
LEAST = {torch.float32: 2.0**-126, torch.float64: 2.0**-486}

Apply = Callable[[Tokens, Rule, Tensor | None, Tensor | None, Outputs], Results]


def root_mean_square(square: Tensor, sums: Tensor, n: int, weights: Tensor) -> Tensor:
    """The root mean square of the combined advantages, whose squares add up to `square`.

    1 if they are 0 up to rounding, since dividing would amplify rounding errors, or below LEAST, where they
    or their squares lose digits. NaN if the squares overflow.
    """
    tokens = sums[len(FIELDS) * n]
    root = (square / tokens.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    first = FIELDS.index("advantage_square_sum") * n
    count = sums[:n]
    mean_square = torch.where(count > 0, sums[first : first + n] / count, 0.0)
    share = weights.detach().abs().to(torch.float64)
    terms = ((share.mean(0) if share.dim() == 2 else share) * mean_square.sqrt()).sum()
    noise = (32 * torch.finfo(weights.dtype).eps * terms).clamp(min=LEAST[weights.dtype])
    root = torch.where(root <= noise, 1.0, root)
    return torch.where(square == torch.inf, torch.nan, root)


def divided(combined: Tensor, root: Tensor, dtype: torch.dtype) -> Tensor:
    """A 0 stays 0, so that a NaN root does not reach masked tokens."""
    return torch.where(combined == 0, combined, combined / root.to(combined.dtype)).to(dtype)


def with_normalize(apply: Apply) -> Apply:
    """Wraps `apply` to divide if `outputs.normalize` is set; half-precision types are rounded once, after the
    division."""

    @functools.wraps(apply)
    def call(
        tokens: Tokens, rule: Rule, preference: Tensor | None, weights: Tensor | None, outputs: Outputs
    ) -> Results:
        if not outputs.normalize:
            return apply(tokens, rule, preference, weights, outputs)
        given = tokens.advantages
        if given.dtype in (torch.float16, torch.bfloat16):
            tokens = tokens._replace(advantages=given.float())
        results = apply(tokens, rule, preference, weights, outputs._replace(normalize=False))
        root = root_mean_square(results.square_sum, results.sums, tokens.objectives, results.weights)
        return results._replace(advantages=divided(results.advantages, root, given.dtype))

    return call
