"""The CPU backend: allocates the results and calls the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_kernels._call import Number, Outputs, Results, Rule, Tokens, statistics_size

from . import _cpu
from .arguments import Gae
from .native import computed, scale_of_rows
from .normalize import with_normalize
from .operators import NOTHING, empty_results

build_info = _cpu.build_info
# Fast paths in C++ for the common case: plain tensors, the uniform preference and few settings. They return
# None otherwise.
quick_weights, quick_min_norm, quick_upgrad = _cpu.quick_weights, _cpu.quick_min_norm, _cpu.quick_upgrad
quick_loss = _cpu.quick_loss
# Whether the native module allocates tensors, which needs torch >= 2.10.
_ALLOCATES = hasattr(Tensor, "__dlpack_c_exchange_api__") and _cpu.use_exchange(
    Tensor.__dlpack_c_exchange_api__
)


def statistics(tokens: Tokens, pairs: bool) -> Tensor:
    sums = torch.empty(statistics_size(tokens.objectives, pairs), device="cpu", dtype=torch.float64)
    _cpu.statistics(tokens, pairs, sums, torch.get_num_threads())
    return sums


def solve(
    sums: Tensor, rule: Rule, preference: Tensor | None, objectives: int
) -> tuple[Tensor, Tensor, Tensor]:
    weights, effective = sums.new_empty(objectives), sums.new_empty(objectives)
    optimum = sums.new_empty(())
    _cpu.solve(sums, rule, preference, objectives, weights, optimum, effective)
    return weights, optimum, effective


@with_normalize
def apply(
    tokens: Tokens, rule: Rule, preference: Tensor | None, weights: Tensor | None, outputs: Outputs
) -> Results:
    results = Results if _ALLOCATES else empty_results(tokens, rule, weights, outputs)
    threads = torch.get_num_threads()
    return _cpu.apply(tokens, rule, preference, weights, outputs, results, NOTHING, threads)


def weights(
    scores: Tensor,
    preference: Tensor | None,
    regularization: Number,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    source, sizes = computed(scores), scale_of_rows(scale, scores)
    if source.dim() > 2:
        source = source.reshape(-1, source.shape[-1])
    threads = torch.get_num_threads()
    _cpu.weights(source, preference, float(regularization), sizes, result, optimum, threads)


def min_norm(
    gram: Tensor, preference: Tensor | None, regularization: Number, result: Tensor, optimum: Tensor
) -> None:
    threads = torch.get_num_threads()
    bad = _cpu.min_norm(_matrices(gram), preference, float(regularization), result, optimum, threads)
    _check_gram(gram, bad)


def upgrad(gram: Tensor, preference: Tensor | None, result: Tensor, optimum: Tensor) -> None:
    _check_gram(gram, _cpu.upgrad(_matrices(gram), preference, result, optimum, torch.get_num_threads()))


def _matrices(gram: Tensor) -> Tensor:
    source = computed(gram)
    return source.reshape(-1, *source.shape[-2:]) if source.dim() > 3 else source


def _check_gram(gram: Tensor, bad: int) -> None:
    if bad >= 0:
        which = f" at batch index {bad}" if gram.dim() > 2 else ""
        raise ValueError(
            f"gram: expected a symmetric positive semidefinite matrix, got one that is clearly not{which}"
        )


def gae(problem: Gae) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(problem.rewards.dtype, problem.values.dtype)
    advantages = torch.empty(problem.rewards.shape, device="cpu", dtype=dtype)
    returns = torch.empty_like(advantages)
    _cpu.gae(problem, advantages, returns, torch.get_num_threads())
    return advantages, returns


def group_normalize(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float
) -> Tensor:
    rows = rewards.shape[0]
    if group_ids is not None:
        _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    else:
        order = torch.arange(rows, device="cpu")
        groups = rows // group_size if group_size else 0
        begin = torch.arange(groups + 1, device="cpu") * group_size
    result = torch.empty(rewards.shape, device="cpu", dtype=rewards.dtype)
    _cpu.group_normalize(rewards, begin, order, scale, eps, result, torch.get_num_threads())
    return result
