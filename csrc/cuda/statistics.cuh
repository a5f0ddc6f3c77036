// Computes the statistics of core/statistics.hpp and, on request, the weights of the batch from them.
//
// A block sums over its share of the tokens, or of the sequences, for one layer, and writes the sums to its own partial
// sums; the last block to finish adds all partial sums in a fixed order and solves for the weights. With many
// statistics one block would take long: a second launch adds them on all multiprocessors.
#pragma once

#include "flat.cuh"
#include "rows.cuh"
#include "solve.cuh"
#include "tokens.cuh"

namespace pama {
namespace cuda {

struct Finish {
    Partials partials;
    double* sums;
    unsigned* counter;  // null: another launch adds the partial sums
    unsigned layers;
    int n;
    bool pairs, presence, solved;
    Solve solve;
};

template <class Source>
struct StatisticsTask {
    Source source;
    Clip clip;
    ClipIn<float> narrow;  // computed on the host
    bool noon;
    Finish finish;
};

struct Place {
    Layer layer;
    int64_t block, thread;
};

// The layers of one share of the tokens run at about the same time, so that only the first one reads the tokens from
// memory and the others from the cache.
__device__ inline Place place(const Finish& finish) {
    const int64_t block = blockIdx.x / finish.layers;
    return {layer_at(blockIdx.x % finish.layers, finish.n), block, block * blockDim.x + threadIdx.x};
}

// field_index: the index in the statistics of a slot of a group. tile_index: the same for 4 x 4 tiles of the pair
// fields from `kind` on. -1: the slot is not stored.
template <int G, bool Pairs>
__device__ inline int64_t field_index(const Finish& finish, const Place& at, int slot) {
    using S = Slots<G, Pairs>;
    return finish.pairs || slot < S::kProduct ? S::index(slot, finish.n, at.layer.first) : -1;
}
__device__ inline int64_t tile_index(const Finish& finish, const Place& at, int kind, int slot) {
    const int64_t n = finish.n, i = at.layer.first + slot / kGroup % kGroup, j = at.layer.second + slot % kGroup;
    return i < n && j < n ? pair_offset(n, kind + slot / (kGroup * kGroup)) + i * n + j : -1;
}

template <int G, bool Pairs>
__device__ inline void write_fields(Values<Slots<G, Pairs>::kAll>& values, const Finish& finish, const Place& at) {
    write_block(values, finish.partials, at.block, [&](int slot) { return field_index<G, Pairs>(finish, at, slot); });
}
template <int Kinds>
__device__ inline void write_tiles(Values<Kinds * kGroup * kGroup>& values, const Finish& finish, const Place& at,
                                   int kind) {
    write_block(values, finish.partials, at.block, [&](int slot) { return tile_index(finish, at, kind, slot); });
}

// N: the number of objectives if it is below kGroup, else 0.
template <int N>
__device__ inline void finish(const Finish& task) {
    if (!task.counter || !last_block(task.counter)) return;
    add_partials(task.partials, task.sums, task.n, task.pairs, task.presence, threadIdx.x, blockDim.x);
    __syncthreads();
    if (task.solved) solve_scores<N>(task.solve);
}

template <class T, class Source>
__device__ inline ClipIn<T> clip_in(const StatisticsTask<Source>& task) {
    if constexpr (sizeof(T) == sizeof(float))
        return task.narrow;
    else
        return ClipIn<T>(task.clip);
}

template <class T, int G, bool Pairs, class Source>
__device__ inline void add_layer(const StatisticsTask<Source>& task, const Place& at) {
    Values<Slots<G, Pairs>::kAll> values;
    if (!add_tokens<T, G, Pairs>(task.source, clip_in<T>(task), task.noon, at.layer.first, at.thread, values)) {
        values = {};
        add_tokens<double, G, Pairs>(task.source, clip_in<double>(task), task.noon, at.layer.first, at.thread, values);
    }
    write_fields<G, Pairs>(values, task.finish, at);
}

template <class T, class Source>
__device__ inline void multiply_layer(const StatisticsTask<Source>& task, const Place& at) {
    Values<2 * kGroup * kGroup> values;
    if (!multiply_tokens<T>(task.source, clip_in<T>(task), task.noon, at.layer, at.thread, values)) {
        values = {};
        multiply_tokens<double>(task.source, clip_in<double>(task), task.noon, at.layer, at.thread, values);
    }
    write_tiles<2>(values, task.finish, at, kBoundProduct);
}

struct FlatTask {
    FlatTokens source;
    Clip clip;
    FlatClip narrow;
    bool noon;
    Finish finish;
};

// G: the objectives of a group; G < kGroup is the number of all objectives.
template <int G, bool Pairs, bool Full>
__global__ void __launch_bounds__(kManyThreads, 1) flat_kernel(const __grid_constant__ FlatTask task) {
    using S = Slots<G, Pairs>;
    constexpr int kWidth = S::kAll > kWarp ? S::kAll : kWarp;
    using Table = double[kManyThreads / kWarp][kWidth];
    PAMA_SHARED(Table, table);
    const Place at = place(task.finish);
    const auto group = static_cast<unsigned>(at.thread);
    double* const row = table[threadIdx.x / kWarp];
    const bool tile = G == kGroup && Pairs && at.layer.first != at.layer.second;
    bool held;
    if constexpr (G == kGroup && Pairs) {
        held = tile ? multiply_flat<Full>(task.source, task.narrow, at.layer, group, row)
                    : add_flat<G, Pairs, Full>(task.source, task.narrow, at.layer.first, group, row);
    } else {
        held = add_flat<G, Pairs, Full>(task.source, task.narrow, at.layer.first, group, row);
    }
    if (!held) add_exact(task.source, task.clip, task.noon, Pairs, G, at.layer, group, row);
    write_table(&table[0][0], kWidth, tile ? kWarp : S::kAll, task.finish.partials, at.block, [&](int slot) {
        return tile ? tile_index(task.finish, at, kBoundProduct, slot) : field_index<G, Pairs>(task.finish, at, slot);
    });
    finish<G == kGroup ? 0 : G>(task.finish);
}

template <class T>
__global__ void __launch_bounds__(kFewThreads, 1)
    tokens_kernel(const __grid_constant__ StatisticsTask<AnyTokens> task) {
    const Place at = place(task.finish);
    if (at.layer.kind >= 0) {
        Values<kGroup * kGroup> values;
        pair_tokens(task.source, at.layer, at.thread, values);
        write_tiles<1>(values, task.finish, at, at.layer.kind);
    } else if (at.layer.first == at.layer.second) {
        add_layer<T, kGroup, true>(task, at);
    } else {
        multiply_layer<T>(task, at);
    }
    finish<0>(task.finish);
}

__global__ void __launch_bounds__(kFewThreads, 1) rows_kernel(const __grid_constant__ StatisticsTask<RowTokens> task) {
    const Place at = place(task.finish);
    if (at.layer.kind >= 0) {
        Values<kGroup * kGroup> values;
        pair_rows(task.source, at.layer, at.thread, values);
        write_tiles<1>(values, task.finish, at, at.layer.kind);
    } else if (at.layer.first == at.layer.second) {
        Values<Slots<kGroup, true>::kAll> values;
        add_rows(task.source, at.layer.first, at.thread, values);
        write_fields<kGroup, true>(values, task.finish, at);
    } else {
        Values<2 * kGroup * kGroup> values;
        multiply_rows(task.source, at.layer, at.thread, values);
        write_tiles<2>(values, task.finish, at, kBoundProduct);
    }
    finish<0>(task.finish);
}

__global__ void __launch_bounds__(kFewThreads, 1) add_kernel(const __grid_constant__ Finish task) {
    add_partials(task.partials, task.sums, task.n, task.pairs, task.presence, blockIdx.x * blockDim.x + threadIdx.x,
                 gridDim.x * blockDim.x);
}

}  // namespace cuda
}  // namespace pama
