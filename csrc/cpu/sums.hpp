// The statistics of one tile: per objective the masked sums of core/statistics.hpp, in T within the tile and
// float64 across tiles.
#pragma once

#include "tile.hpp"

PAMA_BEGIN

// Sums of one objective, in the order of `Field` from kBoundSum on. Where an objective is absent the factors of its
// token may be NaN: their products are taken out by `present`. Asks for the next tile on the way.
template <bool Noon, bool Present, class T, class V = typename Lanes<T>::V>
inline void objective_sums(const Tile<T>& tile, const T* a, const T* present, T* bound, int64_t objective, T* sums) {
    constexpr int64_t width = sizeof(V) / sizeof(T);
    const T *logp = tile.logp, *pos = tile.pos, *neg = tile.neg, *grad_pos = tile.grad_pos, *grad_neg = tile.grad_neg,
            *off_pos = tile.off_pos, *off_neg = tile.off_neg;
    const Ahead ahead = tile.ahead;
    const int64_t padded = tile.padded;
    const V zero{}, unit = zero + 1;
    V s[kFields - 1] = {};
    for (int64_t t = 0; t < padded; t += width) {
        ask(ahead.at(t, objective));
        const V x = load<V>(a + t), one = x > 0 ? unit : zero;
        V i, g, clipped = one * load<V>(off_pos + t);
        surrogate_terms(Noon, x, load<V>(pos + t), Noon ? zero : load<V>(neg + t), load<V>(grad_pos + t),
                        Noon ? zero : load<V>(grad_neg + t), g, i);
        if constexpr (!Noon) clipped += x < 0 ? load<V>(off_neg + t) : zero;
        if constexpr (Present) {
            const auto absent = load<V>(present + t) == 0;
            i = absent ? zero : i;
            g = absent ? zero : g;
        }
        store(bound + t, i);
        s[0] += i;
        s[1] += i * i;
        s[2] += i * load<V>(logp + t);
        s[3] += g;
        s[4] += x;
        s[5] += x * x;
        s[6] += one;
        s[7] += clipped;
    }
    totals(s, sums);
}

// Sums over a tile's tokens of x and y, or of their product.
template <class T, class V = typename Lanes<T>::V>
inline void two_totals(const T* x, const T* y, int64_t padded, T (&sums)[2]) {
    V s[2] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) {
        s[0] += load<V>(x + t);
        s[1] += load<V>(y + t);
    }
    totals(s, sums);
}
template <class T, class V = typename Lanes<T>::V>
inline T dot(const T* x, const T* y, int64_t padded) {
    V s[2] = {};
    T sums[2];
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) s[0] += load<V>(x + t) * load<V>(y + t);
    totals(s, sums);
    return sums[0];
}

template <class T>
inline T total(const T* PAMA_RESTRICT x, int64_t count) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < count; ++t) sum += x[t];
    return sum;
}

// Float32 sums of squares overflow above 1e19 and vanish below 1e-19: such a tile is summed in float64.
// fields: (kFields - 1, n), from kBoundSum on.
inline bool out_of_range(int64_t n, const float* fields, const Tile<float>& tile) {
    unsigned highest = 0;
    for (int64_t k = 0; k < (kFields - 1) * n; ++k) {
        unsigned bits;
        memcpy(&bits, fields + k, sizeof bits);
        bits &= 0x7fffffff;
        highest = bits > highest ? bits : highest;
    }
    if (highest >= 0x7f800000) return true;
    const float tiny = 0x1p-80f;
    const float *bound = fields, *bound_square = bound + n, *square = fields + (kAdvantageSquareSum - 1) * n;
    for (int64_t i = 0; i < n; ++i) {
        if (square[i] >= tiny && (bound_square[i] >= tiny || bound[i] == 0)) continue;
        unsigned all = 0;
        for (int64_t t = 0; t < tile.count; ++t) {
            unsigned bits;
            memcpy(&bits, tile.advantages + i * kTileTokens + t, sizeof bits);
            all |= bits << 1;
        }
        if (all != 0) return true;
    }
    return false;
}
inline bool out_of_range(int64_t, const double*, const Tile<double>&) { return false; }

// The fields of the tile, and I in `tile.bound`. Returns false if T's range does not suffice.
template <class T>
inline bool objective_fields(const Tokens& tokens, const Tile<T>& tile) {
    const int64_t n = tokens.n;
    for (int64_t i = 0; i < n; ++i) {
        const T* a = tile.advantages + i * kTileTokens;
        const T* here = tile.present ? tile.present + i * kTileTokens : nullptr;
        const auto sum = tokens.noon ? (here ? objective_sums<true, true, T> : objective_sums<true, false, T>)
                                     : (here ? objective_sums<false, true, T> : objective_sums<false, false, T>);
        T own[kFields - 1];
        sum(tile, a, here, tile.bound + i * kTileTokens, i, own);
        for (int f = 0; f < kFields - 1; ++f) tile.fields[f * n + i] = own[f];
    }
    return !out_of_range(n, tile.fields, tile);
}

// Adds the tile's fields, whose tokens have the weight `omega`, to `sums`.
template <class T>
inline void add_fields(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    const int64_t n = tokens.n;
    T both[2];
    two_totals(tile.valid, tile.kl, tile.padded, both);
    const double valid = both[0];
    for (int64_t i = 0; i < n; ++i)
        sums[kCount * n + i] += omega * (tile.present ? total(tile.present + i * kTileTokens, tile.count) : valid);
    for (int64_t k = 0; k < (kFields - 1) * n; ++k) sums[kBoundSum * n + k] += omega * tile.fields[k];
    sums[total_offset(n) + kTokenCount] += omega * valid;
    sums[total_offset(n) + kKlSum] += omega * both[1];
}

// The pairs, likewise.
template <class T>
inline void add_pairs(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    const int64_t n = tokens.n, padded = tile.padded;
    const auto add = [&](int pair, const T* x, const T* y, bool symmetric) {
        double* block = sums + pair_offset(n, pair);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = symmetric ? i : 0; j < n; ++j) {
                const double value = omega * dot(x + i * kTileTokens, y + j * kTileTokens, padded);
                block[i * n + j] += value;
                if (symmetric && j > i) block[j * n + i] += value;
            }
    };
    add(kBoundProduct, tile.bound, tile.bound, true);
    add(kAdvantageProduct, tile.advantages, tile.advantages, true);
    if (!tile.present) return;  // the driver fills the rest from the totals
    add(kPairCount, tile.present, tile.present, true);
    add(kPairAdvantage, tile.advantages, tile.present, false);
    for (int64_t i = 0; i < n; ++i) {
        T *PAMA_RESTRICT square = tile.squares + i * kTileTokens, *PAMA_RESTRICT a = tile.advantages + i * kTileTokens;
        for (int64_t t = 0; t < padded; ++t) square[t] = a[t] * a[t];
    }
    add(kPairAdvantageSquare, tile.squares, tile.present, false);
}

PAMA_END
