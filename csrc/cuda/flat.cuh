// The statistics of contiguous float32 tokens for the common case: all objectives of a token adjacent in memory and
// present, token weights of 1. A thread processes four consecutive tokens at a time and issues all loads before the
// arithmetic.
//
// Float32 sums over kFlatChunk tokens are added over the warp and accumulated in double, one slot per lane. If a sum of
// a warp overflows or underflows in float32, or a number is not finite, the warp restarts in double, in a function that
// is not inlined (flat_exact.cuh).
#pragma once

#include "flat_exact.cuh"

namespace pama {
namespace cuda {

constexpr int kFlatSteps = 16, kFlatChunk = kTogether * kFlatSteps;  // tokens of a thread
static_assert(kFlatChunk * kWarp < 0x10000, "counts of a warp's chunk have 16 bits");

// The limits of a token's factors, combined with the clamp of the log-ratio and with Noon; computed on the host.
struct FlatClip {
    float high, low, dual, log_high, log_low, log_dual, on_neg;
    unsigned off_neg;  // added to the counts for a clipped negative advantage

    FlatClip(const Clip& clip, bool noon) {
        const float limit = static_cast<float>(kMaxLogRatio);
        const ClipIn<float> in(clip);
        high = in.high;
        low = noon ? 0.0f : in.low;
        dual = noon ? 0.0f : in.dual;
        log_high = min_of(in.log_high, limit);
        log_dual = min_of(in.log_dual, limit);
        log_low = max_of(in.log_low, -limit);
        on_neg = noon ? 0.0f : 1.0f;
        off_neg = noon ? 0u : 0x10000u;
    }
};

// Two 16-bit counts in one integer: a clipped objective adds 0x10000, a positive advantage adds 1.
struct FlatFactors {
    float logp, pos, neg, grad_pos, grad_neg, kl;
    unsigned count_pos, count_neg;
};

// `poison` becomes NaN if a number is not finite; the other results are then undefined.
template <bool Weighted>
__device__ inline FlatFactors flat_factors(const FlatClip& clip, bool valid, float logp, float old, float w,
                                           float& poison) {
    constexpr float limit = static_cast<float>(kMaxLogRatio), log2e = 1.4426950408889634f, magic = 12582912.0f;
    const float d = valid ? logp - old : 0.0f;
    poison += 0.0f * d;
    FlatFactors f;
    f.logp = valid ? logp : 0.0f;
    // e^c = 2^k e^r as in core/numbers.hpp.
    const float c = fmaxf(fminf(d, limit), -limit), shifted = c * log2e + magic, k = shifted - magic;
    const float r = (c - k * 0.693145752f) - k * 1.42860677e-6f;
    const float tail = r * r * exponential_series<2, 7>(r);
    unsigned bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = bits * 0x800000u + 0x3f800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    const float u = power * (r + tail) + power;
    f.kl = power * tail + ((power - 1.0f) + (power * r - c));  // without cancellation if power is 1
    const bool off_pos = d > clip.log_high || d<-limit, off_neg = d> clip.log_dual || d < clip.log_low;
    f.pos = fminf(u, clip.high);
    f.neg = fmaxf(fminf(u, clip.dual), clip.low);
    f.grad_pos = off_pos ? 0.0f : 1.0f;
    f.grad_neg = off_neg ? 0.0f : clip.on_neg;
    f.count_pos = off_pos ? 0x10001u : 1u;
    f.count_neg = off_neg ? clip.off_neg : 0u;
    if (Weighted) {
        w = valid ? w : 0.0f;
        poison += 0.0f * w;
        f.pos *= w, f.neg *= w, f.grad_pos *= w, f.grad_neg *= w;
    }
    return f;
}

// Four tokens with the advantages of G objectives; a byte of `mask` for each.
template <int G>
struct FourTokens {
    float logp[kTogether], old[kTogether], w[kTogether], advantages[kTogether * G];
    unsigned mask;
    __device__ bool valid(int u) const { return (mask >> 8 * u & 0xff) != 0; }
};

__device__ inline void load_four(float* to, const float* from) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Loads the advantages with vector loads; all four tokens must exist. Full: the advantages of a token are contiguous
// and at most kGroup.
template <int G, bool Full>
__device__ inline void load_advantages(float* to, const FlatTokens& x, int first, unsigned token) {
    constexpr bool together = Full || G < kGroup;
    const unsigned pitch = static_cast<unsigned>(sizeof(float)) * (together ? G : x.n);
    const char* const from = reinterpret_cast<const char*>(x.advantages + (together ? 0 : first));
    PAMA_UNROLL
    for (int u = 0; u < G; ++u)
        load_four(to + 4 * u,
                  reinterpret_cast<const float*>(together ? from + static_cast<std::uint64_t>(token) * pitch + 16 * u
                                                          : from + static_cast<std::uint64_t>(token + u) * pitch));
}
template <int G>
__device__ inline void gather_advantages(float* to, const FlatTokens& x, int first, unsigned token) {
    PAMA_UNROLL
    for (int u = 0; u < kTogether; ++u) {
        const float* const from = x.advantages + static_cast<int64_t>(x.inside(token + u)) * x.n + first;
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) to[u * G + k] = G < kGroup || first + k < x.n ? from[k] : 0.0f;
    }
}

// Loads a group of four tokens; positions before the first token or after the last one count as masked. Full:
// log-probabilities of both policies, a mask of one-byte elements and at most kGroup objectives are given, importance
// weights are not, and vector loads are possible for all of them.
template <int G, bool Full>
__device__ inline FourTokens<G> load_tokens(const FlatTokens& x, int first, unsigned group) {
    FourTokens<G> t;
    const unsigned token = x.token_of(group);
    if (Full && x.whole(group)) {
        load_four(t.logp, x.logp + token);
        load_four(t.old, x.old + token);
        t.mask = *reinterpret_cast<const unsigned*>(x.mask_bytes + token);
        load_advantages<G, Full>(t.advantages, x, first, token);
        return t;
    }
    PAMA_UNROLL
    for (int u = 0; u < kTogether; ++u) t.logp[u] = t.old[u] = 0.0f, t.w[u] = 1.0f;
    if (!Full && x.vectors && x.whole(group)) {
        load_advantages<G, Full>(t.advantages, x, first, token);
        if (x.logp) {
            load_four(t.logp, x.logp + token);
            load_four(t.old, (x.old ? x.old : x.logp) + token);
        }
        if (x.w) load_four(t.w, x.w + token);
        if (!x.mask || x.mask_bytes) {
            t.mask = x.mask ? *reinterpret_cast<const unsigned*>(x.mask_bytes + token) : 0x01010101u;
            return t;
        }
    } else {
        gather_advantages<G>(t.advantages, x, first, token);
        PAMA_UNROLL
        for (int u = 0; u < kTogether; ++u) {
            const unsigned k = x.inside(token + u);
            if (x.logp) {
                t.logp[u] = x.logp[k];
                t.old[u] = (x.old ? x.old : x.logp)[k];
            }
            if (!Full && x.w) t.w[u] = x.w[k];
        }
    }
    t.mask = 0;
    PAMA_ROLLED
    for (int u = 0; u < kTogether; ++u) t.mask |= x.valid(token + u) ? 1u << 8 * u : 0u;
    return t;
}

// Adds the sums of a chunk over the warp and accumulates them in double, in the lane that owns the slot.
template <int Count>
struct LaneTotals {
    static constexpr int kBatches = (Count + kWarp - 1) / kWarp;
    double total[kBatches] = {};

    __device__ void add(const float (&sums)[Count], int lane) {
        PAMA_UNROLL
        for (int b = 0; b < kBatches; ++b) {
            float values[kWarp];
            PAMA_UNROLL
            for (int k = 0; k < kWarp; ++k) values[k] = b * kWarp + k < Count ? sums[b * kWarp + k] : 0.0f;
            total[b] += b + 1 < kBatches ? transposed_sums(values, lane)
                                         : transposed_sums<kWarp / 2, Count - (kBatches - 1) * kWarp>(values, lane);
        }
    }
    __device__ bool finite() const {
        double poison = 0;
        PAMA_UNROLL
        for (int b = 0; b < kBatches; ++b) poison += 0 * total[b];
        return poison == 0;
    }
    // place(k): the position of sum k in the row.
    template <class Place>
    __device__ void store(double* row, int lane, Place place) const {
        PAMA_UNROLL
        for (int b = 0; b < kBatches; ++b)
            if (b * kWarp + lane < Count) row[place(b * kWarp + lane)] = total[b];
    }
};

// The float32 sums of a thread: the fields from kBoundSum to kAdvantageSquareSum of each objective, then the products
// in the order of Slots, then k3.
template <int G, bool Pairs>
struct FlatSums {
    using S = Slots<G, Pairs>;
    static_assert(kBoundSum == 1 && kAdvantageSquareSum == 6, "what is counted in integers comes before and after");
    static constexpr int kProduct = kAdvantageSquareSum * G, kKl = kProduct + S::kAll - S::kProduct, kAll = kKl + 1;

    __device__ static constexpr int field(int f, int k) { return S::field(f - 1, k); }
    __device__ static constexpr int product(int kind, int i, int j) {
        return kProduct + S::product(kind, i, j) - S::kProduct;
    }
    __device__ static int slot(int k) {
        return k < kProduct ? k + G : k < kKl ? k - kProduct + S::kProduct : S::kTotal + kKlSum;
    }
};

constexpr float kTiny = 0x1p-80f;  // a smaller sum of squares may have lost terms to underflow

// Writes the sums of the fields of a group of objectives to `row`, the row of this warp.
template <int G, bool Pairs, bool Full>
__device__ inline bool add_flat(const FlatTokens& x, const FlatClip& clip, int first, unsigned group, double* row) {
    using S = Slots<G, Pairs>;
    using F = FlatSums<G, Pairs>;
    const int lane = threadIdx.x % kWarp;
    LaneTotals<F::kAll> totals;
    unsigned tokens = 0, positive = 0, clipped = 0;  // the last two are for the objective lane % 4
    bool held = true;
    float poison = 0;
    constexpr bool kAhead = Full && !Pairs;  // load tokens while those before them are added; else registers spill
    FourTokens<G> next = {};
    if (kAhead && group - lane < x.groups) next = load_tokens<G, Full>(x, first, group);
    for (unsigned leader = group - lane; leader < x.groups;) {
        float sums[F::kAll] = {};
        unsigned counts[G] = {}, advantage_bits[G] = {}, bound_bits[G] = {}, chunk_tokens = 0;
        PAMA_ROLLED
        for (int step = 0; step < kFlatSteps && leader < x.groups; ++step, leader += x.stride) {
            const FourTokens<G> t = kAhead ? next : load_tokens<G, Full>(x, first, leader + lane);
            if (kAhead && leader + x.stride < x.groups) next = load_tokens<G, Full>(x, first, leader + x.stride + lane);
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const bool valid = t.valid(u);
                const FlatFactors f = flat_factors<!Full>(clip, valid, t.logp[u], t.old[u], t.w[u], poison);
                chunk_tokens += valid ? 1u : 0u;
                sums[F::kKl] += f.kl;
                float own[G], bound[G];
                PAMA_UNROLL
                for (int k = 0; k < G; ++k) {
                    const float a = valid ? t.advantages[u * G + k] : 0.0f;
                    const bool up = a > 0;
                    const float i = a * (up ? f.grad_pos : f.grad_neg);
                    own[k] = a, bound[k] = i;
                    sums[F::field(kBoundSum, k)] += i;
                    sums[F::field(kBoundSquareSum, k)] += i * i;
                    sums[F::field(kLogprobSum, k)] += i * f.logp;
                    sums[F::field(kSurrogateSum, k)] += a * (up ? f.pos : f.neg);
                    sums[F::field(kAdvantageSum, k)] += a;
                    sums[F::field(kAdvantageSquareSum, k)] += a * a;
                    if (up) counts[k] += f.count_pos;
                    if (a < 0) counts[k] += f.count_neg;
                    advantage_bits[k] |= bits_of(a);
                    bound_bits[k] |= bits_of(i);
                    PAMA_UNROLL
                    for (int j = 0; Pairs && j < k; ++j) {
                        sums[F::product(kBoundProduct, j, k)] += bound[j] * i;
                        sums[F::product(kAdvantageProduct, j, k)] += own[j] * a;
                    }
                }
            }
        }
        unsigned mine = 0;
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            held = held && (sums[F::field(kBoundSquareSum, k)] >= kTiny || bound_bits[k] << 1 == 0);
            held = held && (sums[F::field(kAdvantageSquareSum, k)] >= kTiny || advantage_bits[k] << 1 == 0);
            const unsigned count = __reduce_add_sync(kAllLanes, counts[k]);
            mine = lane % 4 == k ? count : mine;
        }
        positive += mine & 0xffff;
        clipped += mine >> 16;
        tokens += __reduce_add_sync(kAllLanes, chunk_tokens);
        totals.add(sums, lane);
    }
    if (__any_sync(kAllLanes, !(held && poison == 0 && totals.finite()))) return false;
    totals.store(row, lane, [](int k) { return F::slot(k); });
    if (lane < G) {
        row[S::field(kCount, lane)] = tokens;
        row[S::field(kPositiveCount, lane)] = positive;
        row[S::field(kClippedCount, lane)] = clipped;
    }
    if (lane == 0) row[S::kTotal + kTokenCount] = tokens;
    return true;
}

// Products of two groups of objectives: 16 of bound terms, then 16 of advantages.
template <bool Full>
__device__ inline bool multiply_flat(const FlatTokens& x, const FlatClip& clip, const Layer& layer, unsigned group,
                                     double* row) {
    constexpr int G = kGroup;
    const int lane = threadIdx.x % kWarp;
    LaneTotals<2 * G * G> totals;
    bool held = true;
    float poison = 0;
    for (unsigned leader = group - lane; leader < x.groups;) {
        float sums[2 * G * G] = {}, most[4 * G] = {};
        PAMA_ROLLED
        for (int step = 0; step < kFlatSteps && leader < x.groups; ++step, leader += x.stride) {
            const FourTokens<G> t = load_tokens<G, Full>(x, layer.first, leader + lane);
            float others[kTogether * G];
            if ((Full || x.vectors) && x.whole(leader + lane))
                load_advantages<G, Full>(others, x, layer.second, x.token_of(leader + lane));
            else
                gather_advantages<G>(others, x, layer.second, x.token_of(leader + lane));
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const bool valid = t.valid(u);
                const FlatFactors f = flat_factors<!Full>(clip, valid, t.logp[u], t.old[u], t.w[u], poison);
                float own[2 * G], bound[2 * G];
                PAMA_UNROLL
                for (int k = 0; k < 2 * G; ++k) {
                    const float a = valid ? (k < G ? t.advantages[u * G + k] : others[u * G + k - G]) : 0.0f;
                    own[k] = a;
                    bound[k] = a * (a > 0 ? f.grad_pos : f.grad_neg);
                    most[k] = fmaxf(most[k], fabsf(a));
                    most[2 * G + k] = fmaxf(most[2 * G + k], fabsf(bound[k]));
                    poison += 0.0f * a;
                }
                PAMA_UNROLL
                for (int i = 0; i < G; ++i) {
                    PAMA_UNROLL
                    for (int j = 0; j < G; ++j) {
                        sums[i * G + j] += bound[i] * bound[G + j];
                        sums[(G + i) * G + j] += own[i] * own[G + j];
                    }
                }
            }
        }
        PAMA_UNROLL
        for (int k = 0; k < 4 * G; ++k) held = held && (most[k] == 0 || most[k] >= 0x1p-40f);
        totals.add(sums, lane);
    }
    if (__any_sync(kAllLanes, !(held && poison == 0 && totals.finite()))) return false;
    totals.store(row, lane, [](int k) { return k; });
    return true;
}

}  // namespace cuda
}  // namespace pama
