// The scalar problem of PAMA (Theorem 1) with a unique solution:
//
//     minimise over c in the simplex   1/2 (a.c)^2 + rho/2 ||c - p||^2,
//
// rho = 0 standing for the limit rho -> 0 (the optimal point that is nearest to p).
//
// Stationarity makes c = [p - lambda (a - tau)]_+ with lambda = a.c / rho: the projection on the simplex of
// a point that moves along a line. Along it the support only shrinks (an index that leaves the support has a larger a
// than the mean over the remaining support, and that mean decreases), and phi(lambda) = a.c is convex and falling.
// Newton's method on phi(lambda) = rho lambda from lambda = 0 therefore rises monotonically to the root:
//
//     on the support S, m = |S|, abar = mean_S a, e = sum_S p - 1,
//     lambda = (abar + sum_S (a - abar) p) / (rho + sum_S (a - abar)^2)
//     c_i = p_i - e/m - lambda (a_i - abar),     and every index with a negative weight leaves S.
//
// Between two Newton steps lambda is held until no index leaves (Michelot's projection), so no member of the
// final support can be dropped: at most n departures and n Newton steps, for every finite input. For a uniform p the
// Newton step may be taken in every round: the indices outside S are then ordered by a, and phi on any S that contains
// the final support stays below phi.
//
// Scores are replaced by their distances from the score of the index that never leaves the support, so that the means
// have no cancellation. Lambda is kept from decreasing by rounding, so the weights have sum 1 after every round and c
// is on the simplex for any range of scores. If the scores span more than about 1e12 (double), rounding may select
// another optimal point; the optimum a.c stays accurate.
//
// The template solves one problem (V = double) or one problem per SIMD lane (V = a GCC vector type).
#pragma once

#include <cmath>

#include "numbers.hpp"
#include "solution.hpp"

PAMA_BEGIN

// For rho = 0, if 0 is outside the open interval (min a, max a), the solution is exact without iteration: a.c is the
// score nearest 0, and the objectives with that score share the weight. The caller includes only these objectives, with
// scores of 0.
//
// least_spread: the smallest sum of squares that has a finite reciprocal (smaller distances are negligible). rounding:
// two units in the last place of 1.
template <class V>
PAMA_HD constexpr typename LaneOf<V>::type least_spread() {
    typedef typename LaneOf<V>::type T;
    return sizeof(T) == 4 ? static_cast<T>(1e-37) : static_cast<T>(1e-300);
}
template <class V>
PAMA_HD constexpr typename LaneOf<V>::type rounding() {
    typedef typename LaneOf<V>::type T;
    return sizeof(T) == 4 ? static_cast<T>(0x1p-22) : static_cast<T>(0x1p-51);
}

// a: n scores whose squares are in the range of T (the caller rescales), overwritten; p: preference, 0 for excluded
// objectives; c: on input 1 for objectives that are included, else 0; on output the weights. Returns a.c. Uniform: p is
// 1 / their number and is not read. A compile-time N > 0 unrolls the loops; n is then ignored.
template <class V, int N = 0, bool Uniform = false>
PAMA_HD inline V simplex_solve(int n, V* PAMA_RESTRICT a, const V* PAMA_RESTRICT p, V rho, V* PAMA_RESTRICT c) {
    const int size = N > 0 ? N : n;
    const V zero = V{}, one = zero + 1;
    const V huge = zero + 1e30f;  // relative to a
    const auto none = rho != rho;

    V low = huge, high = -huge, at_preference = zero;
    for (int i = 0; i < size; ++i) {
        low = min_of(a[i] + (one - c[i]) * huge, low);
        high = max_of(a[i] - (one - c[i]) * huge, high);
        at_preference += Uniform ? c[i] * a[i] : c[i] * a[i] * p[i];
    }
    const V sign = choose(at_preference >= zero, one, -one), base = choose(at_preference >= zero, low, -high);
    for (int i = 0; i < size; ++i) a[i] = sign * a[i] - base;
    V lambda = zero, shift = zero, mean = zero;
    auto holding = none;
#if defined(__CUDA_ARCH__)
    const int unconditional = 1;
#else
    const int unconditional = N > 0 && N <= 4 ? N - 1 : 1;  // rounds without a branch: additional rounds change nothing
#endif
    for (int round = 1; round <= 2 * size + 2; ++round) {
        V m = zero, sum_a = zero, sum_p = zero;
        for (int i = 0; i < size; ++i) {
            m += c[i];
            sum_a += c[i] * a[i];
            if (!Uniform) sum_p += c[i] * p[i];
        }
        const V share = reciprocal(m);
        mean = sum_a * share;
        shift = Uniform ? share : max_of((one - sum_p) * share, zero);  // below 0 only by rounding
        V spread = rho, slope = base + mean;
        for (int i = 0; i < size; ++i) {
            const V centred = c[i] * (a[i] - mean);
            spread += centred * centred;
            if (!Uniform) slope += centred * p[i];
        }
        const V step = max_of(choose(spread > least_spread<V>(), slope * reciprocal(spread), zero), lambda);
        lambda = Uniform ? step : choose(holding, lambda, step);
        auto left = none;
        for (int i = 0; i < size; ++i) {
            const V weight = c[i] * ((Uniform ? shift : p[i] + shift) - lambda * (a[i] - mean));
            c[i] = choose(weight < zero, zero, c[i]);
            left = left | (weight < zero);
        }
        if (round >= unconditional && !any(left | holding)) break;
        if (!Uniform) holding = left;  // lambda is held until no index leaves the support
    }
    V total = zero, optimum = zero;
    for (int i = 0; i < size; ++i) {
        const V weight = c[i] * ((Uniform ? shift : p[i] + shift) - lambda * (a[i] - mean));
        c[i] = choose(weight > zero, weight, zero);
        total += c[i];
        optimum += c[i] * (a[i] + base);
    }
    // Rounding grows with lambda times the distances.
    const auto apart = (max_of(total - one, one - total) > rounding<V>()) & (lambda > zero);
    if (any(apart)) {
        const V scale = choose(apart, one / total, one);
        optimum *= scale;
        for (int i = 0; i < size; ++i) c[i] *= scale;
    }
    return choose(rho == zero, zero, sign * optimum);
}

// Batcher's network: N values in rising order, N a power of two, lane by lane. `merge_halves` merges the sorted halves
// of every Step-th of N.
template <int N, int Step, class V>
PAMA_HD inline void merge_halves(V* v) {
    if constexpr (2 * Step < N) {
        merge_halves<N, 2 * Step>(v);
        merge_halves<N, 2 * Step>(v + Step);
    }
    for (int i = 2 * Step < N ? Step : 0; i + Step < N; i += 2 * Step) {
        const V less = min_of(v[i], v[i + Step]);
        v[i + Step] = max_of(v[i], v[i + Step]);
        v[i] = less;
    }
}
template <int N, class V>
PAMA_HD inline void sort_values(V* v) {
    if constexpr (N > 1) {
        sort_values<N / 2>(v);
        sort_values<N / 2>(v + N / 2);
        merge_halves<N, 1>(v);
    }
}

// The first N of the values, N at most 16; v: sorted_size<N>() of them.
template <int N>
constexpr int sorted_size() {
    static_assert(N <= 16, "a larger network is needed");
    return N <= 2 ? 2 : N <= 4 ? 4 : N <= 8 ? 8 : 16;
}
template <int N, class V>
PAMA_HD inline void sort_some(V* v) {
    for (int i = N; i < sorted_size<N>(); ++i) v[i] = V{} + static_cast<float>(INFINITY);
    sort_values<sorted_size<N>()>(v);
}

// The multipliers of the weights c_i = [tau - lambda a_i]_+ if all objectives are included and p is uniform. a: the
// distances of the scores from the smallest one, `base`, in rising order. The support consists of the first k of them,
// so all N supports are evaluated in order, without a dependent loop: with e the sum of the differences between the
// k-th distance and those before it, the k-th weight at lambda_{k-1} is (1 - lambda_{k-1} e) / k. At any lambda e rises
// with k, so the support ends before the first k where it is negative. Tau is the largest weight, hence lambda times a
// distance in the support is at most 1.
template <class V>
struct Threshold {
    V lambda, tau, last;  // last: the largest distance in the support
};
template <int N, class V>
PAMA_HD inline Threshold<V> sorted_threshold(const V* a, V base, V rho) {
    const V zero = V{};
    V sum = zero, score = base, spread = rho;
    V share = zero + 1, mean = zero, width = rho, last = zero;  // of the support
    for (int k = 2; k <= N; ++k) {
        const float count = static_cast<float>(k);
        const V apart = a[k - 1] * (count - 1) - sum;
        const auto holds = score * apart <= spread;
        sum += a[k - 1];
        spread += apart * apart * ((zero + 1) / (zero + count * (count - 1)));
        const V middle = sum * ((zero + 1) / (zero + count));
        score = base + middle;
        share = choose(holds, (zero + 1) / (zero + count), share);
        mean = choose(holds, middle, mean);
        width = choose(holds, spread, width);
        last = choose(holds, a[k - 1], last);
    }
    V lambda = choose(width > least_spread<V>(), (base + mean) * reciprocal(width), zero);
    lambda = max_of(lambda, zero);  // below 0 only by rounding, where an index with a weight near 0 was dropped
    return {lambda, share + lambda * mean, last};
}

// Solves the problem for scores in any order, for small N. rho, c and the result as in simplex_solve; c is only
// written. Without regularization and for scores of one sign, the support are the scores equal to the one nearest 0: so
// it is for any positive base, and with 1 the products do not underflow.
template <class V, int N>
PAMA_HD inline V simplex_sorted(const V* PAMA_RESTRICT a, V rho, V* PAMA_RESTRICT c) {
    const V zero = V{}, one = zero + 1;
    V low = a[0], high = a[0], total = a[0];
    for (int i = 1; i < N; ++i) {
        low = min_of(a[i], low);
        high = max_of(a[i], high);
        total += a[i];
    }
    const V sign = choose(total >= zero, one, -one), base = choose(total >= zero, low, -high);
    V sorted[sorted_size<N>()];
    for (int i = 0; i < N; ++i) sorted[i] = c[i] = sign * a[i] - base;
    sort_some<N>(sorted);
    const Threshold<V> at = sorted_threshold<N>(sorted, choose((rho == zero) & (base >= zero), one, base), rho);
    V optimum = base;
    for (int i = 0; i < N; ++i) {
        const V weight = choose(c[i] <= at.last, max_of(at.tau - at.lambda * c[i], zero), zero);
        optimum += weight * c[i];
        c[i] = weight;
    }
    return choose(rho == zero, zero, sign * optimum);
}

// The weights are [tau - lambda (a_i - pivot)]_+.
template <class V>
struct Multipliers {
    V lambda, tau, pivot;
};

// Solves the problem for a uniform p, all objectives included and a mean of 0 or more, by Newton steps as in
// simplex_solve; the support is the scores below a bound, so a step only sums over them. score(i): a_i; pivot: their
// mean. Sums are over distances from the pivot, the mean over the support before, so that neither the squares nor
// the bound lose digits where the scores differ little. The last step repeats the support.
template <class V, class Score>
PAMA_HD inline Multipliers<V> newton_multipliers(int n, Score score, V pivot, V rho) {
    const V zero = V{}, one = zero + 1, most = zero + 1e30f;
    V bound = most, members = zero, lambda = zero, tau = zero;
    for (int round = 0; round < n + 2; ++round) {
        V count[2] = {}, sum[2] = {}, squares[2] = {};  // two chains of additions
        const auto add = [&](int part, int i) {
            const V apart = score(i) - pivot;
            const auto inside = apart <= bound;
            count[part] = choose(inside, count[part] + one, count[part]);
            sum[part] = choose(inside, sum[part] + apart, sum[part]);
            squares[part] = choose(inside, squares[part] + apart * apart, squares[part]);
        };
        int i = 0;
        for (; i + 2 <= n; i += 2) {
            add(0, i);
            add(1, i + 1);
        }
        if (i < n) add(0, i);
        const V support = count[0] + count[1], total = sum[0] + sum[1], share = reciprocal(support);
        const V offset = total * share, mean = pivot + offset;
        const V spread = rho + max_of(squares[0] + squares[1] - total * offset, zero);
        lambda = choose(spread > least_spread<V>(), max_of(mean, zero) * reciprocal(spread), zero);
        tau = share + lambda * offset;
        if (!any(support != members)) break;
        members = support;
        bound = choose(mean > zero, ((pivot - mean) + offset) + share * spread * reciprocal(mean), most);
        pivot = mean;
        tau = tau - lambda * offset;  // relative to the new pivot
    }
    return {lambda, tau, pivot};
}

constexpr double kLeastRho = 1e-280;  // for scores of magnitude 1: a smaller rho counts as 0

// Solves one row of any scale, in double. a: scores; p: preference; c: on input 1 for objectives that are included,
// else 0; on output the weights. a and p are overwritten. scale < 0 stands for max a^2. Returns the optimum a.c. If no
// objective is included, c = p. A NaN or infinity in an included objective makes all results NaN. N as in
// simplex_solve.
template <int N = 0>
PAMA_HD inline double simplex_row(int given_n, double* PAMA_RESTRICT a, double* PAMA_RESTRICT p, double regularization,
                                  double scale, double* PAMA_RESTRICT c) {
    const int n = N > 0 ? N : given_n;
    double largest = 0, poison = 0, mass = 0, count = 0, low = INFINITY, high = -INFINITY;
    for (int i = 0; i < n; ++i) {
        if (c[i] == 0) continue;
        low = min_of(a[i], low);
        high = max_of(a[i], high);
        poison += 0 * a[i];
        largest = max_of(std::fabs(a[i]), largest);
        mass += p[i];
        count += 1;
    }
    if (regularization > 0) poison += scale < 0 ? 0 : 0 * scale;
    if (count == 0 || poison != 0) {
        for (int i = 0; i < n; ++i) c[i] = count == 0 ? p[i] : NAN;
        return count == 0 ? 0.0 : NAN;
    }
    bool uniform = true;
    double first = -1;
    const double part = 1 / (mass > 0 ? mass : count);
    for (int i = 0; i < n; ++i) {
        p[i] = c[i] == 0 ? 0 : (mass > 0 ? p[i] * part : part);
        if (c[i] == 0) continue;
        if (first < 0) first = p[i];
        uniform = uniform && p[i] == first;
    }
    const nnqp::Scale scaled(largest);
    const double unit = scaled(largest), size = scale < 0 ? unit * unit : scaled(scaled(scale));
    const double rho = regularization * size > kLeastRho ? regularization * size : 0;
    const bool one_sided = rho == 0 && !(low < 0 && high > 0);
    const double nearest = low > 0 ? low : (high < 0 ? high : 0.0);
    if (one_sided || largest == 0) {
        for (int i = 0; i < n; ++i) {
            c[i] = a[i] == nearest ? c[i] : 0;
            a[i] = 0;
        }
        uniform ? simplex_solve<double, N, true>(n, a, p, 0.0, c) : simplex_solve<double, N>(n, a, p, 0.0, c);
        return nearest;
    }
    for (int i = 0; i < n; ++i) a[i] = c[i] == 0 ? 0 : scaled(a[i]);
    const double optimum =
        uniform ? simplex_solve<double, N, true>(n, a, p, rho, c) : simplex_solve<double, N>(n, a, p, rho, c);
    return max_of(low, min_of(high, scaled.undo(optimum)));
}

PAMA_END
