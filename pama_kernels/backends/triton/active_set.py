"""Solves P quadratic problems at once, over the simplex or over the non-negative cone, by exchange of the
active set.

SIMPLEX:  minimise over c in the simplex  1/2 c'Mc + weight/2 ||c - p||^2
else:     minimise over v >= 0            1/2 v'Mv - q'v

Both come down to y >= 0 minimising 1/2 y'Hy - r'y with H = M + ue' + eu' + rho I, one factorisation of H on
a support for each round (derivation: csrc/core/min_norm.hpp): exchange of all indices with the wrong sign,
then Lawson and Hanson's descent. On the simplex u homogenises (c = y / e'y, r = e); else u = 0. Where the
minimiser may not be unique, proximal steps with ridge/2 ||c - c_previous||^2 follow, from c_0 = p or v_0 = 0.
Rounds and steps are limited; a problem fails if its residual is then not certified, or is larger than its
ridge allows.

Vectors are (P, BLOCK); M is (P, BLOCK, BLOCK), or (1, BLOCK, BLOCK) if all problems have the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

VIOLATION = tl.constexpr(1e-14)  # of the terms that cancel in a multiplier
TIE = tl.constexpr(1e-11)  # the same: below it a multiplier may be an exact zero
CERTIFIED = tl.constexpr(1e-13)  # Wolfe's gap of an answer; KKT residual over the terms that cancel in it
RIDGE = tl.constexpr(1e-9)  # of a proximal step: bias RIDGE against rounding epsilon / RIDGE
SMALLEST_RIDGE = tl.constexpr(1e-12)
LARGEST_RIDGE, RIDGE_FACTOR = tl.constexpr(1e-2), tl.constexpr(100.0)  # where M is not semidefinite
PROXIMAL_GAP = tl.constexpr(10.0)  # of the ridge: more than a proximal step can leave
PROXIMAL_STEPS = tl.constexpr(12)
PROXIMAL_SIGMA = tl.constexpr(1e-2)  # keeps H regular along c where c'Mc = 0
SMALLEST_SIGMA = tl.constexpr(1e-290)
SINGULAR_PIVOT = tl.constexpr(1e-11)  # relative to H_ii: a pivot that counts as zero
SMALLEST_PIVOT = tl.constexpr(1e-15)  # what a smaller pivot is raised to in a proximal step
SPARE_EXCHANGES = tl.constexpr(2)
LARGEST = tl.constexpr(1.7e308)
ROUNDS_PER_OBJECTIVE, SPARE_ROUNDS = tl.constexpr(64), tl.constexpr(256)

EXCHANGE, DESCEND, DONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# the kind of addition that started a descent
INITIAL, BLOCKWISE, SINGLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def any_of(x):
    """(P, BLOCK) truth values to (P,)."""
    return tl.max(x.to(tl.int32), 1) > 0


@triton.jit
def multiply(m, x):
    """M x."""
    return tl.sum(m * x[:, :, None], 1)


@triton.jit
def _factor_and_solve(m, inside, shift, rho, r, floor, N, BLOCK: tl.constexpr):
    """Solves H_SS y_S = r_S by LDL', with the unknowns outside S replaced by those of the identity; y is 0
    outside S. Also returns whether every pivot was at least `floor` times its H_ii; smaller pivots are raised
    to that."""
    index = tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, BLOCK)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    both = inside[:, :, None] & inside[:, None, :]
    h = tl.where(both, m + (shift[:, :, None] + shift[:, None, :]), 0.0)
    own = tl.where(inside, tl.zeros_like(shift) + rho[:, None], 1.0)
    h += tl.where(row == column, own[:, None, :], 0.0)
    low = tl.where(inside, floor[:, None] * tl.sum(tl.where(row == column, h, 0.0), 1), 0.0)
    y = tl.where(inside, r, 0.0)
    inverse = tl.zeros_like(shift)
    regular = rho == rho
    for k in range(N):
        right = tl.sum(tl.where(row == k, h, 0.0), 1)  # row k: D L', from the diagonal on
        here = index == k
        pivot = tl.sum(tl.where(here, right, 0.0), 1)
        smallest = tl.sum(tl.where(here, low, 0.0), 1)
        regular = regular & (pivot > smallest)
        reciprocal = 1.0 / tl.where(pivot > smallest, pivot, smallest)
        right = tl.where(index > k, right, 0.0)
        factor = right * reciprocal[:, None]
        own_y = tl.sum(tl.where(here, y, 0.0), 1)
        y -= factor * own_y[:, None]
        inverse = tl.where(here, reciprocal[:, None], inverse)
        h -= factor[:, :, None] * right[:, None, :]
    y *= inverse
    for step in range(N):
        k = N - 1 - step
        right = tl.where(index > k, tl.sum(tl.where(row == k, h, 0.0), 1), 0.0)
        y -= tl.where(index == k, inverse * tl.sum(right * y, 1)[:, None], 0.0)
    return tl.where(inside, y, 0.0), regular


@triton.jit
def _cancelling(diagonal, y, r):
    """A bound on the terms of (M y - r)_j, |M_jk| <= sqrt(M_jj M_kk)."""
    root = tl.sqrt(tl.maximum(diagonal, 0.0))
    return root * tl.sum(root * tl.abs(y), 1)[:, None] + tl.abs(r)


@triton.jit
def _nonnegative(
    m, diagonal, shift, rho, r, present, inside, strict, active, N, BLOCK: tl.constexpr, SIMPLEX: tl.constexpr
):
    """y, whether it is optimal, and whether a multiplier outside its support may be 0. A strict problem fails
    if exchange alone does not solve it. Starts from the support `inside`."""
    index = tl.arange(0, BLOCK)[None, :]
    count = tl.sum(present.to(tl.int32), 1)
    floor = tl.where(strict, SINGULAR_PIVOT, SMALLEST_PIVOT).to(tl.float64)
    own = diagonal + 2.0 * shift + rho[:, None]
    mode = tl.where(active, EXCHANGE, DONE)
    kind = tl.zeros_like(count) + INITIAL
    fewest = count + 1
    spare = tl.zeros_like(count) + SPARE_EXCHANGES
    additions = count
    worst = tl.zeros_like(count)
    best = tl.zeros_like(rho)
    point = tl.zeros_like(shift)
    saved = tl.zeros_like(shift)
    result = tl.zeros_like(shift)
    solved = active & ~active
    ties = active & ~active
    rounds = 0
    while (tl.min(mode, 0) != DONE) & (rounds < N * ROUNDS_PER_OBJECTIVE + SPARE_ROUNDS):
        rounds += 1
        y, regular = _factor_and_solve(m, inside, shift, rho, r, floor, N, BLOCK)
        size = tl.sum(tl.abs(y), 1)
        usable = (regular | (strict == 0)) & (size < LARGEST)
        multiplier = multiply(m, y) - r
        if SIMPLEX:
            total = tl.sum(y, 1)
            usable = usable & (total > 0.0)
            multiplier += tl.sum(shift * y, 1)[:, None] + shift * total[:, None]
            terms = tl.sum(tl.where(inside, own * tl.abs(y), 0.0), 1)
            scale = own * total[:, None] + terms[:, None]
        else:
            scale = _cancelling(own, y, r)
        outside = present & (inside == 0)
        violated = outside & (multiplier < -(scale * VIOLATION))
        tied = any_of(outside & (multiplier < scale * TIE))

        # exchange all indices of the wrong sign
        exchanging = mode == EXCHANGE
        wrong = (inside & (y < 0.0)) | violated
        changes = tl.sum(wrong.to(tl.int32), 1)
        optimal = exchanging & usable & (changes == 0)
        better = changes < fewest
        swap = exchanging & usable & (changes > 0) & (better | (spare > 0))
        gave_up = exchanging & (swap == 0) & (optimal == 0)
        spare = tl.where(swap & (better == 0), spare - 1, spare)
        fewest = tl.where(swap & better, changes, fewest)
        last_chance = gave_up & (strict == 0)

        # descend: y is the optimum on the support, or the step to it leaves the cone
        descending = mode == DESCEND
        falling = inside & ((y > 0.0) == 0)
        feasible = usable & (any_of(falling) == 0)
        ratio = tl.where(point > 0.0, point / tl.where(falling & (point > 0.0), point - y, 1.0), 0.0)
        ratio = tl.where(falling, ratio, 1.0)
        length = tl.minimum(tl.min(ratio, 1), 1.0)
        moving = descending & usable & (feasible == 0)
        arrived = descending & (moving == 0)
        dropped = falling & (ratio <= length[:, None])
        moved = tl.where(dropped, 0.0, point + length[:, None] * (y - point))
        value = tl.where(feasible, tl.sum(r * y, 1), 0.0)
        rise = value > best
        one_by_one = arrived & (kind == BLOCKWISE) & (rise == 0)  # no rise: add one index
        accepted = arrived & (one_by_one == 0)
        additions = tl.where(accepted, tl.where((kind == INITIAL) | rise, count, additions - 1), additions)
        best = tl.where(accepted & rise, value, best)
        alive = accepted & feasible
        settled = alive & ((any_of(violated) == 0) | (additions == 0))
        extend = alive & (settled == 0)
        blockwise = extend & (additions == count)
        single = (extend & (blockwise == 0)) | one_by_one
        lowest = tl.where(violated, multiplier, LARGEST)
        worst = tl.where(extend, tl.argmin(lowest, 1), worst)

        # the next state
        ended = optimal | settled | (gave_up & strict) | (accepted & (alive == 0))
        solved = solved | optimal | settled
        ties = tl.where(ended, tied, ties)
        result = tl.where(ended[:, None], y, result)
        best = tl.where(last_chance, 0.0, best)
        kind = tl.where(last_chance, INITIAL, kind)
        kind = tl.where(blockwise, BLOCKWISE, kind)
        kind = tl.where(single, SINGLE, kind)
        saved = tl.where(extend[:, None], y, saved)
        next_point = tl.where(inside & (y > 0.0), y, 0.0)  # the start of a descent, or its end
        point = tl.where((last_chance | extend)[:, None], next_point, point)
        point = tl.where(moving[:, None], moved, point)
        point = tl.where(one_by_one[:, None], saved, point)
        inside = tl.where(swap[:, None], inside ^ wrong, inside)
        inside = tl.where(moving[:, None], inside & (dropped == 0), inside)
        inside = tl.where(last_chance[:, None], next_point > 0.0, inside)
        inside = tl.where(blockwise[:, None], inside | violated, inside)
        inside = tl.where(single[:, None], (point > 0.0) | (index == worst[:, None]), inside)
        mode = tl.where(last_chance, DESCEND, mode)
        mode = tl.where(ended, DONE, mode)
    return result, solved, ties


@triton.jit
def _leaders(m, raw, present, BLOCK: tl.constexpr):
    """The first objective that is identical to each: equal rows of M and equal preferences, compared by a
    hash of their bits. Integer sums do not depend on their order, so every thread gets the same hash.

    raw: the preference as it was given, since a normalised one contains a sum.
    """
    index = tl.arange(0, BLOCK)[None, :]
    bits = (index.to(tl.int64) + 1) * 6364136223846793005
    bits = (bits ^ ((bits >> 29) & 0x7FFFFFFFF)) * 3935559000370003845
    odd = ((bits ^ ((bits >> 32) & 0xFFFFFFFF)) * 2862933555777941757) | 1
    rows = _mixed((m + 0.0).to(tl.int64, bitcast=True)) * odd[:, :, None]  # + 0: -0 becomes 0
    mark = tl.sum(tl.where(present[:, :, None], rows, 0), 1) + _mixed((raw + 0.0).to(tl.int64, bitcast=True))
    same = (mark[:, :, None] == mark[:, None, :]) & present[:, :, None] & present[:, None, :]
    leader = tl.min(tl.where(same, tl.arange(0, BLOCK)[None, :, None], BLOCK), 1)
    return tl.where(present, leader, index)


@triton.jit
def _mixed(bits):
    bits = (bits ^ ((bits >> 33) & 0x7FFFFFFF)) * 4768777513237032717
    return bits ^ ((bits >> 29) & 0x7FFFFFFFF)


@triton.jit
def _shared(point, leader):
    """Identical objectives share their weight equally."""
    members = leader[:, :, None] == leader[:, None, :]
    count = tl.sum(members.to(tl.int32), 1)
    result = tl.sum(tl.where(members, point[:, :, None], 0.0), 1)
    return tl.where(count > 1, result / count, point)


@triton.jit
def minimise(m, diagonal, present, p, raw, q, weight, N, BLOCK: tl.constexpr, SIMPLEX: tl.constexpr):
    """Returns (c or v, failed) of problems that are finite and scaled to 1 <= max_i M_ii < 2. If no objective
    is present, the result is p or 0.

    present (P, BLOCK): the objectives that are included; M is 0 in the rows and columns of others. diagonal:
    M_ii. p: preference on the simplex of the objectives present, 0 for others; raw: as it was given. weight:
    (P,). q: only for problems over the cone.
    """
    index = tl.arange(0, BLOCK)[None, :]
    smallest = tl.min(tl.where(present, diagonal, LARGEST), 1)
    certified = (weight + 1.0) * CERTIFIED
    origin = p
    start = present & (q > 0.0)
    if SIMPLEX:
        leader = _leaders(m, raw, present, BLOCK)
        twins = tl.max(tl.max((present & (leader != index)).to(tl.int32), 1), 0) > 0
        # the indices with a positive weight after one Jacobi step from the centre of the simplex
        sums = multiply(m, present.to(tl.float64))
        count = tl.maximum(tl.sum(present.to(tl.int32), 1), 1)
        mean_sum = tl.sum(tl.where(present, sums, 0.0), 1) / count
        start = present & (sums - mean_sum[:, None] <= diagonal + weight[:, None])
    inside = start
    ridge = tl.zeros_like(weight) + RIDGE
    least = tl.zeros_like(weight) + SMALLEST_RIDGE
    answer = p
    active = any_of(present)
    failed = active & ~active
    step = tl.zeros_like(weight).to(tl.int32) - 1  # proximal steps taken; -1 in the strict attempt
    while tl.max(active.to(tl.int32), 0) > 0:
        strict = step < 0
        added = tl.where(strict, 0.0, ridge)
        rho = weight + added
        if SIMPLEX:
            centre = (weight[:, None] * p + added[:, None] * origin) / tl.where(rho > 0.0, rho, 1.0)[:, None]
            sigma = smallest + rho
            sigma = tl.where(strict, sigma, tl.where(sigma > PROXIMAL_SIGMA, sigma, PROXIMAL_SIGMA))
            shift = 0.5 * (sigma + rho * tl.sum(centre * centre, 1))[:, None] - rho[:, None] * centre
            shift = tl.where(present, shift, 0.0)
            r = tl.where(present, 1.0, tl.zeros_like(p))
            attempt = active & ((sigma > SMALLEST_SIGMA) | ~strict)
        else:
            shift = tl.zeros_like(p)
            r = tl.where(present, q + added[:, None] * origin, 0.0)
            attempt = active
        y, solved, tied = _nonnegative(
            m, diagonal, shift, rho, r, present, inside, strict, attempt, N, BLOCK, SIMPLEX
        )
        candidate = tl.where((y > 0.0) & solved[:, None], y, 0.0)
        if SIMPLEX:
            total = tl.sum(candidate, 1)
            vertex = tl.where(present & (diagonal == smallest[:, None]), index, BLOCK)
            vertex = (index == tl.min(vertex, 1)[:, None]).to(tl.float64)
            candidate = tl.where(solved[:, None], candidate / tl.where(solved, total, 1.0)[:, None], vertex)
            if twins:
                equal = _shared(candidate, leader)
                candidate = tl.where(((weight > 0.0) | ~strict)[:, None], equal, candidate)
            gradient = multiply(m, candidate) + weight[:, None] * (candidate - p)
            gap = tl.sum(candidate * gradient, 1) - tl.min(tl.where(present, gradient, LARGEST), 1)
            residual = gap
        else:
            gradient = multiply(m, candidate) - q
            wrong = tl.where(candidate > 0.0, tl.abs(gradient), tl.where(gradient < 0.0, -gradient, 0.0))
            wrong = tl.where(present, wrong, 0.0)
            scale = _cancelling(diagonal, candidate, q)
            gap = tl.max(wrong / tl.where(scale > 0.0, scale, 1.0), 1)
            residual = tl.max(wrong, 1) / (1.0 + tl.max(candidate, 1))
        ended = solved | ~strict
        unique = (weight >= RIDGE) | ~tied
        certain = ended & (gap <= certified) & (unique | ~strict)
        # M has a negative eigenvalue larger than the ridge: restart with a larger ridge
        allowed = PROXIMAL_GAP * tl.where(ridge > RIDGE, ridge, RIDGE) * (weight + 1.0)
        astray = ended & ~strict & ~(solved & (residual <= allowed))
        at_end = (ended & (step == PROXIMAL_STEPS - 1)) | (astray & (ridge >= LARGEST_RIDGE))
        finish = active & (certain | at_end)
        answer = tl.where(finish[:, None], candidate, answer)
        failed = failed | (finish & ~certain & astray)
        active = active & ~finish

        astray = astray & ~certain
        first = strict | astray
        larger = ridge * RIDGE_FACTOR
        least = tl.where(astray, larger, least)
        smaller = tl.where(ridge * 0.1 > least, ridge * 0.1, least)
        ridge = tl.where(astray, larger, tl.where(step >= 0, smaller, ridge))
        beginning = p if SIMPLEX else tl.zeros_like(p)
        origin = tl.where(first[:, None], beginning, candidate)
        inside = tl.where(first[:, None], start, candidate > 0.0)
        step += 1
    return answer, failed
