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
// constant, or any number if a vector has at most N elements. Prefetches `Ahead` bytes further, unless that is 0.
template <int N, int Ahead, class Format, class Row>
PAMA_INLINE void load_columns(Format format, const typename Format::Stored* from, Row row, FloatV* v) {
    constexpr int width = Lanes<float>::count;
    const auto load_rows = [&](auto length, auto* to, auto read) {
        for (int k = 0; k < length * width; k += width) {
            const auto* at = from + k / length * row + k % length * (N / length);
            if constexpr (Ahead > 0) prefetch(reinterpret_cast<const char*>(at) + Ahead);
            to[k / width] = read(at);
        }
        deinterleave<length>(to);
    };
    constexpr bool pairs =
        std::is_same<Format, Bfloat16>::value && N > 1 && (!std::is_same<Row, int64_t>::value || N >= 2 * width);
    if constexpr (pairs) {  // two numbers in the bits of a float
        FloatV words[N / 2];
        load_rows(std::integral_constant<int, N / 2>{}, words, [](const auto* at) { return load<FloatV>(at); });
        for (int i = 0; i < N / 2; ++i) {
            const FloatBits bits = reinterpret_cast<FloatBits>(words[i]);
            v[2 * i] = reinterpret_cast<FloatV>(bits << 16);
            v[2 * i + 1] = reinterpret_cast<FloatV>(bits & 0xffff0000);
        }
    } else {
        load_rows(std::integral_constant<int, N>{}, v, [&](const auto* at) { return load_floats(format, at); });
    }
}

// Transposes N contiguous numbers of each of `count` rows to N arrays of floats `stride` apart, applying
// `change`(vector, first row) to each vector. row: as in load_columns.
template <int N, class Format, class Row, class Change>
__attribute__((noinline)) void rows_to_columns(Format format, const typename Format::Stored* PAMA_RESTRICT rows,
                                               Row row, int64_t count, float* PAMA_RESTRICT columns, int64_t stride,
                                               Change change) {
    constexpr int64_t width = Lanes<float>::count;
    int64_t t = 0;
    for (; t + width <= count; t += width) {
        FloatV v[N];
        load_columns<N, 0>(format, rows + t * row, row, v);
        for (int i = 0; i < N; ++i) store(columns + i * stride + t, change(v[i], t));
    }
    for (; t < count; ++t)
        for (int i = 0; i < N; ++i) columns[i * stride + t] = change(FloatV{} + Format::read(rows[t * row + i]), t)[0];
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

// Calls visit(integral constant N) for the sizes that have a transposition in registers; else returns false.
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

// Whether there is a transposition in registers.
template <class Format, class Change>
inline bool contiguous_rows_to_columns(Format format, int n, const typename Format::Stored* rows, int64_t row,
                                       int64_t objective, int64_t count, float* columns, int64_t stride,
                                       Change change) {
    if (objective != 1) return false;
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
    if (contiguous_rows_to_columns(Native<float>{}, n, rows, row, objective, count, columns, stride,
                                   [](FloatV x, int64_t) { return x; }))
        return;
    for (int i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) columns[i * stride + t] = rows[t * row + i * objective];
}

inline void columns_to_rows(int n, const float* columns, int64_t stride, int64_t count, float* rows) {
    if (with_constant(n, [&](auto size) { columns_to_rows<size>(columns, stride, count, rows); })) return;
    for (int64_t t = 0; t < count; ++t)
        for (int i = 0; i < n; ++i) rows[t * n + i] = columns[i * stride + t];
}

PAMA_END
