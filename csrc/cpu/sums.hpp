// The statistics of one tile: the masked sums of core/statistics.hpp for each objective, accumulated in T within a tile
// and in float64 across tiles.
#pragma once

#include "tile.hpp"

PAMA_BEGIN

// Sums the fields of one objective, except kCount, over the tile. Prefetches the next tile.
template <bool Noon, bool Present, class T, class V = typename Lanes<T>::V>
inline void objective_sums(const Tile<T>& tile, const T* a, const T* present, T* bound, int64_t objective, T* sums) {
    const T *logp = tile.logp, *pos = tile.pos, *neg = tile.neg, *grad_pos = tile.grad_pos, *grad_neg = tile.grad_neg,
            *off_pos = tile.off_pos, *off_neg = tile.off_neg;
    const Ahead ahead = tile.ahead;
    const int64_t padded = tile.padded;
    const V zero{}, unit = zero + 1;
    V s[kFields] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) {
        prefetch(ahead.at(t, objective));
        TokenFactors<V> f;
        f.logp = load<V>(logp + t);
        f.pos = load<V>(pos + t);
        f.grad_pos = load<V>(grad_pos + t);
        f.neg = Noon ? zero : load<V>(neg + t);
        f.grad_neg = Noon ? zero : load<V>(grad_neg + t);
        const TokenCount<V> count{unit, load<V>(off_pos + t), Noon ? zero : load<V>(off_neg + t)};
        const auto here = Present ? load<V>(present + t) != zero : zero == zero;
        store(bound + t, add_token(f, Noon, load<V>(a + t), here, unit, count, s, s));
    }
    totals<kFields - 1>(s + 1, sums + 1);
}

// Computes the bound terms I in `tile.bound`.
template <class T, class V = typename Lanes<T>::V>
inline void bound_terms(const Tokens& tokens, const Tile<T>& tile) {
    const V zero{};
    for (int64_t i = 0; i < tokens.n; ++i)
        for (int64_t t = 0, at = i * kTileTokens; t < tile.padded; t += Lanes<T>::count, at += Lanes<T>::count) {
            V surrogate, bound;
            surrogate_terms(tokens.noon, load<V>(tile.advantages + at), zero, zero, load<V>(tile.grad_pos + t),
                            tokens.noon ? zero : load<V>(tile.grad_neg + t), surrogate, bound);
            if (tile.present) bound = load<V>(tile.present + at) != zero ? bound : zero;
            store(tile.bound + at, bound);
        }
}

// two_totals: the sums of x and of y over the tokens of a tile. dot: the sum of their product.
template <class T, class V = typename Lanes<T>::V>
inline void two_totals(const T* x, const T* y, int64_t padded, T* sums) {
    V s[2] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) {
        s[0] += load<V>(x + t);
        s[1] += load<V>(y + t);
    }
    totals<2>(s, sums);
}
template <class T, class V = typename Lanes<T>::V>
inline T dot(const T* x, const T* y, int64_t padded) {
    V s{};
    T sum;
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) s += load<V>(x + t) * load<V>(y + t);
    totals<1>(&s, &sum);
    return sum;
}

// Whether the tile must be summed in float64: float32 squares overflow above 1e19 and underflow below 1e-19. fields:
// (kFields, n).
inline bool out_of_range(int64_t n, const float* fields, const Tile<float>& tile) {
    unsigned highest = 0;
    for (int64_t k = 0; k < kFields * n; ++k) {
        unsigned bits;
        memcpy(&bits, fields + k, sizeof bits);
        bits &= 0x7fffffff;
        highest = bits > highest ? bits : highest;
    }
    if (highest >= 0x7f800000) return true;
    const float tiny = 0x1p-80f;
    const float *bound = fields + kBoundSum * n, *bound_square = fields + kBoundSquareSum * n,
                *square = fields + kAdvantageSquareSum * n;
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

// Computes the fields and totals of the tile, and the bound terms I in `tile.bound`. Returns false if the range of T
// does not suffice.
template <class T>
inline bool objective_fields(const Tokens& tokens, const Tile<T>& tile) {
    const int64_t n = tokens.n;
    T own[kFields], *const both = tile.fields + total_offset(n);
    two_totals(tile.valid, tile.kl, tile.padded, both);
    for (int64_t i = 0; i < n; ++i) {
        const T* a = tile.advantages + i * kTileTokens;
        const T* here = tile.present ? tile.present + i * kTileTokens : nullptr;
        const auto sum = tokens.noon ? (here ? objective_sums<true, true, T> : objective_sums<true, false, T>)
                                     : (here ? objective_sums<false, true, T> : objective_sums<false, false, T>);
        sum(tile, a, here, tile.bound + i * kTileTokens, i, own);
        own[kCount] = here ? dot(here, tile.valid, tile.padded) : both[kTokenCount];
        for (int f = 0; f < kFields; ++f) tile.fields[f * n + i] = own[f];
    }
    return !out_of_range(n, tile.fields, tile);
}

// Adds the fields and totals of the tile to `sums`. omega: the weight of each of its tokens.
template <class T>
inline void add_fields(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    for (int64_t k = 0; k < statistics_size(tokens.n, false); ++k) sums[k] += omega * tile.fields[k];
}

// The sums of x_i y_j over the tile for kPairRows rows x and kPairColumns rows y, with all of them in registers.
constexpr int64_t kPairRows = 4, kPairColumns = PAMA_VECTOR_BYTES == 64 ? 4 : 2;
template <class T, class V = typename Lanes<T>::V>
inline void product_block(const T* const* x, const T* const* y, int64_t padded, T* sums) {
    V s[kPairRows * kPairColumns] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count)
        for (int64_t i = 0; i < kPairRows; ++i)
            for (int64_t j = 0; j < kPairColumns; ++j) s[i * kPairColumns + j] += load<V>(x[i] + t) * load<V>(y[j] + t);
    totals<kPairRows * kPairColumns>(s, sums);
}

// block (n, n) += omega sum_t x_i y_j; of a symmetric sum, the lower triangle is copied from the upper one.
template <class T>
inline void add_products(int64_t n, int64_t padded, double omega, const T* x, const T* y, double* block) {
    const bool symmetric = x == y;
    const auto row = [n](const T* rows, int64_t i) { return rows + (i < n ? i : n - 1) * kTileTokens; };
    for (int64_t i = 0; i < n; i += kPairRows)
        for (int64_t j = symmetric ? i : 0; j < n; j += kPairColumns) {
            const T *left[kPairRows], *right[kPairColumns];
            T sums[kPairRows * kPairColumns];
            for (int64_t k = 0; k < kPairRows; ++k) left[k] = row(x, i + k);
            for (int64_t k = 0; k < kPairColumns; ++k) right[k] = row(y, j + k);
            product_block(left, right, padded, sums);
            for (int64_t k = 0; k < kPairRows * kPairColumns; ++k) {
                const int64_t to = i + k / kPairColumns, from = j + k % kPairColumns;
                if (to >= n || from >= n || (symmetric && from < to)) continue;
                const double value = omega * static_cast<double>(sums[k]);
                block[to * n + from] += value;
                if (symmetric && from > to) block[from * n + to] += value;
            }
        }
}

// Adds the pair statistics of the tile to `sums`.
template <class T>
inline void add_pairs(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    const int64_t n = tokens.n, padded = tile.padded;
    const auto add = [&](int pair, const T* x, const T* y) {
        add_products(n, padded, omega, x, y, sums + pair_offset(n, pair));
    };
    add(kBoundProduct, tile.bound, tile.bound);
    add(kAdvantageProduct, tile.advantages, tile.advantages);
    if (!tile.present) return;  // the driver computes the other pair statistics from the fields
    add(kPairCount, tile.present, tile.present);
    add(kPairAdvantage, tile.advantages, tile.present);
    for (int64_t i = 0; i < n; ++i) {
        T *PAMA_RESTRICT square = tile.squares + i * kTileTokens, *PAMA_RESTRICT a = tile.advantages + i * kTileTokens;
        for (int64_t t = 0; t < padded; ++t) square[t] = a[t] * a[t];
    }
    add(kPairAdvantageSquare, tile.squares, tile.present);
}

PAMA_END
