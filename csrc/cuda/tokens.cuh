// Sums over tokens: of the fields of a group of objectives and the products within it, of the products of two groups,
// and of the pair fields of presence.
//
// A thread adds at most kChunk tokens in T before they go to double; where T did not hold them, it starts again in
// double.
#pragma once

#include <cmath>
#include <type_traits>

#include "../core/token.hpp"
#include "load.cuh"
#include "slots.cuh"

namespace pama {
namespace cuda {

constexpr int kChunk = 32;  // tokens

// What a token has beside its advantages; then those of G objectives. Masked: not valid, and any values.
template <class T>
struct TokenInput {
    T logp, old, w, omega;
    bool valid;
};
template <class T, int G>
struct ObjectiveInput {
    T advantages[G];
    bool present[G];
};

// Tokens of any layout and dtype.
struct AnyTokens {
    static constexpr bool kPresence = true;  // or weights of tokens other than 1
    static constexpr int kTogether = 1;
    DeviceTokens p;
    Walk walk;
    const double* counts;  // valid tokens of each sequence; null: its length, or not asked for
    bool row_mean;         // omega is 1 over them
    using Cursor = Position;

    __device__ int64_t end() const { return walk.last(p); }
    __device__ void start(Cursor& at, int64_t first, int64_t end) const { at.start(p, walk, first, end); }
    __device__ void next(Cursor& at, int64_t end) const { at.next(p, walk, end); }
    __device__ static int64_t index(const Cursor& at) { return at.index; }

    template <class T>
    __device__ TokenInput<T> token(const Cursor& at, int64_t end) const {
        TokenInput<T> x{0, 0, 1, 1, false};
        if (at.index >= end) return x;
        x.valid = !p.mask || load_truth(p.mask, at.in(p.mask));
        if (p.logprobs) x.logp = x.old = load_number<T>(p.logprobs, at.in(p.logprobs));
        if (p.old_logprobs) x.old = load_number<T>(p.old_logprobs, at.in(p.old_logprobs));
        if (p.importance_weights) x.w = load_number<T>(p.importance_weights, at.in(p.importance_weights));
        if (row_mean) {
            const double count = counts ? counts[at.row] : static_cast<double>(p.length(at.row));
            x.omega = x.valid ? static_cast<T>(1 / count) : T(0);
        }
        return x;
    }

    template <class T, int G>
    __device__ ObjectiveInput<T, G> objectives(const Cursor& at, int64_t end, bool valid, int first) const {
        ObjectiveInput<T, G> x;
        const bool inside = at.index < end;
        const int64_t base = at.in(p.advantages), where = at.in(p.objective_mask);
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            const int64_t i = first + k;
            const bool here = inside && i < p.n;
            x.advantages[k] = here ? load_number<T>(p.advantages, base + i * p.advantages.objective) : T(0);
            x.present[k] = here && valid &&
                           (!p.objective_mask || load_truth(p.objective_mask, where + i * p.objective_mask.objective));
        }
        return x;
    }
};

// With Noon a negative advantage counts as 0: as if its factors were 0, or NaN where the token is bad.
template <class T>
__device__ inline TokenFactors<T> factors(const ClipIn<T>& clip, bool noon, const TokenInput<T>& x) {
    TokenFactors<T> f = token_factors(clip, x.valid, x.logp, x.old, x.w);
    f.neg = noon ? T(0) * f.neg : f.neg;
    f.grad_neg = noon ? T(0) * f.grad_neg : f.grad_neg;
    f.off_neg = f.off_neg && !noon;
    return f;
}

// False: T did not hold the sums of some chunk, and `all` is of no use.
template <class T, int G, bool Pairs, class Source>
__device__ inline bool add_tokens(const Source& source, const ClipIn<T>& clip, bool noon, int first, int64_t thread,
                                  Values<Slots<G, Pairs>::kAll>& all) {
    using S = Slots<G, Pairs>;
    constexpr bool kChunks = sizeof(T) < sizeof(double), kIntegers = !Source::kPresence;
    constexpr int kTogether = kChunks ? Source::kTogether : 1;
    using Counter = typename std::conditional<kIntegers, unsigned, double>::type;
    const int64_t end = source.end();
    typename Source::Cursor at;
    source.start(at, thread, end);
    Counter counts[S::kAll - S::kCounts] = {};
    bool held = true;
    do {
        T sums[S::kCounts] = {}, most_advantage[G] = {}, most_bound[G] = {};
        PAMA_ROLLED
        for (int j = 0; (!kChunks || j < kChunk) && source.index(at) < end; j += kTogether) {
            TokenInput<T> token[kTogether];
            ObjectiveInput<T, G> input[kTogether];
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                token[u] = source.template token<T>(at, end);
                input[u] = source.template objectives<T, G>(at, end, token[u].valid, first);
                source.next(at, end);
            }
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const TokenInput<T>& x = token[u];
                const TokenFactors<T> f = factors(clip, noon, x);
                const T omega = kIntegers ? T(1) : x.omega;
                const Counter one = static_cast<Counter>(omega);
                sums[S::kKl] += omega * f.kl;
                counts[S::kTokens - S::kCounts] += x.valid ? one : Counter(0);
                T own[G], bound[G];
                PAMA_UNROLL
                for (int k = 0; k < G; ++k) {
                    const bool here = input[u].present[k];
                    const T a = raw_advantage(input[u].advantages[k], here), up = a < 0 ? T(0) : a, down = a - up;
                    T i = up * f.grad_pos + down * f.grad_neg, g = up * f.pos + down * f.neg;
                    if (Source::kPresence) {  // else absent is masked, and all factors are 0
                        i = here ? i : T(0);
                        g = here ? g : T(0);
                    }
                    own[k] = omega * a;
                    bound[k] = omega * i;
                    sums[0 * G + k] += bound[k];
                    sums[1 * G + k] += bound[k] * i;
                    sums[2 * G + k] += bound[k] * f.logp;
                    sums[3 * G + k] += omega * g;
                    sums[4 * G + k] += own[k];
                    sums[5 * G + k] += own[k] * a;
                    if (Pairs) {
                        int pair = S::kProduct + k - 1;  // of 0 and k; of j and k it is G - 2 - j further on
                        PAMA_UNROLL
                        for (int j = 0; j < k; ++j) {
                            sums[pair] += bound[j] * i;
                            sums[pair + S::kEach] += own[j] * a;
                            pair += G - 2 - j;
                        }
                    }
                    most_advantage[k] = std::fmax(most_advantage[k], std::fabs(a));
                    most_bound[k] = std::fmax(most_bound[k], std::fabs(i));
                    if (!kIntegers) counts[k] += here ? one : Counter(0);
                    counts[G + k] += a > 0 ? one : Counter(0);
                    counts[2 * G + k] += (a > 0 && f.off_pos) || (a < 0 && f.off_neg) ? one : Counter(0);
                }
            }
        }
        if (kChunks) {
            // float32 squares overflow above 1e19 and vanish below 1e-19.
            T poison = T(0);
            PAMA_UNROLL
            for (int k = 0; k < S::kCounts; ++k) poison += T(0) * sums[k];
            held = held && poison == T(0);
            const T tiny = static_cast<T>(0x1p-80);
            PAMA_UNROLL
            for (int k = 0; k < G; ++k) {
                held = held && (sums[1 * G + k] >= tiny || most_bound[k] == T(0));
                held = held && (sums[5 * G + k] >= tiny || most_advantage[k] == T(0));
            }
        }
        PAMA_UNROLL
        for (int k = 0; k < S::kCounts; ++k) all[k] += static_cast<double>(sums[k]);
    } while (kChunks && source.index(at) < end);
    PAMA_UNROLL
    for (int k = S::kCounts; k < S::kAll; ++k) {
        const bool count = k < S::kCounts + G;  // all tokens, where every objective is present
        all[k] = static_cast<double>(counts[kIntegers && count ? S::kTokens - S::kCounts : k - S::kCounts]);
    }
    return held;
}

// Products of two groups of objectives, in double: 16 of bound terms, then 16 of advantages. T need only hold the
// terms.
template <class T, class Source>
__device__ inline bool multiply_tokens(const Source& source, const ClipIn<T>& clip, bool noon, const Layer& layer,
                                       int64_t thread, Values<2 * kGroup * kGroup>& all) {
    constexpr int G = kGroup;
    const int64_t end = source.end();
    typename Source::Cursor at;
    source.start(at, thread, end);
    bool held = true;
    PAMA_ROLLED
    while (source.index(at) < end) {
        const TokenInput<T> x = source.template token<T>(at, end);
        const TokenFactors<T> f = factors(clip, noon, x);
        double own[2][G], bound[2][G];
        PAMA_UNROLL
        for (int side = 0; side < 2; ++side) {
            const int first = side == 0 ? layer.first : layer.second;
            const ObjectiveInput<T, G> input = source.template objectives<T, G>(at, end, x.valid, first);
            PAMA_UNROLL
            for (int k = 0; k < G; ++k) {
                const bool here = input.present[k];
                const T a = raw_advantage(input.advantages[k], here), i = bound_term(f, false, a, here);
                held = held && T(0) * i == T(0);
                own[side][k] = static_cast<double>(side == 0 ? x.omega * a : a);
                bound[side][k] = static_cast<double>(side == 0 ? x.omega * i : i);
            }
        }
        PAMA_UNROLL
        for (int i = 0; i < G; ++i) {
            PAMA_UNROLL
            for (int j = 0; j < G; ++j) {
                all[i * G + j] += bound[0][i] * bound[1][j];
                all[(G + i) * G + j] += own[0][i] * own[1][j];
            }
        }
        source.next(at, end);
    }
    return held;
}

// One tile of one pair field of presence: omega times A'_i, A'_i^2 or 1 where j is present.
template <class Source>
__device__ inline void pair_tokens(const Source& source, const Layer& layer, int64_t thread,
                                   Values<kGroup * kGroup>& all) {
    constexpr int G = kGroup;
    const int64_t end = source.end();
    typename Source::Cursor at;
    source.start(at, thread, end);
    PAMA_ROLLED
    while (source.index(at) < end) {
        const TokenInput<double> token = source.template token<double>(at, end);
        const auto x = source.template objectives<double, G>(at, end, token.valid, layer.first);
        const auto y = source.template objectives<double, G>(at, end, token.valid, layer.second);
        PAMA_UNROLL
        for (int i = 0; i < G; ++i) {
            const double a = raw_advantage(x.advantages[i], x.present[i]);
            const double here = x.present[i] ? 1.0 : 0.0;
            const double value = layer.kind == kPairCount ? here : layer.kind == kPairAdvantage ? a : a * a;
            PAMA_UNROLL
            for (int j = 0; j < G; ++j) all[i * G + j] += token.omega * value * (y.present[j] ? 1.0 : 0.0);
        }
        source.next(at, end);
    }
}

}  // namespace cuda
}  // namespace pama
