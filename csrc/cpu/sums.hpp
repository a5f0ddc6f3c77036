// The statistics of one tile: the masked sums of core/statistics.hpp for each objective, accumulated in T within a tile
// and in float64 across tiles.
#pragma once

#include "tile.hpp"

PAMA_BEGIN

// The number of objectives whose fields are summed in one pass over a plain tile, limited by the vector registers.
constexpr int kTogether = PAMA_VECTOR_BYTES == 64 ? 2 : 1;

// Sums the fields of `Count` objectives of a plain tile, except kCount. a, bound: of the first of them; bound receives
// the bound terms if Bound. Prefetches the next tile.
template <bool Noon, bool Bound, int Count, class V = FloatV>
inline void plain_sums(const Tile<float>& tile, const float* a, float* bound, int64_t objective, float* sums) {
    const float *logp = tile.logp, *pos = tile.pos, *neg = tile.neg, *side = tile.side;
    const Ahead ahead = tile.ahead;
    const int64_t padded = tile.padded, stride = tile.stride;
    const V zero{}, one = zero + 1;
    V s[Count][kFields] = {};
    if (padded <= 0) __builtin_unreachable();
    for (int64_t t = 0; t < padded; t += Lanes<float>::count)
        for (int i = 0; i < Count; ++i) {
            prefetch(ahead.at(t, objective + i));
            V(&to)[kFields] = s[i];
            const V raw = load<V>(a + i * stride + t), own = Noon ? max_of(zero, raw) : raw;  // max_of keeps NaN
            const auto positive = raw > zero, kept = !(load<V>(side + t) * own < zero);
            const V factor = Noon ? load<V>(pos + t) : (positive ? load<V>(pos + t) : load<V>(neg + t));
            const V counted = positive ? one : zero;
            const V term = kept ? own : zero;
            to[kBoundSum] += term;
            to[kBoundSquareSum] += term * term;
            to[kLogprobSum] += term * load<V>(logp + t);
            to[kSurrogateSum] += own * factor;
            to[kAdvantageSum] += raw;
            to[kAdvantageSquareSum] += raw * raw;
            to[kPositiveCount] += counted;
            to[kClippedCount] = kept ? to[kClippedCount] + one : to[kClippedCount];
            if constexpr (Bound) store(bound + i * stride + t, term);
        }
    V all[Count * (kFields - 1)];
    float own[Count * (kFields - 1)];
    for (int k = 0; k < Count * (kFields - 1); ++k) all[k] = s[k / (kFields - 1)][k % (kFields - 1) + 1];
    totals<Count*(kFields - 1)>(all, own);
    for (int i = 0; i < Count; ++i) {
        memcpy(sums + i * kFields + 1, own + i * (kFields - 1), sizeof own / Count);
        sums[i * kFields + kClippedCount] = static_cast<float>(padded) - sums[i * kFields + kClippedCount];
    }
}

template <bool Bound>
inline void plain_sums(bool noon, const Tile<float>& tile, int64_t n) {
    for (int64_t i = 0; i < n;) {
        const bool together = i + kTogether <= n;
        const auto sum = together ? (noon ? plain_sums<true, Bound, kTogether> : plain_sums<false, Bound, kTogether>)
                                  : (noon ? plain_sums<true, Bound, 1> : plain_sums<false, Bound, 1>);
        sum(tile, tile.advantages + i * tile.stride, tile.bound + i * tile.stride, i, tile.fields + i * kFields);
        i += together ? kTogether : 1;
    }
}

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
        for (int64_t t = 0, at = i * tile.stride; t < tile.padded; t += Lanes<T>::count, at += Lanes<T>::count) {
            const TokenFactors<V> f = tile_factors(tokens.noon, tile, t);
            V surrogate, bound;
            surrogate_terms(tokens.noon, load<V>(tile.advantages + at), zero, zero, f.grad_pos, f.grad_neg, surrogate,
                            bound);
            if (tile.present) bound = load<V>(tile.present + at) != zero ? bound : zero;
            store(tile.bound + at, bound);
        }
}

// The sum of x y over the tokens of a tile.
template <class T, class V = typename Lanes<T>::V>
inline T dot(const T* x, const T* y, int64_t padded) {
    V s{};
    T sum;
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) s += load<V>(x + t) * load<V>(y + t);
    totals<1>(&s, &sum);
    return sum;
}

// The sums of x_i y over the tokens of a tile, for `Count` arrays x_i, `stride` apart.
template <int Count, class T, class V = typename Lanes<T>::V>
inline void dots(const T* x, int64_t stride, const T* y, int64_t padded, T* sums) {
    V s[Count] = {};
    for (int64_t t = 0; t < padded; t += Lanes<T>::count)
        for (int i = 0; i < Count; ++i) s[i] += load<V>(x + i * stride + t) * load<V>(y + t);
    totals<Count>(s, sums);
}

// Whether the tile must be summed in float64: float32 squares overflow above 1e19 and underflow below 1e-19. fields:
// (n, kFields).
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
    for (int64_t i = 0; i < n; ++i) {
        const float* own = fields + i * kFields;
        if (own[kAdvantageSquareSum] >= tiny && (own[kBoundSquareSum] >= tiny || own[kBoundSum] == 0)) continue;
        unsigned all = 0;
        for (int64_t t = 0; t < tile.count; ++t) {
            unsigned bits;
            memcpy(&bits, tile.advantages + i * tile.stride + t, sizeof bits);
            all |= bits << 1;
        }
        if (all != 0) return true;
    }
    return false;
}
inline bool out_of_range(int64_t, const double*, const Tile<double>&) { return false; }

// Computes the fields of the tile and, if `bound` or if the tile is not plain, the bound terms I in `tile.bound`.
// Returns false if the range of T does not suffice.
template <class T>
inline bool objective_fields(const Tokens& tokens, bool bound, const Tile<T>& tile) {
    const int64_t n = tokens.n;
    if constexpr (sizeof(T) == sizeof(float))
        if (tile.plain) (bound ? plain_sums<true> : plain_sums<false>)(tokens.noon, tile, n);
    for (int64_t i = 0; i < n; ++i) {
        T* const own = tile.fields + i * kFields;
        const T* here = tile.present ? tile.present + i * tile.stride : nullptr;
        if (!tile.plain) {
            const auto sum = tokens.noon ? (here ? objective_sums<true, true, T> : objective_sums<true, false, T>)
                                         : (here ? objective_sums<false, true, T> : objective_sums<false, false, T>);
            sum(tile, tile.advantages + i * tile.stride, here, tile.bound + i * tile.stride, i, own);
        }
        own[kCount] = here ? dot(here, tile.valid, tile.padded) : tile.fields[total_offset(n) + kTokenCount];
    }
    return !out_of_range(n, tile.fields, tile);
}

// Adds the fields and totals of the tile to `sums`. omega: the weight of each of its tokens.
template <class T>
inline void add_fields(const Tokens& tokens, const Tile<T>& tile, double omega, double* PAMA_RESTRICT sums) {
    const int64_t n = tokens.n;
    for (int64_t i = 0; i < n; ++i)
        for (int f = 0; f < kFields; ++f) sums[f * n + i] += omega * static_cast<double>(tile.fields[i * kFields + f]);
    for (int64_t k = total_offset(n); k < total_offset(n) + kTotals; ++k)
        sums[k] += omega * static_cast<double>(tile.fields[k]);
}

constexpr int kPairRows = 4, kPairColumns = PAMA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kOwnPairs = kPairRows * (kPairRows - 1) / 2;

// The sums over the tile of the products of kPairRows rows x and kPairColumns rows y, with all sums in registers.
template <class T, class V = typename Lanes<T>::V>
__attribute__((noinline)) void product_block(const T* const* x, const T* const* y, int64_t padded, T* sums) {
    V s[kPairRows * kPairColumns] = {};
    if (padded <= 0) __builtin_unreachable();
    for (int64_t t = 0; t < padded; t += Lanes<T>::count) {
        V left[kPairRows];
        for (int i = 0; i < kPairRows; ++i) left[i] = load<V>(x[i] + t);
        for (int j = 0; j < kPairColumns; ++j)
            for (int i = 0; i < kPairRows; ++i) s[i * kPairColumns + j] += left[i] * load<V>(y[j] + t);
    }
    totals<kPairRows * kPairColumns>(s, sums);
}

// The same for each pair of rows within a group of kPairRows, for Groups groups of rows.
template <int Groups, class T, class V = typename Lanes<T>::V>
__attribute__((noinline)) void own_products(const T* const* x, int64_t padded, T* sums) {
    V s[Groups * kOwnPairs] = {};
    if (padded <= 0) __builtin_unreachable();
    for (int64_t t = 0; t < padded; t += Lanes<T>::count)
        for (int group = 0, k = 0; group < Groups; ++group) {
            V row[kPairRows];
            for (int i = 0; i < kPairRows; ++i) row[i] = load<V>(x[group * kPairRows + i] + t);
            for (int i = 0; i < kPairRows; ++i)
                for (int j = i + 1; j < kPairRows; ++j, ++k) s[k] += row[i] * row[j];
        }
    totals<Groups * kOwnPairs>(s, sums);
}

// block (n, n) += omega sum_t x_i y_j. If x is y, only where i < j: the diagonal is the sum `field`, and the driver
// copies the other triangle.
template <class T>
inline void add_products(int64_t n, const Tile<T>& tile, double omega, const T* x, const T* y, int field,
                         double* block) {
    const bool symmetric = x == y;
    const auto row = [&](const T* rows, int64_t i) { return rows + (i < n ? i : n - 1) * tile.stride; };
    const auto add = [&](int64_t i, int64_t j, T sum) {
        if (i < n && j < n) block[i * n + j] += omega * static_cast<double>(sum);
    };
    if (symmetric) {
        constexpr int groups = PAMA_VECTOR_BYTES == 64 ? 2 : 1;
        for (int64_t i = 0; i < n; ++i) add(i, i, tile.fields[i * kFields + field]);
        for (int64_t first = 0; first < n; first += groups * kPairRows) {
            const T* rows[groups * kPairRows];
            T sums[groups * kOwnPairs], *sum = sums;
            for (int k = 0; k < groups * kPairRows; ++k) rows[k] = row(x, first + k);
            const bool all = first + kPairRows < n;
            (all ? own_products<groups, T> : own_products<1, T>)(rows, tile.padded, sums);
            for (int64_t i = first; i < (all ? first + groups * kPairRows : first + kPairRows); ++i)
                for (int64_t j = i + 1; (j - first) % kPairRows != 0; ++j) add(i, j, *sum++);
        }
    }
    for (int64_t i = 0; i < n; i += kPairRows)
        for (int64_t j = symmetric ? i + kPairRows : 0; j < n; j += kPairColumns) {
            const T *left[kPairRows], *right[kPairColumns];
            T sums[kPairRows * kPairColumns];
            for (int k = 0; k < kPairRows; ++k) left[k] = row(x, i + k);
            for (int k = 0; k < kPairColumns; ++k) right[k] = row(y, j + k);
            product_block(left, right, tile.padded, sums);
            if (i + kPairRows <= n && j + kPairColumns <= n) {
                for (int64_t k = 0; k < kPairRows; ++k)
                    for (int64_t l = 0; l < kPairColumns; ++l)
                        block[(i + k) * n + j + l] += omega * static_cast<double>(sums[k * kPairColumns + l]);
                continue;
            }
            for (int k = 0; k < kPairRows * kPairColumns; ++k) add(i + k / kPairColumns, j + k % kPairColumns, sums[k]);
        }
}

// Adds the pair statistics of the tile to `sums`.
template <class T>
inline void add_pairs(const Tokens& tokens, const Tile<T>& tile, double omega, double* sums) {
    const int64_t n = tokens.n, padded = tile.padded;
    const auto add = [&](int pair, const T* x, const T* y, int field = kFields) {
        add_products(n, tile, omega, x, y, field, sums + pair_offset(n, pair));
    };
    add(kBoundProduct, tile.bound, tile.bound, kBoundSquareSum);
    add(kAdvantageProduct, tile.advantages, tile.advantages, kAdvantageSquareSum);
    if (!tile.present) return;  // the driver computes the other pair statistics from the fields
    add(kPairCount, tile.present, tile.present, kCount);
    add(kPairAdvantage, tile.advantages, tile.present);
    for (int64_t i = 0; i < n; ++i) {
        T *PAMA_RESTRICT square = tile.squares + i * tile.stride, *PAMA_RESTRICT a = tile.advantages + i * tile.stride;
        for (int64_t t = 0; t < padded; ++t) square[t] = a[t] * a[t];
    }
    add(kPairAdvantageSquare, tile.squares, tile.present);
}

PAMA_END
