"""Sums over tokens that `apply.py` does not compute: the number of valid tokens, and the N x N sums for many
objectives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels._call import PAIRS, Tokens
from pama_kernels.backends._counter import counter

from .launch import INTERPRETED, launch, options_of, programs
from .problem import ANY_SIZE, MASK, OFFSETS, Problem, problem
from .reduce import add_pairs_kernel, added_number, is_last, store_pair_tile
from .terms import add_token_pairs, no_pairs, pairs_in_slot
from .tokens import clip_of, load_factors, load_terms, locate, row_range, tokens_in_all, valid_tokens
from .trace import larger, memory

PAIRS_IN_REGISTERS = 8  # up to this number of objectives, the pass over tokens also computes the N x N sums
_COUNTED = 128 if INTERPRETED else 1024  # tokens at a time if only the mask is read
_BLOCK = 8  # objectives of a block of pairs


@triton.jit(do_not_specialize=["m_row", "m_token", "cu_step", "rows", "width"])
def count_kernel(
    mask, m_row: tl.int64, m_token: tl.int64, cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64,
    counts, total,
    counter, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr, UNIT: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    """Counts the valid tokens of each row (BY_ROW), or those of each program's share, which the last program
    adds."""
    mask = (mask, m_row, m_token)
    cu = (cu, cu_step)
    slots = tl.num_programs(0)
    if BY_ROW:
        for index in range(tl.program_id(0), rows, slots):
            row = tl.cast(index, tl.int64)
            begin, end = row_range(cu, row, width)
            count = tl.zeros([TOKENS], tl.int32)
            for first in range(begin, end, TOKENS):
                at = first + tl.arange(0, TOKENS)
                count += valid_tokens(mask, tl.zeros_like(at) + row, at, at < end, UNIT).to(tl.int32)
            tl.store(counts + row, tl.sum(count.to(tl.int64), axis=0).to(tl.float64))
    else:
        every = tokens_in_all(cu, rows, width, LAYOUT)
        count = tl.zeros([TOKENS], tl.int32)
        for tile in range(tl.program_id(0), tl.cdiv(every, TOKENS), slots):
            at = tl.cast(tile, tl.int64) * TOKENS + tl.arange(0, TOKENS)
            row, token = locate(at, cu, rows, width, LAYOUT, NARROW)
            count += valid_tokens(mask, row, token, at < every, UNIT).to(tl.int32)
        tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), axis=0).to(tl.float64))
        if is_last(counter, slots):
            tl.store(total, added_number(counts, slots, 1, 0))


def valid_count(given: Tokens, by_row: bool) -> Tensor:
    """Valid tokens of each row, or of all (1,), in float64."""
    only_mask = given._replace(
        logprobs=None, old_logprobs=None, ref_logprobs=None, importance_weights=None, objective_mask=None
    )
    p = problem(only_mask, by_row, without_objectives=True)
    units = given.rows if by_row else -(-p.total // _COUNTED)
    slots = programs(p.device, units, 4)
    counts = memory(p.device, given.rows if by_row else slots)
    total = None if by_row else memory(p.device, 1)
    c = p.constants
    options = options_of(TOKENS=_COUNTED, LAYOUT=c.LAYOUT, NARROW=c.NARROW, UNIT=c.UNIT, BY_ROW=by_row)
    launch(
        count_kernel, p.device, slots, options, *p.arguments[MASK], *p.arguments[OFFSETS], counts, total,
        None if by_row else counter(p.device),
    )  # fmt: skip
    return counts if total is None else total


@triton.jit
def share_of(row, inside, row_counts):
    """The token weights: None where all are 1, or 1 over the valid tokens of the row, float64."""
    share = None
    if row_counts is not None:
        share = 1.0 / tl.maximum(tl.load(row_counts + row, mask=inside, other=1.0), 1.0)
    return share


@triton.jit(do_not_specialize=[*ANY_SIZE, "slots"])
def pairs_kernel(
    advantages, a_row: tl.int64, a_token: tl.int64, a_objective: tl.int64,
    presence, o_row: tl.int64, o_token: tl.int64, o_objective: tl.int64,
    mask, m_row: tl.int64, m_token: tl.int64, logprobs, l_row: tl.int64, l_token: tl.int64,
    old, b_row: tl.int64, b_token: tl.int64, importance, w_row: tl.int64, w_token: tl.int64,
    ref, r_row: tl.int64, r_token: tl.int64, cu, cu_step: tl.int64, rows: tl.int64, width: tl.int64,
    low: tl.float64, low_at, high: tl.float64, high_at, dual: tl.float64, dual_at,
    row_counts, partial, slots: tl.int64,
    n: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, LAYOUT: tl.constexpr, NARROW: tl.constexpr,
    UNIT: tl.constexpr, DENSE: tl.constexpr, NOON: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    PRESENT: tl.constexpr,
):  # fmt: skip
    """Computes the N x N sums for many objectives: each program has a block of pairs and a share of the
    tokens."""
    D: tl.constexpr = tl.float64 if WIDE else tl.float32
    clip = clip_of(low, low_at, high, high_at, dual, dual_at)
    own = (advantages, a_row, a_token, a_objective)
    here = (presence, o_row, o_token, o_objective)
    cu = (cu, cu_step)
    total = tokens_in_all(cu, rows, width, LAYOUT)
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    blocks: tl.constexpr = (n + BLOCK - 1) // BLOCK
    i = block // blocks * BLOCK
    j = block % blocks * BLOCK
    sums = no_pairs(TOKENS, BLOCK, PRESENT)
    for tile in range(slot, tl.cdiv(total, TOKENS), slots):
        at = tl.cast(tile, tl.int64) * TOKENS + tl.arange(0, TOKENS)
        row, token = locate(at, cu, rows, width, LAYOUT, NARROW)
        factors = load_factors(
            (mask, m_row, m_token), (logprobs, l_row, l_token), (old, b_row, b_token),
            (importance, w_row, w_token), clip, row, token, at < total, UNIT, D,
        )  # fmt: skip
        x = load_terms(own, here, factors, row, token, i, n, BLOCK, NOON, DENSE, D)
        y = load_terms(own, here, factors, row, token, j, n, BLOCK, NOON, DENSE, D)
        sums = add_token_pairs(sums, x, y, share_of(row, at < total, row_counts), PRESENT)
    store_pair_tile(partial, slot, sums, i, j, n, BLOCK, PRESENT)


def pair_slots(device: torch.device, n: int, units: int) -> int:
    """The number of shares into which the tokens are divided, for each block of pairs."""
    slots: int = larger(1, programs(device, units, 4) // (-(-n // _BLOCK)) ** 2)
    return slots


def finish_pairs(partial: Tensor, slots: int, sums: Tensor, n: int, present: bool) -> None:
    k = 256
    options = options_of(n=n, K=k, PRESENT=present)
    launch(add_pairs_kernel, sums.device, -(-len(PAIRS) * n * n // k), options, partial, slots, sums)


def store_pairs_of(p: Problem, present: bool, row_counts: Tensor | None, sums: Tensor) -> None:
    """Writes the N x N blocks of a buffer whose fields are computed already."""
    n, tokens = p.constants.n, p.constants.tile(128 if present else 256, _BLOCK)
    slots = pair_slots(p.device, n, -(-p.total // tokens))
    partial = memory(p.device, slots * pairs_in_slot(present) * n * n)
    options = options_of(TOKENS=tokens, BLOCK=_BLOCK, PRESENT=present, **p.constants._asdict())
    blocks = (-(-n // _BLOCK)) ** 2
    launch(pairs_kernel, p.device, slots * blocks, options, *p.arguments, row_counts, partial, slots)
    finish_pairs(partial, slots, sums, n, present)
