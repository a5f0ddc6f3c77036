// The statistics of core/statistics.hpp, and the weights of the batch from them, in one launch.
//
// A block adds up its share of the tokens for a group of objectives (blockIdx.y) and writes the sums to slots of its
// own; the last block to finish adds the slots in order and solves. A thread adds at most kChunk tokens in T before
// they go to double; where T did not hold them, the thread starts again in double.
#pragma once

#include "../core/token.hpp"
#include "load.cuh"
#include "solve.cuh"

namespace pama {
namespace cuda {

constexpr int kBlocksPerProcessor = 3;
constexpr int kGroup = 4;    // objectives of one thread
constexpr int kChunk = 32;   // tokens
constexpr int kSummed = 6;   // fields of ObjectiveSums
constexpr int kCounted = 3;  // count, positive, clipped

struct StatisticsTask {
    Tokens tokens;
    Walk walk;
    bool vectors;  // the advantages of a token lie together, aligned to kGroup
    bool pairs;
    double *partials, *sums;
    unsigned* counter;
    Solve solve;
};

// Pairs are added in tiles of kGroup x kGroup, one tile of one kind per layer.
PAMA_HD inline int groups_of(int n) { return (n + kGroup - 1) / kGroup; }
PAMA_HD inline int pair_kinds(bool presence) { return presence ? kPairs : kPairCount; }

template <class T, int G>
struct TokenInput {
    T logp, old, w, advantages[G];
    unsigned present;  // bits
    bool valid;
};

// Objectives first ... first + G - 1 of one token.
template <class T, bool F32, int G>
__device__ inline TokenInput<T, G> load_token(const StatisticsTask& task, const Position& at, bool inside, int first) {
    const Tokens& p = task.tokens;
    TokenInput<T, G> x;
    x.logp = x.old = 0;
    x.w = 1;
    x.present = 0;
    x.valid = inside && (!p.mask || load_truth(p.mask, at.in(p.mask)));
    PAMA_UNROLL
    for (int k = 0; k < G; ++k) x.advantages[k] = 0;
    if (!inside) return x;
    if (p.logprobs) x.logp = x.old = load_number<T, F32>(p.logprobs, at.in(p.logprobs));
    if (p.old_logprobs) x.old = load_number<T, F32>(p.old_logprobs, at.in(p.old_logprobs));
    if (p.importance_weights) x.w = load_number<T, F32>(p.importance_weights, at.in(p.importance_weights));
    const long base = at.in(p.advantages) + first * p.advantages.objective;
    if (F32 && G == 4 && task.vectors) {
        const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(p.advantages.data) + base);
        const float parts[] = {v.x, v.y, v.z, v.w};
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) x.advantages[k] = static_cast<T>(parts[k % 4]);
    } else if (F32 && G == 2 && task.vectors) {
        const float2 v = *reinterpret_cast<const float2*>(static_cast<const float*>(p.advantages.data) + base);
        x.advantages[0] = static_cast<T>(v.x);
        x.advantages[G - 1] = static_cast<T>(v.y);
    } else {
        PAMA_UNROLL
        for (int k = 0; k < G; ++k)
            if (first + k < p.n) x.advantages[k] = load_number<T, F32>(p.advantages, base + k * p.advantages.objective);
    }
    const long where = p.objective_mask ? at.in(p.objective_mask) + first * p.objective_mask.objective : 0;
    PAMA_UNROLL
    for (int k = 0; k < G; ++k) {
        const bool here = first + k < p.n && x.valid &&
                          (!p.objective_mask || load_truth(p.objective_mask, where + k * p.objective_mask.objective));
        x.present |= here ? 1u << k : 0u;
    }
    return x;
}

// What one thread has added up.
template <int G>
struct Accumulated {
    double sums[kSummed * G] = {}, kl = 0;
    unsigned count[G] = {}, positive[G] = {}, clipped[G] = {}, tokens = 0;

    template <class T>
    __device__ void add(int k, const ObjectiveSums<T>& s) {
        sums[0 * G + k] += static_cast<double>(s.bound);
        sums[1 * G + k] += static_cast<double>(s.bound_square);
        sums[2 * G + k] += static_cast<double>(s.bound_logp);
        sums[3 * G + k] += static_cast<double>(s.surrogate);
        sums[4 * G + k] += static_cast<double>(s.advantage);
        sums[5 * G + k] += static_cast<double>(s.advantage_square);
    }
};

// False: T did not hold the sums of some chunk, and `all` is of no use.
template <class T, bool F32, int G>
__device__ inline bool add_tokens(const StatisticsTask& task, int first, Accumulated<G>& all) {
    constexpr bool kChunks = sizeof(T) < sizeof(double);
    constexpr int kTogether = !kChunks ? 1 : G <= 2 ? 4 : 2;  // loads in flight
    const bool noon = task.tokens.noon;
    const ClipIn<T> clip(task.tokens.clip);
    const long end = task.walk.last(task.tokens);
    Position at;
    at.start(task.tokens, task.walk, static_cast<long>(blockIdx.x) * kThreads + threadIdx.x, end);
    bool held = true;
    do {
        ObjectiveSums<T> sums[G];
        T kl = 0;
        unsigned advantages = 0;  // bits: one was not 0
        PAMA_ROLLED
        for (int j = 0; (!kChunks || j < kChunk) && at.index < end; j += kTogether) {
            TokenInput<T, G> input[kTogether];
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                input[u] = load_token<T, F32, G>(task, at, at.index < end, first);
                at.next(task.tokens, task.walk, end);
            }
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const TokenInput<T, G>& x = input[u];
                const TokenFactors<T> f = token_factors(clip, x.valid, x.logp, x.old, x.w);
                kl += f.kl;
                all.tokens += x.valid;
                PAMA_UNROLL
                for (int k = 0; k < G; ++k) {
                    const bool here = x.present >> k & 1;
                    const T a = raw_advantage(x.advantages[k], here);
                    sums[k].add(f, noon, a, here);
                    advantages |= a != 0 ? 1u << k : 0u;
                    all.count[k] += here;
                    all.positive[k] += a > 0;
                    all.clipped[k] += (a > 0 && f.off_pos) || (!noon && a < 0 && f.off_neg);
                }
            }
        }
        all.kl += static_cast<double>(kl);
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            held = held && (!kChunks || sums[k].in_range(advantages >> k & 1));
            all.add(k, sums[k]);
        }
    } while (kChunks && at.index < end);
    return held;
}

// Slot `k` of a thread's sums as an index of the statistics; -1 where there is no such objective.
template <int G>
PAMA_HD inline long statistics_index(int slot, long n, int first) {
    static_assert(kCount == 0 && kBoundSum == 1 && kAdvantageSquareSum == kSummed && kPositiveCount == kSummed + 1);
    if (slot >= (kSummed + kCounted) * G)
        return first == 0 ? total_offset(n) + (slot == (kSummed + kCounted) * G ? kTokenCount : kKlSum) : -1;
    const int i = first + slot % G, k = slot / G;
    const int field = k < kSummed ? kBoundSum + k : (k == kSummed ? kCount : k);
    return i < n ? field * n + i : -1;
}

// The sums of the block's tokens and objectives to its slots.
template <class T, bool F32, int G>
__device__ inline void statistics_layer(const StatisticsTask& task, int group) {
    constexpr int kSlots = (kSummed + kCounted) * G + kTotals, kDoubles = kSummed * G + 1;
    const int first = group * G, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Accumulated<G> all;
    if (!add_tokens<T, F32, G>(task, first, all)) {
        all = {};
        add_tokens<double, F32, G>(task, first, all);
    }

    using Table = double[kWarps][kSlots];
    PAMA_SHARED(Table, table);
    double values[kWarp] = {};
    PAMA_UNROLL
    for (int k = 0; k < kSummed * G; ++k) values[k] = all.sums[k];
    values[kDoubles - 1] = all.kl;
    const double sum = transposed_sums(values, lane);
    if (lane < kSummed * G) table[warp][lane] = sum;
    if (lane == kDoubles - 1) table[warp][kSlots - 1] = sum;
    PAMA_UNROLL
    for (int k = 0; k < G; ++k) {
        const unsigned counts[] = {__reduce_add_sync(kAllLanes, all.count[k]),
                                   __reduce_add_sync(kAllLanes, all.positive[k]),
                                   __reduce_add_sync(kAllLanes, all.clipped[k])};
        if (lane == 0)
            for (int c = 0; c < kCounted; ++c) table[warp][(kSummed + c) * G + k] = counts[c];
    }
    const unsigned tokens = __reduce_add_sync(kAllLanes, all.tokens);
    if (lane == 0) table[warp][kSlots - 2] = tokens;
    __syncthreads();
    for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += table[w][slot];
        const long index = statistics_index<G>(slot, task.tokens.n, first);
        if (index >= 0) task.partials[index * gridDim.x + blockIdx.x] = total;
    }
}

// One tile of one kind of pairs, in double.
__device__ inline void pairs_layer(const StatisticsTask& task, int layer) {
    constexpr int G = kGroup;
    const Tokens& p = task.tokens;
    const int groups = groups_of(p.n), kind = layer / (groups * groups), tile = layer % (groups * groups);
    const int first = tile / groups * G, second = tile % groups * G;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const ClipIn<double> clip(p.clip);
    const long end = task.walk.last(p);
    Position at;
    at.start(p, task.walk, static_cast<long>(blockIdx.x) * kThreads + threadIdx.x, end);
    double values[kWarp] = {};
    while (at.index < end) {
        const TokenInput<double, G> x = load_token<double, false, G>(task, at, true, first);
        const TokenInput<double, G> y = load_token<double, false, G>(task, at, true, second);
        const TokenFactors<double> f = token_factors(clip, x.valid, x.logp, x.old, x.w);
        const auto value = [&](const TokenInput<double, G>& t, int k, bool left) {
            const bool here = t.present >> k & 1;
            const double a = raw_advantage(t.advantages[k], here);
            if (kind == kBoundProduct) return bound_term(f, p.noon, a, here);
            if (kind == kPairCount || (!left && kind != kAdvantageProduct)) return here ? 1.0 : 0.0;
            return kind == kPairAdvantageSquare ? a * a : a;
        };
        PAMA_UNROLL
        for (int i = 0; i < G; ++i) PAMA_UNROLL
        for (int j = 0; j < G; ++j) values[i * G + j] += value(x, i, true) * value(y, j, false);
        at.next(p, task.walk, end);
    }
    using Table = double[kWarps][G * G];
    PAMA_SHARED(Table, table);
    const double sum = transposed_sums(values, lane);
    if (lane < G * G) table[warp][lane] = sum;
    __syncthreads();
    for (int slot = threadIdx.x; slot < G * G; slot += kThreads) {
        const int i = first + slot / G, j = second + slot % G;
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += table[w][slot];
        if (i < p.n && j < p.n)
            task.partials[(pair_offset(p.n, kind) + static_cast<long>(i) * p.n + j) * gridDim.x + blockIdx.x] = total;
    }
}

// The last block: slots to sums, a warp for each.
__device__ inline void add_partials(const StatisticsTask& task) {
    const long n = task.tokens.n, lane = threadIdx.x % kWarp;
    const bool presence = static_cast<bool>(task.tokens.objective_mask);
    const long size = task.pairs ? pair_offset(n, pair_kinds(presence)) : statistics_size(n, false);
    for (long index = threadIdx.x / kWarp; index < size; index += kWarps) {
        double sum = 0;
        for (long block = lane; block < gridDim.x; block += kWarp)
            sum += __ldcg(task.partials + index * gridDim.x + block);
        sum = warp_sum(sum);
        if (lane == 0) task.sums[index] = sum;
    }
    __syncthreads();
    if (!task.pairs || presence) return;
    // Where every objective is present everywhere, the other pairs follow from the single sums.
    for (long k = threadIdx.x; k < n * n; k += kThreads) {
        const long i = k / n;
        task.sums[pair_offset(n, kPairCount) + k] = task.sums[kCount * n + i];
        task.sums[pair_offset(n, kPairAdvantage) + k] = task.sums[kAdvantageSum * n + i];
        task.sums[pair_offset(n, kPairAdvantageSquare) + k] = task.sums[kAdvantageSquareSum * n + i];
    }
    __syncthreads();
}

// F32: every floating-point tensor is float32. G: objectives of a group, all of them where G < kGroup.
template <class T, bool F32, int G, bool Pairs>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) statistics_kernel(const StatisticsTask task) {
    const int layer = static_cast<int>(blockIdx.y), groups = (task.tokens.n + G - 1) / G;
    if (!Pairs || layer < groups)
        statistics_layer<T, F32, G>(task, layer);
    else
        pairs_layer(task, layer - groups);
    if (!last_block(task.counter)) return;
    add_partials(task);
    if (threadIdx.x == 0 && task.solve.bound == Bound::scores) solve_scores<G>(task.sums, task.tokens.n, task.solve);
}

}  // namespace cuda
}  // namespace pama
