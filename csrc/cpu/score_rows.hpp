// Many rows of the scalar problem: float32 rows in memory, transposed to one row per SIMD lane.
#pragma once

#include "lanes.hpp"

PAMA_BEGIN

// As `solve_ordinary`, for scores that are not negative, without regularization: the smallest ones share the weight.
// Returns false if there is a NaN or infinity.
template <int N, class V>
inline bool solve_non_negative(const V* a, V* c, V* optimum) {
    const V zero{}, one = zero + 1;
    V low = a[0], total = a[0], ties = zero;
    for (int i = 1; i < N; ++i) {
        low = min_of(a[i], low);
        total += a[i];
    }
    if (any(total - total != zero)) return false;
    for (int i = 0; i < N; ++i) ties += choose(a[i] == low, one, zero);
    const V share = reciprocal(ties);
    for (int i = 0; i < N; ++i) c[i] = choose(a[i] == low, share, zero);
    *optimum = low;
    return true;
}

// Solves the rows in the lanes of v; the weights in c. Returns the optima. Not inlined, so that v and c of the caller
// stay in registers.
template <int N>
__attribute__((noinline)) FloatV solve_in_memory(const FloatV* v, const double* scale, bool non_negative,
                                                 const ScalarRule& rule, double* row, FloatV* c) {
    constexpr int width = Lanes<float>::count;
    const LaneRows<float> lanes{
        N, reinterpret_cast<const float*>(v), nullptr, width, reinterpret_cast<float*>(c), width, scale, non_negative};
    return solve_lanes<FloatV, N>(lanes, rule, LaneMemory<FloatV>{nullptr, row});
}

// Solves the rows [first, last) of N float32 scores, one SIMD register of rows at a time; contiguous rows are
// transposed in registers.
template <int N>
inline void weights_rows(const ScoreRows& rows, const ScalarRule& rule, int64_t first, int64_t last, double* buffer) {
    constexpr int width = Lanes<float>::count;
    constexpr int64_t ahead = 1024;  // floats
    const int64_t row = rows.scores.row, objective = rows.scores.objective;
    const float* PAMA_RESTRICT const scores = static_cast<const float*>(rows.scores.data);
    const double* const scale = static_cast<const double*>(rows.scale.data);
    float *PAMA_RESTRICT const weights = static_cast<float*>(rows.weights),
                               *PAMA_RESTRICT const optimum = static_cast<float*>(rows.optimum);
    const double regularization = rule.regularization;
    const bool contiguous = row == N && objective == 1;
    const bool ordinary = rule.uniform && !scale && ordinary_regularization<float>(regularization);
    for (int64_t at = first; at < last; at += width) {
        const int used = static_cast<int>(last - at < width ? last - at : width);
        FloatV v[N], c[N], s;
        if (contiguous && used == width) {
            for (int i = 0; i < N; ++i) {
                prefetch(scores + at * N + i * width + ahead);
                prefetch_for_writing(weights + at * N + i * width + ahead);
                v[i] = load<FloatV>(scores + at * N + i * width);
            }
            prefetch_for_writing(optimum + at + ahead);
        } else {
            float given[N * width] = {};
            for (int t = 0; t < used; ++t)
                for (int i = 0; i < N; ++i) given[t * N + i] = scores[(at + t) * row + i * objective];
            for (int i = 0; i < N; ++i) v[i] = load<FloatV>(given + i * width);
        }
        FloatV low = {};  // over several rows; a NaN does not change it
        for (int i = 0; i < N; ++i) low = min_of(v[i], low);
        deinterleave<N>(v);
        const bool non_negative = regularization == 0 && !any(low < 0.0f);
        const bool solved =
            ordinary && (non_negative ? solve_non_negative<N>(v, c, &s)
                                      : solve_ordinary<N>(v, static_cast<float>(regularization), c, &s));
        if (!solved) {
            FloatV from[N], to[N];
            double size[width];
            if (scale)
                for (int t = 0; t < width; ++t) size[t] = t < used ? scale[(at + t) * rows.scale.row] : 1.0;
            for (int i = 0; i < N; ++i) from[i] = v[i];
            s = solve_in_memory<N>(from, scale ? size : nullptr, non_negative, rule, buffer, to);
            for (int i = 0; i < N; ++i) c[i] = to[i];
        }
        interleave<N>(c);
        if (used == width) {
            store(optimum + at, s);
            for (int i = 0; i < N; ++i) store(weights + at * N + i * width, c[i]);
        } else {
            float found[N * width], value[width];
            for (int i = 0; i < N; ++i) store(found + i * width, c[i]);
            store(value, s);
            memcpy(optimum + at, value, sizeof(float) * static_cast<size_t>(used));
            memcpy(weights + at * N, found, sizeof(float) * static_cast<size_t>(used * N));
        }
    }
}

// Solves float32 rows of any number n of objectives, transposed in pieces through memory; N as in `solve_lanes`.
template <int N>
__attribute__((noinline)) void weights_pieces(const ScoreRows& rows, const ScalarRule& rule, int64_t begin, int64_t end,
                                              void* scratch) {
    constexpr int width = Lanes<float>::count;
    constexpr int64_t piece = 16 * width;
    const int n = N > 0 ? N : rows.n;
    const int64_t row = rows.scores.row, objective = rows.scores.objective;
    auto* work = static_cast<FloatV*>(scratch);
    auto* a = reinterpret_cast<float*>(work + 3 * n);
    float* c = a + n * piece;
    auto* size = reinterpret_cast<double*>(c + n * piece);
    const LaneMemory<FloatV> memory{work, size + piece};
    const double* const scale = static_cast<const double*>(rows.scale.data);
    for (int64_t first = begin; first < end; first += piece) {
        const int64_t count = end - first < piece ? end - first : piece;
        for (int64_t t = count; t < count + width && t < piece; ++t)
            for (int i = 0; i < n; ++i) a[i * piece + t] = 0;
        rows_to_columns(n, static_cast<const float*>(rows.scores.data) + first * row, row, objective, count, a, piece);
        for (int64_t t = 0; t < count; ++t) size[t] = scale ? scale[(first + t) * rows.scale.row] : 0;
        for (int64_t t = 0; t < count; t += width) {
            const int used = static_cast<int>(count - t < width ? count - t : width);
            bool non_negative = rule.regularization == 0;
            for (int i = 0; non_negative && i < n; ++i) non_negative = !any(load<FloatV>(a + i * piece + t) < 0.0f);
            const LaneRows<float> lanes{n,           a + t, nullptr, piece, c + t, used, scale ? size + t : nullptr,
                                        non_negative};
            const FloatV s = solve_rows<FloatV, N>(lanes, rule, memory);
            memcpy(static_cast<float*>(rows.optimum) + first + t, &s, sizeof(float) * static_cast<size_t>(used));
        }
        columns_to_rows(n, c, piece, count, static_cast<float*>(rows.weights) + first * n);
    }
}

inline void weights_rows(const ScoreRows& rows, const ScalarRule& rule, int64_t first, int64_t last, void* scratch) {
    if (with_constant(rows.n,
                      [&](auto size) { weights_rows<size>(rows, rule, first, last, static_cast<double*>(scratch)); }))
        return;
    with_lanes_size(rows.n, [&](auto size) {
        if constexpr (!is_constant(size)) weights_pieces<size>(rows, rule, first, last, scratch);
    });
}

PAMA_END
