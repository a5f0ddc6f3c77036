// Values of any dtype, loaded and stored.
#pragma once

#include "simd.hpp"

PAMA_BEGIN

typedef unsigned FloatBits __attribute__((vector_size(PAMA_VECTOR_BYTES)));

// A vector of numbers, as float.
inline FloatV load_floats(Native<float>, const float* from) { return load<FloatV>(from); }
inline FloatV load_floats(Bfloat16, const unsigned short* from) {
    FloatBits bits{};
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    bits = reinterpret_cast<FloatBits>(_mm512_maskz_cvtepu16_epi32(0xffff, halves));
#elif defined(__AVX2__)
    bits = reinterpret_cast<FloatBits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    for (int k = 0; k < Lanes<float>::count; ++k) bits[k] = from[k];
#endif
    return reinterpret_cast<FloatV>(bits << 16);
}
inline FloatV load_floats(Float16, const unsigned short* from) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return reinterpret_cast<FloatV>(_mm512_maskz_cvtph_ps(0xffff, halves));
#elif defined(__F16C__)
    return reinterpret_cast<FloatV>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    FloatV x{};
    for (int k = 0; k < Lanes<float>::count; ++k) x[k] = f16_to_float(from[k]);
    return x;
#endif
}

// A vector of 16-bit numbers, as double.
template <class Format>
inline DoubleV load_doubles(Format, const unsigned short* from) {
    [[maybe_unused]] constexpr bool bfloat16 = std::is_same<Format, Bfloat16>::value;
#if defined(__AVX512F__)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256 floats =
        bfloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)) : _mm256_cvtph_ps(halves);
    return reinterpret_cast<DoubleV>(_mm512_maskz_cvtps_pd(0xff, floats));
#elif defined(__F16C__)
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128 floats =
        bfloat16 ? _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16)) : _mm_cvtph_ps(halves);
    return reinterpret_cast<DoubleV>(_mm256_cvtps_pd(floats));
#else
    DoubleV x{};
    for (int k = 0; k < Lanes<double>::count; ++k) x[k] = static_cast<double>(Format::read(from[k]));
    return x;
#endif
}

template <class T, class S, class F>
inline void convert(const S* PAMA_RESTRICT source, int64_t stride, int64_t count, T* PAMA_RESTRICT target, F read) {
    if (stride == 1) {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) target[t] = read(source[t]);
    } else if (stride == 0) {
        const T value = count > 0 ? static_cast<T>(read(source[0])) : T(0);
        for (int64_t t = 0; t < count; ++t) target[t] = value;
    } else {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) target[t] = read(source[t * stride]);
    }
}

// count values from element `offset` on, as T; for masks (`truth`) 1 where not zero. unsigned char: masks only.
template <class T>
inline void load_values(const Array& array, int64_t offset, int64_t stride, int64_t count, bool truth, T* target) {
    if (truth)
        return with_bits(array, [&](auto* data, auto bits) {
            convert(data + offset, stride, count, target, [bits](auto x) { return static_cast<T>((x & bits) != 0); });
        });
    if constexpr (sizeof(T) >= sizeof(float))
        with_format(array.dtype, [&](auto format) {
            typedef decltype(format) Format;
            const auto* from = static_cast<const typename Format::Stored*>(array.data) + offset;
            int64_t t = 0;
            if constexpr (sizeof(T) == 4 && sizeof *from == 2)
                for (; stride == 1 && t + Lanes<float>::count <= count; t += Lanes<float>::count)
                    store(target + t, load_floats(format, from + t));
            if constexpr (sizeof(T) == 8 && sizeof *from == 2)
                for (; stride == 1 && t + Lanes<double>::count <= count; t += Lanes<double>::count)
                    store(target + t, load_doubles(format, from + t));
            if (t < count)
                convert(from + t, stride, count - t, target + t,
                        [](auto x) { return static_cast<T>(Format::read(x)); });
        });
}

template <class Format, class T>
inline void write_values(Format, const T* PAMA_RESTRICT source, int64_t count,
                         typename Format::Stored* PAMA_RESTRICT target) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) target[t] = Format::write(source[t]);
}

#if defined(__AVX512BW__)
// Two vectors at a time. The upper half of a float is rounded up where the lower one is above 0x8000, or equal to it
// and the upper half is odd.
inline void write_values(Bfloat16, const float* source, int64_t count, unsigned short* target) {
    typedef unsigned short Halves __attribute__((vector_size(64)));
    Halves lower, upper;
    for (unsigned short k = 0; k < 32; ++k) lower[k] = static_cast<unsigned short>(2 * k);
    for (unsigned short k = 0; k < 32; ++k) upper[k] = static_cast<unsigned short>(2 * k + 1);
    int64_t t = 0;
    for (; t + 32 <= count; t += 32) {
        const __m512i x = _mm512_loadu_si512(source + t), y = _mm512_loadu_si512(source + t + 16);
        const auto pick = [&](Halves which) {
            return reinterpret_cast<Halves>(_mm512_permutex2var_epi16(x, reinterpret_cast<__m512i>(which), y));
        };
        const Halves low = pick(lower), high = pick(upper), tie = 0x8000 - (high & 1);
        store(target + t, low > tie ? high + 1 : high);
        if (_mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y), _CMP_UNORD_Q) != 0)  // NaN
            for (int64_t k = t; k < t + 32; ++k) target[k] = float_to_bf16(source[k]);
    }
    for (; t < count; ++t) target[t] = float_to_bf16(source[t]);
}
#endif

inline void write_values(Float16, const float* source, int64_t count, unsigned short* target) {
    int64_t t = 0;
#if defined(__F16C__)
    for (; t + 8 <= count; t += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + t), _mm256_cvtps_ph(_mm256_loadu_ps(source + t), 0));
#endif
    for (; t < count; ++t) target[t] = float_to_f16(source[t]);
}

// count values to contiguous elements from `offset` on.
template <class T>
inline void store_values(const Array& array, int64_t offset, int64_t count, const T* source) {
    with_format(array.dtype, [&](auto format) {
        write_values(format, source, count, static_cast<typename decltype(format)::Stored*>(array.data) + offset);
    });
}

inline void store_value(const Array& array, int64_t offset, double value) { store_values(array, offset, 1, &value); }

PAMA_END
