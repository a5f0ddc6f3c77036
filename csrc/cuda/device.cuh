// What kernels use of CUDA, and how they are launched. With PAMA_CUDA_EMULATION the same sources are plain C++.
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
#define PAMA_CUDA_THREADS 1024  // no limit; less where emulated
#endif
constexpr int limited(int threads) { return threads < PAMA_CUDA_THREADS ? threads : PAMA_CUDA_THREADS; }
// Blocks that add up tokens, one to a multiprocessor: few, so that few partial sums are left to the last one. The first
// leaves a thread 128 registers, the second 255.
constexpr int kManyThreads = limited(512), kFewThreads = limited(256);
constexpr unsigned kAllLanes = 0xffffffffu;

// 32 sums over a warp with 31 exchanges: lane k receives the sum of every lane's values[k]. The order is fixed. With
// fewer than `Count` values the others are 0, and the sums of lanes beyond mean nothing.
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

// Whether this is the last block of the grid to come here, told to all its threads. What every block wrote to global
// memory before is then visible to it. The counter is 0 before and after every launch.
__device__ inline bool last_block(unsigned* counter) {
    PAMA_SHARED(bool, last);
    __syncthreads();
    if (threadIdx.x == 0) {  // its fences order what the whole block wrote before the barrier and reads after the next
        __threadfence();
        last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace pama
