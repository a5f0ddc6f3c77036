// The sums over the tokens of each sequence (RowSum in core/statistics.hpp). With advantages per sequence, every
// statistic is a sum over sequences of one of these sums times A_i, A_i^2 or A_i A_j.
#pragma once

#include "../core/statistics.hpp"
#include "load.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

struct RowSumsTask {
    DeviceTokens p;
    int64_t segments;
    double* sums;  // [field][segment][row]
};

// F32: all floating-point tensors are float32 and the mask has one-byte elements.
template <class T, bool F32>
__device__ inline T row_number(const Array& array, int64_t at) {
    return F32 ? static_cast<T>(static_cast<const float*>(array.data)[at]) : load_number<T>(array, at);
}

template <class T, bool F32>
__device__ inline bool add_segment(const DeviceTokens& p, int64_t row, int64_t first, int64_t last,
                                   double (&all)[kWarp]) {
    constexpr bool kChunks = sizeof(T) < sizeof(double);
    constexpr int kTogether = kChunks ? 4 : 1, kChunk = 32;
    const ClipIn<T> clip(p.clip);
    const int64_t base = p.starts ? p.starts[row] : 0;
    const auto at = [&](const Array& array, int64_t token) { return row * array.row + (base + token) * array.token; };
    unsigned counts[kRowSums] = {};
    bool held = true;
    int64_t token = first + threadIdx.x % kWarp;
    do {
        T sums[kRowSums] = {};
        PAMA_ROLLED
        for (int j = 0; (!kChunks || j < kChunk) && token < last; j += kTogether) {
            T logp[kTogether], old[kTogether], w[kTogether];
            bool valid[kTogether];
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                valid[u] = token < last;
                const int64_t k = valid[u] ? token : last - 1;
                logp[u] = p.logprobs ? row_number<T, F32>(p.logprobs, at(p.logprobs, k)) : T(0);
                old[u] = p.old_logprobs ? row_number<T, F32>(p.old_logprobs, at(p.old_logprobs, k)) : logp[u];
                w[u] =
                    p.importance_weights ? row_number<T, F32>(p.importance_weights, at(p.importance_weights, k)) : T(1);
                if (p.mask) {
                    const int64_t m = at(p.mask, k);
                    valid[u] = valid[u] &&
                               (F32 ? static_cast<const unsigned char*>(p.mask.data)[m] != 0 : load_truth(p.mask, m));
                }
                token += kWarp;
            }
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const TokenFactors<T> f = token_factors(clip, valid[u], logp[u], old[u], w[u]);
                add_to_row(f, false, valid[u], 1u, sums, counts);
            }
        }
        held = held && (!kChunks || row_in_range(sums));
        PAMA_UNROLL
        for (int k = kRowCounted; k < kRowStatistics; ++k) all[k] += static_cast<double>(sums[k]);
    } while (kChunks && token < last);
    PAMA_UNROLL
    for (int k = 0; k < kRowCounted; ++k) all[k] = counts[k];
    return held;
}

// One warp per segment of a sequence.
template <class T, bool F32>
__global__ void __launch_bounds__(kFewThreads) row_sums_kernel(const RowSumsTask task) {
    const int lane = threadIdx.x % kWarp;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp;
    for (int64_t item = warp; item < task.p.rows * task.segments; item += warps) {
        const int64_t row = item / task.segments, segment = item % task.segments, length = task.p.length(row);
        const int64_t each = (length + task.segments - 1) / task.segments, first = segment * each;
        const int64_t last = first + each < length ? first + each : length;
        double all[kWarp] = {};
        if (!add_segment<T, F32>(task.p, row, first, last, all)) {
            PAMA_UNROLL
            for (int k = 0; k < kWarp; ++k) all[k] = 0;
            add_segment<double, F32>(task.p, row, first, last, all);
        }
        const double sum = transposed_sums(all, lane);
        if (lane < kRowStatistics) task.sums[(lane * task.segments + segment) * task.p.rows + row] = sum;
    }
}

}  // namespace cuda
}  // namespace pama
