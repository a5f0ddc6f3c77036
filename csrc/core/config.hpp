// Macros that let one header serve the host and the device.
#pragma once

#if defined(__CUDACC__)
#define PAMA_HD __host__ __device__
#else
#define PAMA_HD
#endif

// A function that is called at several places and compiled once on the device, where inlining it makes the code large.
#if defined(__CUDA_ARCH__)
#define PAMA_ONCE __noinline__
#else
#define PAMA_ONCE
#endif

// A function whose inlining would keep the variables of its caller out of registers.
#if defined(__GNUC__)
#define PAMA_OUT_OF_LINE __attribute__((noinline))
#else
#define PAMA_OUT_OF_LINE
#endif

#define PAMA_RESTRICT __restrict__

#if defined(__CUDA_ARCH__) || defined(__clang__)
#define PAMA_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define PAMA_UNROLL
#else
#define PAMA_UNROLL _Pragma("GCC unroll 16")
#endif

// Each translation unit that is compiled for another instruction set names its own inline namespace, so
// that the linker cannot merge a function built for one CPU with the same function built for another.
#if !defined(PAMA_ISA)
#define PAMA_ISA generic
#endif
#define PAMA_BEGIN   \
    namespace pama { \
    inline namespace PAMA_ISA {
#define PAMA_END \
    }            \
    }
