// Transposition between rows of N numbers in memory and N vectors of one number from each row, N a power of two.
#pragma once

#include <utility>

#include "values.hpp"

PAMA_BEGIN

// Elements Index... of the concatenation (a, b).
template <class V, int... Index>
inline V pick(V a, V b, std::integer_sequence<int, Index...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Index...);
#else
    typedef decltype(a < b) Indices;
    return __builtin_shuffle(a, b, Indices{Index...});
#endif
}

template <int Offset, class V, int... K>
inline V every_second(V a, V b, std::integer_sequence<int, K...>) {
    return pick(a, b, std::integer_sequence<int, (2 * K + Offset)...>{});
}

template <int Offset, int... K>
inline FloatV zip(FloatV a, FloatV b, std::integer_sequence<int, K...>) {
    return pick(a, b, std::integer_sequence<int, (Offset + K / 2 + (K % 2) * static_cast<int>(sizeof...(K)))...>{});
}

using LaneIndices = std::make_integer_sequence<int, Lanes<float>::count>;

// v: N consecutive vectors of an interleaved stream; becomes one vector per position in the row.
template <int N>
PAMA_INLINE void deinterleave(FloatV* v) {
    if constexpr (N > 1) {
        FloatV even[N / 2], odd[N / 2];
        for (int k = 0; k < N / 2; ++k) {
            even[k] = every_second<0>(v[2 * k], v[2 * k + 1], LaneIndices{});
            odd[k] = every_second<1>(v[2 * k], v[2 * k + 1], LaneIndices{});
        }
        deinterleave<N / 2>(even);
        deinterleave<N / 2>(odd);
        for (int k = 0; k < N / 2; ++k) {
            v[2 * k] = even[k];
            v[2 * k + 1] = odd[k];
        }
    }
}

template <int N>
PAMA_INLINE void interleave(FloatV* v) {
    if constexpr (N > 1) {
        FloatV even[N / 2], odd[N / 2];
        for (int k = 0; k < N / 2; ++k) {
            even[k] = v[2 * k];
            odd[k] = v[2 * k + 1];
        }
        interleave<N / 2>(even);
        interleave<N / 2>(odd);
        for (int k = 0; k < N / 2; ++k) {
            v[2 * k] = zip<0>(even[k], odd[k], LaneIndices{});
            v[2 * k + 1] = zip<Lanes<float>::count / 2>(even[k], odd[k], LaneIndices{});
        }
    }
}

// A vector of four floats at from, four at from + step, and so on.
inline FloatV load_quads(const float* from, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
    __m512 x = _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(from));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(from + step));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(from + 2 * step));
    x = _mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(from + 3 * step));
    return reinterpret_cast<FloatV>(x);
#elif defined(__AVX2__)
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps(from));
    return reinterpret_cast<FloatV>(_mm256_insertf128_ps(x, _mm_loadu_ps(from + step), 1));
#else
    return load<FloatV>(from);
#endif
}

// Two numbers from each of a and b, in turn, within each quarter: of four numbers the first two, or the last two.
template <int Offset, class V, int... K>
inline V zip_quads(V a, V b, std::integer_sequence<int, K...>) {
    constexpr int lanes = static_cast<int>(sizeof...(K));
    return pick(a, b, std::integer_sequence<int, (K / 4 * 4 + Offset + K % 4 / 2 + K % 2 * lanes)...>{});
}
// The first halves of the quarters of a and b, or the second halves.
template <int Offset, class V, int... K>
inline V join_quads(V a, V b, std::integer_sequence<int, K...>) {
    constexpr int lanes = static_cast<int>(sizeof...(K));
    return pick(a, b, std::integer_sequence<int, (K / 4 * 4 + Offset + K % 2 + K % 4 / 2 * lanes)...>{});
}

// v[i]: float i of as many rows, `row` floats apart, as a vector has lanes; N a multiple of 4. Half the permutations of
// `deinterleave` for N = 16.
template <int N>
PAMA_INLINE void load_rows_of_quads(const float* from, int64_t row, FloatV* v) {
    constexpr LaneIndices lanes{};
    for (int i = 0; i < N; i += 4) {
        FloatV x[4];
        for (int j = 0; j < 4; ++j) x[j] = load_quads(from + j * row + i, 4 * row);
        const FloatV a = zip_quads<0>(x[0], x[1], lanes), b = zip_quads<2>(x[0], x[1], lanes),
                     c = zip_quads<0>(x[2], x[3], lanes), d = zip_quads<2>(x[2], x[3], lanes);
        v[i] = join_quads<0>(a, c, lanes);
        v[i + 1] = join_quads<2>(a, c, lanes);
        v[i + 2] = join_quads<0>(b, d, lanes);
        v[i + 3] = join_quads<2>(b, d, lanes);
    }
}

// In lane k the sum of the lanes k and k + Distance of a; where that bit of k is set, k - Distance and k of b.
template <int Distance, class V, int... K>
inline V fold(V a, V b, std::integer_sequence<int, K...>) {
    constexpr int lanes = static_cast<int>(sizeof...(K));
    return pick(a, b, std::integer_sequence<int, (K & Distance ? lanes + K : K)...>{}) +
           pick(a, b, std::integer_sequence<int, (K & Distance ? lanes : 0) + (K ^ Distance)...>{});
}
template <int Distance, int Count, class V, class Lanes, int... K>
PAMA_INLINE void fold_neighbours(V* v, Lanes lanes, std::integer_sequence<int, K...>) {
    constexpr int last = Count - 1;
    ((v[K] = fold<Distance>(v[2 * K], v[2 * K < last ? 2 * K + 1 : last], lanes)), ...);
}

// The sums over the lanes of N vectors at once: of pairs of neighbours, of pairs of those, and so on; lane k of the
// result is that of vector k. v: workspace.
template <int N, class V, class T, int Count = N, int Distance = 1>
PAMA_INLINE void totals(V* v, T* sums) {
    constexpr int lanes = sizeof(V) / sizeof(T);
    if constexpr (Distance < lanes) {
        constexpr int half = (Count + 1) / 2;
        fold_neighbours<Distance, Count>(v, std::make_integer_sequence<int, lanes>{},
                                         std::make_integer_sequence<int, half>{});
        totals<N, V, T, half, 2 * Distance>(v, sums);
    } else {
        for (int k = 0; k < N; k += lanes) {  // copies: an array whose address is taken would stay in memory
            const V x = v[k / lanes];
            memcpy(sums + k, &x, static_cast<size_t>(N - k < lanes ? N - k : lanes) * sizeof(T));
        }
    }
}

// v[i]: column i of as many rows of N contiguous numbers as a vector has lanes. Rows are `row` numbers apart: N, a
// constant, or any number if a vector has at most N elements. Memory: they are not in the cache, and the lines `ahead`
// bytes further are prefetched.
template <int N, bool Memory, class Format, class Row>
PAMA_INLINE void load_columns(Format format, const typename Format::Stored* from, Row row, FloatV* v,
                              int64_t ahead = 0) {
    constexpr int width = Lanes<float>::count;
    constexpr bool native = std::is_same<Format, Native<float>>::value;
    // From memory, whole rows in order are faster; from the cache, fewer permutations.
    constexpr bool quads = N >= 16 && !Memory;
    // Two 16-bit numbers are moved in the bits of a float.
    constexpr bool pairs = std::is_same<Format, Bfloat16>::value && N > 1 &&
                           (quads || !std::is_same<Row, int64_t>::value || N >= 2 * width);
    constexpr int words = pairs ? N / 2 : N;
    const auto load_rows = [&](auto length, auto* to, auto read) {
        for (int k = 0; k < length * width; k += width) {
            const auto* at = from + k / length * row + k % length * (N / length);
            if constexpr (Memory) prefetch(reinterpret_cast<const char*>(at) + ahead);
            to[k / width] = read(at);
        }
        deinterleave<length>(to);
    };
    if constexpr (pairs) {
        FloatV word[words];
        if constexpr (quads)
            load_rows_of_quads<words>(reinterpret_cast<const float*>(from), row / 2, word);
        else
            load_rows(std::integral_constant<int, words>{}, word, [](const auto* at) { return load<FloatV>(at); });
        for (int i = 0; i < words; ++i) {
            const FloatBits bits = reinterpret_cast<FloatBits>(word[i]);
            v[2 * i] = reinterpret_cast<FloatV>(bits << 16);
            v[2 * i + 1] = reinterpret_cast<FloatV>(bits & 0xffff0000);
        }
    } else if constexpr (quads && native) {
        load_rows_of_quads<N>(from, row, v);
    } else {
        load_rows(std::integral_constant<int, N>{}, v, [&](const auto* at) { return load_floats(format, at); });
    }
}

// Transposes N contiguous numbers of each of `count` rows to N arrays of floats `stride` apart, applying
// `change`(first row) to each vector of values of these rows. row: as in load_columns.
template <int N, class Format, class Row, class Change>
__attribute__((noinline)) void rows_to_columns(Format format, const typename Format::Stored* PAMA_RESTRICT rows,
                                               Row row, int64_t count, float* PAMA_RESTRICT columns, int64_t stride,
                                               Change change) {
    constexpr int64_t width = Lanes<float>::count;
    int64_t t = 0;
    for (; t + width <= count; t += width) {
        FloatV v[N];
        load_columns<N, false>(format, rows + t * row, row, v);
        const auto changed = change(t);
        for (int i = 0; i < N; ++i) store(columns + i * stride + t, changed(v[i]));
    }
    for (; t < count; ++t)
        for (int i = 0; i < N; ++i) columns[i * stride + t] = change(t)(FloatV{} + Format::read(rows[t * row + i]))[0];
}

template <int N>
inline void columns_to_rows(const float* PAMA_RESTRICT columns, int64_t stride, int64_t count,
                            float* PAMA_RESTRICT rows) {
    constexpr int64_t width = Lanes<float>::count;
    int64_t t = 0;
    for (; t + width <= count; t += width) {
        FloatV v[N];
        for (int i = 0; i < N; ++i) memcpy(&v[i], columns + i * stride + t, sizeof v[i]);
        interleave<N>(v);
        memcpy(rows + t * N, v, sizeof v);
    }
    for (; t < count; ++t)
        for (int i = 0; i < N; ++i) rows[t * N + i] = columns[i * stride + t];
}

// The sizes that have a transposition in registers, and a function that calls visit(integral constant N) for them; else
// it returns false.
constexpr bool is_constant(int n) { return n == 2 || n == 4 || n == 8 || n == 16; }
template <class Visit>
inline bool with_constant(int n, Visit visit) {
    switch (n) {
        case 2:
            visit(std::integral_constant<int, 2>{});
            return true;
        case 4:
            visit(std::integral_constant<int, 4>{});
            return true;
        case 8:
            visit(std::integral_constant<int, 8>{});
            return true;
        case 16:
            visit(std::integral_constant<int, 16>{});
            return true;
        default:
            return false;
    }
}

// Whether there is a transposition in registers. The objectives of a row are contiguous.
template <class Format, class Change>
inline bool contiguous_rows_to_columns(Format format, int n, const typename Format::Stored* rows, int64_t row,
                                       int64_t count, float* columns, int64_t stride, Change change) {
    if (n % 16 == 0) {
        for (int i = 0; i < n; i += 16)
            rows_to_columns<16>(format, rows + i, row, count, columns + i * stride, stride, change);
        return true;
    }
    return row == n && with_constant(n, [&](auto size) {
               rows_to_columns<size>(format, rows, size, count, columns, stride, change);
           });
}

inline void rows_to_columns(int n, const float* rows, int64_t row, int64_t objective, int64_t count, float* columns,
                            int64_t stride) {
    if (objective == 1 && contiguous_rows_to_columns(Native<float>{}, n, rows, row, count, columns, stride,
                                                     [](int64_t) { return [](FloatV x) { return x; }; }))
        return;
    for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) columns[i * stride + t] = rows[t * row + i * objective];
}

inline void columns_to_rows(int n, const float* columns, int64_t stride, int64_t count, float* rows) {
    if (with_constant(n, [&](auto size) { columns_to_rows<size>(columns, stride, count, rows); })) return;
    constexpr int64_t together = 4;  // fewer loops, each of which may end with a mispredicted branch
    int64_t t = 0;
    for (; t + together <= count; t += together)
        for (int i = 0; i < n; ++i)
            for (int64_t k = t; k < t + together; ++k) rows[k * n + i] = columns[i * stride + k];
    for (; t < count; ++t)
        for (int i = 0; i < n; ++i) rows[t * n + i] = columns[i * stride + t];
}

PAMA_END
