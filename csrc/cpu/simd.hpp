// Vector types and loads for the instruction set that this translation unit is built for.
// Nothing here, or in the files that include it, calls a function template of the standard library: the linker could
// then merge it with the same one built for another processor.
#pragma once

#include <string.h>

#include <type_traits>

#include "../core/numbers.hpp"
#include "../core/simplex.hpp"
#include "kernels.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#define PAMA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define PAMA_VECTOR_BYTES 32
#else
#define PAMA_VECTOR_BYTES 16
#endif

// Forces inlining: vectors stay in registers only within one function.
#define PAMA_INLINE inline __attribute__((always_inline))
#define PAMA_INLINE_LAMBDA __attribute__((always_inline))  // after the parameters

PAMA_BEGIN

typedef float FloatV __attribute__((vector_size(PAMA_VECTOR_BYTES)));
typedef double DoubleV __attribute__((vector_size(PAMA_VECTOR_BYTES)));

#if defined(__AVX512F__)
template <>
inline bool any(const decltype(FloatV{} < FloatV{})& mask) {
    const auto bits = reinterpret_cast<__m512i>(mask);
    return _mm512_test_epi32_mask(bits, bits) != 0;
}
template <>
inline bool any(const decltype(DoubleV{} < DoubleV{})& mask) {
    const auto bits = reinterpret_cast<__m512i>(mask);
    return _mm512_test_epi64_mask(bits, bits) != 0;
}

// To 2^-28 by one Newton step from 14 bits: a fifth of the time of a division.
template <>
inline FloatV reciprocal(FloatV x) {
    const FloatV r = reinterpret_cast<FloatV>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
    return r + r * (1.0f - x * r);
}
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
// One instruction also for a constant, which GCC 12 compares and blends.
#define PAMA_LESSER(NAME, V, INSIDE, ...)                                                    \
    template <>                                                                              \
    inline V NAME(V given, V other) {                                                        \
        const auto x = reinterpret_cast<INSIDE>(given), y = reinterpret_cast<INSIDE>(other); \
        return reinterpret_cast<V>(__VA_ARGS__);                                             \
    }
#if defined(__AVX512F__)
PAMA_LESSER(min_of, FloatV, __m512, _mm512_maskz_min_ps(0xffff, x, y))
PAMA_LESSER(max_of, FloatV, __m512, _mm512_maskz_max_ps(0xffff, x, y))
PAMA_LESSER(min_of, DoubleV, __m512d, _mm512_maskz_min_pd(0xff, x, y))
PAMA_LESSER(max_of, DoubleV, __m512d, _mm512_maskz_max_pd(0xff, x, y))
#else
PAMA_LESSER(min_of, FloatV, __m256, _mm256_min_ps(x, y))
PAMA_LESSER(max_of, FloatV, __m256, _mm256_max_ps(x, y))
PAMA_LESSER(min_of, DoubleV, __m256d, _mm256_min_pd(x, y))
PAMA_LESSER(max_of, DoubleV, __m256d, _mm256_max_pd(x, y))
#endif
#undef PAMA_LESSER
#endif

// The power of two at or below x > 0 (normal), but one that has a normal reciprocal.
inline FloatV power_below(FloatV x) {
    typedef int Bits __attribute__((vector_size(PAMA_VECTOR_BYTES)));
    Bits bits;
    memcpy(&bits, &x, sizeof x);
    bits &= 0x7f800000;
    bits = bits > 0x7e800000 ? bits * 0 + 0x7e800000 : bits;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline DoubleV power_below(DoubleV x) {
    typedef int64_t Bits __attribute__((vector_size(PAMA_VECTOR_BYTES)));
    Bits bits;
    memcpy(&bits, &x, sizeof x);
    bits &= 0x7ff0000000000000;
    bits = bits > 0x7fd0000000000000 ? bits * 0 + 0x7fd0000000000000 : bits;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    using V = FloatV;
    static constexpr int count = PAMA_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
    using V = DoubleV;
    static constexpr int count = PAMA_VECTOR_BYTES / 8;
};

template <class V, class T>
inline V load(const T* from) {
    V x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class V, class T>
inline void store(T* to, V x) {
    memcpy(to, &x, sizeof x);
}

// Software prefetch for reading and for writing. One cache line is prefetched between two
// computations, so that the memory access overlaps with them; the hardware prefetcher does not look ahead past the work
// on one tile.
// Forced inline: GCC removes calls of a function that only prefetches.
PAMA_INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }
PAMA_INLINE void prefetch_for_writing(const void* to) { __builtin_prefetch(to, 1, 2); }

PAMA_END
