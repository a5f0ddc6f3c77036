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

// Four tokens: their log-probabilities and importance weights.
template <class T>
struct TokenValues {
    static constexpr int kCount = 4;
    T logp[kCount], old[kCount], w[kCount];
    bool valid[kCount];
};

// The tokens of a sequence of contiguous float32 tensors and a mask of one-byte elements, four at a time from addresses
// that are multiples of 16 bytes. Absent tensors are null.
struct VectorTokens {
    const float *logp, *old, *w;
    const unsigned char* mask;
    bool usable = false;
    int skip = 0;  // the first token at a multiple of 16 bytes

    __device__ VectorTokens(const DeviceTokens& p, int64_t row, int64_t base) {
        const auto start = [&](const Array& array, int64_t bytes) {
            const int64_t at = (row * array.row + base) * bytes;
            return array ? static_cast<const char*>(array.data) + at : nullptr;
        };
        const auto contiguous = [](const Array& array) { return !array || array.token == 1; };
        logp = reinterpret_cast<const float*>(start(p.logprobs, 4));
        old = reinterpret_cast<const float*>(start(p.old_logprobs, 4));
        w = reinterpret_cast<const float*>(start(p.importance_weights, 4));
        mask = reinterpret_cast<const unsigned char*>(start(p.mask, 1));
        skip = static_cast<int>(reinterpret_cast<std::uintptr_t>(logp) / 4 % 4);
        skip = (4 - skip) % 4;
        const auto aligned = [](const void* at, unsigned bytes) {
            return reinterpret_cast<std::uintptr_t>(at) % bytes == 0;
        };
        usable = logp && contiguous(p.logprobs) && contiguous(p.old_logprobs) && contiguous(p.importance_weights) &&
                 contiguous(p.mask) && aligned(logp + skip, 16) && (!old || aligned(old + skip, 16)) &&
                 (!w || aligned(w + skip, 16)) && (!mask || aligned(mask + skip, 4));
    }

    template <class T>
    __device__ static void load(T (&to)[4], const float* from) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    // The tokens from `token` on that are in [first, last).
    template <class T>
    __device__ void load(TokenValues<T>& x, int64_t token, int64_t first, int64_t last) const {
        const bool whole = token >= first && token + 4 <= last;
        unsigned bytes = 0x01010101u;
        if (whole) {
            load(x.logp, logp + token);
            load(x.old, (old ? old : logp) + token);
            if (w) load(x.w, w + token);
            if (mask) bytes = *reinterpret_cast<const unsigned*>(mask + token);
        }
        PAMA_UNROLL
        for (int u = 0; u < 4; ++u) {
            const int64_t k = token + u;
            x.valid[u] = (bytes >> 8 * u & 0xff) != 0;
            if (!whole) {
                const bool inside = k >= first && k < last;
                x.valid[u] = inside && (!mask || mask[k] != 0);
                x.logp[u] = inside ? logp[k] : 0;
                x.old[u] = inside && old ? old[k] : x.logp[u];
                if (w) x.w[u] = inside ? w[k] : 0;
            }
            if (!w) x.w[u] = 1;
        }
    }
};

// A lane that restarts in double takes the tokens that it took in float.
template <class T, bool F32>
__device__ inline bool add_segment(const DeviceTokens& p, int64_t row, int64_t first, int64_t last,
                                   double (&all)[kWarp]) {
    constexpr bool kChunks = sizeof(T) < sizeof(double);
    constexpr int kTogether = kChunks || F32 ? 4 : 1, kChunk = 32;
    const ClipIn<T> clip(p.clip);
    const int64_t base = p.starts ? p.starts[row] : 0;
    const auto at = [&](const Array& array, int64_t token) { return row * array.row + (base + token) * array.token; };
    const VectorTokens vectors(p, row, base);
    const int lane = threadIdx.x % kWarp;
    unsigned counts[kRowSums] = {};
    bool held = true;
    int64_t token = first + lane;
    if (F32 && vectors.usable) token = first - ((first - vectors.skip) & 3) + 4 * lane;
    do {
        T sums[kRowSums] = {};
        PAMA_ROLLED
        for (int j = 0; (!kChunks || j < kChunk) && token < last; j += kTogether) {
            TokenValues<T> x;
            if constexpr (F32)
                if (vectors.usable) {
                    vectors.load(x, token, first, last);
                    token += 4 * kWarp;
                }
            if (!F32 || !vectors.usable) {
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) {
                    x.valid[u] = token < last;
                    const int64_t k = x.valid[u] ? token : last - 1;
                    x.logp[u] = p.logprobs ? row_number<T, F32>(p.logprobs, at(p.logprobs, k)) : T(0);
                    x.old[u] = p.old_logprobs ? row_number<T, F32>(p.old_logprobs, at(p.old_logprobs, k)) : x.logp[u];
                    x.w[u] = p.importance_weights
                                 ? row_number<T, F32>(p.importance_weights, at(p.importance_weights, k))
                                 : T(1);
                    if (p.mask) {
                        const int64_t m = at(p.mask, k);
                        x.valid[u] = x.valid[u] && (F32 ? static_cast<const unsigned char*>(p.mask.data)[m] != 0
                                                        : load_truth(p.mask, m));
                    }
                    token += kWarp;
                }
            }
            PAMA_UNROLL
            for (int u = 0; u < kTogether; ++u) {
                const TokenFactors<T> f = token_factors(clip, x.valid[u], x.logp[u], x.old[u], x.w[u]);
                add_to_row(f, false, x.valid[u], 1u, sums, counts);
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
__global__ void __launch_bounds__(kFewThreads, 2) row_sums_kernel(const RowSumsTask task) {
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
