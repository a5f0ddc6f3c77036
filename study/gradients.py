"""The objectives' gradients for the trained parameters, and how far a rule's weights are from min-norm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import mgda_weights


def gram_of_gradients(
    parameters: Sequence[Tensor], logprobs: Tensor, mask: Tensor, advantages: Tensor
) -> Tensor:
    """(K, K), of the gradients of mean(log-probability times advantage), for advantages (B, K)."""
    objectives = [(logprobs * column[:, None])[mask].mean() for column in advantages.T]
    gradients = [torch.autograd.grad(x, list(parameters), retain_graph=True) for x in objectives]
    gram = torch.zeros(len(objectives), len(objectives), dtype=torch.float64, device=logprobs.device)
    for each in zip(*gradients, strict=True):
        flat = torch.stack([g.flatten() for g in each]).double()
        gram += flat @ flat.T
    return gram.cpu()


def of_gradients(gram: Tensor, weights: Tensor) -> dict[str, Any]:
    """From the Gram matrix of the objectives and, last, of the combined advantage: cosines to the latter,
    whether an objective falls to first order, and the weights' distance to min-norm's."""
    n = len(gram) - 1
    norms = gram.diagonal().sqrt()
    cosines = gram[:n, n] / (norms[:n] * norms[n]).clamp(min=1e-30)
    best = mgda_weights(gram[None, :n, :n])[0]
    row = {f"cosine_{i}": x for i, x in enumerate(cosines.tolist())}
    row |= {f"mgda_{i}": x for i, x in enumerate(best.tolist())}
    row["gradient_sacrificed"] = float((cosines < -1e-4).any())
    mean = weights.double().cpu()
    mean = mean.reshape(-1, n).mean(0)
    return row | {"mgda_tv": float((mean / mean.sum() - best).abs().sum()) / 2}
