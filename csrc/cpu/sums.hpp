// The statistics of one tile: per objective the masked sums of core/statistics.hpp, in T within the tile and
// float64 across tiles.
#pragma once

#include "tile.hpp"

PAMA_BEGIN

// Sums of one objective, in the order of `Field` from kBoundSum on. Where an objective is absent the factors of its
// token may be NaN: their products are taken out by `present`.
template <bool Noon, bool Present, class T>
inline void objective_sums(const Tile<T>& tile, const T* PAMA_RESTRICT a, const T* PAMA_RESTRICT present,
                           T* PAMA_RESTRICT bound, T* sums) {
    const T *PAMA_RESTRICT logp = tile.logp, *PAMA_RESTRICT pos = tile.pos, *PAMA_RESTRICT neg = tile.neg,
                           *PAMA_RESTRICT grad_pos = tile.grad_pos, *PAMA_RESTRICT grad_neg = tile.grad_neg,
                           *PAMA_RESTRICT off_pos = tile.off_pos, *PAMA_RESTRICT off_neg = tile.off_neg;
    T s1 = 0, s2 = 0, sl = 0, sg = 0, sa = 0, sa2 = 0, positive = 0, clipped = 0;
#pragma omp simd reduction(+ : s1, s2, sl, sg, sa, sa2, positive, clipped)
    for (long t = 0; t < tile.count; ++t) {
        const T up = a[t] < 0 ? T(0) : a[t], down = a[t] - up;
        const T one = a[t] > 0 ? T(1) : T(0), other = a[t] < 0 ? T(1) : T(0);
        T i = up * grad_pos[t], g = up * pos[t];
        if constexpr (!Noon) {
            i += down * grad_neg[t];
            g += down * neg[t];
        }
        if constexpr (Present) {
            i = present[t] != 0 ? i : T(0);
            g = present[t] != 0 ? g : T(0);
        }
        bound[t] = i;
        s1 += i;
        s2 += i * i;
        sl += i * logp[t];
        sg += g;
        sa += a[t];
        sa2 += a[t] * a[t];
        positive += one;
        clipped += one * off_pos[t] + (Noon ? T(0) : other * off_neg[t]);
    }
    const T all[] = {s1, s2, sl, sg, sa, sa2, positive, clipped};
    for (int f = 0; f < kFields - 1; ++f) sums[f] = all[f];
}

// Not inlined: GCC 12 gives the vectors up where it is.
template <class T>
__attribute__((noinline)) T dot(const T* PAMA_RESTRICT x, const T* PAMA_RESTRICT y, long count) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < count; ++t) sum += x[t] * y[t];
    return sum;
}

template <class T>
inline T total(const T* PAMA_RESTRICT x, long count) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < count; ++t) sum += x[t];
    return sum;
}

// Float32 sums of squares overflow above 1e19 and vanish below 1e-19: such a tile is summed in float64.
inline bool out_of_range(const float* sums, const float* a, long count) {
    float poison = 0;
    for (int f = 0; f < kFields - 1; ++f) poison += 0.0f * sums[f];
    if (poison != 0) return true;
    const float tiny = 0x1p-80f;
    if (sums[kAdvantageSquareSum - 1] >= tiny && (sums[kBoundSquareSum - 1] >= tiny || sums[kBoundSum - 1] == 0))
        return false;
    unsigned bits = 0;
    for (long t = 0; t < count; ++t) {
        unsigned value;
        memcpy(&value, a + t, 4);
        bits |= value << 1;
    }
    return bits != 0;
}
inline bool out_of_range(const double*, const double*, long) { return false; }

// Adds the tile to `sums`; `tile.bound` receives I. Returns false, adding nothing, if T's range does not suffice.
template <class T>
inline bool add_sums(const Problem& problem, const Tile<T>& tile, bool pairs, double* sums) {
    const long n = problem.n, count = tile.count;
    T *bound = tile.bound, *squares = tile.squares, *fields = tile.fields;
    bool in_range = true;
    for (long i = 0; i < n; ++i) {
        const T* a = tile.advantages + i * kTileTokens;
        const T* here = tile.present ? tile.present + i * kTileTokens : nullptr;
        const auto sum = problem.noon ? (here ? objective_sums<true, true, T> : objective_sums<true, false, T>)
                                      : (here ? objective_sums<false, true, T> : objective_sums<false, false, T>);
        sum(tile, a, here, bound + i * kTileTokens, fields + i * kFields);
        in_range = in_range && !out_of_range(fields + i * kFields, a, count);
    }
    if (!in_range) return false;
    const double tokens = total(tile.valid, count);
    for (long i = 0; i < n; ++i) {
        sums[kCount * n + i] += tile.present ? total(tile.present + i * kTileTokens, count) : tokens;
        for (int f = 1; f < kFields; ++f) sums[f * n + i] += fields[i * kFields + f - 1];
    }
    sums[total_offset(n) + kTokenCount] += tokens;
    sums[total_offset(n) + kKlSum] += total(tile.kl, count);
    if (!pairs) return true;
    const auto add = [&](int pair, const T* x, const T* y, bool symmetric) {
        double* block = sums + pair_offset(n, pair);
        for (long i = 0; i < n; ++i)
            for (long j = symmetric ? i : 0; j < n; ++j) {
                const double value = dot(x + i * kTileTokens, y + j * kTileTokens, count);
                block[i * n + j] += value;
                if (symmetric && j > i) block[j * n + i] += value;
            }
    };
    add(kBoundProduct, bound, bound, true);
    add(kAdvantageProduct, tile.advantages, tile.advantages, true);
    if (!tile.present) return true;  // the driver fills the rest from the totals
    add(kPairCount, tile.present, tile.present, true);
    add(kPairAdvantage, tile.advantages, tile.present, false);
    for (long i = 0; i < n; ++i) {
        T *PAMA_RESTRICT square = squares + i * kTileTokens, *PAMA_RESTRICT a = tile.advantages + i * kTileTokens;
        for (long t = 0; t < count; ++t) square[t] = a[t] * a[t];
    }
    add(kPairAdvantageSquare, squares, tile.present, false);
    return true;
}

PAMA_END
