// Counts the valid tokens of a mask of any dtype, 16 bytes at a time.
#pragma once

#include "load.cuh"

namespace pama {
namespace cuda {

// Bit masks, for two neighbouring words of a mask tensor, of the bits that are nonzero for a nonzero element: all bits
// except the sign bit of a floating-point number.
struct TruthBits {
    unsigned low, high;
    int bytes;  // size of an element

    __device__ explicit TruthBits(Dtype dtype) : low(~0u), high(~0u), bytes(static_cast<int>(size_of(dtype))) {
        if (dtype == Dtype::f32) low = high = 0x7fffffffu;
        if (dtype == Dtype::f64) high = 0x7fffffffu;
        if (dtype == Dtype::bf16 || dtype == Dtype::f16) low = high = 0x7fff7fffu;
    }

    // The number of nonzero elements in two words.
    __device__ unsigned count(unsigned x, unsigned y) const {
        x &= low;
        y &= high;
        if (bytes == 8) return (x | y) != 0 ? 1u : 0u;
        if (bytes == 4) return (x != 0 ? 1u : 0u) + (y != 0 ? 1u : 0u);
        return count(x) + count(y);
    }

  private:
    __device__ unsigned count(unsigned word) const {
        if (bytes == 2) return ((word & 0xffffu) != 0 ? 1u : 0u) + (word >> 16 != 0 ? 1u : 0u);
        word |= word >> 4;
        word |= word >> 2;
        word |= word >> 1;
        return ((word & 0x01010101u) * 0x01010101u) >> 24;
    }
};

// The number of valid tokens that one of `threads` threads counts in a sequence whose mask begins at element `from`.
__device__ inline unsigned count_valid(const Array& mask, int64_t from, int64_t length, int thread, int threads) {
    unsigned count = 0;
    int64_t token = thread;
    if (mask.token == 1) {
        const TruthBits bits(mask.dtype);
        const char* const start = static_cast<const char*>(mask.data) + from * bits.bytes;
        const int64_t lead =
            static_cast<int64_t>((16 - reinterpret_cast<std::uintptr_t>(start) % 16) % 16) / bits.bytes;
        const int64_t before = lead < length ? lead : length, vectors = (length - before) * bits.bytes / 16;
        for (int64_t k = thread; k < before; k += threads) count += load_truth(mask, from + k) ? 1u : 0u;
        const uint4* const words = reinterpret_cast<const uint4*>(start + before * bits.bytes);
        PAMA_UNROLL_BY(8)
        for (int64_t k = thread; k < vectors; k += threads) {
            const uint4 v = words[k];
            count += bits.count(v.x, v.y) + bits.count(v.z, v.w);
        }
        token += before + vectors * (16 / bits.bytes);
    }
    for (; token < length; token += threads) count += load_truth(mask, from + token * mask.token) ? 1u : 0u;
    return count;
}

// Counts the valid tokens of each sequence, one block per sequence.
template <class Counts>
__global__ void __launch_bounds__(kFewThreads) row_counts_kernel(const DeviceTokens p, Counts* const counts) {
    using Table = unsigned[kFewThreads / kWarp];
    PAMA_SHARED(Table, table);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const int64_t base = p.starts ? p.starts[row] : 0, from = row * p.mask.row + base * p.mask.token;
        const unsigned own = count_valid(p.mask, from, p.length(row), threadIdx.x, blockDim.x);
        const unsigned sum = __reduce_add_sync(kAllLanes, own);
        if (lane == 0) table[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            Counts total = 0;
            for (int w = 0; w < warps; ++w) total += table[w];
            counts[row] = total;
        }
        __syncthreads();
    }
}

}  // namespace cuda
}  // namespace pama
