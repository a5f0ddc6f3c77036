// Vector types, loads and the exponential for the instruction set that this translation unit is built for.
// Nothing here, or in the files that include it, calls a function template of the standard library: the linker could
// then merge it with the same one built for another processor.
#pragma once

#include <string.h>

#include "../core/numbers.hpp"
#include "problem.hpp"

#if defined(__AVX512F__)
#define PAMA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PAMA_VECTOR_BYTES 32
#else
#define PAMA_VECTOR_BYTES 16
#endif

PAMA_BEGIN

typedef float FloatV __attribute__((vector_size(PAMA_VECTOR_BYTES)));
typedef double DoubleV __attribute__((vector_size(PAMA_VECTOR_BYTES)));

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
