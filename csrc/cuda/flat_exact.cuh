// The layout of contiguous float32 tokens, and their sums in double for values out of the range of float32.
#pragma once

#include "tokens.cuh"

namespace pama {
namespace cuda {

constexpr int kTogether = 4;  // consecutive tokens: a group

// Groups of four tokens begin at addresses that are aligned for vector loads: the first group begins `skip` tokens
// before the first token. Absent tensors are null.
struct FlatTokens {
    const float *logp, *old, *w, *advantages;
    Array mask;
    const unsigned char* mask_bytes;  // a mask of one-byte elements, read as one aligned word per group
    bool vectors;                     // logp, old, w and advantages are aligned for vectors
    int n, skip;
    unsigned count, groups, stride;   // tokens; groups; threads of a layer
    unsigned first_whole, all_whole;  // groups in which all four tokens exist: the first one, and their number

    // Computed modulo 2^32: positions before the first token become larger than the last one.
    __device__ unsigned token_of(unsigned group) const { return group * kTogether - skip; }
    __device__ bool whole(unsigned group) const { return group - first_whole < all_whole; }
    __device__ unsigned inside(unsigned token) const { return token < count ? token : 0; }
    __device__ bool valid(unsigned token) const { return token < count && (!mask || load_truth(mask, token)); }
};
constexpr int64_t kMostFlat = (int64_t{1} << 32) - (int64_t{1} << 20);  // tokens

// The sums of one objective, and its products with a second objective.
struct ExactSums {
    double bound = 0, bound_square = 0, bound_logp = 0, surrogate = 0, advantage = 0, advantage_square = 0;
    double kl = 0, bound_product = 0, advantage_product = 0, tokens = 0, positive = 0, clipped = 0;
};

__device__ inline ExactSums exact_sums(const FlatTokens& x, const Clip& clip, bool noon, int i, int j, unsigned group) {
    const ClipIn<double> limits(clip);
    ExactSums s;
    PAMA_ROLLED
    for (; group < x.groups; group += x.stride) {
        PAMA_ROLLED
        for (int u = 0; u < kTogether; ++u) {
            const unsigned token = x.token_of(group) + u;
            if (!x.valid(token)) continue;
            const int64_t at = token;
            const double logp = x.logp ? x.logp[at] : 0, old = x.old ? x.old[at] : logp;
            const TokenFactors<double> f = factors(limits, noon, {logp, old, x.w ? x.w[at] : 1.0, 1.0, true});
            const auto advantage = [&](int k) {
                return raw_advantage(k < x.n ? static_cast<double>(x.advantages[at * x.n + k]) : 0.0, true);
            };
            const auto of_sign = [](double a, double pos, double neg) {
                return a < 0 ? 0 * pos + a * neg : a * pos + 0 * neg;
            };
            const double a = advantage(i), b = advantage(j), bound = of_sign(a, f.grad_pos, f.grad_neg);
            s.bound += bound;
            s.bound_square += bound * bound;
            s.bound_logp += bound * f.logp;
            s.surrogate += of_sign(a, f.pos, f.neg);
            s.advantage += a;
            s.advantage_square += a * a;
            s.kl += f.kl;
            s.bound_product += bound * of_sign(b, f.grad_pos, f.grad_neg);
            s.advantage_product += a * b;
            s.tokens += 1;
            s.positive += a > 0 ? 1 : 0;
            s.clipped += (a > 0 && f.off_pos) || (a < 0 && f.off_neg) ? 1 : 0;
        }
    }
    return s;
}

// Writes all slots of a group of objectives, or of the products of two groups, to `row`. The warp reads its tokens once
// per objective, or once per pair.
__device__ PAMA_NOINLINE void add_exact(const FlatTokens& x, const Clip& clip, bool noon, bool pairs, int objectives,
                                        const Layer& layer, unsigned group, double* row) {
    const bool tile = layer.first != layer.second, writes = threadIdx.x % kWarp == 0;
    const int each = pairs ? objectives * (objectives - 1) / 2 : 0, totals = kFields * objectives;
    int pair = totals + kTotals;  // slots in the order of Slots
    PAMA_ROLLED
    for (int i = 0; i < objectives; ++i) {
        PAMA_ROLLED
        for (int j = tile ? 0 : i; j < (tile || pairs ? objectives : i + 1); ++j) {
            const ExactSums s = exact_sums(x, clip, noon, layer.first + i, layer.second + j, group);
            const auto put = [&](int slot, double value) {
                const double sum = warp_sum(value);
                if (writes) row[slot] = sum;
            };
            if (tile || i != j) {
                const int at = tile ? i * objectives + j : pair++;
                put(at, s.bound_product);
                put(at + (tile ? objectives * objectives : each), s.advantage_product);
                continue;
            }
            const double fields[kFields] = {s.tokens,           s.bound,     s.bound_square,
                                            s.bound_logp,       s.surrogate, s.advantage,
                                            s.advantage_square, s.positive,  s.clipped};
            PAMA_UNROLL
            for (int field = 0; field < kFields; ++field) put(field * objectives + i, fields[field]);
            put(totals + kTokenCount, s.tokens);
            put(totals + kKlSum, s.kl);
        }
    }
}

}  // namespace cuda
}  // namespace pama
