// What a thread adds up, the reduction over blocks, and which layers of the grid compute which statistics.
//
// A layer computes the fields of a group of kGroup objectives and the products within it, or a tile of products of two
// groups, or, with an objective mask, a tile of one of the pair fields that the products do not give.
#pragma once

#include "../core/statistics.hpp"
#include "device.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

constexpr int kGroup = 4;
constexpr int kProductKinds = 2;  // bound_product and advantage_product: symmetric, and their diagonals are fields

PAMA_HD inline int64_t groups_of(int n) { return (n + kGroup - 1) / kGroup; }

PAMA_HD inline int64_t layers_of(int n, bool pairs, bool presence) {
    const int64_t groups = groups_of(n);
    return groups +
           (pairs ? groups * (groups - 1) / 2 + (presence ? (kPairs - kProductKinds) * groups * groups : 0) : 0);
}

struct Layer {
    int first, second;  // objectives at which the groups begin
    int kind;           // of a pair field; -1: the fields of a group (first == second), or the products of two
};

PAMA_HD inline Layer layer_at(int64_t index, int n) {
    const int64_t groups = groups_of(n);
    const auto at = [](int64_t g, int64_t h, int64_t kind) {
        return Layer{static_cast<int>(g * kGroup), static_cast<int>(h * kGroup), static_cast<int>(kind)};
    };
    if (index < groups) return at(index, index, -1);
    index -= groups;
    if (index < groups * (groups - 1) / 2) {
        int64_t g = 0;
        for (; index >= groups - 1 - g; ++g) index -= groups - 1 - g;
        return at(g, g + 1 + index, -1);
    }
    index -= groups * (groups - 1) / 2;
    return at(index / groups % groups, index % groups, kProductKinds + index / (groups * groups));
}

// The slots of the fields of G objectives and of the products within them. First what is summed in floating point, then
// what may be counted in integers.
template <int G, bool Pairs>
struct Slots {
    static constexpr int kSummed = 6 * G;  // bound_sum ... advantage_square_sum
    static constexpr int kKl = kSummed;
    static constexpr int kProduct = kKl + 1;
    static constexpr int kEach = Pairs ? G * (G - 1) / 2 : 0;
    static constexpr int kCounts = kProduct + kProductKinds * kEach;
    static constexpr int kTokens = kCounts + 3 * G;  // count, positive_count, clipped_count of each; then all tokens
    static constexpr int kAll = kTokens + 1;

    // The slot as an index of the statistics; -1 where there is no such objective or it is another layer's.
    PAMA_HD static int64_t index(int slot, int64_t n, int first) {
        static_assert(kBoundSum == 1 && kAdvantageSquareSum == 6 && kPositiveCount == 7 && kClippedCount == 8);
        if (slot == kKl) return first == 0 ? total_offset(n) + kKlSum : -1;
        if (slot == kTokens) return first == 0 ? total_offset(n) + kTokenCount : -1;
        if (slot >= kProduct && slot < kCounts) {
            int pair = (slot - kProduct) % (kEach ? kEach : 1), i = 0;
            for (; pair >= G - 1 - i; ++i) pair -= G - 1 - i;
            const int64_t row = first + i, column = row + 1 + pair;
            const int kind = (slot - kProduct) / (kEach ? kEach : 1);
            return column < n ? pair_offset(n, kind) + row * n + column : -1;
        }
        const int k = slot < kSummed ? slot : slot - kCounts, field = k / G;
        const int64_t i = first + k % G;
        if (i >= n) return -1;
        if (slot < kSummed) return (kBoundSum + field) * n + i;
        return (field == 0 ? kCount : kPositiveCount + field - 1) * n + i;
    }
};

// Values of one thread for `Count` slots, in the batches that a warp transposes at once.
template <int Count>
struct Values {
    static constexpr int kBatches = (Count + kWarp - 1) / kWarp;
    double batch[kBatches][kWarp] = {};
    __device__ double& operator[](int slot) { return batch[slot / kWarp][slot % kWarp]; }
};

struct Partials {
    double* data;
    int64_t blocks;
};

// The sums of the block from those of its warps, rows of `width`, to its place; `index(slot)` says where a slot
// belongs.
template <class Index>
__device__ inline void write_table(const double* table, int width, int count, const Partials& partials, int64_t block,
                                   Index index) {
    const int warps = blockDim.x / kWarp;
    __syncthreads();
    for (int slot = threadIdx.x; slot < count; slot += blockDim.x) {
        double total = 0;
        for (int w = 0; w < warps; ++w) total += table[w * width + slot];
        const int64_t at = index(slot);
        if (at >= 0) partials.data[at * partials.blocks + block] = total;
    }
}

// The sums of the block from the values of its threads.
template <int Count, class Index>
__device__ inline void write_block(Values<Count>& values, const Partials& partials, int64_t block, Index index) {
    using Table = double[kFewThreads / kWarp][Count];
    PAMA_SHARED(Table, table);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    PAMA_UNROLL
    for (int b = 0; b < Values<Count>::kBatches; ++b) {
        const double sum = transposed_sums(values.batch[b], lane);
        if (b * kWarp + lane < Count) table[warp][b * kWarp + lane] = sum;
    }
    write_table(&table[0][0], Count, Count, partials, block, index);
}

// The last block: partials to sums, a warp for each, and what follows from others.
__device__ inline void add_partials(const Partials& partials, double* sums, int64_t n, bool pairs, bool presence) {
    const int64_t lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int64_t fields = statistics_size(n, false), size = statistics_size(n, pairs);
    const int64_t written = pairs && !presence ? pair_offset(n, kProductKinds) : size;
    for (int64_t index = threadIdx.x / kWarp; index < written; index += warps) {
        const int64_t pair = index - fields, kind = pair / (n * n), row = pair / n % n, column = pair % n;
        if (pair >= 0 && kind < kProductKinds && row >= column) continue;
        double sum = 0;
        const double* const from = partials.data + index * partials.blocks;
        PAMA_UNROLL_BY(4)
        for (int64_t block = lane; block < partials.blocks; block += kWarp) sum += __ldcg(from + block);
        sum = warp_sum(sum);
        if (lane == 0) sums[index] = sum;
    }
    __syncthreads();
    if (!pairs) return;
    double* const products = sums + fields;
    for (int64_t k = threadIdx.x; k < n * n; k += blockDim.x) {
        const int64_t i = k / n, j = k % n;
        if (i >= j) {
            products[k] = i == j ? sums[kBoundSquareSum * n + i] : products[j * n + i];
            products[n * n + k] = i == j ? sums[kAdvantageSquareSum * n + i] : products[n * n + j * n + i];
        }
        if (presence) continue;  // else every objective is present everywhere
        products[kPairCount * n * n + k] = sums[kCount * n + i];
        products[kPairAdvantage * n * n + k] = sums[kAdvantageSum * n + i];
        products[kPairAdvantageSquare * n * n + k] = sums[kAdvantageSquareSum * n + i];
    }
    __syncthreads();
}

}  // namespace cuda
}  // namespace pama
