"""Advantages from rewards: generalised advantage estimation as a parallel scan, and group normalisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, power_of_two
from .solvers import read

_STEPS = 1024  # steps times objectives that a program scans at a time
_MEMBERS = 1024  # members of a group times objectives, likewise


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float64 to dtype. To bfloat16 by float32 and whole numbers: the interpreter would cut digits off."""
    if dtype == tl.bfloat16:
        x = tl.where(x == x, x, float("nan")).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


# --- generalised advantage estimation --------------------------------------------------------------------


@triton.jit
def _truth(pointer, here):
    """Whether a mask of any type is non-zero; false where not `here`."""
    x = tl.load(pointer, here, 0)
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return here & (x != 0)


@triton.jit
def _nearest(found, value, next_found, next_value):
    """Scan operator: the last value that was found. Truth values are int32: every GPU can shuffle them."""
    return found | next_found, tl.where(next_found != 0, next_value, value)


@triton.jit
def _chain(cut, factor, term, next_cut, next_factor, next_term):
    """Scan operator: x -> term + factor x, or term alone where cut, one after the other."""
    total = tl.where(next_cut != 0, next_term, next_term + next_factor * term)
    return cut | next_cut, factor * next_factor, total


@triton.jit(do_not_specialize=["width", "n"])
def gae_kernel(
    rewards, reward_row, reward_step, reward_objective, values, value_row, value_step, value_objective,
    mask, mask_row, mask_step, dones, done_row, done_step, last_values, last_row, last_objective,
    advantages, returns, gamma: tl.float64, lam: tl.float64, width, n,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, backwards in chunks of STEPS; place 0 of a chunk is its last step.

    A valid step is V -> its value and A -> reward + gamma V - value + gamma lam A, where V and A are those of
    the valid step that follows, both 0 where the episode ends; a masked step changes neither.
    """
    tiles = tl.cdiv(n, BLOCK)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.arange(0, STEPS)
    objective = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = objective < n
    gamma = tl.full([], gamma, tl.float64)
    decay = gamma * tl.full([], lam, tl.float64)
    value = tl.zeros((BLOCK,), tl.float64)
    if last_values is not None:
        bootstrap = last_values + sequence * last_row + objective * last_objective
        value = read(bootstrap, inside, tl.float64)
    advantage = tl.zeros((BLOCK,), tl.float64)
    for done_steps in range(0, width, STEPS):
        step = width - 1 - done_steps - place.to(tl.int64)
        valid = step >= 0
        later = (step + 1 < width) & (place > 0)  # within this chunk
        if mask is not None:
            own_mask = mask + sequence * mask_row
            valid = valid & _truth(own_mask + step * mask_step, valid)
            later = later & _truth(own_mask + (step + 1) * mask_step, later)
        over = step < 0
        if dones is not None:
            over = valid & _truth(dones + sequence * done_row + step * done_step, valid)
        here = valid[:, None] & inside[None, :]
        own_values = values + sequence * value_row + objective[None, :] * value_objective
        own = read(own_values + step[:, None] * value_step, here, tl.float64)
        following_here = later[:, None] & inside[None, :]
        following = read(own_values + (step + 1)[:, None] * value_step, following_here, tl.float64)
        found, following = tl.associative_scan((following_here.to(tl.int32), following), 0, _nearest)
        found = found != 0
        following = tl.where(found, following, value[None, :])
        ends = (over & valid)[:, None] & inside[None, :]
        own_rewards = rewards + sequence * reward_row + objective[None, :] * reward_objective
        delta = read(own_rewards + step[:, None] * reward_step, here, tl.float64) - own
        delta += tl.where(ends, 0.0, gamma * following)
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
        earliest = tl.where(last & here, own, tl.where(last & found, following, 0.0))
        any_found = tl.max((last & (here | found)).to(tl.int32), 0) > 0
        value = tl.where(any_found, tl.sum(earliest, 0), value)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    rows, width, n = rewards.shape
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    advantages = torch.empty(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    if advantages.numel() == 0:
        return advantages, returns
    block = min(power_of_two(n), 16)
    steps = min(_STEPS // block, power_of_two(width))
    none = (0, 0)
    launch(
        gae_kernel, rewards.device, rows * triton.cdiv(n, block), rewards, *rewards.stride(), values,
        *values.stride(), mask, *(none if mask is None else mask.stride()), dones,
        *(none if dones is None else dones.stride()), last_values,
        *(none if last_values is None else last_values.stride()), advantages, returns, gamma, lam, width, n,
        STEPS=steps, BLOCK=block,
    )  # fmt: skip
    return advantages, returns


# --- group normalisation ---------------------------------------------------------------------------------


@triton.jit
def _members(rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS: tl.constexpr):
    """Up to MEMBERS rewards from place `first` on, who of them is a member, their rows, whether all are."""
    place = first + tl.arange(0, MEMBERS)
    member = place < last
    at = place
    if ids is not None:
        member = member & (tl.load(ids + place, member, 0) == own)
        at = tl.load(order + place, member, 0)
    here = member[:, None] & (objective < n)[None, :]
    x = read(rewards + at[:, None] * row + objective[None, :] * column, here, tl.float64)
    return x, here, at, tl.min(member.to(tl.int32), 0)


@triton.jit(do_not_specialize=["rows", "n", "size"])
def group_normalize_kernel(
    rewards, row, column, order, ids, result, eps: tl.float64, rows, n, size,
    SCALE: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group: `size` rows that stand together; or with ids (sorted, by `order`) those with the id of place
    program_id(0), if it is the first of them."""
    tiles = tl.cdiv(n, BLOCK)
    program = (tl.program_id(0) // tiles).to(tl.int64)
    objective = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = 0
    begin, last = program * size, program * size + size
    leads = 1
    if ids is not None:
        own = tl.load(ids + program)
        begin, last = program, program * 0 + rows
        before = tl.load(ids + program - 1, program > 0, own)
        leads = ((program == 0) | (before != own)).to(tl.int32)
    if leads != 0:
        total = tl.zeros((BLOCK,), tl.float64)
        count = tl.zeros((BLOCK,), tl.float64)
        first, more = begin, begin < last
        while more:
            x, here, _, full = _members(
                rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
            )
            known = here & (x == x)
            total += tl.sum(tl.where(known, x, 0.0), 0)
            count += tl.sum(known.to(tl.float64), 0)
            first += MEMBERS
            more = (full != 0) & (first < last)
        end = first
        mean = total / count
        squares = tl.zeros((BLOCK,), tl.float64)
        if SCALE:
            first = begin
            while first < end:
                x, here, _, _ = _members(
                    rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
                )
                known = here & (x == x)
                centred = tl.where(known, x - mean[None, :], 0.0)
                squares += tl.sum(centred * centred, 0)
                first += MEMBERS
        deviation = tl.sqrt(squares / tl.where(count > 1, count - 1, 1.0)) + tl.full([], eps, tl.float64)
        deviation = tl.where(count > 1, deviation, 1.0) if SCALE else 1.0 + 0.0 * count
        first = begin
        while first < end:
            x, here, at, _ = _members(
                rewards, row, column, order, ids, own, first, last, objective, n, MEMBERS
            )
            y = tl.where(x == x, (x - mean[None, :]) / deviation[None, :], 0.0)
            to = result + at[:, None] * n + objective[None, :]
            tl.store(to, rounded(y, result.dtype.element_ty), here)
            first += MEMBERS


def group_normalize(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: bool, eps: float
) -> Tensor:
    rows, n = rewards.shape
    result = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    if result.numel() == 0:
        return result
    order = ids = None
    groups, largest = rows // group_size, group_size
    if group_ids is not None:  # sorting needs no host, counting the groups would
        ids, order = group_ids.to(torch.int64).sort(stable=True)
        groups, largest = rows, rows
    block = min(power_of_two(n), 16)
    members = min(_MEMBERS // block, power_of_two(largest))
    launch(
        group_normalize_kernel, rewards.device, groups * triton.cdiv(n, block), rewards, *rewards.stride(),
        order, ids, result, eps, rows, n, group_size, SCALE=scale, MEMBERS=members, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return result
