// Computes weights, combined advantages, loss and gradient, and the statistics in the same pass, for blocks of tokens
// or rows.
#pragma once

#include "../core/weights.hpp"
#include "token_weights.hpp"

PAMA_BEGIN

// The sum of squares; recomputed in double if the sum in T is out of range.
template <class T>
inline double square_sum(const T* x, int64_t count, T sum) {
    const T tiny = static_cast<T>(0x1p-80);
    if (sizeof(T) == sizeof(double) || (sum >= tiny && T(0) * sum == 0)) return static_cast<double>(sum);
    double exact = 0;
    for (int64_t t = 0; t < count; ++t) exact += static_cast<double>(x[t]) * static_cast<double>(x[t]);
    return exact;
}

// Where the objective weights of a tile are: `fixed` (n), those of each token in w.c, or applied already (Noon), so
// that w.combined contains sum_i c_i max(A_i, 0).
enum class Weighting { fixed, own, applied };

// Computes combined advantages, gradient and loss of one tile. omega: the weight of each of its tokens. Objective
// weights are divided by `masses` (one per token, or null), and are 0 where that is 0. NaN weights do not affect masked
// tokens.
template <bool Noon, Weighting Weights, class T, class V = typename Lanes<T>::V>
inline void apply_weights(const Pass& pass, const Workspace<T>& w, int64_t first, double omega, const T* fixed,
                          const T* masses, Partial& partial) {
    const Tile<T> tile = w.tile;
    const Outputs& outputs = pass.outputs;
    const T* const own = w.c;
    T *const combined = w.combined, *const gradient = w.gradient;
    const int n = pass.tokens.n;
    const bool loss = static_cast<bool>(outputs.loss), penalty = outputs.kl_coef != 0;
    const bool first_pass = !partial.sums;  // otherwise the sums have prefetched the next tile
    const int64_t size = size_of(outputs.gradient.dtype);
    const char* next_gradient = outputs.gradient
                                    ? static_cast<const char*>(outputs.gradient.data) + (first + tile.count) * size
                                    : reinterpret_cast<const char*>(gradient);
    const V zero{}, coefficient = zero + static_cast<T>(outputs.kl_coef),
                    by = zero + static_cast<T>(pass.scale * omega), slope_coefficient = coefficient * by;
    V sums[2] = {};
    for (int64_t t = 0; t < tile.padded; t += Lanes<T>::count) {
        V up = zero, down = zero;
        if constexpr (Weights == Weighting::applied) up = load<V>(combined + t);
        for (int i = 0; i < n && Weights != Weighting::applied; ++i) {
            if (first_pass) prefetch(tile.ahead.at(t, i));
            const V a = load<V>(tile.advantages + i * tile.stride + t), positive = max_of(zero, a);
            const V weight = Weights == Weighting::own ? load<V>(own + i * tile.stride + t) : zero + fixed[i];
            up += weight * positive;
            if constexpr (!Noon) down += weight * (a - positive);
        }
        if (masses) {
            const V mass = load<V>(masses + t);
            up = mass == 0 ? zero : up / mass;
            down = mass == 0 ? zero : down / mass;
        }
        const auto masked = load<V>(tile.valid + t) == 0;
        up = masked ? zero : up;
        down = masked ? zero : down;
        store(combined + t, up + down);
        sums[1] += (up + down) * (up + down);
        if (!loss) continue;
        const TokenFactors<V> f = tile_factors(Noon, tile, t);
        V gain, slope;
        loss_terms(Noon, up, down, f, by, gain, slope);
        if (penalty) {
            gain -= coefficient * load<V>(tile.ref_kl + t);
            slope -= slope_coefficient * load<V>(tile.ref_slope + t);
        }
        sums[0] -= by * gain + zero * slope;  // a slope out of range: NaN, so that the driver computes in double
        prefetch_for_writing(next_gradient + t * size);
        store(gradient + t, masked ? zero : -slope);
    }
    T result[2];
    totals<2>(sums, result);
    partial.loss += static_cast<double>(result[0]);
    if (outputs.advantages) partial.square += omega * square_sum(combined, tile.padded, result[1]);
}

// Computes and stores the results of one tile. fixed (n): objective weights of all its tokens, or null to use w.c or,
// if `applied`, w.combined. divisor (n): the preference; the weights of a token are divided by its sum over the
// objectives present there. Null: no division.
template <class T>
inline void apply_tile(const Pass& pass, Workspace<T>& w, int64_t first, double omega, const T* fixed, const T* divisor,
                       Partial& partial, bool applied = false) {
    const T* masses = nullptr;
    if (divisor && w.tile.present) {
        presence_masses(w.tile, pass.tokens.n, divisor, w.shares);
        masses = w.shares;
    }
    constexpr Weighting known = Weighting::fixed, own = Weighting::own;
    const auto results = applied            ? apply_weights<true, Weighting::applied, T>
                         : pass.tokens.noon ? (fixed ? apply_weights<true, known, T> : apply_weights<true, own, T>)
                                            : (fixed ? apply_weights<false, known, T> : apply_weights<false, own, T>);
    results(pass, w, first, omega, fixed, masses, partial);
    if (pass.outputs.advantages) store_values(pass.outputs.advantages, first, w.tile.count, w.combined);
    if (pass.outputs.gradient) store_values(pass.outputs.gradient, first, w.tile.count, w.gradient);
}

// The results of tokens that are masked.
inline void store_masked(const Pass& pass, int64_t first, int64_t count) {
    store_zeros(pass.outputs.advantages, first, count);
    store_zeros(pass.outputs.gradient, first, count);
}

// Computes the weights c (n) of a row from its own sums, or loads given ones. Returns the optimum. work: 3 n doubles.
inline double row_weights(const Pass& pass, int64_t row, const double* sums, double* c, double* work) {
    const int n = pass.tokens.n;
    double optimum = 0;
    if (pass.known) {
        load_values(pass.weights, row * pass.weights.row, pass.weights.objective, n, false, c);
        for (int i = 0; i < n; ++i) optimum += c[i] * score(sums, n, i);
    } else {
        for (int i = 0; i < n; ++i) c[i] = sums[kCount * n + i] > 0 ? 1 : 0;
        optimum = statistics_weights(pass.rule, sums, n, pass.preference, work, work + n, c);
    }
    store_values(pass.outputs.weights, row * n, n, c);
    store_value(pass.outputs.optimum, row, optimum);
    return optimum;
}

// Processes one row: its weights, then the results of its tokens.
template <class T>
inline void apply_row(const Pass& pass, int64_t row, Workspace<T>& w, Partial& partial) {
    const Tokens& tokens = pass.tokens;
    const int n = tokens.n;
    const int64_t first = tokens.begin(row), last = tokens.begin(row + 1);
    const double omega = pass.token_weight(row);
    const bool need_ref = pass.outputs.kl_coef != 0;
    int64_t tiles = 0;
    double* sums = w.sums;
    const int64_t size = statistics_size(n, false);
    for (int64_t k = 0; k < size; ++k) sums[k] = 0;
    const auto add = [&](int64_t at, int64_t count, int64_t next, double) {
        load_tile(tokens, at, count, next, need_ref, w.tile, w.arena);
        ++tiles;
        const bool pairs = partial.sums && pass.outputs.pairs;
        with_fields(tokens, w, at, false, pairs, [&](const auto& tile) {
            add_fields(tokens, tile, 1.0, sums);
            if (pairs) add_pairs(tokens, tile, omega, partial.sums);
        });
    };
    for_each_tile(tokens, nullptr, first, last, add, [](int64_t, int64_t) {});
    for (int64_t k = 0; partial.sums && k < size; ++k) partial.sums[k] += omega * sums[k];
    double* c = w.row + 3 * n;
    row_weights(pass, row, sums, c, w.row);
    row_preference(n, pass.preference, sums + kCount * n, w.row);
    for (int i = 0; i < n; ++i) {
        w.weights[i] = static_cast<T>(c[i]);
        w.divisor[i] = static_cast<T>(w.row[i]);
    }
    const auto apply = [&](int64_t at, int64_t count, int64_t next, double) {
        if (tiles > 1) load_tile(tokens, at, count, next, need_ref, w.tile, w.arena);
        apply_tile(pass, w, at, omega, w.weights, pass.known ? nullptr : w.divisor, partial);
    };
    for_each_tile(tokens, nullptr, first, last, apply,
                  [&](int64_t at, int64_t count) { store_masked(pass, at, count); });
}

PAMA_END
