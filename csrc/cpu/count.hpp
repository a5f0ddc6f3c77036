// Counts the nonzero values of a mask at memory bandwidth.
#pragma once

#include "simd.hpp"

PAMA_BEGIN

// The sum of the lanes, which are counts.
template <class V>
inline int64_t sum_lanes(const V& counts) {
    typedef typename std::decay<decltype(counts[0])>::type S;
    int64_t sum = 0;
    for (unsigned k = 0; k < sizeof(V) / sizeof(S); ++k) sum += static_cast<int64_t>(counts[k]);
    return sum;
}

typedef unsigned char BytesV __attribute__((vector_size(PAMA_VECTOR_BYTES)));
#if defined(__AVX512BW__) || defined(__AVX2__)
template <>
inline int64_t sum_lanes(const BytesV& counts) {
    typedef int64_t V __attribute__((vector_size(PAMA_VECTOR_BYTES)));
#if defined(__AVX512BW__)
    const auto sums = _mm512_sad_epu8(reinterpret_cast<__m512i>(counts), _mm512_setzero_si512());
#else
    const auto sums = _mm256_sad_epu8(reinterpret_cast<__m256i>(counts), _mm256_setzero_si256());
#endif
    return sum_lanes(reinterpret_cast<V>(sums));
}
#endif

// S: an unsigned integer of the size of a value; a value is nonzero if it has a bit in common with `bits`. Each lane
// counts up to its maximum before the lanes are added.
template <class S>
inline int64_t count_nonzero(const S* PAMA_RESTRICT source, int64_t stride, int64_t count, S bits) {
    typedef S V __attribute__((vector_size(PAMA_VECTOR_BYTES)));
    constexpr int64_t width = PAMA_VECTOR_BYTES / sizeof(S), most = sizeof(S) == 1 ? 254 : 65534;
    int64_t found = 0, t = 0;
    while (stride == 1 && t + 2 * width <= count) {
        const int64_t left = (count - t) / (2 * width), rounds = left < most ? left : most;
        V first = {}, second = {};
        for (int64_t k = 0; k < rounds; ++k, t += 2 * width) {
            first -= reinterpret_cast<V>((load<V>(source + t) & bits) != 0);
            second -= reinterpret_cast<V>((load<V>(source + t + width) & bits) != 0);
        }
        found += sum_lanes(first) + sum_lanes(second);
    }
    for (; t < count; ++t) found += (source[t * stride] & bits) != 0;
    return found;
}

inline int64_t count_nonzero(const Array& mask, int64_t offset, int64_t stride, int64_t count) {
    return with_bits(mask, [&](auto* data, auto bits) { return count_nonzero(data + offset, stride, count, bits); });
}

PAMA_END
