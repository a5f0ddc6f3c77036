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

// The slots of the fields of G objectives, of the totals, and of the products within the group.
template <int G, bool Pairs>
struct Slots {
    static constexpr int kTotal = kFields * G;
    static constexpr int kProduct = kTotal + kTotals;
    static constexpr int kEach = Pairs ? G * (G - 1) / 2 : 0;
    static constexpr int kAll = kProduct + kProductKinds * kEach;

    PAMA_HD static constexpr int field(int f, int k) { return f * G + k; }
    // Of the pair i < j of the group.
    PAMA_HD static constexpr int product(int kind, int i, int j) {
        return kProduct + kind * kEach + i * (2 * G - 3 - i) / 2 + j - 1;
    }

    // The slot as an index of the statistics; -1 where there is no such objective or it is another layer's.
    PAMA_HD static int64_t index(int slot, int64_t n, int first) {
        if (slot < kTotal) {
            const int64_t i = first + slot % G;
            return i < n ? slot / G * n + i : -1;
        }
        if (slot < kProduct) return first == 0 ? total_offset(n) + slot - kTotal : -1;
        constexpr int each = kEach ? kEach : 1;
        int pair = (slot - kProduct) % each, i = 0;
        for (; pair >= G - 1 - i; ++i) pair -= G - 1 - i;
        const int64_t row = first + i, column = row + 1 + pair;
        return column < n ? pair_offset(n, (slot - kProduct) / each) + row * n + column : -1;
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

// The last block: partials to sums, four at a time by each warp with all their loads in flight, and what follows from
// others.
__device__ inline void add_partials(const Partials& partials, double* sums, int64_t n, bool pairs, bool presence) {
    constexpr int kSums = 4, kLoads = 5;
    const int64_t lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int64_t fields = statistics_size(n, false), size = statistics_size(n, pairs);
    const int64_t written = pairs && !presence ? pair_offset(n, kProductKinds) : size;
    const auto each = static_cast<unsigned>(n);  // divisions of 64 bits are slow
    for (int64_t first = threadIdx.x / kWarp; first < written; first += kSums * warps) {
        double sum[kSums] = {};
        bool wanted[kSums];
        PAMA_UNROLL
        for (int u = 0; u < kSums; ++u) {
            const int64_t index = first + u * warps;
            wanted[u] = index < written;
            if (!pairs || index < fields || index >= fields + kProductKinds * n * n) continue;
            const unsigned row = static_cast<unsigned>(index - fields) / each;  // of one of the matrices
            wanted[u] = wanted[u] && row % each < static_cast<unsigned>(index - fields) - row * each;
        }
        for (int64_t from = lane; from < partials.blocks; from += kLoads * kWarp) {
            double part[kSums][kLoads];
            PAMA_UNROLL
            for (int u = 0; u < kSums; ++u) {
                const double* const row = partials.data + (first + u * warps) * partials.blocks + from;
                PAMA_UNROLL
                for (int l = 0; l < kLoads; ++l)
                    part[u][l] = wanted[u] && from + l * kWarp < partials.blocks ? __ldcg(row + l * kWarp) : 0;
            }
            PAMA_UNROLL
            for (int u = 0; u < kSums; ++u) {
                PAMA_UNROLL
                for (int l = 0; l < kLoads; ++l) sum[u] += part[u][l];
            }
        }
        PAMA_UNROLL
        for (int u = 0; u < kSums; ++u) sum[u] = warp_sum(sum[u]);
        PAMA_UNROLL
        for (int u = 0; u < kSums; ++u)
            if (lane == 0 && wanted[u]) sums[first + u * warps] = sum[u];
    }
    __syncthreads();
    if (!pairs) return;
    double* const products = sums + fields;
    for (unsigned k = threadIdx.x; k < each * each; k += blockDim.x) {
        const unsigned i = k / each, j = k % each;
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
