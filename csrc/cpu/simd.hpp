// Vector types, loads and the exponential for the instruction set that this translation unit is built for.
// Nothing here, or in the files that include it, calls a function template of the standard library: the linker could
// then merge it with the same one built for another processor.
#pragma once

#include <string.h>

#include <type_traits>

#include "../core/numbers.hpp"
#include "../core/simplex.hpp"
#include "problem.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#define PAMA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PAMA_VECTOR_BYTES 32
#else
#define PAMA_VECTOR_BYTES 16
#endif

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
    typedef long Bits __attribute__((vector_size(PAMA_VECTOR_BYTES)));
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

// Two vectors in step: where each instruction waits for the one before, the other vector's fill the time.
template <class V>
struct Two {
    typedef typename std::decay<decltype(V{}[0])>::type Element;
    V first, second;
#define PAMA_EACH(OP)                                                                          \
    auto operator OP(const Two& x) const { return two(first OP x.first, second OP x.second); } \
    template <class S>                                                                         \
    auto operator OP(S x) const {                                                              \
        const Element y = static_cast<Element>(x);                                             \
        return two(first OP y, second OP y);                                                   \
    }
    PAMA_EACH(+)
    PAMA_EACH(-)
    PAMA_EACH(*)
    PAMA_EACH(/)
    PAMA_EACH(<)
    PAMA_EACH(>)
    PAMA_EACH(<=)
    PAMA_EACH(>=)
    PAMA_EACH(==)
    PAMA_EACH(!=)
    PAMA_EACH(&)
    PAMA_EACH(|)
#undef PAMA_EACH
    Two operator-() const { return {-first, -second}; }
    Two& operator+=(const Two& x) { return *this = *this + x; }
    Two& operator-=(const Two& x) { return *this = *this - x; }
    Two& operator*=(const Two& x) { return *this = *this * x; }
    template <class W>
    static Two<W> two(W x, W y) {
        return {x, y};
    }
};
template <class M, class V>
inline Two<V> choose(Two<M> condition, Two<V> x, Two<V> y) {
    return {condition.first ? x.first : y.first, condition.second ? x.second : y.second};
}
template <class V>
inline Two<V> reciprocal(Two<V> x) {
    return {reciprocal(x.first), reciprocal(x.second)};
}
template <class V>
inline Two<V> power_below(Two<V> x) {
    return {power_below(x.first), power_below(x.second)};
}
template <class M>
inline bool any(const Two<M>& mask) {
    return any(mask.first | mask.second);
}

inline unsigned short float_to_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest even; the magic addition lets the float unit do the rounding, in the subnormal range too.
inline unsigned short float_to_f16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    const unsigned sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<unsigned short>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<unsigned short>(sign | 0x7c00);
    if (bits < 0x38800000) {
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return static_cast<unsigned short>(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return static_cast<unsigned short>(sign | ((bits - 0x38000000) >> 13));
}

PAMA_END
