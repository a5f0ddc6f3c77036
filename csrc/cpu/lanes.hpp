// Solves the scalar problem for one row (or token) per SIMD lane.
#pragma once

#include "../core/simplex.hpp"
#include "shuffle.hpp"

PAMA_BEGIN

// Solves one lane in double, for problems beyond the precision of T. row: 3 n doubles.
template <class T>
__attribute__((noinline)) T solve_lane(int n, const T* a, const T* present, int64_t stride, const double* preference,
                                       double regularization, double scale, double* row, T* c) {
    for (int i = 0; i < n; ++i) {
        row[i] = static_cast<double>(a[i * stride]);
        row[n + i] = preference[i];
        row[2 * n + i] = present ? static_cast<double>(present[i * stride]) : 1.0;
    }
    const T optimum = static_cast<T>(simplex_row(n, row, row + n, regularization, scale, row + 2 * n));
    for (int i = 0; i < n; ++i) c[i * stride] = static_cast<T>(row[2 * n + i]);
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
__attribute__((noinline)) V solve_unsure(int n, const T* a, const T* present, int64_t stride, int lanes,
                                         const double* preference, double regularization, const double* scale,
                                         const V& largest, const V& marked, V optimum, double* row, T* c) {
    for (int k = 0; k < lanes; ++k) {
        bool unsure = lane<T>(marked, k) != 0;
        for (int i = 0; i < n && !unsure; ++i) {
            const T own = a[i * stride + k];
            const bool counts = !present || present[i * stride + k] > 0;
            unsure = counts && (own < 0 ? -own : own) < lane<T>(largest, k) * narrow<T>();
        }
        if (unsure)
            set_lane(optimum, k,
                     solve_lane(n, a + k, present ? present + k : nullptr, stride, preference, regularization,
                                scale ? scale[k] : -1.0, row, c + k));
    }
    return optimum;
}

// Not inlined: with many objectives a call costs nothing, and the code can be counted (benchmarks/cpu_code.py).
template <class V, int N>
__attribute__((noinline)) V sorted_weights(const V* a, const V& rho, V* c) {
    return simplex_sorted<V, N>(a, rho, c);
}

// Solves `lanes` rows at once. a (n, stride): scores, with the rows adjacent; preference (n). c (n, stride) receives
// the weights. Returns the optima. `present` (1 or 0, like a) may be null; `scale` (per lane) may be null, then it is
// max a^2. `non_negative`: no score is negative and there is no regularization. work: 3 n vectors; row: 3 n doubles. A
// compile-time N > 0 replaces n and lets the compiler keep values in registers.
template <class V, int N, class T>
inline V solve_lanes(int given, const T* a, const T* present, int64_t stride, int lanes, const double* preference,
                     bool uniform, double regularization, bool non_negative, T* c, V* work, double* row,
                     const double* scale = nullptr) {
    const V zero = V{}, one = zero + static_cast<T>(1);
    const int n = N > 0 ? N : given;
    if (non_negative && !present) {
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
    V *const x = N > 0 ? local : work, *const p = x + n, *const keep = p + n;
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
    const auto extreme = (largest > static_cast<T>(1e6)) | ((largest < static_cast<T>(1e-3)) & (largest > zero));
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
        for (int k = 0; k < lanes; ++k) {  // in double, since a scale is a square
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
            if (any(settled & (low < high))) {  // otherwise all weights are equal already
                V ties = zero;
                for (int i = 0; i < n; ++i) ties += choose(load<V>(a + i * stride) == nearest, one, zero);
                const V share = reciprocal(ties);
                for (int i = 0; i < n; ++i)
                    keep[i] = choose(settled, choose(load<V>(a + i * stride) == nearest, share, zero), keep[i]);
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
        constexpr int unrolled = N <= 8 ? N : 0;
        optimum = uniform ? simplex_solve<V, unrolled, true>(n, x, p, rho, keep)
                          : simplex_solve<V, unrolled>(n, x, p, rho, keep);
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
        optimum =
            solve_unsure<V>(n, a, present, stride, lanes, preference, regularization, scale,
                            weak ? choose(rho < size * static_cast<T>(weak_regularization<T>()), largest, zero) : zero,
                            choose(unsure, one, zero), optimum, row, c);
    return optimum;
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

// Solves rows of N float32 scores, one SIMD register of rows at a time; contiguous rows are transposed in registers.
template <int N>
inline void weights_rows(int64_t rows, const float* PAMA_RESTRICT scores, int64_t row, int64_t objective,
                         const double* preference, bool uniform, double regularization, const double* scale,
                         int64_t scale_row, float* PAMA_RESTRICT weights, float* PAMA_RESTRICT optimum,
                         double* buffer) {
    constexpr int width = Lanes<float>::count;
    constexpr int64_t ahead = 1024;  // floats
    const bool contiguous = row == N && objective == 1;
    for (int64_t at = 0; at < rows; at += width) {
        const int used = static_cast<int>(rows - at < width ? rows - at : width);
        FloatV v[N], c[N];
        if (contiguous && used == width) {
            for (int i = 0; i < N; ++i) {
                prefetch(scores + at * N + i * width + ahead);
                prefetch_for_writing(weights + at * N + i * width + ahead);
                v[i] = load<FloatV>(scores + at * N + i * width);
            }
            prefetch_for_writing(optimum + at + ahead);
        } else {
            memset(v, 0, sizeof v);
            for (int t = 0; t < used; ++t)
                for (int i = 0; i < N; ++i)
                    reinterpret_cast<float*>(v)[t * N + i] = scores[(at + t) * row + i * objective];
        }
        FloatV low = {};  // over several rows; a NaN does not change it
        for (int i = 0; i < N; ++i) low = min_of(v[i], low);
        deinterleave<N>(v);
        double size[width];
        if (scale)
            for (int t = 0; t < width; ++t) size[t] = t < used ? scale[(at + t) * scale_row] : 1.0;
        const bool non_negative = regularization == 0 && !any(low < 0.0f);
        const FloatV s = solve_lanes<FloatV, N>(N, reinterpret_cast<const float*>(v),
                                                static_cast<const float*>(nullptr), width, width, preference, uniform,
                                                regularization, non_negative, reinterpret_cast<float*>(c),
                                                static_cast<FloatV*>(nullptr), buffer, scale ? size : nullptr);
        interleave<N>(c);
        if (used == width) {
            store(optimum + at, s);
            for (int i = 0; i < N; ++i) store(weights + at * N + i * width, c[i]);
        } else {
            memcpy(optimum + at, &s, sizeof(float) * static_cast<size_t>(used));
            memcpy(weights + at * N, c, sizeof(float) * static_cast<size_t>(used * N));
        }
    }
}

// Solves float32 rows of any number n of objectives, transposed in pieces through memory; N as in `solve_lanes`.
template <int N>
__attribute__((noinline)) void weights_pieces(int64_t rows, int n, const float* scores, int64_t row, int64_t objective,
                                              const double* preference, bool uniform, double regularization,
                                              const double* scale, int64_t scale_row, float* weights, float* optimum,
                                              void* scratch) {
    constexpr int width = Lanes<float>::count;
    constexpr int64_t piece = 16 * width;
    auto* work = static_cast<FloatV*>(scratch);
    auto* a = reinterpret_cast<float*>(work + 3 * n);
    float* c = a + n * piece;
    auto* size = reinterpret_cast<double*>(c + n * piece);
    double* buffer = size + piece;
    for (int64_t first = 0; first < rows; first += piece) {
        const int64_t count = rows - first < piece ? rows - first : piece;
        for (int64_t t = count; t < count + width && t < piece; ++t)
            for (int i = 0; i < n; ++i) a[i * piece + t] = 0;
        rows_to_columns(n, scores + first * row, row, objective, count, a, piece);
        for (int64_t t = 0; t < count; ++t) size[t] = scale ? scale[(first + t) * scale_row] : 0;
        for (int64_t t = 0; t < count; t += width) {
            const int used = static_cast<int>(count - t < width ? count - t : width);
            bool non_negative = regularization == 0;
            for (int i = 0; non_negative && i < n; ++i) non_negative = !any(load<FloatV>(a + i * piece + t) < 0.0f);
            const FloatV s =
                solve_lanes<FloatV, N>(n, a + t, static_cast<const float*>(nullptr), piece, used, preference, uniform,
                                       regularization, non_negative, c + t, work, buffer, scale ? size + t : nullptr);
            memcpy(optimum + first + t, &s, sizeof(float) * static_cast<size_t>(used));
        }
        columns_to_rows(n, c, piece, count, weights + first * n);
    }
}

inline void weights_rows(int64_t rows, int n, const float* scores, int64_t row, int64_t objective,
                         const double* preference, bool uniform, double regularization, const double* scale,
                         int64_t scale_row, float* weights, float* optimum, void* scratch) {
    if (with_constant(n, [&](auto size) {
            weights_rows<size>(rows, scores, row, objective, preference, uniform, regularization, scale, scale_row,
                               weights, optimum, static_cast<double*>(scratch));
        }))
        return;
    with_lanes_size(n, [&](auto size) {
        weights_pieces<size>(rows, n, scores, row, objective, preference, uniform, regularization, scale, scale_row,
                             weights, optimum, scratch);
    });
}

PAMA_END
