"""The CUDA backend: statistics with the weights of the batch in one launch, and the batched solvers.

What nvcc built as `pama_kernels._cuda`; the other operators are left to the next backend. Kernels run on the
current stream of the tensors' device, in memory that torch allocates; nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pama_kernels import _cuda
from pama_kernels._codes import statistics_size

from ._native import DTYPES, array, token_problem

_BLOCKS_PER_PROCESSOR = 3  # as csrc/cuda/statistics.cuh has it
_WORK_LIMIT = 1 << 24  # doubles of work space of one call, unless one problem needs more
_CAPTURED_CALLS = 4096  # counters set aside for calls that CUDA graphs capture, per device

Stream = tuple[int, int]  # device, address


@functools.lru_cache(maxsize=4)
def unusable(device_type: str) -> str | None:
    """Why these kernels cannot run on this type of device; None where they can."""
    if device_type != "cuda":
        return f"runs on CUDA tensors only, not on {device_type!r}"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    problem: str = _cuda.device_problem()
    if problem:
        return problem
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            return f"needs compute capability 8.0 or higher, {name} has {major}.{minor}"
    return None


def _stream(x: Tensor) -> Stream:
    """The current stream of the tensor's device."""
    device: int = x.get_device()
    address: int = torch._C._cuda_getCurrentRawStream(device)
    return device, address


_capturing = torch.cuda.is_current_stream_capturing


@functools.lru_cache(maxsize=64)
def _processors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


class _Counters:
    """Counters of finished blocks: 0 before and after a launch, never shared by launches that may overlap.

    Launches on one stream follow each other and share one. Those that a graph captures may be replayed on any
    stream, so each gets one for itself, from a reserve that the first call outside a capture has set to 0
    (`torch.cuda.graph` synchronises before it captures). Without a reserve the graph sets its own to 0.
    """

    def __init__(self) -> None:
        self.of_stream: dict[Stream, Tensor] = {}
        self.reserve: dict[int, tuple[Tensor, int]] = {}

    def take(self, stream: Stream, like: Tensor) -> Tensor | int:
        """A counter, or its address."""
        device = stream[0]
        if _capturing():
            reserve, used = self.reserve.get(device, (None, _CAPTURED_CALLS))
            if reserve is None or used == _CAPTURED_CALLS:
                return _zeros(1, like)
            self.reserve[device] = reserve, used + 1
            return reserve.data_ptr() + 4 * used
        counter = self.of_stream.get(stream)
        if counter is None:
            if device not in self.reserve:
                self.reserve[device] = _zeros(_CAPTURED_CALLS, like), 0
            counter = self.of_stream[stream] = _zeros(1, like)
        return counter


def _zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=like.device)


_counters = _Counters()


def _doubles(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)


def _solution(n: int, wide: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if wide else torch.float32
    return (
        torch.empty(n, dtype=dtype, device=like.device),
        torch.empty((), dtype=dtype, device=like.device),
    )


def _statistics(
    like: Tensor, problem: tuple[object, ...], objectives: int, gram: bool, solve: tuple[object, ...] | None
) -> Tensor:
    stream = _stream(like)
    most = _BLOCKS_PER_PROCESSOR * _processors(stream[0])
    sums = _doubles(statistics_size(objectives, gram), like)
    partials = _doubles(_cuda.statistics_partials(problem, gram, most), like)
    counter = _counters.take(stream, like)
    address = counter if isinstance(counter, int) else counter.data_ptr()
    _cuda.statistics(problem, gram, most, partials.data_ptr(), address, sums.data_ptr(), solve, *stream)
    return sums


def statistics(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: Sequence[int],
    clip: Sequence[float],
    noon: bool,
    gram: bool,
) -> Tensor:
    problem = token_problem(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective_mask,
        importance_weights,
        None,
        cu_seqlens,
        layout,
        clip,
        noon,
    )
    return _statistics(advantages, problem, advantages.shape[-1], gram, None)


def statistics_weights(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    objective_mask: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: Sequence[int],
    clip: Sequence[float],
    noon: bool,
    gram: bool,
    prior: Tensor,
    regularization: float,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and the weights of the batch and the optimum from them: one launch (two with `gram`)."""
    n = advantages.shape[-1]
    problem = token_problem(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective_mask,
        importance_weights,
        None,
        cu_seqlens,
        layout,
        clip,
        noon,
    )
    weights, optimum = _solution(n, wide, advantages)
    work = _doubles(_cuda.solve_work(n, gram), advantages)
    solve = (
        gram,
        prior.data_ptr(),
        regularization,
        wide,
        weights.data_ptr(),
        optimum.data_ptr(),
        work.data_ptr(),
    )
    sums = _statistics(advantages, problem, n, gram, solve)
    return sums, weights, optimum


def batch_weights(
    sums: Tensor, objectives: int, gram: bool, prior: Tensor, regularization: float, wide: bool
) -> tuple[Tensor, Tensor]:
    weights, optimum = _solution(objectives, wide, sums)
    work = _doubles(_cuda.solve_work(objectives, gram), sums)
    solve = (
        gram,
        prior.data_ptr(),
        regularization,
        wide,
        weights.data_ptr(),
        optimum.data_ptr(),
        work.data_ptr(),
    )
    _cuda.batch_weights(sums.data_ptr(), objectives, solve, *_stream(sums))
    return weights, optimum


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _work(rows: int, doubles: int, like: Tensor) -> tuple[Tensor | None, int]:
    """Work space, and how many problems it serves at a time."""
    if doubles == 0:
        return None, rows
    slots = min(rows, max(1, _WORK_LIMIT // doubles))
    return _doubles(slots * doubles, like), slots


def weights(
    scores: Tensor, prior: Tensor, uniform: bool, regularization: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    source = _computed(scores)
    result, optimum = source.new_empty(source.shape), source.new_empty(source.shape[:-1])
    weights_out(source, prior, uniform, regularization, scale, result, optimum)
    return result, optimum


def weights_out(
    scores: Tensor,
    prior: Tensor,
    uniform: bool,
    regularization: float,
    scale: Tensor | None,
    result: Tensor,
    optimum: Tensor,
) -> None:
    n = scores.shape[-1]
    source = _computed(scores).reshape(-1, n)
    rows = source.shape[0]
    sizes = None
    if scale is not None:
        scale = scale.double().expand(scores.shape[:-1]).reshape(-1)
        sizes = array(scale, scale.stride(0), 0, 0)
    work, slots = _work(rows, _cuda.weights_work(n), source)
    _cuda.weights(
        rows,
        n,
        (source.data_ptr(), DTYPES[source.dtype], source.stride(0), 0, source.stride(1)),
        prior.data_ptr(),
        regularization,
        sizes,
        result.data_ptr(),
        optimum.data_ptr(),
        0 if work is None else work.data_ptr(),
        slots,
        *_stream(source),
    )


def min_norm(gram: Tensor, prior: Tensor, regularization: float) -> tuple[Tensor, Tensor]:
    source = _computed(gram)
    result, optimum = source.new_empty(source.shape[:-1]), source.new_empty(source.shape[:-2])
    min_norm_out(source, prior, regularization, result, optimum)
    return result, optimum


def min_norm_out(gram: Tensor, prior: Tensor, regularization: float, result: Tensor, optimum: Tensor) -> None:
    n = gram.shape[-1]
    source = _computed(gram).reshape(-1, n, n)
    rows = source.shape[0]
    batch_stride, row_stride, column_stride = source.stride()
    stream = _stream(source)
    work, slots = _work(rows, _cuda.min_norm_work(n), source)
    _cuda.min_norm(
        rows,
        n,
        source.dtype == torch.float64,
        source.data_ptr(),
        batch_stride,
        row_stride,
        column_stride,
        prior.data_ptr(),
        regularization,
        result.data_ptr(),
        optimum.data_ptr(),
        0 if work is None else work.data_ptr(),
        slots,
        _processors(stream[0]),
        *stream,
    )
