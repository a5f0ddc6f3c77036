// The slots that a thread accumulates, the reduction over blocks, and the assignment of statistics to layers of the
// grid.
//
// A layer computes the fields of a group of kGroup objectives and the products within it, or a tile of products of two
// groups, or, with an objective mask, a tile of one of the pair fields that cannot be computed from the products.
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
    int kind;           // the pair field; -1: the fields of a group (first == second), or the products of two groups
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
    // The slot of the product of the pair i < j of the group.
    PAMA_HD static constexpr int product(int kind, int i, int j) {
        return kProduct + kind * kEach + i * (2 * G - 3 - i) / 2 + j - 1;
    }

    // The index of a slot in the statistics; -1 if there is no such objective or another layer computes it.
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

// The values of one thread for `Count` slots, in batches of one warp transposition each.
template <int Count>
struct Values {
    static constexpr int kBatches = (Count + kWarp - 1) / kWarp;
    double batch[kBatches][kWarp] = {};
    __device__ double& operator[](int slot) { return batch[slot / kWarp][slot % kWarp]; }
};

constexpr unsigned kLoads = 17;  // partial sums that a thread loads at a time: of 8 threads, those of 132 blocks

struct Partials {
    double* data;  // [statistic][block]
    int64_t blocks;

    // Threads that add the partial sums of one statistic.
    PAMA_HD unsigned lanes() const {
        unsigned count = 1;
        while (count < 8 && count * kLoads < blocks) count *= 2;
        return count;
    }
};

// The number of leading statistics that have partial sums: without an objective mask the pair fields after the products
// follow from fields.
PAMA_HD inline int64_t added_statistics(int64_t n, bool pairs, bool presence) {
    return pairs && !presence ? pair_offset(n, kProductKinds) : statistics_size(n, pairs);
}

// Adds the sums of the warps of a block, rows of `width`, and writes them to the block's partial sums; index(slot) is
// the index of a slot in the statistics.
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

// Adds the values of the threads of a block and writes them to the block's partial sums.
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

// Adds the partial sums in a fixed order, and computes the statistics that follow from others: the other half and the
// diagonal of the products and, without an objective mask, the other pair fields. Called by whole warps; this is thread
// `thread` of `threads`.
__device__ inline void add_partials(const Partials& partials, double* sums, int n, bool pairs, bool presence,
                                    unsigned thread, unsigned threads) {
    const unsigned lanes = partials.lanes(), lane = thread % lanes, groups = threads / lanes;
    const auto each = static_cast<unsigned>(n), blocks = static_cast<unsigned>(partials.blocks);
    const auto fields = static_cast<unsigned>(statistics_size(n, false)), square = each * each;
    const auto written = static_cast<unsigned>(added_statistics(n, pairs, presence));
    double* const to = sums + fields;
    PAMA_ROLLED
    for (unsigned first = thread / kWarp * (kWarp / lanes); first < written; first += groups) {
        const unsigned index = first + thread % kWarp / lanes, at = index < fields ? index : index - fields;
        const unsigned row = at / each, column = at - row * each;  // of the fields, or of the matrices
        const unsigned kind = row < each ? kBoundProduct : kAdvantageProduct, i = row - kind * each;
        const bool product = index >= fields && at < kProductKinds * square;
        const bool wanted = index < written && (!product || i < column);
        const double* const from = partials.data + static_cast<int64_t>(index) * blocks;
        double sum = 0;
        PAMA_ROLLED
        for (unsigned block = lane; wanted && block < blocks; block += kLoads * lanes) {
            double part[kLoads];
            const double* next = from + block;
            PAMA_UNROLL
            for (unsigned l = 0; l < kLoads; ++l, next += lanes)
                part[l] = block + l * lanes < blocks ? __ldcg(next) : 0;
            PAMA_UNROLL
            for (unsigned l = 0; l < kLoads; ++l) sum += part[l];
        }
        PAMA_ROLLED
        for (unsigned half = lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
        if (!wanted) continue;
        if (lane == 0) {
            sums[index] = sum;
            if (product) to[kind * square + column * each + i] = sum;
            if (pairs && index == kBoundSquareSum * each + column) to[column * (each + 1)] = sum;
            if (pairs && index == kAdvantageSquareSum * each + column) to[square + column * (each + 1)] = sum;
        }
        if (!pairs || presence || index >= fields) continue;
        const unsigned follows = row == kCount                ? kPairCount
                                 : row == kAdvantageSum       ? kPairAdvantage
                                 : row == kAdvantageSquareSum ? kPairAdvantageSquare
                                                              : kPairs;
        PAMA_ROLLED
        for (unsigned j = lane; follows != kPairs && j < each; j += lanes)
            to[follows * square + column * each + j] = sum;
    }
}

}  // namespace cuda
}  // namespace pama
