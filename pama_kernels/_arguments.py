"""Validation at the public edge: what the arguments are, told by their shapes and dtypes alone.

Nothing here reads a value of a tensor on another device than the host, so nothing synchronises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)

WEIGHTS_PER = ("batch", "sequence", "token")
BOUNDS = ("scores", "gram")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")

Prior = Sequence[float] | Tensor | None
ClipRange = float | tuple[float, float]


class Layout(NamedTuple):
    """How tokens are arranged: padded (B, T), flat (M,), packed (M,) with offsets, or one per row (B,)."""

    rows: int
    width: int  # tokens of a padded row; of all rows when flat or packed; -1 where only cu_seqlens tells
    objectives: int
    sequences: bool  # rows are sequences (not so when flat)
    packed: bool
    per_sequence: bool  # advantages (B, N)
    mask_per_sequence: bool  # objective_mask (B, N)

    def numbers(self) -> list[int]:
        """What the backends take of it."""
        return [self.rows, self.width, int(self.per_sequence), int(self.mask_per_sequence)]


def shape_of(x: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in x.shape) + ("," if x.dim() == 1 else "") + ")"


def check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a {kind} tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected a {kind} tensor, got dtype {x.dtype}")


def check_float(name: str, x: Any) -> None:
    check_tensor(name, x, FLOATS, "floating-point")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name}: expected a plain tensor, got a negated view; pass {name}.resolve_neg()")


def check_mask(name: str, x: Any) -> None:
    check_tensor(name, x, MASKS, "bool, integer or floating-point")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {like_name}, got {x.device}")


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {shape_of(like)} as {like_name}, got {shape_of(x)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """True or False and nothing that Python would take for it: "none" is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    inclusive: bool = True,
    infinite: bool = False,
) -> float:
    """A real number in [low, high] (or above low), as float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    inside = low <= number <= high if inclusive else low < number <= high
    if not inside or (number in (math.inf, -math.inf) and not infinite):
        bracket = "[" if inclusive else "("
        end = "]" if high < math.inf or infinite else ")"
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}{end}, got {value!r}")
    return number


def clip_bounds(clip_range: Any, dual_clip: Any = None) -> tuple[float, float, float]:
    """(eps_low, eps_high, dual_clip or infinity)."""
    if isinstance(clip_range, (tuple, list)):
        if len(clip_range) != 2:
            raise ValueError(f"clip_range: expected one number or (low, high), got {len(clip_range)} values")
        pair = tuple(clip_range)
    else:
        pair = (clip_range, clip_range)
    low = check_number("clip_range", pair[0], 0.0, 1.0)
    high = check_number("clip_range", pair[1], 0.0, math.inf, infinite=True)
    if dual_clip is None:
        return low, high, math.inf
    dual = check_number("dual_clip", dual_clip, 1.0 + high, math.inf, inclusive=False)
    return low, high, dual


def traced() -> bool:
    """Whether operators are recorded (torch.compile, FakeTensorMode, make_fx), not just run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _uniform_prior(n: int, device: torch.device) -> Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64, device=device)


def _sequence_prior(values: tuple[float, ...], device: torch.device) -> Tensor:
    if any(not 0 <= value < math.inf for value in values) or not 0 < sum(values) < math.inf:
        raise ValueError(
            f"prior: expected non-negative finite numbers with a positive sum, got {list(values)}"
        )
    total = math.fsum(values)
    shares = [value / total for value in values]
    if device.type == "cpu" or traced():
        return torch.tensor(shares, dtype=torch.float64, device=device)
    return _filled(shares, device)


def _filled(values: Sequence[float], device: torch.device) -> Tensor:
    """Number by number: a copy from the host would wait for the device."""
    result = torch.empty(len(values), dtype=torch.float64, device=device)
    for place, value in zip(result.unbind(), values, strict=True):
        place.fill_(value)
    return result


# Made once, not per call; while compiling they are part of the graph.
_cached_uniform_prior = functools.lru_cache(maxsize=256)(_uniform_prior)
_cached_sequence_prior = functools.lru_cache(maxsize=256)(_sequence_prior)


def check_prior_type(prior: Any) -> None:
    """Several numbers in order: a set has none, and a dictionary would be read by its keys."""
    if isinstance(prior, (str, bytes, dict, set, frozenset)) or not hasattr(prior, "__len__"):
        raise TypeError(
            f"prior: expected a list of numbers, one for each objective, or a tensor, got {prior!r} "
            f"({type(prior).__name__})"
        )


def prior_tensor(prior: Any, n: int, device: torch.device) -> tuple[Tensor, bool]:
    """The prior on the simplex, (N,) float64 on the device, and whether it is known to be uniform."""
    compiling = traced()
    if prior is None:
        return (_uniform_prior if compiling else _cached_uniform_prior)(n, device), True
    if isinstance(prior, Tensor):
        if prior.dtype not in MASKS[1:]:
            raise TypeError(f"prior: expected real numbers, got dtype {prior.dtype}")
        if prior.shape != (n,):
            raise ValueError(f"prior: expected shape ({n},), got {shape_of(prior)}")
        if prior.device != device:
            raise ValueError(f"prior: expected device {device}, got {prior.device}")
        values = prior.detach().double()
        if device.type == "cpu" and not compiling:
            return _cached_sequence_prior(tuple(values.tolist()), device), False
        return values / values.sum(), False
    check_prior_type(prior)
    if len(prior) != n:
        raise ValueError(f"prior: expected {n} numbers, got {len(prior)}")
    try:
        numbers = tuple(float(value) for value in prior)
    except (TypeError, ValueError):
        raise TypeError(f"prior: expected {n} numbers, got {prior!r}") from None
    return (_sequence_prior if compiling else _cached_sequence_prior)(numbers, device), False


def check_regularization(value: Any) -> float:
    return check_number("regularization", value, 0.0, math.inf)


def resolve_layout(
    advantages: Any,
    mask: Any = None,
    *,
    logprobs: Any = None,
    old_logprobs: Any = None,
    ref_logprobs: Any = None,
    importance_weights: Any = None,
    objective_mask: Any = None,
    cu_seqlens: Any = None,
) -> Layout:
    """Checks types, dtypes, shapes and devices of every tensor together, and tells the layout."""
    check_float("advantages", advantages)
    like_name, like = "advantages", advantages
    if logprobs is not None:
        check_float("logprobs", logprobs)
        like_name, like = "logprobs", logprobs
        check_device("advantages", advantages, like_name, like)
    if mask is not None:
        check_mask("mask", mask)
        check_device("mask", mask, like_name, like)
    for name, x in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("importance_weights", importance_weights),
    ):
        if x is not None:
            check_float(name, x)
            check_device(name, x, like_name, like)
    tokens_name, tokens = ("logprobs", logprobs) if logprobs is not None else ("mask", mask)
    if tokens is not None:
        if tokens.dim() not in (1, 2):
            raise ValueError(f"{tokens_name}: expected shape (B, T) or (M,), got {shape_of(tokens)}")
        for name, x in (
            ("mask", mask),
            ("old_logprobs", old_logprobs),
            ("ref_logprobs", ref_logprobs),
            ("importance_weights", importance_weights),
        ):
            if x is not None:
                check_same_shape(name, x, tokens_name, tokens)

    if advantages.dim() not in (2, 3):
        raise ValueError(
            "advantages: expected shape (B, T, N), (B, N) or (M, N), objectives last, "
            f"got {shape_of(advantages)}"
        )
    n = advantages.shape[-1]
    if n < 1:
        raise ValueError(f"advantages: expected at least one objective, got {shape_of(advantages)}")
    layout = (
        _packed_layout(advantages, tokens_name, tokens, cu_seqlens, n)
        if cu_seqlens is not None
        else _layout(advantages, tokens_name, tokens, n)
    )
    if objective_mask is None:
        return layout
    check_mask("objective_mask", objective_mask)
    check_device("objective_mask", objective_mask, like_name, like)
    by_sequence = layout.sequences and objective_mask.shape == (layout.rows, n)
    by_token = (not layout.sequences or layout.packed) and objective_mask.shape == (layout.width, n)
    if not (by_sequence or by_token):
        expected = f"({layout.rows}, {n})" if layout.sequences else f"({layout.width}, {n})"
        if layout.packed and layout.width >= 0:
            expected += f" or ({layout.width}, {n})"
        raise ValueError(f"objective_mask: expected shape {expected}, got {shape_of(objective_mask)}")
    return layout._replace(mask_per_sequence=by_sequence and not by_token)


def _layout(advantages: Tensor, tokens_name: str, tokens: Tensor | None, n: int) -> Layout:
    if tokens is None:
        if advantages.dim() == 3:
            return Layout(advantages.shape[0], advantages.shape[1], n, True, False, False, False)
        return Layout(advantages.shape[0], 1, n, True, False, True, False)
    if tokens.dim() == 1:
        if advantages.dim() != 2 or advantages.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"advantages: expected shape ({tokens.shape[0]}, N) for flat {tokens_name}, "
                f"got {shape_of(advantages)}"
            )
        return Layout(1, tokens.shape[0], n, False, False, False, False)
    rows, width = tokens.shape
    if advantages.dim() == 3:
        if advantages.shape[:2] != tokens.shape:
            raise ValueError(
                f"advantages: expected shape ({rows}, {width}, N) for {tokens_name} "
                f"{shape_of(tokens)}, got {shape_of(advantages)}"
            )
        return Layout(rows, width, n, True, False, False, False)
    if advantages.shape == tokens.shape:
        raise ValueError(
            f"advantages: {shape_of(advantages)} is the shape of {tokens_name}, which is ambiguous; one "
            "objective per token is advantages.unsqueeze(-1), per-sequence advantages with N == T are "
            "advantages[:, None].expand(B, T, N)"
        )
    if advantages.shape[0] != rows:
        raise ValueError(
            f"advantages: expected shape ({rows}, {width}, N) or ({rows}, N) for {tokens_name} "
            f"{shape_of(tokens)}, got {shape_of(advantages)}"
        )
    return Layout(rows, width, n, True, False, True, False)


def _packed_layout(
    advantages: Tensor, tokens_name: str, tokens: Tensor | None, cu_seqlens: Any, n: int
) -> Layout:
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "one-dimensional int32 or int64")
    check_device("cu_seqlens", cu_seqlens, "advantages", advantages)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected shape (B + 1,), offsets of B sequences, got {shape_of(cu_seqlens)}"
        )
    rows = cu_seqlens.shape[0] - 1
    if tokens is not None and tokens.dim() != 1:
        raise ValueError(f"{tokens_name}: expected shape (M,) with cu_seqlens, got {shape_of(tokens)}")
    if advantages.dim() != 2:
        raise ValueError(
            f"advantages: expected shape (M, N) or (B, N) with cu_seqlens, got {shape_of(advantages)}"
        )
    first = advantages.shape[0]
    if tokens is None:
        per_sequence = first == rows
        return Layout(rows, -1 if per_sequence else first, n, True, True, per_sequence, False)
    width = tokens.shape[0]
    if first not in (width, rows):
        raise ValueError(
            f"advantages: expected shape ({width}, N) or ({rows}, N) with cu_seqlens, "
            f"got {shape_of(advantages)}"
        )
    return Layout(rows, width, n, True, True, first != width, False)


def check_weights(weights: Any, layout: Layout, device: torch.device) -> None:
    check_float("weights", weights)
    n = layout.objectives
    fits = weights.dim() == 1 and weights.shape[0] == n
    if layout.sequences and weights.dim() == 2:
        fits = weights.shape[0] == layout.rows and weights.shape[1] == n
    if not fits:
        rows = f" or ({layout.rows}, {n})" if layout.sequences else ""
        raise ValueError(f"weights: expected shape ({n},){rows}, got {shape_of(weights)}")
    if weights.device != device:
        raise ValueError(f"weights: expected device {device}, got {weights.device}")


def check_rule(weights_per: Any, bound: Any) -> None:
    check_choice("weights_per", weights_per, WEIGHTS_PER)
    check_choice("bound", bound, BOUNDS)
    if bound == "gram" and weights_per != "batch":
        raise ValueError(f"bound: 'gram' goes with weights_per='batch' only, got {weights_per!r}")


def check_process_group(process_group: Any, weights_per: Any) -> None:
    if process_group is None:
        return
    if weights_per != "batch":
        raise ValueError(
            f"process_group: goes with weights_per='batch' only, got weights_per={weights_per!r}"
        )
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup, got {type(process_group).__name__}"
        )


def check_weighting(layout: Layout, weights_per: Any, bound: Any, process_group: Any, weights: Any) -> None:
    check_rule(weights_per, bound)
    check_process_group(process_group, weights_per)
    if weights_per == "sequence" and not layout.sequences and weights is None:
        raise ValueError("weights_per: 'sequence' needs cu_seqlens where tensors are flat")
