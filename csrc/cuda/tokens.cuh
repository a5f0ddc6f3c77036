// Sums over tokens: of the fields of a group of objectives and the products within it, of the products of two groups,
// and of the pair fields that depend on presence.
//
// A thread sums at most kChunk tokens in T before it adds them to double sums; if a sum overflows or underflows in T,
// the thread restarts in double.
#pragma once

#include <cmath>
#include <type_traits>

#include "load.cuh"
#include "slots.cuh"

namespace pama {
namespace cuda {

constexpr int kChunk = 32;  // tokens

// TokenInput: the values of a token except its advantages. ObjectiveInput: the advantages of G objectives. A masked
// token is not valid and may have any values.
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
    DeviceTokens p;
    Walk walk;
    const double* counts;  // valid tokens of each sequence; null: its length, or unused
    bool row_mean;         // the token weight omega is 1 / counts
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

// With Noon a negative advantage counts as 0: its factors become 0, or NaN if the token has a NaN.
template <class T>
__device__ inline TokenFactors<T> factors(const ClipIn<T>& clip, bool noon, const TokenInput<T>& x) {
    TokenFactors<T> f = token_factors(clip, x.valid, x.logp, x.old, x.w);
    f.neg = noon ? T(0) * f.neg : f.neg;
    f.grad_neg = noon ? T(0) * f.grad_neg : f.grad_neg;
    f.off_neg = f.off_neg && !noon;
    return f;
}

// Returns false if a sum of some chunk overflowed or underflowed in T; `all` is then undefined.
template <class T, int G, bool Pairs, class Source>
__device__ inline bool add_tokens(const Source& source, const ClipIn<T>& clip, bool noon, int first, int64_t thread,
                                  Values<Slots<G, Pairs>::kAll>& all) {
    using S = Slots<G, Pairs>;
    constexpr bool kChunks = sizeof(T) < sizeof(double);
    const int64_t end = source.end();
    typename Source::Cursor at;
    source.start(at, thread, end);
    double counts[G][kFields] = {}, tokens = 0;
    bool held = true;
    do {
        T sums[G][kFields] = {}, products[kProductKinds][S::kEach + 1] = {}, kl = 0;
        T most_advantage[G] = {}, most_bound[G] = {};
        PAMA_ROLLED
        for (int j = 0; (!kChunks || j < kChunk) && source.index(at) < end; ++j) {
            const TokenInput<T> x = source.template token<T>(at, end);
            const ObjectiveInput<T, G> input = source.template objectives<T, G>(at, end, x.valid, first);
            source.next(at, end);
            const TokenFactors<T> f = factors(clip, noon, x);
            const double one = static_cast<double>(x.omega);
            const TokenCount<double> count{one, f.off_pos ? one : 0.0, f.off_neg ? one : 0.0};
            kl += x.omega * f.kl;
            tokens += x.valid ? one : 0.0;
            T own[G], bound[G];
            PAMA_UNROLL
            for (int k = 0; k < G; ++k) {
                const bool here = input.present[k];
                const T a = raw_advantage(input.advantages[k], here);
                const T i = add_token(f, false, a, here, x.omega, count, sums[k], counts[k]);
                own[k] = x.omega * a;
                bound[k] = x.omega * i;
                PAMA_UNROLL
                for (int other = 0; Pairs && other < k; ++other) {
                    products[kBoundProduct][S::product(0, other, k) - S::kProduct] += bound[other] * i;
                    products[kAdvantageProduct][S::product(0, other, k) - S::kProduct] += own[other] * a;
                }
                most_advantage[k] = std::fmax(most_advantage[k], std::fabs(a));
                most_bound[k] = std::fmax(most_bound[k], std::fabs(i));
            }
        }
        // Add the sums in T to double sums. float32 squares overflow above 1e19 and underflow below 1e-19.
        T poison = T(0) * kl;
        const T tiny = static_cast<T>(0x1p-80);
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            held = held && (sums[k][kBoundSquareSum] >= tiny || most_bound[k] == T(0));
            held = held && (sums[k][kAdvantageSquareSum] >= tiny || most_advantage[k] == T(0));
            PAMA_UNROLL
            for (int f = 0; f < kFields; ++f) {
                if (counts_tokens(f)) continue;
                poison += T(0) * sums[k][f];
                all[S::field(f, k)] += static_cast<double>(sums[k][f]);
            }
        }
        PAMA_UNROLL
        for (int kind = 0; kind < kProductKinds; ++kind) {
            PAMA_UNROLL
            for (int pair = 0; pair < S::kEach; ++pair) {
                poison += T(0) * products[kind][pair];
                all[S::kProduct + kind * S::kEach + pair] += static_cast<double>(products[kind][pair]);
            }
        }
        all[S::kTotal + kKlSum] += static_cast<double>(kl);
        held = held && (!kChunks || poison == T(0));
    } while (kChunks && source.index(at) < end);
    all[S::kTotal + kTokenCount] = tokens;
    PAMA_UNROLL
    for (int k = 0; k < G; ++k) {
        PAMA_UNROLL
        for (int f = 0; f < kFields; ++f) {
            if (counts_tokens(f)) all[S::field(f, k)] = counts[k][f];
        }
    }
    return held || !kChunks;
}

// Products of two groups of objectives, in double: 16 of bound terms, then 16 of advantages. Only the terms, not their
// products, must be in the range of T.
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

// One tile of a pair field that depends on presence: omega times A'_i, A'_i^2 or 1 where j is present.
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
