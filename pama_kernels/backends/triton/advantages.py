"""Advantages from rewards: generalised advantage estimation as a parallel scan, and group normalisation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pama_kernels.backends.arguments import Gae
from pama_kernels.whiten import rounding

from .launch import check_memory, launch, number, number_of, options_of, power_of_two
from .simplex import power_of_two_of
from .tokens import read, rounded, truth
from .trace import shape, strides

_STEPS = 1024  # steps times objectives that a program scans at a time
_MEMBERS = 1024  # members of a group times objectives that a program processes at a time
_SMALL = 64  # members of the groups of GRPO


# --- generalised advantage estimation --------------------------------------------------------------------


@triton.jit
def _nearest(found, value, next_found, next_value):
    """Scan operator: the last value that was found. Truth values are int32: every GPU can shuffle them."""
    return found | next_found, tl.where(next_found != 0, next_value, value)


@triton.jit
def _chain(cut, factor, term, next_cut, next_factor, next_term):
    """Scan operator: x -> term + factor x, or term alone where cut, one after the other."""
    total = tl.where(next_cut != 0, next_term, next_term + next_factor * term)
    return cut | next_cut, factor * next_factor, total


_STRIDES = [
    *(
        "r_row",
        "r_step",
        "r_objective",
        "v_row",
        "v_step",
        "v_objective",
        "m_row",
        "m_step",
        "d_row",
        "d_step",
    ),
    *("t_row", "t_step", "l_row", "l_objective", "f_row", "f_step", "f_objective", "width"),
]


@triton.jit(do_not_specialize=_STRIDES)
def gae_kernel(
    rewards, r_row: tl.int64, r_step: tl.int64, r_objective: tl.int64,
    values, v_row: tl.int64, v_step: tl.int64, v_objective: tl.int64,
    mask, m_row: tl.int64, m_step: tl.int64, dones, d_row: tl.int64, d_step: tl.int64,
    truncated, t_row: tl.int64, t_step: tl.int64, last_values, l_row: tl.int64, l_objective: tl.int64,
    final_values, f_row: tl.int64, f_step: tl.int64, f_objective: tl.int64,
    advantages, returns, gamma: tl.float64, gamma_at, lam: tl.float64, lam_at, width: tl.int64,
    n: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, backwards in chunks of STEPS; place 0 of a chunk is its last step.

    A valid step maps (V, A), the value and the advantage of the next valid step, to its own: V -> value, A ->
    reward + gamma V - value + gamma lam A. Where the episode ends, A is first set to 0, and V to 0 or, if the
    episode is truncated, to the step's final value. A masked step changes neither.
    """
    tiles = tl.cdiv(n, BLOCK)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.arange(0, STEPS)
    objective = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = objective < n
    discount = number_of(gamma, gamma_at)
    decay = discount * number_of(lam, lam_at)
    value = tl.zeros((BLOCK,), tl.float64)
    if last_values is not None:
        bootstrap = last_values + sequence * l_row + objective * l_objective
        value = read(bootstrap, inside, tl.float64)
    advantage = tl.zeros((BLOCK,), tl.float64)
    for done_steps in range(0, width, STEPS):
        step = width - 1 - done_steps - place.to(tl.int64)
        valid = step >= 0
        later = valid & (step + 1 < width) & (place > 0)  # within this chunk
        if mask is not None:
            own_mask = mask + sequence * m_row
            valid = truth(own_mask + step * m_step, valid)
            later = truth(own_mask + (step + 1) * m_step, later)
        over = valid & ~valid
        if dones is not None:
            over = truth(dones + sequence * d_row + step * d_step, valid)
        here = valid[:, None] & inside[None, :]
        own_values = values + sequence * v_row + objective[None, :] * v_objective
        own = read(own_values + step[:, None] * v_step, here, tl.float64)
        following_here = later[:, None] & inside[None, :]
        following = read(own_values + (step + 1)[:, None] * v_step, following_here, tl.float64)
        found, following = tl.associative_scan((following_here.to(tl.int32), following), 0, _nearest)
        found = found != 0
        following = tl.where(found, following, value[None, :])
        nearest = following
        following = tl.where(over[:, None], 0.0, following)
        if truncated is not None:
            cut_off = truth(truncated + sequence * t_row + step * t_step, valid & ~over)
            final = (
                final_values + sequence * f_row + step[:, None] * f_step + objective[None, :] * f_objective
            )
            stops = cut_off[:, None] & inside[None, :]
            following = tl.where(stops, read(final, stops, tl.float64), following)
            over = over | cut_off
        ends = over[:, None] & inside[None, :]
        own_rewards = rewards + sequence * r_row + objective[None, :] * r_objective
        delta = read(own_rewards + step[:, None] * r_step, here, tl.float64) - own + discount * following
        term = tl.where(here, delta, 0.0)
        factor = tl.where(here, decay, tl.full([], 1.0, tl.float64))
        cut, factor, term = tl.associative_scan((ends.to(tl.int32), factor, term), 0, _chain)
        result = tl.where(cut != 0, term, term + factor * advantage[None, :])
        to = (sequence * width + step[:, None]) * n + objective[None, :]
        stored = (step >= 0)[:, None] & inside[None, :]
        tl.store(advantages + to, rounded(tl.where(here, result, 0.0), advantages.dtype.element_ty), stored)
        tl.store(returns + to, rounded(tl.where(here, result + own, 0.0), returns.dtype.element_ty), stored)
        last = (place == STEPS - 1)[:, None]
        advantage = tl.sum(tl.where(last, result, 0.0), 0)
        # the value of the earliest valid step of this chunk
        earliest = tl.where(last & here, own, tl.where(last & found, nearest, 0.0))
        any_found = tl.max((last & (here | found)).to(tl.int32), 0) > 0
        value = tl.where(any_found, tl.sum(earliest, 0), value)


def empty_gae(problem: Gae) -> tuple[Tensor, Tensor]:
    rewards = problem.rewards
    dtype = torch.promote_types(rewards.dtype, problem.values.dtype)
    advantages = torch.empty(rewards.shape, dtype=dtype, device=rewards.device)
    return advantages, torch.empty_like(advantages)


def gae(problem: Gae, results: tuple[Tensor, Tensor]) -> None:
    rewards, *_, gamma, lam = problem
    (rows, width, _), n = shape(rewards), rewards.shape[-1]
    if rows == 0 or width == 0 or n == 0:
        return
    block = min(power_of_two(n), 16)
    arrays: list[Any] = []
    for (name, x), dimensions in zip(problem._asdict().items(), (3, 3, 2, 2, 2, 2, 3), strict=False):
        check_memory(**{name: x})
        arrays += [x, *((0,) * dimensions if x is None else strides(x))]
    options = options_of(n=n, STEPS=_STEPS // max(block, 4), BLOCK=block)
    launch(
        gae_kernel, rewards.device, rows * triton.cdiv(n, block), options, *arrays, *results,
        *number(gamma), *number(lam), width,
    )  # fmt: skip


# --- group normalisation ---------------------------------------------------------------------------------


@triton.jit
def _members(rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS: tl.constexpr):
    """Up to MEMBERS rewards from place `first` on: the values, whether each is a member of the group, their
    rows, and whether all are members."""
    place = first + tl.arange(0, MEMBERS)
    member = place < last
    at = place
    if ids is not None:
        member = member & (tl.load(ids + place, member, 0) == own)
        at = tl.load(order + place, member, 0)
    here = member[:, None] & (objective < n)[None, :]
    x = read(rewards + at[:, None] * row + objective[None, :] * column, here, tl.float64)
    return x, here, at, tl.min(member.to(tl.int32), 0)


@triton.jit(do_not_specialize=["row", "column", "rows", "size"])
def group_normalize_kernel(
    rewards, row: tl.int64, column: tl.int64, order, ids, result, eps: tl.float64, rows: tl.int64,
    size: tl.int64,
    n: tl.constexpr, ROUNDING: tl.constexpr, SCALE: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalises one group: `size` adjacent rows or, with ids (sorted by `order`), the rows with the id at
    place program_id(0), if that place is the first with this id. (x - mean) / (deviation + eps), in units of
    the largest |x|."""
    tiles = tl.cdiv(n, BLOCK)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    objective = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    infinity: tl.constexpr = float("inf")
    own = 0
    begin, last = program * size, program * size + size
    leads = 1
    if ids is not None:
        own = tl.load(ids + program)
        begin, last = program, program * 0 + rows
        before = tl.load(ids + program - 1, program > 0, own)
        leads = ((program == 0) | (before != own)).to(tl.int32)
    if leads != 0:
        count = tl.zeros((BLOCK,), tl.float64)
        low = count + infinity
        high = count - infinity
        first, more = begin, begin < last
        while more:
            x, here, _, full = _members(
                rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
            )
            known = here & (x == x)
            count += tl.sum(known.to(tl.float64), 0)
            low = tl.minimum(low, tl.min(tl.where(known, x, infinity), 0))
            high = tl.maximum(high, tl.max(tl.where(known, x, -infinity), 0))
            first += MEMBERS
            more = (full != 0) & (first < last)
        end = first
        largest = tl.maximum(tl.maximum(tl.abs(low), tl.abs(high)), 2.2250738585072014e-308)
        unit, inverse = power_of_two_of(tl.where(largest < infinity, largest, 1.0))
        total = tl.zeros((BLOCK,), tl.float64)
        first = begin
        while first < end:
            x, here, _, _ = _members(
                rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
            )
            total += tl.sum(tl.where(here & (x == x), x * inverse[None, :], 0.0), 0)
            first += MEMBERS
        mean = tl.where((count > 0) & (largest == infinity), float("nan"), total / tl.maximum(count, 1.0))
        same = (high - low <= ROUNDING * largest) & (largest < infinity)
        divisor = 1.0 / unit
        if SCALE:
            squares = tl.zeros((BLOCK,), tl.float64)
            first = begin
            while first < end:
                x, here, _, _ = _members(
                    rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
                )
                centred = tl.where(here & (x == x), x * inverse[None, :] - mean[None, :], 0.0)
                squares += tl.sum(centred * centred, 0)
                first += MEMBERS
            divisor = tl.sqrt(squares / tl.maximum(count - 1, 1.0)) + tl.full([], eps, tl.float64) / unit
        first = begin
        while first < end:
            x, here, at, _ = _members(
                rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
            )
            y = (x * inverse[None, :] - mean[None, :]) / divisor[None, :]
            y = tl.where((x != x) | same[None, :], 0.0, y)
            to = result + at[:, None] * n + objective[None, :]
            tl.store(to, rounded(y, result.dtype.element_ty), here)
            first += MEMBERS


def empty_normalized(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float
) -> Tensor:
    return torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)


def group_normalize(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float, result: Tensor
) -> None:
    (rows, _), n = shape(rewards), rewards.shape[-1]
    if rows == 0 or n == 0:
        return
    check_memory(rewards=rewards, group_ids=group_ids)
    order = ids = None
    groups = rows // group_size
    if group_ids is not None:  # sorting needs no host synchronisation; counting the groups would
        ids, order = group_ids.to(torch.int64).sort(stable=True)
        groups = rows
    block = min(power_of_two(n), 16)
    # Two variants, not one for each size of a group or a batch.
    small = group_ids is not None or group_size <= _SMALL
    members = min(_MEMBERS // block, _SMALL if small else _MEMBERS)
    options = options_of(
        n=n, ROUNDING=rounding(rewards.dtype), SCALE=scale, MEMBERS=members, BLOCK=block, num_warps=2
    )
    launch(
        group_normalize_kernel, rewards.device, groups * triton.cdiv(n, block), options, rewards,
        *strides(rewards), order, ids, result, eps, rows, group_size,
    )  # fmt: skip
