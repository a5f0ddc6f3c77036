"""Sums over all programs of a launch: each program stores its partial sums in its own slot, and the last one
to finish adds the slots in a fixed order.

A slot has HEAD numbers [loss, optimum, sum of squares], the sum of c (n), then the statistics in the order of
the buffer, without the pair blocks that can be computed from the fields.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pama_kernels._call import FIELDS, TOTALS

from .terms import (
    ADVANTAGE_SQUARE_SUM,
    ADVANTAGE_SUM,
    BOUND_SQUARE_SUM,
    FIELD_COUNT,
    PAIR_COUNT,
    TOTAL_COUNT,
    pairs_in_slot,
    summed_pairs,
)

HEAD = 3  # plus n


def slot_size(n: int, statistics: bool, pairs: bool, present: bool) -> int:
    fields = len(FIELDS) * n + len(TOTALS) + (pairs_in_slot(present) * n * n if pairs else 0)
    return HEAD + n + (fields if statistics else 0)


@triton.jit
def is_last(counter, slots):
    """Whether all other programs of the launch have stored their slots. The last program resets the
    counter."""
    tl.debug_barrier()  # every thread's stores come before the program is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel") == slots - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def clear(slot, SIZE: tl.constexpr):
    for first in range(0, SIZE, 128):
        k = first + tl.arange(0, 128)
        tl.store(slot + k, tl.zeros([128], tl.float64), mask=k < SIZE)
    tl.debug_barrier()


@triton.jit
def add_to(pointer, x, inside):
    tl.store(pointer, x + tl.load(pointer, mask=inside, other=0.0), mask=inside)


@triton.jit
def store_sums(slot, sums, n: tl.constexpr, N: tl.constexpr):
    """Sums over tokens, and adds the result to the fields of a slot."""
    i = tl.arange(0, N)
    for field in tl.static_range(FIELD_COUNT):
        add_to(slot + field * n + i, tl.sum(sums[field].to(tl.float64), axis=0), i < n)
    one = tl.zeros([1], tl.int32)
    for total in tl.static_range(TOTAL_COUNT):
        x = tl.sum(sums[FIELD_COUNT + total].to(tl.float64), axis=0)
        add_to(slot + FIELD_COUNT * n + total + one, x[None], one == 0)
    tl.debug_barrier()  # other threads may read what is stored here


@triton.jit
def store_pairs(slot, sums, n: tl.constexpr, N: tl.constexpr, PRESENT: tl.constexpr, SQUARES: tl.constexpr):
    """Sums over tokens, and adds the result to the pair blocks of a slot. SQUARES: also adds their diagonals
    to the fields of squares."""
    to = slot + FIELD_COUNT * n + TOTAL_COUNT
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    for block in tl.static_range(summed_pairs(PRESENT)):
        add_to(to + block * n * n + i * n + j, tl.sum(sums[block], axis=0), (i < n) & (j < n))
    if SQUARES:
        on = (i < n) & (i == j)
        at = slot + i + tl.zeros_like(j)
        add_to(at + BOUND_SQUARE_SUM * n, tl.sum(sums[0], axis=0), on)
        add_to(at + ADVANTAGE_SQUARE_SUM * n, tl.sum(sums[1], axis=0), on)
    tl.debug_barrier()


@triton.jit
def store_pair_tile(partial, slot, sums, i, j, n: tl.constexpr, BLOCK: tl.constexpr, PRESENT: tl.constexpr):
    """Sums over tokens, and stores the result in a slot that has only pair blocks, for the objectives from i
    and from j on."""
    many: tl.constexpr = summed_pairs(PRESENT)
    p = (i + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    q = (j + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
    to = partial + slot.to(tl.int64) * many * n * n
    for pair in tl.static_range(many):
        tl.store(to + pair * n * n + p * n + q, tl.sum(sums[pair], axis=0), mask=(p < n) & (q < n))


@triton.jit
def added_slots(partial, slots, stride, at, inside, CHUNK: tl.constexpr):
    """The sum of element `at` (K,) over all slots, in fixed order."""
    total = tl.zeros(at.shape, tl.float64)
    for first in range(0, slots, CHUNK):
        slot = first + tl.arange(0, CHUNK).to(tl.int64)
        x = tl.load(
            partial + slot[:, None] * stride + at[None, :],
            mask=(slot < slots)[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        total += tl.sum(x, axis=0)
    return total


@triton.jit
def added_number(partial, slots, stride, place):
    """The sum of one element over all slots, a scalar."""
    zero = tl.zeros([1], tl.int32)
    return tl.sum(added_slots(partial + place, slots, stride, zero, zero == 0, 128), axis=0)


@triton.jit
def _pair_source(k, n: tl.constexpr, first: tl.constexpr):
    """The source of element k of the pairs if every objective is present: the index in the blocks from
    `first` on or, for the last three blocks, in the fields (from 0 on)."""
    block = k // (n * n)
    i = k % (n * n) // n
    follows = tl.where(block == 2, i, i + ADVANTAGE_SUM * n)
    follows = tl.where(block == 4, i + ADVANTAGE_SQUARE_SUM * n, follows)
    return tl.where(block < 2, first + k, follows)


@triton.jit
def store_statistics(
    partial, slots, stride, sums, n: tl.constexpr, PAIRS: tl.constexpr, PRESENT: tl.constexpr
):
    """Adds the statistics of all slots and stores them in the buffer. `partial` points behind the head of a
    slot."""
    pairs: tl.constexpr = FIELD_COUNT * n + TOTAL_COUNT
    size: tl.constexpr = pairs + PAIR_COUNT * n * n if PAIRS else pairs
    K: tl.constexpr = 64 if size <= 64 else 128
    CHUNK: tl.constexpr = 4096 // K  # slots at a time: as many loads as a thread has registers for
    for first in range(0, size, K):
        k = first + tl.arange(0, K)
        source = k
        if PAIRS:
            if not PRESENT:
                source = tl.where(k < pairs, k, _pair_source(tl.maximum(k - pairs, 0), n, pairs))
        tl.store(sums + k, added_slots(partial, slots, stride, source, k < size, CHUNK), mask=k < size)
    tl.debug_barrier()  # what is stored here is read again by other threads


@triton.jit(do_not_specialize=["slots"])
def add_pairs_kernel(partial, slots, sums, n: tl.constexpr, K: tl.constexpr, PRESENT: tl.constexpr):
    """Adds the pair blocks of slots that have nothing else, into a buffer whose fields are computed
    already."""
    blocks: tl.constexpr = summed_pairs(PRESENT)
    k = tl.program_id(0) * K + tl.arange(0, K)
    value = added_slots(partial, slots, blocks * n * n, k, k < blocks * n * n, 16)
    if not PRESENT:
        field = _pair_source(k, n, 0)
        follows = (k >= 2 * n * n) & (k < PAIR_COUNT * n * n)
        value = tl.where(follows, tl.load(sums + field, mask=follows, other=0.0), value)
    tl.store(sums + FIELD_COUNT * n + TOTAL_COUNT + k, value, mask=k < PAIR_COUNT * n * n)
