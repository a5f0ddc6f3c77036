// The two passes over a block of tokens: statistics alone; and weights, combined advantages, loss and gradient
// with the statistics beside them.
#pragma once

#include "../core/weights.hpp"
#include "lanes.hpp"
#include "sums.hpp"

PAMA_BEGIN

// Tiles in the type of the computation and, for float, in double for what float can't hold.
template <class T>
struct Workspace {
    Tile<T> tile;
    Tile<double> exact;
    T *c, *combined, *gradient, *scale;  // (n, kTileTokens) and (kTileTokens) each
    T* weights;                          // (n)
    double* row;                         // (4 n)
    double* sums;                        // (statistics_size(n, false))
    typename Lanes<T>::V* lanes;         // (3 n)
    Arena arena;
};

template <class T>
inline Workspace<T> allocate(const Problem& problem, void* scratch) {
    Workspace<T> w;
    Arena arena{static_cast<char*>(scratch)};
    w.tile = allocate_tile<T>(problem, arena);
    w.exact = allocate_tile<double>(problem, arena);
    w.c = arena.take<T>(problem.n * kTileTokens);
    w.combined = arena.take<T>(kTileTokens);
    w.gradient = arena.take<T>(kTileTokens);
    w.scale = arena.take<T>(kTileTokens);
    w.weights = arena.take<T>(problem.n);
    w.row = arena.take<double>(4 * problem.n);
    w.sums = arena.take<double>(statistics_size(problem.n, false));
    w.lanes = arena.take<typename Lanes<T>::V>(3 * problem.n);
    w.arena = arena;
    return w;
}

inline long scratch_size(int n) {
    return 2 * tile_bytes<double>(n) + 8 * kTileTokens * (n + 3L) + 8 * (5L * n + statistics_size(n, false)) +
           3L * n * PAMA_VECTOR_BYTES + 3 * 8 * kTileTokens + 64 * 16;
}

template <class T>
inline void add_tile(const Problem& problem, Workspace<T>& w, long first, bool pairs, double* sums) {
    if (add_sums(problem, w.tile, pairs, sums)) return;
    load_tile(problem, first, w.tile.count, false, w.exact, w.arena);
    add_sums(problem, w.exact, pairs, sums);
}

template <class T>
inline void statistics_block(const Problem& problem, bool pairs, long first, long last, double* sums, void* scratch) {
    Workspace<T> w = allocate<T>(problem, scratch);
    const long step = tile_tokens(problem.n);
    for (long at = first; at < last; at += step) {
        load_tile(problem, at, last - at < step ? last - at : step, false, w.tile, w.arena);
        add_tile(problem, w, at, pairs, sums);
    }
}

inline void store(const Array& array, long offset, double value) {
    switch (array.dtype) {
        case Dtype::f64:
            static_cast<double*>(array.data)[offset] = value;
            break;
        case Dtype::bf16:
            static_cast<unsigned short*>(array.data)[offset] = float_to_bf16(static_cast<float>(value));
            break;
        case Dtype::f16:
            static_cast<unsigned short*>(array.data)[offset] = float_to_f16(static_cast<float>(value));
            break;
        default:
            static_cast<float*>(array.data)[offset] = static_cast<float>(value);
    }
}

// Per-token results are contiguous in the tokens.
template <class T>
inline void store_tokens(const Array& array, long first, long count, const T* PAMA_RESTRICT source) {
    if (array.dtype == Dtype::f32) {
        float* PAMA_RESTRICT target = static_cast<float*>(array.data) + first;
#pragma omp simd
        for (long t = 0; t < count; ++t) target[t] = static_cast<float>(source[t]);
    } else {
        for (long t = 0; t < count; ++t) store(array, first + t, static_cast<double>(source[t]));
    }
}

// c(t) of each token (n, kTileTokens) into w.c, from I in tile.bound. Returns the sum of the optima over valid tokens.
template <class V, int N, class T>
inline double token_weights(const Problem& problem, const Apply& apply, Workspace<T>& w) {
    const Tile<T>& tile = w.tile;
    constexpr int width = sizeof(V) / sizeof(T);
    T* optimum = w.combined;
    for (long t = 0; t < tile.count; t += width) {
        const int used = static_cast<int>(tile.count - t < width ? tile.count - t : width);
        const V s =
            solve_lanes<V, N>(problem.n, tile.bound + t, tile.present ? tile.present + t : nullptr, kTileTokens, used,
                              apply.prior, apply.uniform, apply.regularization,
                              problem.noon && apply.regularization == 0, w.c + t, reinterpret_cast<V*>(w.lanes), w.row);
        store(optimum + t, s);
    }
    return dot(optimum, tile.valid, tile.padded);
}

template <class T>
inline double token_weights(const Problem& problem, const Apply& apply, Workspace<T>& w) {
    if constexpr (sizeof(T) == sizeof(float))
        if (!w.tile.present)
            return with_lanes_size(problem.n,
                                   [&](auto size) { return token_weights<FloatV, size>(problem, apply, w); });
    return token_weights<typename Lanes<T>::V, 0>(problem, apply, w);
}

// Combined advantages, gradient and loss of one tile, with weights `fixed` (n) or each token's own in w.c. Returns the
// sum of the loss. NaN weights stay away from masked places.
template <bool Noon, bool Own, class T, class V = typename Lanes<T>::V>
inline T apply_weights(const Problem& problem, const Apply& apply, const Workspace<T>& w, long first, const T* fixed) {
    const Tile<T> tile = w.tile;
    const T *const own = w.c, *const row_scale = apply.row_scale ? w.scale : nullptr;
    T *const combined = w.combined, *const gradient = w.gradient;
    const int n = problem.n;
    const bool loss = static_cast<bool>(apply.loss), penalty = apply.kl_coef != 0;
    const long size = size_of(apply.gradient.dtype);
    const char* next_gradient = apply.gradient
                                    ? static_cast<const char*>(apply.gradient.data) + (first + tile.count) * size
                                    : reinterpret_cast<const char*>(gradient);
    const V zero{}, coefficient = zero + static_cast<T>(apply.kl_coef), scale = zero + static_cast<T>(apply.scale);
    V sum[1] = {};
    for (long t = 0; t < tile.padded; t += Lanes<T>::count) {
        V up = zero, down = zero;
        for (int i = 0; i < n; ++i) {
            ask(tile.ahead.at(t, i));
            const V a = load<V>(tile.advantages + i * kTileTokens + t), positive = a < 0 ? zero : a;
            const V weight = Own ? load<V>(own + i * kTileTokens + t) : zero + fixed[i];
            up += weight * positive;
            if constexpr (!Noon) down += weight * (a - positive);
        }
        const auto masked = load<V>(tile.valid + t) == 0;
        up = masked ? zero : up;
        down = masked ? zero : down;
        store(combined + t, up + down);
        if (!loss) continue;
        V gain = up * load<V>(tile.pos + t), slope = up * load<V>(tile.grad_pos + t);
        if constexpr (!Noon) {
            gain += down * load<V>(tile.neg + t);
            slope += down * load<V>(tile.grad_neg + t);
        }
        slope *= load<V>(tile.ratio + t);
        if (penalty) {
            gain -= coefficient * load<V>(tile.ref_kl + t);
            slope -= coefficient * load<V>(tile.ref_slope + t);
        }
        const V by = row_scale ? load<V>(row_scale + t) : scale;
        sum[0] -= by * gain;
        ask_to_write(next_gradient + t * size);
        store(gradient + t, -by * slope);
    }
    T result[1];
    totals(sum, result);
    return result[0];
}

// One tile's results. `fixed` (n) serves all its tokens, or null: w.c does.
template <class T>
inline void apply_tile(const Problem& problem, const Apply& apply, Workspace<T>& w, long first, const T* fixed,
                       Partial& partial) {
    const long count = w.tile.count;
    if (apply.row_scale)
        for_each_segment(problem, first, count, [&](long row, long, long at, long piece) {
            for (long t = 0; t < piece; ++t) w.scale[at + t] = static_cast<T>(apply.scale * apply.row_scale[row]);
        });
    for (long t = count; t < w.tile.padded; ++t) w.scale[t] = 0;
    const auto pass = problem.noon ? (fixed ? apply_weights<true, false, T> : apply_weights<true, true, T>)
                                   : (fixed ? apply_weights<false, false, T> : apply_weights<false, true, T>);
    partial.loss += pass(problem, apply, w, first, fixed);
    if (apply.combined && !apply.combined_per_row) store_tokens(apply.combined, first, count, w.combined);
    if (apply.gradient) store_tokens(apply.gradient, first, count, w.gradient);
}

template <class T>
inline void given_weights(const Array& given, long row, int n, T* c) {
    load_values(given, row * given.row, given.objective, n, false, c);
}

// Advantages per sequence: A_i of the row (0 where absent) and which objectives are present.
template <class T>
inline void row_advantages(const Problem& problem, long row, T* a, T* present) {
    load_values(problem.advantages, row * problem.advantages.row, problem.advantages.objective, problem.n, false, a);
    for (int i = 0; i < problem.n; ++i) present[i] = 1;
    if (problem.objective_mask)
        load_values(problem.objective_mask, row * problem.objective_mask.row, problem.objective_mask.objective,
                    problem.n, true, present);
    for (int i = 0; i < problem.n; ++i) {
        const T value = present[i] == 0 ? T(0) : a[i] + 0 * a[i];
        a[i] = problem.noon && value < 0 ? T(0) : value;
    }
}

// One row: its weights (solved on its own sums, or given), then its tokens.
template <class T>
inline void apply_row(const Problem& problem, const Apply& apply, long row, Workspace<T>& w, Partial& partial) {
    const int n = problem.n;
    const long first = problem.begin(row), last = problem.begin(row + 1), step = tile_tokens(n);
    const bool need_ref = apply.kl_coef != 0;
    double* sums = w.sums;
    for (long k = 0; k < statistics_size(n, false); ++k) sums[k] = 0;
    const bool one_tile = last - first <= step;
    // Weights that are known and one result per row: all that the tokens tell is whether one is valid.
    const bool only_count = apply.combined_per_row && !partial.statistics;
    for (long at = first; at < last; at += step) {
        const long count = last - at < step ? last - at : step;
        if (only_count) {
            if (problem.mask) load_tokens(problem, problem.mask, at, count, true, w.scale);
            sums[total_offset(n) + kTokenCount] += problem.mask ? total(w.scale, count) : static_cast<T>(count);
            continue;
        }
        load_tile(problem, at, count, need_ref, w.tile, w.arena);
        add_tile(problem, w, at, apply.pairs, apply.pairs ? partial.statistics : sums);
        if (apply.pairs) add_tile(problem, w, at, false, sums);
    }
    if (!apply.pairs && partial.statistics)
        for (long k = 0; k < statistics_size(n, false); ++k) partial.statistics[k] += sums[k];
    double* c = w.row + 2 * n;
    double optimum = 0;
    const double valid = sums[total_offset(n) + kTokenCount];
    T *values = w.c, *present = w.c + n;
    if (apply.combined_per_row) row_advantages(problem, row, values, present);
    if (apply.weights_per == WeightsPer::sequence) {
        optimum = statistics_weights(sums, n, apply.prior, apply.regularization, w.row, w.row + n, c);
    } else if (apply.weights_per == WeightsPer::token) {  // all tokens of the row have the same bound terms
        for (int i = 0; i < n; ++i) {
            w.row[i] = static_cast<double>(values[i]);
            w.row[n + i] = apply.prior[i];
            c[i] = valid > 0 ? static_cast<double>(present[i]) : 0.0;
        }
        optimum = simplex_row(n, w.row, w.row + n, apply.regularization, -1.0, c);
        partial.optimum += valid * optimum;
        for (int i = 0; i < n; ++i) partial.weights[i] += valid > 0 ? valid * c[i] : 0.0;
    } else {
        given_weights(apply.given, row, n, c);
        for (int i = 0; i < n; ++i) optimum += c[i] * score(sums, n, i);
    }
    double combined = 0;
    for (int i = 0; i < n; ++i) {
        w.weights[i] = static_cast<T>(c[i]);
        if (apply.weights) store(apply.weights, row * n + i, c[i]);
        if (apply.combined_per_row) combined += c[i] * static_cast<double>(values[i]);
    }
    if (apply.combined_per_row) store(apply.combined, row, valid > 0 ? combined : 0.0);
    if (apply.optimum) store(apply.optimum, row, optimum);
    if (apply.combined_per_row && !apply.loss) return;
    for (long at = first; at < last; at += step) {
        if (!one_tile) load_tile(problem, at, last - at < step ? last - at : step, need_ref, w.tile, w.arena);
        apply_tile(problem, apply, w, at, w.weights, partial);
    }
}

// With weights per sequence, or given per row, or one result per row, `first` and `last` are rows.
inline bool by_rows(const Apply& apply) {
    return apply.weights_per == WeightsPer::sequence || apply.given_per_row || apply.combined_per_row;
}

template <class T>
inline void apply_block(const Problem& problem, const Apply& apply, long first, long last, Partial& partial,
                        void* scratch) {
    Workspace<T> w = allocate<T>(problem, scratch);
    if (by_rows(apply)) {
        for (long row = first; row < last; ++row) apply_row(problem, apply, row, w, partial);
        return;
    }
    const bool per_token = apply.weights_per == WeightsPer::token;
    if (!per_token) given_weights(apply.given, 0, problem.n, w.weights);
    const long step = tile_tokens(problem.n);
    for (long at = first; at < last; at += step) {
        load_tile(problem, at, last - at < step ? last - at : step, apply.kl_coef != 0, w.tile, w.arena);
        if (partial.statistics) add_tile(problem, w, at, apply.pairs, partial.statistics);
        if (per_token) {
            partial.optimum += token_weights(problem, apply, w);
            for (int i = 0; i < problem.n; ++i)
                partial.weights[i] += dot(w.c + i * kTileTokens, w.tile.valid, w.tile.padded);
        }
        apply_tile(problem, apply, w, at, per_token ? nullptr : w.weights, partial);
    }
}

PAMA_END
