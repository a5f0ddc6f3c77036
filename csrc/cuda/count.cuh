// Counts the valid tokens of a mask of any dtype, 16 bytes at a time.
#pragma once

#include "load.cuh"

namespace pama {
namespace cuda {

// Bit masks, for two neighbouring words of a mask tensor, of the bits that are nonzero for a nonzero element: all bits
// except the sign bit of a floating-point number.
struct TruthBits {
    unsigned low, high;
    int shift;  // log2 of the bytes of an element

    __device__ explicit TruthBits(Dtype dtype) : low(~0u), high(~0u), shift(0) {
        for (auto bytes = size_of(dtype); bytes > 1; bytes /= 2) ++shift;
        if (dtype == Dtype::f32) low = high = 0x7fffffffu;
        if (dtype == Dtype::f64) high = 0x7fffffffu;
        if (dtype == Dtype::bf16 || dtype == Dtype::f16) low = high = 0x7fff7fffu;
    }

    // The number of nonzero elements of two bytes or more in two words.
    __device__ unsigned count(unsigned x, unsigned y) const {
        x &= low;
        y &= high;
        if (shift == 3) return (x | y) != 0 ? 1u : 0u;
        if (shift == 2) return (x != 0 ? 1u : 0u) + (y != 0 ? 1u : 0u);
        return halves(x) + halves(y);
    }

  private:
    __device__ static unsigned halves(unsigned word) {
        return ((word & 0xffffu) != 0 ? 1u : 0u) + (word >> 16 != 0 ? 1u : 0u);
    }
};

// The highest bit of each byte that is not 0.
__device__ inline unsigned high_bits(unsigned word) {
    return (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u;
}
__device__ inline unsigned count_bytes(const uint4& v) {
    return __popc(high_bits(v.x) | high_bits(v.y) >> 1 | high_bits(v.z) >> 2 | high_bits(v.w) >> 3);
}

// The number of valid tokens that one of `threads` threads counts in a sequence whose mask begins at element `from`.
__device__ inline unsigned count_valid(const Array& mask, int64_t from, int64_t length, int thread, int threads) {
    unsigned count = 0;
    int64_t token = thread;
    if (mask.token == 1) {
        const TruthBits bits(mask.dtype);
        const char* const start = static_cast<const char*>(mask.data) + (from << bits.shift);
        const int64_t lead =
            static_cast<int64_t>((16 - reinterpret_cast<std::uintptr_t>(start) % 16) % 16) >> bits.shift;
        const int64_t before = lead < length ? lead : length, vectors = (length - before) << bits.shift >> 4;
        PAMA_ROLLED
        for (int64_t k = thread; k < before; k += threads) count += load_truth(mask, from + k) ? 1u : 0u;
        const uint4* const words = reinterpret_cast<const uint4*>(start + (before << bits.shift));
        if (bits.shift == 0) {
            constexpr int kTogether = 4;  // loads in flight
            PAMA_ROLLED
            for (int64_t k = thread; k < vectors; k += kTogether * threads) {
                uint4 v[kTogether];
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u)
                    v[u] = k + u * threads < vectors ? words[k + u * threads] : uint4{0, 0, 0, 0};
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) count += count_bytes(v[u]);
            }
        } else {
            PAMA_UNROLL_BY(4)
            for (int64_t k = thread; k < vectors; k += threads) {
                const uint4 v = words[k];
                count += bits.count(v.x, v.y) + bits.count(v.z, v.w);
            }
        }
        token += before + (vectors << 4 >> bits.shift);
    }
    PAMA_ROLLED
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
