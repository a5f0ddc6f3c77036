// Solves the scalar problem for one row (or token) per SIMD lane.
#pragma once

#include "../core/simplex.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

// Rows of the scalar problem, one per SIMD lane.
template <class T>
struct LaneRows {
    int n;
    const T* a;        // (n, stride): scores, with the rows adjacent
    const T* present;  // 1 or 0, like a; null: all are
    int64_t stride;
    T* c;                       // (n, stride): receives the weights
    int lanes;                  // rows in use
    const double* scale;        // (lanes); null: max a^2
    bool non_negative = false;  // no score is negative and there is no regularization
};

// Memory of `solve_lanes`.
template <class V>
struct LaneMemory {
    V* vectors;   // 3 n; not used with a compile-time n
    double* row;  // 3 n
};

// Solves one lane in double, for problems beyond the precision of T. row: 3 n doubles.
template <class T>
__attribute__((noinline)) T solve_lane(const LaneRows<T>& rows, const ScalarRule& rule, int lane, double* row) {
    const int n = rows.n;
    for (int i = 0; i < n; ++i) {
        const int64_t at = i * rows.stride + lane;
        row[i] = static_cast<double>(rows.a[at]);
        row[n + i] = rule.preference[i];
        row[2 * n + i] = rows.present ? static_cast<double>(rows.present[at]) : 1.0;
    }
    const double scale = rows.scale ? rows.scale[lane] : -1.0;
    const T optimum = static_cast<T>(simplex_row(n, row, row + n, rule.regularization, scale, row + 2 * n));
    for (int i = 0; i < n; ++i) rows.c[i * rows.stride + lane] = static_cast<T>(row[2 * n + i]);
    return optimum;
}

template <class T, class V>
inline T lane(const V& v, int k) {
    T x;
    memcpy(&x, reinterpret_cast<const char*>(&v) + static_cast<int64_t>(sizeof(T)) * k, sizeof x);
    return x;
}
template <class T, class V>
inline void set_lane(V& v, int k, T x) {
    memcpy(reinterpret_cast<char*>(&v) + static_cast<int64_t>(sizeof(T)) * k, &x, sizeof x);
}

template <class T>
constexpr T narrow() {
    return static_cast<T>(sizeof(T) == 4 ? 1e-3 : 1e-9);
}
template <class T>
constexpr double weak_regularization() {
    return sizeof(T) == 4 ? 1e-4 : 1e-13;
}

// Solves lanes again in double whose scores differ much in magnitude while the regularization is weak: the weight of
// the largest score is then near the rounding error of T, and the other weights depend on it. These are the marked
// lanes and those with a score below narrow() times `largest`. Not inlined, to save registers in the common case.
// Returns the optima.
template <class V, class T>
__attribute__((noinline)) V solve_unsure(const LaneRows<T>& rows, const ScalarRule& rule, const V& largest,
                                         const V& marked, V optimum, double* row) {
    for (int k = 0; k < rows.lanes; ++k) {
        bool unsure = lane<T>(marked, k) != 0;
        for (int i = 0; i < rows.n && !unsure; ++i) {
            const int64_t at = i * rows.stride + k;
            const T own = rows.a[at];
            const bool counts = !rows.present || rows.present[at] > 0;
            unsure = counts && (own < 0 ? -own : own) < lane<T>(largest, k) * narrow<T>();
        }
        if (unsure) set_lane(optimum, k, solve_lane(rows, rule, k, row));
    }
    return optimum;
}

// Not inlined: with many objectives a call costs nothing, and the code can be counted (benchmarks/cpu_code.py).
template <class V, int N>
__attribute__((noinline)) V sorted_weights(const V* a, const V& rho, V* c) {
    return simplex_sorted<V, N>(a, rho, c);
}

// For any n. Not inlined: the loops of a function of their own are a quarter faster.
template <class V, bool Uniform>
PAMA_OUT_OF_LINE V solve_any(int n, V* a, const V* p, const V& rho, V* c) {
    return simplex_solve<V, 0, Uniform>(n, a, p, rho, c);
}

// Where squares of the scores, of which `largest` is the largest |a_i|, may be out of the range of T.
template <class T, class V>
inline auto extreme_scores(const V& largest) {
    return (largest > static_cast<T>(1e6)) | ((largest < static_cast<T>(1e-3)) & (largest > V{}));
}

// Solves the rows of all lanes; the weights in rows.c. Returns the optima. A compile-time N > 0 replaces rows.n and
// lets the compiler keep values in registers; all objectives are then present.
template <class V, int N, class T>
inline V solve_lanes(const LaneRows<T>& rows, const ScalarRule& rule, const LaneMemory<V>& memory) {
    const T *const a = rows.a, *const present = N > 0 ? nullptr : rows.present;
    const int64_t stride = rows.stride;
    const double *const preference = rule.preference, *const scale = rows.scale;
    const bool uniform = rule.uniform;
    const double regularization = rule.regularization;
    T* const c = rows.c;
    const V zero = V{}, one = zero + static_cast<T>(1);
    const int n = N > 0 ? N : rows.n;
    if (rows.non_negative && !present) {
        V low = load<V>(a), poison = zero;
        for (int i = 0; i < n; ++i) {
            const V x = load<V>(a + i * stride);
            low = min_of(low, x);
            poison += zero * x;
        }
        V ties = zero, mass = zero;
        for (int i = 0; i < n; ++i) {
            const auto tied = load<V>(a + i * stride) == low;
            ties += choose(tied, one, zero);
            mass += choose(tied, zero + static_cast<T>(preference[i]), zero);
        }
        const V share = reciprocal(ties), shift = (uniform ? share : max_of((one - mass) * share, zero)) + poison;
        for (int i = 0; i < n; ++i) {  // bitwise equal to simplex_solve
            const V kept = uniform ? shift : shift + static_cast<T>(preference[i]);
            store(c + i * stride, choose(load<V>(a + i * stride) == low, kept, poison));
        }
        return low + poison;
    }
    V local[N > 0 ? 3 * N : 1];
    V *const x = N > 0 ? local : memory.vectors, *const p = x + n, *const keep = p + n;
    V mass = zero, count = zero, poison = zero;
    V low = zero + static_cast<T>(INFINITY), high = -low;
    for (int i = 0; i < n; ++i) {
        keep[i] = present ? load<V>(present + i * stride) : one;
        x[i] = load<V>(a + i * stride);
        if (present) {
            x[i] = choose(keep[i] > zero, x[i], zero);
            mass += keep[i] * static_cast<T>(preference[i]);
            count += keep[i];
            low = choose(keep[i] > zero, min_of(x[i], low), low);
            high = choose(keep[i] > zero, max_of(x[i], high), high);
        } else {
            low = min_of(x[i], low);
            high = max_of(x[i], high);
        }
        poison += zero * x[i];
    }
    const V largest = max_of(-low, high);
    // A row for which rho from 1e-30 to 1e18 times its squares is out of the range of T is scaled, exactly, by a power
    // of two that follows from its largest score; subnormal scores are scaled up first.
    V unit = one, lift = one, inverse = one, size = largest * largest;
    const auto extreme = extreme_scores<T>(largest);
    if (any(extreme)) {
        lift = choose(extreme & (largest < static_cast<T>(1e-30)), zero + static_cast<T>(0x1p100), one);
        const V power = choose(extreme, power_below(largest * lift), one);
        inverse = one / power;
        for (int i = 0; i < n; ++i) x[i] = (x[i] * lift) * inverse;
        size = (largest * lift) * inverse;
        size *= size;
        unit = power / lift;
    }
    const V least = max_of(size, zero + static_cast<T>(1e-6)) * static_cast<T>(1e-30);  // scores of 0: size is 0
    V rho = size * static_cast<T>(regularization);
    if (scale && regularization > 0)
        for (int k = 0; k < rows.lanes; ++k) {  // in double, since a scale is a square
            const double by = static_cast<double>(lane<T>(lift, k)) * static_cast<double>(lane<T>(inverse, k)),
                         own = regularization * scale[k] * by * by;
            set_lane(poison, k, lane<T>(poison, k) + static_cast<T>(0 * scale[k]));
            set_lane(rho, k, static_cast<T>(own < 1e30 ? own : 1e30));
        }
    rho = choose(rho < least, zero, min_of(rho, zero + static_cast<T>(1e30)));  // below: rho = 0 in T; above: c = p
    const auto exact = rho == zero, one_sided = (low >= zero) | (high <= zero);
    const V nearest = choose(low > zero, low, choose(high < zero, high, zero));
    const auto settled = exact & one_sided;
    V optimum = zero;
    if constexpr (N > 0)
        if (uniform && !present) {
            if constexpr (N >= 8)
                optimum = sorted_weights<V, N>(x, rho, keep);
            else
                optimum = simplex_sorted<V, N>(x, rho, keep);
            if (any(extreme & settled)) {  // different scores may be equal after the scaling
                V ties = zero;
                for (int i = 0; i < n; ++i) ties += choose(load<V>(a + i * stride) == nearest, one, zero);
                const V share = reciprocal(ties);
                for (int i = 0; i < n; ++i)
                    keep[i] =
                        choose(extreme & settled, choose(load<V>(a + i * stride) == nearest, share, zero), keep[i]);
            }
        }
    if (N == 0 || !uniform || present) {
        for (int i = 0; i < n; ++i) {
            if (!uniform)
                p[i] = present ? choose(mass > zero, keep[i] * static_cast<T>(preference[i]) / mass, keep[i] / count)
                               : zero + static_cast<T>(preference[i]);
            keep[i] = choose(settled & (load<V>(a + i * stride) != nearest), zero, keep[i]);
            x[i] = choose(settled, zero, x[i]);
        }
        if constexpr (N > 0)
            optimum = simplex_solve<V, N>(n, x, p, rho, keep);
        else
            optimum = uniform ? solve_any<V, true>(n, x, p, rho, keep) : solve_any<V, false>(n, x, p, rho, keep);
    }
    optimum = choose(exact, choose(one_sided, nearest, zero), max_of(low, min_of(high, optimum * unit)));
    const auto none = present ? count == zero : count != count;
    if (any(none | (poison != zero)))
        for (int i = 0; i < n; ++i) keep[i] = choose(none, zero + static_cast<T>(preference[i]), keep[i] + poison);
    for (int i = 0; i < n; ++i) store(c + i * stride, keep[i]);
    optimum = choose(none, zero, optimum) + poison;
    const V smaller = min_of(-low, high);
    const auto unsure = exact & (low < zero) & (high > zero) & (smaller < largest * narrow<T>());
    const bool weak = regularization > 0 && (scale || regularization < weak_regularization<T>());
    if (weak || any(unsure))
        optimum = solve_unsure<V>(
            rows, rule, weak ? choose(rho < size * static_cast<T>(weak_regularization<T>()), largest, zero) : zero,
            choose(unsure, one, zero), optimum, memory.row);
    return optimum;
}

// Whether rho of rows of ordinary scores is 0 or far from the ends of the range of T.
template <class T>
inline bool ordinary_regularization(double regularization) {
    return regularization == 0 || (regularization >= weak_regularization<T>() && regularization <= 1e6);
}

// Solves the rows in the lanes of a, with a uniform preference and no scale, in registers. Returns false, with nothing
// computed, if `solve_lanes` would scale a row, solve it in double, or find a NaN.
template <int N, class V, class T>
inline bool solve_ordinary(const V* a, T regularization, V* c, V* optimum) {
    const V zero{};
    V low = a[0], high = a[0], total = a[0];
    for (int i = 1; i < N; ++i) {
        low = min_of(a[i], low);
        high = max_of(a[i], high);
        total += a[i];
    }
    const V largest = max_of(-low, high), smaller = min_of(-low, high);
    auto rare = extreme_scores<T>(largest) | (total != total);
    if (regularization == 0) rare |= (smaller > zero) & (smaller < largest * narrow<T>());
    if (any(rare)) return false;
    V value;
    const V rho = largest * largest * regularization;
    if constexpr (N >= 8)
        value = sorted_weights<V, N>(a, rho, c);
    else
        value = simplex_sorted<V, N>(a, rho, c);
    *optimum = max_of(low, min_of(high, value));
    return true;
}

// `solve_lanes`, in registers if that is possible.
template <class V, int N, class T>
inline V solve_rows(const LaneRows<T>& rows, const ScalarRule& rule, const LaneMemory<V>& memory) {
    if constexpr (N > 0)
        if (rule.uniform && !rows.scale && !rows.non_negative && ordinary_regularization<T>(rule.regularization)) {
            V a[N], c[N], optimum;
            for (int i = 0; i < N; ++i) a[i] = load<V>(rows.a + i * rows.stride);
            if (solve_ordinary<N>(a, static_cast<T>(rule.regularization), c, &optimum)) {
                for (int i = 0; i < N; ++i) store(rows.c + i * rows.stride, c[i]);
                return optimum;
            }
        }
    return solve_lanes<V, N>(rows, rule, memory);
}

// Calls visit(integral constant N) with N = n if `solve_lanes` can keep all values in registers, else with 0.
template <class Visit>
inline auto with_lanes_size(int n, Visit visit) {
    switch (n) {
#define PAMA_SIZE(N) \
    case N:          \
        return visit(std::integral_constant<int, N>{});
        PAMA_SIZE(2)
        PAMA_SIZE(3)
        PAMA_SIZE(4)
        PAMA_SIZE(5)
        PAMA_SIZE(6)
        PAMA_SIZE(7)
        PAMA_SIZE(8)
        PAMA_SIZE(16)
#undef PAMA_SIZE
        default:
            return visit(std::integral_constant<int, 0>{});
    }
}

PAMA_END
