// The statistics of one tile: the masked sums of core/statistics.hpp for each objective, accumulated in T within a tile
// and in float64 across tiles.
#pragma once

#include "split.hpp"

PAMA_BEGIN

// The number of objectives whose fields are summed in one pass over a plain tile, limited by the vector registers:
// twice as many where the bound terms are the advantages (unclipped_sums).
constexpr int kTogether = PAMA_VECTOR_BYTES == 64 ? 2 : 1;

// Sums the fields of `Count` objectives over tokens of a plain tile, except kCount; `first` is the first of them.
// Stores the bound terms if Bound. Prefetches what is `ahead`.
template <bool Noon, bool Bound, int Count, class V = FloatV>
inline void plain_sums(const TokenSet<float>& tokens, const Ahead ahead, int64_t first, float* sums) {
    const float *a = tokens.advantages + first * tokens.stride, *logp = tokens.logp, *pos = tokens.pos,
                *neg = tokens.neg, *side = tokens.side;
    float* const bound = tokens.bound + first * tokens.stride;
    const int64_t padded = tokens.padded, stride = tokens.stride;
    const V zero{}, one = zero + 1;
    V s[Count][kFields] = {};
    if (padded <= 0) __builtin_unreachable();
    for (int64_t t = 0; t < padded; t += Lanes<float>::count)
        for (int i = 0; i < Count; ++i) {
            prefetch(ahead.at(t, first + i));
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

// Adds to the fields of `Count` objectives, which are the sums over tile.clipped, those over the other tokens, without
// Noon: their bound terms are their advantages. Stores these terms, 0 for the clipped tokens. The products of the pairs
// prefetch the next tile. Squares are added in the order of those products (Products::sum).
template <int Count, class V = FloatV>
inline void unclipped_sums(const Tile<float>& tile, int64_t first, float* sums) {
    const float *a = tile.advantages + first * tile.stride, *logp = tile.logp, *ratio = tile.ratio, *side = tile.side;
    float* const bound = tile.bound + first * tile.stride;
    const int64_t padded = tile.padded, stride = tile.stride;
    const V zero{}, one = zero + 1;
    V sum[Count] = {}, square[Count] = {}, with_logp[Count] = {}, surrogate[Count] = {}, positive[Count] = {};
    if (padded <= 0) __builtin_unreachable();
    for (int64_t t = 0; t < padded; t += Lanes<float>::count) {
        const V logp_here = load<V>(logp + t), ratio_here = load<V>(ratio + t);
        const auto here = load<V>(side + t) == zero;
        for (int i = 0; i < Count; ++i) {
            const V term = here ? load<V>(a + i * stride + t) : zero;
            sum[i] += term;
            square[i] += term * term;
            with_logp[i] += term * logp_here;
            surrogate[i] += term * ratio_here;
            positive[i] = term > zero ? positive[i] + one : positive[i];
            store(bound + i * stride + t, term);
        }
    }
    const TokenSet<float>& clipped = tile.clipped;
    V all[6 * Count];
    float own[6 * Count];
    for (int i = 0; i < Count; ++i) {
        V bound_square = square[i], advantage_square = square[i];
        for (int64_t t = 0, at = (first + i) * clipped.stride; t < clipped.padded; t += Lanes<float>::count) {
            const V term = load<V>(clipped.bound + at + t), raw = load<V>(clipped.advantages + at + t);
            bound_square += term * term;
            advantage_square += raw * raw;
        }
        const V each[] = {sum[i], with_logp[i], surrogate[i], positive[i], bound_square, advantage_square};
        for (int k = 0; k < 6; ++k) all[6 * i + k] = each[k];
    }
    totals<6 * Count>(all, own);
    for (int i = 0; i < Count; ++i) {
        const float* const from = own + 6 * i;
        float* const to = sums + i * kFields;
        to[kBoundSum] += from[0];
        to[kAdvantageSum] += from[0];
        to[kLogprobSum] += from[1];
        to[kSurrogateSum] += from[2];
        to[kPositiveCount] += from[3];
        to[kBoundSquareSum] = from[4];
        to[kAdvantageSquareSum] = from[5];
    }
}

// Calls sum(constant number of objectives, first of them) for all n.
template <int Together, class Sum>
inline void for_objectives(int64_t n, Sum sum) {
    int64_t i = 0;
    for (; i + Together <= n; i += Together) sum(std::integral_constant<int, Together>{}, i);
    for (; i < n; ++i) sum(std::integral_constant<int, 1>{}, i);
}

template <bool Noon, bool Bound>
inline void plain_fields(const TokenSet<float>& tokens, const Ahead& ahead, int64_t n, float* fields) {
    for_objectives<kTogether>(
        n, [&](auto count, int64_t i) { plain_sums<Noon, Bound, count>(tokens, ahead, i, fields + i * kFields); });
}

// bound: whether the bound terms are needed.
inline void plain_fields(bool noon, bool bound, const Tile<float>& tile, const Ahead& ahead, int64_t n) {
    if (!tile.split) {
        const auto sum = noon ? (bound ? plain_fields<true, true> : plain_fields<true, false>)
                              : (bound ? plain_fields<false, true> : plain_fields<false, false>);
        return sum({tile.padded, tile.stride, tile.logp, tile.pos, tile.neg, tile.side, tile.advantages, tile.bound},
                   ahead, n, tile.fields);
    }
    if (tile.clipped.padded > 0)
        plain_fields<false, true>(tile.clipped, nothing_ahead(tile.advantages), n, tile.fields);
    else
        memset(tile.fields, 0, static_cast<size_t>(n * kFields) * sizeof(float));
    for_objectives<2 * kTogether>(
        n, [&](auto count, int64_t i) { unclipped_sums<count>(tile, i, tile.fields + i * kFields); });
}

// Sums the fields of one objective, except kCount, over the tile. Prefetches what is `ahead`.
template <bool Noon, bool Present, class T, class V = typename Lanes<T>::V>
inline void objective_sums(const Tile<T>& tile, const Ahead ahead, int64_t objective, T* sums) {
    const T *logp = tile.logp, *pos = tile.pos, *neg = tile.neg, *grad_pos = tile.grad_pos, *grad_neg = tile.grad_neg,
            *off_pos = tile.off_pos, *off_neg = tile.off_neg;
    const T *a = tile.advantages + objective * tile.stride, *present = tile.present + objective * tile.stride;
    T* const bound = tile.bound + objective * tile.stride;
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

// Computes the fields of the tile. bound: the bound terms I of all tokens are needed in `tile.bound`; pairs: those that
// add_pairs needs. Returns false if the range of T does not suffice.
template <class T>
inline bool objective_fields(const Tokens& tokens, bool bound, bool pairs, Tile<T>& tile) {
    const int64_t n = tokens.n;
    const Ahead ahead = tile.ahead;
    split_tile(tokens.n, tile.plain && pairs && !bound && !tokens.noon, tile);
    if constexpr (sizeof(T) == sizeof(float))
        if (tile.plain) plain_fields(tokens.noon, bound || pairs, tile, ahead, n);
    for (int64_t i = 0; i < n; ++i) {
        T* const own = tile.fields + i * kFields;
        const T* here = tile.present ? tile.present + i * tile.stride : nullptr;
        if (!tile.plain) {
            const auto sum = tokens.noon ? (here ? objective_sums<true, true, T> : objective_sums<true, false, T>)
                                         : (here ? objective_sums<false, true, T> : objective_sums<false, false, T>);
            sum(tile, ahead, i, own);
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

PAMA_END
