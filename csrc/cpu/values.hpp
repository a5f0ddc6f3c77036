// Values of any dtype, loaded and stored.
#pragma once

#include "simd.hpp"

PAMA_BEGIN

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

// count values from element `offset` on, as T; for masks (`truth`) 1 where not zero.
template <class T>
inline void load_values(const Array& array, int64_t offset, int64_t stride, int64_t count, bool truth, T* target) {
    const auto same = [](auto x) { return static_cast<T>(x); };
    const auto nonzero = [](auto x) { return static_cast<T>(x != 0); };
    switch (array.dtype) {
#define PAMA_LOAD(TAG, S)                                             \
    case Dtype::TAG: {                                                \
        const S* source = static_cast<const S*>(array.data) + offset; \
        if (truth)                                                    \
            convert(source, stride, count, target, nonzero);          \
        else                                                          \
            convert(source, stride, count, target, same);             \
        break;                                                        \
    }
        PAMA_LOAD(f32, float)
        PAMA_LOAD(f64, double)
        PAMA_LOAD(u8, unsigned char)
        PAMA_LOAD(i8, signed char)
        PAMA_LOAD(i16, short)
        PAMA_LOAD(i32, int)
        PAMA_LOAD(i64, int64_t)
#undef PAMA_LOAD
        case Dtype::bf16:
        case Dtype::f16: {
            const auto* source = static_cast<const unsigned short*>(array.data) + offset;
            if (truth)
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>((x & 0x7fff) != 0); });
            else if (array.dtype == Dtype::bf16)
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>(bf16_to_float(x)); });
            else
                convert(source, stride, count, target,
                        [](unsigned short x) { return static_cast<T>(f16_to_float(x)); });
            break;
        }
    }
}

// One value; for masks (`truth`) 1 or 0.
inline double load_value(const Array& array, int64_t offset, bool truth = false) {
    double value = 0;
    load_values(array, offset, 1, 1, truth, &value);
    return value;
}

template <class T, class S, class F>
inline void convert_back(const T* PAMA_RESTRICT source, int64_t count, S* PAMA_RESTRICT target, F write) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) target[t] = write(source[t]);
}

inline void store_half(const float* source, int64_t count, unsigned short* target) {
    int64_t t = 0;
#if defined(__F16C__)
    for (; t + 8 <= count; t += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target + t), _mm256_cvtps_ph(_mm256_loadu_ps(source + t), 0));
#endif
    for (; t < count; ++t) target[t] = float_to_f16(source[t]);
}
inline void store_half(const double* source, int64_t count, unsigned short* target) {
    for (int64_t t = 0; t < count; ++t) target[t] = float_to_f16(static_cast<float>(source[t]));
}

// count values to contiguous elements from `offset` on.
template <class T>
inline void store_values(const Array& array, int64_t offset, int64_t count, const T* source) {
    switch (array.dtype) {
        case Dtype::f64:
            convert_back(source, count, static_cast<double*>(array.data) + offset,
                         [](T x) { return static_cast<double>(x); });
            break;
        case Dtype::bf16:
            convert_back(source, count, static_cast<unsigned short*>(array.data) + offset,
                         [](T x) { return float_to_bf16(static_cast<float>(x)); });
            break;
        case Dtype::f16:
            store_half(source, count, static_cast<unsigned short*>(array.data) + offset);
            break;
        default:
            convert_back(source, count, static_cast<float*>(array.data) + offset,
                         [](T x) { return static_cast<float>(x); });
    }
}

inline void store_value(const Array& array, int64_t offset, double value) { store_values(array, offset, 1, &value); }

PAMA_END
