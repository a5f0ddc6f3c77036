// Vector types, loads and the exponential for the instruction set that this translation unit is built for.
// Nothing here, or in the files that include it, calls a function template of the standard library: the linker could
// then merge it with the same one built for another processor.
#pragma once

#include <string.h>

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

// e^x = 2^k e^r with r = x - k log 2, |r| <= log(2)/2, e^r = 1 + r + r^2 q(r); q by its Taylor series, to
// half a unit in the last place of the type. `k3` receives e^x - 1 - x, without cancellation where k = 0.
// Beyond the range of the type it is infinity above and its smallest normal number below.
inline float exponential(float given, float& k3) {
    float x = given;
    x = x < 89.0f ? x : 89.0f;
    x = x > -87.0f ? x : -87.0f;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    float q = 1.0f / 5040;
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    const float tail = r * r * q;
    unsigned bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + (127u << 23);
    float power;
    memcpy(&power, &bits, 4);
    const float u = power * (1.0f + (r + tail));
    k3 = k == 0.0f ? tail : u - 1.0f - given;
    return u;
}

inline double exponential(double given, double& k3) {
    double x = given;
    x = x < 710.0 ? x : 710.0;
    x = x > -708.0 ? x : -708.0;
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
    const double k = shifted - 6755399441055744.0;
    const double r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
    double q = 1.0 / 87178291200.0;
    q = q * r + 1.0 / 6227020800.0;
    q = q * r + 1.0 / 479001600.0;
    q = q * r + 1.0 / 39916800.0;
    q = q * r + 1.0 / 3628800.0;
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    const double tail = r * r * q;
    unsigned long bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits << 52) + (1023UL << 52);
    double power;
    memcpy(&power, &bits, 8);
    const double u = power * (1.0 + (r + tail));
    k3 = k == 0.0 ? tail : u - 1.0 - given;
    return u;
}

inline float bf16_to_float(unsigned short x) {
    const unsigned bits = static_cast<unsigned>(x) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Exact, subnormals, infinities and NaN included: the exponent is rebased by a multiplication.
inline float f16_to_float(unsigned short x) {
    const unsigned magnitude = static_cast<unsigned>(x & 0x7fff) << 13;
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    unsigned bits;
    memcpy(&bits, &scaled, 4);
    bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    bits |= static_cast<unsigned>(x & 0x8000) << 16;
    memcpy(&scaled, &bits, 4);
    return scaled;
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
