// Arithmetic that is the same on every device: choices between values, the exponential, the half-precision formats.
// Templates over V work on one number, or on one number per SIMD lane (a GCC vector type).
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "config.hpp"

PAMA_BEGIN

// Whether a condition holds: for one problem, or in any lane.
PAMA_HD inline bool any(bool x) { return x; }
PAMA_HD inline bool any(int x) { return x != 0; }

template <class Mask>
inline bool any(const Mask& mask) {
    uint64_t words[sizeof(Mask) / sizeof(uint64_t)], bits = 0;
    memcpy(words, &mask, sizeof mask);
    for (uint64_t word : words) bits |= word;
    return bits != 0;
}

// condition ? x : y, in each lane.
template <class Mask, class V>
PAMA_HD inline V choose(Mask condition, V x, V y) {
    return condition ? x : y;
}

template <class V>
PAMA_HD inline V max_of(V x, V y) {
    return choose(x > y, x, y);
}

template <class V>
PAMA_HD inline V min_of(V x, V y) {
    return choose(x < y, x, y);
}

template <class V>
PAMA_HD inline V reciprocal(V x) {
    return (V{} + 1) / x;
}

template <class V>
struct LaneOf {
    typedef typename std::decay<decltype(V{}[0])>::type type;
    typedef decltype(V{} < V{}) Bits;
};
template <>
struct LaneOf<float> {
    typedef float type;
    typedef unsigned Bits;
};
template <>
struct LaneOf<double> {
    typedef double type;
    typedef uint64_t Bits;
};

PAMA_HD constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// r^0 / K! + r^1 / (K + 1)! + ... + r^(Last - K) / Last!
template <int K, int Last, class V>
PAMA_HD inline V exponential_series(V r) {
    constexpr auto term = static_cast<typename LaneOf<V>::type>(inverse_factorial(K));
    if constexpr (K == Last)
        return V{} + term;
    else
        return exponential_series<K + 1, Last>(r) * r + term;
}

// e^x = 2^k e^r with r = x - k log 2, |r| <= log(2)/2, e^r = 1 + r + r^2 q(r); q by its Taylor series, to
// half a unit in the last place of the type. `k3` receives e^x - 1 - x, without cancellation where k = 0.
// Beyond the range of the type it is infinity above and its smallest normal number below. Bounded: |x| < 80.
template <bool Bounded = false, class V>
PAMA_HD inline V exponential(V given, V& k3) {
    typedef typename LaneOf<V>::type T;
    typedef typename LaneOf<V>::Bits Bits;
    constexpr bool single = sizeof(T) == sizeof(float);
    const V zero = V{}, one = zero + T(1), most = zero + T(single ? 89 : 710), least = zero - T(single ? 87 : 708);
    const T magic = single ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa: rounds to an integer
    const V x = Bounded ? given : max_of(min_of(given, most), least);
    const V shifted = x * T(1.4426950408889634) + magic, k = shifted - magic;
    const V r =
        (x - k * T(single ? 0.693145752 : 0.6931471803691238)) - k * T(single ? 1.42860677e-6 : 1.9082149292705877e-10);
    const V tail = r * r * exponential_series<2, single ? 7 : 14>(r);
    Bits bits;
    memcpy(&bits, &shifted, sizeof bits);
    constexpr int mantissa = single ? 23 : 52;
    bits = (bits << mantissa) + (static_cast<typename LaneOf<T>::Bits>(single ? 127 : 1023) << mantissa);
    V power;
    memcpy(&power, &bits, sizeof power);
    const V u = power * (one + (r + tail));
    k3 = choose(k == zero, tail, u - one - given);
    return u;
}

PAMA_HD inline float bf16_to_float(unsigned short x) {
    const unsigned bits = static_cast<unsigned>(x) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Exact, subnormals, infinities and NaN included: the exponent is rebased by a multiplication.
PAMA_HD inline float f16_to_float(unsigned short x) {
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

PAMA_HD inline unsigned short float_to_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to nearest even; the magic addition lets the float unit do the rounding, in the subnormal range too.
PAMA_HD inline unsigned short float_to_f16(float x) {
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
