// The CUDA features that the kernels use, and the kernel launch. With PAMA_CUDA_EMULATION the same sources compile as
// plain C++.
#pragma once

#include "../core/config.hpp"

#if defined(PAMA_CUDA_EMULATION)
#include "emulation.hpp"
#else
#include <cuda_runtime.h>
#define PAMA_SHARED(type, name) __shared__ type name
#define PAMA_ROLLED _Pragma("unroll 1")
#define PAMA_NOINLINE __noinline__ inline
#define PAMA_UNROLL_BY(count) PAMA_PRAGMA(unroll count)
#define PAMA_PRAGMA(text) _Pragma(#text)

namespace pama {
template <class Kernel, class... Arguments>
inline cudaError_t launch(Kernel kernel, dim3 grid, int threads, cudaStream_t stream, const Arguments&... arguments) {
    kernel<<<grid, threads, 0, stream>>>(arguments...);
    return cudaGetLastError();
}
}  // namespace pama
#endif

namespace pama {

constexpr int kWarp = 32;
#if !defined(PAMA_CUDA_THREADS)
#define PAMA_CUDA_THREADS 1024  // no limit in CUDA; smaller in emulation
#endif
constexpr int limited(int threads) { return threads < PAMA_CUDA_THREADS ? threads : PAMA_CUDA_THREADS; }
// Threads of the blocks that sum over tokens, one block per multiprocessor: with few blocks, the last block has few
// partial sums to add. kManyThreads allows 128 registers per thread, kFewThreads 255.
constexpr int kManyThreads = limited(512), kFewThreads = limited(256);
constexpr unsigned kAllLanes = 0xffffffffu;

// 32 sums over a warp with 31 exchanges: lane k receives the sum of every lane's values[k]. The order is fixed. If
// fewer than `Count` values are used, the others are 0, and lanes from Count on receive undefined values.
template <int Half = kWarp / 2, int Count = kWarp, class T>
__device__ inline T transposed_sums(T (&values)[kWarp], int lane) {
    const bool upper = lane & Half;
    PAMA_UNROLL
    for (int k = 0; k < (Half < Count ? Half : Count); ++k) {
        const T mine = upper ? values[k + Half] : values[k], other = upper ? values[k] : values[k + Half];
        values[k] = mine + static_cast<T>(__shfl_xor_sync(kAllLanes, other, Half));
    }
    if constexpr (Half > 1) return transposed_sums<Half / 2, Count>(values, lane);
    return values[0];
}

// The sum over a warp, the same in every lane.
__device__ inline double warp_sum(double value) {
    PAMA_UNROLL
    for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_xor_sync(kAllLanes, value, half);
    return value;
}

// Returns, to all threads of the block, whether this is the last block of the grid to call it. All earlier writes of
// the other blocks to global memory are then visible to this block. The counter is 0 before and after every launch.
__device__ inline bool last_block(unsigned* counter) {
    PAMA_SHARED(bool, last);
    __syncthreads();
    if (threadIdx.x == 0) {  // the fences order the block's writes above and its reads below
        __threadfence();
        last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace pama
