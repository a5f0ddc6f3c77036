"""The min-norm problem as device functions, for P problems at once: csrc/core/min_norm.hpp in tiles.

minimise over c in the simplex  1/2 c'Mc + rho/2 ||c - p||^2,  rho = regularization * max_i M_ii

The method is that of the C++ core: homogenised, so that one factorisation of H = M + ue' + eu' + rho I on a
support gives its optimum; exchange of all wrong indices, then Lawson and Hanson's descent, then proximal
steps where the minimiser is not unique. Here it is one loop with one factorisation per round, and every
problem of the tile is in a state of its own. It ends for the reasons given there. A kernel must not hang on a
bug, so rounds are also limited, to ROUNDS_PER_OBJECTIVE * N + SPARE_ROUNDS, far beyond what any known matrix
takes; a problem that is stopped there returns the best vertex, a point of the simplex without a certificate.

Vectors are (P, BLOCK). M is a tile (P, BLOCK, BLOCK). For N > 64, with P = 1 and GLOBAL, it stands in a
workspace in global memory: M (N x N), the columns of the factor (N x N), and VECTORS vectors of BLOCK.
"""

from __future__ import annotations

import triton
import triton.language as tl

VIOLATION = tl.constexpr(1e-14)  # of the terms that cancel in a multiplier
TIE = tl.constexpr(1e-11)  # the same: below it a multiplier may be an exact zero
CERTIFIED = tl.constexpr(1e-13)  # Wolfe's gap of an answer
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
LARGEST_REGULARIZATION = tl.constexpr(1e100)  # beyond it c = p in double, and before it overflows
LARGEST = tl.constexpr(1.7e308)

EXCHANGE, DESCEND, DONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INITIAL, BLOCKWISE, SINGLE = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
)  # what a descent was entered by

ROUNDS_PER_OBJECTIVE = tl.constexpr(64)
SPARE_ROUNDS = tl.constexpr(256)
VECTORS = tl.constexpr(4)  # of the workspace
PANEL = tl.constexpr(8)  # columns that are factorised at a time in the workspace


@triton.jit
def any_of(x):
    """(P, BLOCK) truth values to (P,)."""
    return tl.max(x.to(tl.int32), 1) > 0


@triton.jit
def power_of_two_scale(x):
    """The power of two s with 1 <= s x < 2, up to the ends of the exponent range."""
    exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    exponent = tl.where(exponent < 2046, 2046 - exponent, 1)
    return (exponent << 52).to(tl.float64, bitcast=True)


# --- M and its factor in a tile ------------------------------------------------------------------------


@triton.jit
def _solve_tile(m, inside, shift, rho, floor, N: tl.constexpr, BLOCK: tl.constexpr):
    """y with H_SS y_S = e by LDL', unknowns outside S replaced by those of the identity; 0 outside S."""
    index = tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, BLOCK)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    both = inside[:, :, None] & inside[:, None, :]
    h = tl.where(both, m + (shift[:, :, None] + shift[:, None, :]), 0.0)
    own = tl.where(inside, tl.zeros_like(shift) + rho[:, None], 1.0)
    h += tl.where(row == column, own[:, None, :], 0.0)
    low = tl.where(inside, floor[:, None] * tl.sum(tl.where(row == column, h, 0.0), 1), 0.0)
    y = inside.to(tl.float64)
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


# --- M and its factor in the workspace -----------------------------------------------------------------


@triton.jit
def _rows_times(matrix, vector, N, BLOCK: tl.constexpr):
    """Sum over i of x_i times row i of M: M x. `vector` points to x."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, PANEL):
        i = first + tl.arange(0, PANEL)
        here = (i < N)[:, None] & (index < N)[None, :]
        rows = tl.load(matrix + i[:, None] * N + index[None, :], here, 0.0)
        total += tl.sum(rows * tl.load(vector + i, i < N, 0.0)[:, None], 0)
    return total


@triton.jit
def _solve_workspace(work, inside, shift, rho, floor, N, BLOCK: tl.constexpr):
    """As `_solve_tile`, on the gathered support: blocks of columns, each updated by those on its left."""
    index = tl.arange(0, BLOCK)
    lane = tl.arange(0, PANEL)
    matrix, factor = work, work + N * N
    vectors = work + 2 * N * N
    member_list = (vectors + 2 * BLOCK).to(tl.pointer_type(tl.int64))
    here = tl.reshape(inside, (BLOCK,))
    shifts = tl.reshape(shift, (BLOCK,))
    weight, relative = tl.sum(rho, 0), tl.sum(floor, 0)
    size = tl.sum(here.to(tl.int32), 0)
    place = tl.cumsum(here.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(member_list + place, index.to(tl.int64), here)
    tl.store(vectors + place, shifts, here)
    tl.debug_barrier()
    used = index < size
    member = tl.load(member_list + index, used, 0)
    u = tl.load(vectors + index, used, 0.0)
    y = used.to(tl.float64)
    inverse = tl.zeros((BLOCK,), tl.float64)
    regular = 1
    for first in range(0, size, PANEL):
        j = first + lane
        taken = used[:, None] & (j < size)[None, :]
        other = tl.load(member_list + j, j < size, 0)
        panel = tl.load(matrix + member[:, None] * N + other[None, :], taken, 0.0)
        panel += u[:, None] + tl.load(vectors + j, j < size, 0.0)[None, :]
        panel += tl.where(index[:, None] == j[None, :], weight, 0.0)
        panel = tl.where(taken, panel, 0.0)
        low = relative * tl.sum(tl.where(index[:, None] == j[None, :], panel, 0.0), 0)
        for k in range(first):
            left = tl.load(factor + k * N + index, used, 0.0)  # column k of L D
            own = tl.load(factor + k * N + j, j < size, 0.0)
            reciprocal = tl.sum(tl.where(index == k, inverse, 0.0), 0)
            panel -= left[:, None] * (own * reciprocal)[None, :]
        for c in range(PANEL):
            if first + c < size:
                left = tl.sum(tl.where(lane[None, :] == c, panel, 0.0), 1)
                pivot = tl.sum(tl.where(index == first + c, left, 0.0), 0)
                smallest = tl.sum(tl.where(lane == c, low, 0.0), 0)
                regular = tl.where(pivot > smallest, regular, 0)
                reciprocal = 1.0 / tl.where(pivot > smallest, pivot, smallest)
                left = tl.where(index > first + c, left, 0.0)
                own = tl.sum(tl.where(index[:, None] == j[None, :], left[:, None], 0.0), 0) * reciprocal
                own_y = tl.sum(tl.where(index == first + c, y, 0.0), 0)
                y -= left * (reciprocal * own_y)
                inverse = tl.where(index == first + c, reciprocal, inverse)
                panel -= left[:, None] * own[None, :]
                tl.store(factor + (first + c) * N + index, left, used)
        tl.debug_barrier()
    y *= inverse
    for step in range(size):
        k = size - 1 - step
        left = tl.load(factor + k * N + index, used, 0.0)
        y -= tl.where(index == k, inverse * tl.sum(left * y, 0), 0.0)
    tl.debug_barrier()
    tl.store(vectors + index, tl.where(used, y, 0.0))
    tl.debug_barrier()
    y = tl.where(here, tl.load(vectors + tl.where(here, place, 0)), 0.0)
    tl.debug_barrier()
    return y[None, :], (regular + tl.zeros_like(rho)) > 0


# --- both ----------------------------------------------------------------------------------------------


@triton.jit
def _multiply(m, work, x, N, BLOCK: tl.constexpr, GLOBAL: tl.constexpr):
    """M x."""
    if GLOBAL:
        vector = work + 2 * N * N
        tl.debug_barrier()
        tl.store(vector + tl.arange(0, BLOCK), tl.reshape(x, (BLOCK,)))
        tl.debug_barrier()
        product = _rows_times(work, vector, N, BLOCK)[None, :]
    else:
        product = tl.sum(m * x[:, :, None], 1)
    return product


@triton.jit
def _leaders(m, work, prior, present, diagonal, N, BLOCK: tl.constexpr, GLOBAL: tl.constexpr):
    """The first objective that is identical to each: equal products with a random vector, M_ii and prior.

    Rows that differ by rounding alone may count as identical: to share their weight costs no more than that.
    """
    index = tl.arange(0, BLOCK)[None, :]
    bits = (index.to(tl.int64) + 1) * 6364136223846793005
    bits = (bits ^ ((bits >> 29) & 0x7FFFFFFFF)) * 3935559000370003845
    bits = (bits ^ ((bits >> 32) & 0xFFFFFFFF)) * 2862933555777941757
    random = ((bits >> 12) & 0xFFFFFFFFFFFFF | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    random = tl.where(present, random, 0.0)
    mark = _multiply(m, work, random, N, BLOCK, GLOBAL)
    if GLOBAL:
        leader = index + tl.zeros_like(present.to(tl.int32))
        for step in range(N):
            k = N - 1 - step
            chosen = index == k
            same = mark == tl.sum(tl.where(chosen, mark, 0.0), 1)[:, None]
            same = same & (diagonal == tl.sum(tl.where(chosen, diagonal, 0.0), 1)[:, None])
            same = same & (prior == tl.sum(tl.where(chosen, prior, 0.0), 1)[:, None])
            leader = tl.where(same & present & any_of(present & chosen)[:, None], k, leader)
    else:
        same = (mark[:, :, None] == mark[:, None, :]) & (diagonal[:, :, None] == diagonal[:, None, :])
        same = same & (prior[:, :, None] == prior[:, None, :])
        same = same & present[:, :, None] & present[:, None, :]
        leader = tl.min(tl.where(same, tl.arange(0, BLOCK)[None, :, None], BLOCK), 1)
        leader = tl.where(present, leader, index)
    return leader


@triton.jit
def _shared(point, leader, N, BLOCK: tl.constexpr, GLOBAL: tl.constexpr):
    """Identical objectives share their weight equally."""
    if GLOBAL:
        result = point
        for k in range(N):
            members = leader == k
            count = tl.sum(members.to(tl.int32), 1)
            mean = tl.sum(tl.where(members, point, 0.0), 1) / tl.maximum(count, 1)
            result = tl.where(members & (count > 1)[:, None], mean[:, None], result)
    else:
        members = leader[:, :, None] == leader[:, None, :]
        count = tl.sum(members.to(tl.int32), 1)
        result = tl.sum(tl.where(members, point[:, :, None], 0.0), 1)
        result = tl.where(count > 1, result / count, point)
    return result


@triton.jit
def min_norm_solve(
    m, work, diagonal, present, prior, regularization, N, BLOCK: tl.constexpr, GLOBAL: tl.constexpr
):
    """(c, c'Mc) of problems that are finite and scaled to 1 <= max_i M_ii < 2, or with M_ii = 0 throughout.

    present (P, BLOCK): the objectives that take part, at least one; M is 0 in rows and columns of others.
    diagonal: M_ii; prior: on the simplex; regularization (P,).
    """
    index = tl.arange(0, BLOCK)[None, :]
    count = tl.sum(present.to(tl.int32), 1)
    largest = tl.max(tl.where(present, diagonal, 0.0), 1)
    smallest = tl.min(tl.where(present, diagonal, LARGEST), 1)
    prior = tl.where(present, prior, 0.0)
    regularization = tl.where(regularization < LARGEST_REGULARIZATION, regularization, LARGEST_REGULARIZATION)
    weight = regularization * largest
    certified = (weight + 1.0) * CERTIFIED

    leader = _leaders(m, work, prior, present, diagonal, N, BLOCK, GLOBAL)
    twins = tl.max(tl.max((present & (leader != index)).to(tl.int32), 1), 0) > 0

    # where one Jacobi step from the middle of the simplex leaves a positive weight
    sums = _multiply(m, work, present.to(tl.float64), N, BLOCK, GLOBAL)
    mean_sum = tl.sum(tl.where(present, sums, 0.0), 1) / count
    start = present & (sums - mean_sum[:, None] <= diagonal + weight[:, None])

    rho = weight
    sigma = smallest + rho
    sigma = tl.where(sigma > 0.0, sigma, 0.0)
    shift = 0.5 * (sigma + rho * tl.sum(prior * prior, 1))[:, None] - rho[:, None] * prior
    shift = tl.where(present, shift, 0.0)
    ridge = tl.zeros_like(weight) + RIDGE
    least = tl.zeros_like(weight) + SMALLEST_RIDGE
    proximal = tl.zeros_like(count) - 1  # steps taken; -1 in the strict attempt
    mode = tl.where(largest > 0.0, EXCHANGE, DONE)
    kind = tl.zeros_like(count) + INITIAL
    fewest = count + 1
    spare = tl.zeros_like(count) + SPARE_EXCHANGES
    additions = count
    worst = tl.zeros_like(count)
    best = tl.zeros_like(weight)
    inside = start
    point = tl.zeros_like(prior)
    saved = tl.zeros_like(prior)
    answer = prior
    rounds = 0
    limit = N * ROUNDS_PER_OBJECTIVE + SPARE_ROUNDS
    while (tl.min(mode, 0) != DONE) & (rounds <= limit):
        rounds += 1
        strict = proximal < 0
        # H needs a regular start: without one, straight to the proximal steps
        floor = tl.where(strict, SINGULAR_PIVOT, SMALLEST_PIVOT).to(tl.float64)
        if GLOBAL:
            y, regular = _solve_workspace(work, inside, shift, rho, floor, N, BLOCK)
        else:
            y, regular = _solve_tile(m, inside, shift, rho, floor, N, BLOCK)
        total = tl.sum(y, 1)
        linear = tl.sum(shift * y, 1)
        usable = (regular & (sigma > SMALLEST_SIGMA)) | (proximal >= 0)
        usable = usable & (total > 0.0) & (total < LARGEST)
        product = _multiply(m, work, y, N, BLOCK, GLOBAL)
        own = diagonal + 2.0 * shift + rho[:, None]
        terms = tl.sum(tl.where(inside, own * tl.abs(y), 0.0), 1)
        multiplier = product + linear[:, None] + shift * total[:, None] - 1.0
        size = own * total[:, None] + terms[:, None]
        outside = present & (inside == 0)
        violated = outside & (multiplier < -(size * VIOLATION))
        tied = any_of(outside & (multiplier < size * TIE))

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

        # descend: y is the optimum of the support, or the way to it leaves the cone
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
        value = tl.where(feasible, total, 0.0)
        rise = value > best
        one_by_one = arrived & (kind == BLOCKWISE) & (rise == 0)  # the block was no use: its worst alone
        accepted = arrived & (one_by_one == 0)
        additions = tl.where(accepted, tl.where((kind == INITIAL) | rise, count, additions - 1), additions)
        best = tl.where(accepted & rise, value, best)
        alive = accepted & (value > 0.0)
        settled = alive & ((any_of(violated) == 0) | (additions == 0))
        extend = alive & (settled == 0)
        blockwise = extend & (additions == count)
        lowest = tl.where(violated, multiplier, LARGEST)
        lowest_index = tl.where(lowest == tl.min(lowest, 1)[:, None], index, BLOCK)
        worst = tl.where(extend, tl.min(lowest_index, 1), worst)

        # an answer: certified, or the next proximal step starts from it
        solved = optimal | settled
        ended = solved | (accepted & (alive == 0)) | (rounds > limit)
        candidate = tl.where(y > 0.0, y * (1.0 / total)[:, None], 0.0)
        vertex = tl.where(present & (diagonal == smallest[:, None]), index, BLOCK)
        vertex = index == tl.min(vertex, 1)[:, None]
        candidate = tl.where(solved[:, None], candidate, vertex.to(tl.float64))
        if twins:
            equal = _shared(candidate, leader, N, BLOCK, GLOBAL)
            apply = (weight > 0.0) | (strict == 0)
            candidate = tl.where(apply[:, None], equal, candidate)
        product = _multiply(m, work, candidate, N, BLOCK, GLOBAL)
        gradient = product + weight[:, None] * (candidate - prior)
        gap = tl.sum(candidate * gradient, 1) - tl.min(tl.where(present, gradient, LARGEST), 1)
        unique = (weight >= RIDGE) | (tied == 0)
        certain = ended & (gap <= certified) & (unique | (strict == 0))
        # M is less semidefinite than the ridge makes up for: begin again, with a larger one
        allowed = PROXIMAL_GAP * tl.where(ridge > RIDGE, ridge, RIDGE) * (weight + 1.0)
        astray = ended & (strict == 0) & ((solved & (gap <= allowed)) == 0)
        at_end = (ended & (proximal == PROXIMAL_STEPS - 1)) | (astray & (ridge >= LARGEST_RIDGE))
        finish = (mode != DONE) & (certain | at_end | (rounds > limit))
        restart = (ended | (gave_up & strict)) & (finish == 0)
        answer = tl.where(finish[:, None], candidate, answer)

        # the next state
        astray = astray & restart
        first_step = restart & (strict | astray)
        proximal = tl.where(restart, proximal + 1, proximal)
        larger = ridge * RIDGE_FACTOR
        least = tl.where(astray, larger, least)
        smaller = tl.where(ridge * 0.1 > least, ridge * 0.1, least)
        ridge = tl.where(astray, larger, tl.where(restart & (proximal > 1), smaller, ridge))
        origin = tl.where(first_step[:, None], prior, candidate)
        next_rho = weight + ridge
        centre = (weight[:, None] * prior + ridge[:, None] * origin) / next_rho[:, None]
        next_sigma = tl.where(smallest + next_rho > PROXIMAL_SIGMA, smallest + next_rho, PROXIMAL_SIGMA)
        next_shift = 0.5 * (next_sigma + next_rho * tl.sum(centre * centre, 1))[:, None]
        next_shift = tl.where(present, next_shift - next_rho[:, None] * centre, 0.0)
        rho = tl.where(restart, next_rho, rho)
        sigma = tl.where(restart, next_sigma, sigma)
        shift = tl.where(restart[:, None], next_shift, shift)
        fewest = tl.where(restart, count + 1, fewest)
        spare = tl.where(restart, SPARE_EXCHANGES, spare)

        best = tl.where(last_chance, 0.0, best)
        kind = tl.where(last_chance, INITIAL, kind)
        kind = tl.where(blockwise, BLOCKWISE, kind)
        kind = tl.where((extend & (blockwise == 0)) | one_by_one, SINGLE, kind)
        saved = tl.where(extend[:, None], y, saved)
        next_point = tl.where(inside & (y > 0.0), y, 0.0)  # the start of a descent, and where it arrived
        point = tl.where((last_chance | extend)[:, None], next_point, point)
        point = tl.where(moving[:, None], moved, point)
        point = tl.where(one_by_one[:, None], saved, point)

        chosen = index == worst[:, None]
        inside = tl.where(swap[:, None], inside ^ wrong, inside)
        inside = tl.where(moving[:, None], inside & (dropped == 0), inside)
        inside = tl.where(last_chance[:, None], next_point > 0.0, inside)
        inside = tl.where(blockwise[:, None], inside | violated, inside)
        single = (extend & (blockwise == 0)) | one_by_one
        inside = tl.where(single[:, None], (point > 0.0) | chosen, inside)
        inside = tl.where(restart[:, None], tl.where(first_step[:, None], start, candidate > 0.0), inside)
        mode = tl.where(last_chance, DESCEND, mode)
        mode = tl.where(restart, EXCHANGE, mode)
        mode = tl.where(finish, DONE, mode)

    return answer, tl.sum(answer * _multiply(m, work, answer, N, BLOCK, GLOBAL), 1)
