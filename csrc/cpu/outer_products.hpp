// Sums of outer products over a group of rows, in float64. A part of the sums stays in registers over all rows of the
// group: a matrix of 64 x 64 sums is as large as the first-level cache, and is read and written once for each group.
#pragma once

#include "simd.hpp"

PAMA_BEGIN

// The sums in registers: objectives i x vectors of objectives j.
constexpr int kOuterObjectives = 4, kOuterVectors = PAMA_VECTOR_BYTES == 64 ? 4 : 3;

// Adds the first `count` lanes, or all.
template <class V>
inline void add_lanes(double* out, V s, int64_t count) {
    constexpr int64_t width = Lanes<double>::count;
    if (count >= width) return store(out, load<V>(out) + s);
    double lanes[width];
    store(lanes, s);
    for (int64_t lane = 0; lane < count; ++lane) out[lane] += lanes[lane];
}

// n, rounded up to whole vectors and to a multiple of kOuterObjectives: the stride of the factors.
inline int64_t outer_stride(int64_t n) {
    constexpr int64_t width = Lanes<double>::count, multiple = width > kOuterObjectives ? width : kOuterObjectives;
    return (n + multiple - 1) / multiple * multiple;
}

// Factors x and y, both (rows, stride). Where x_i < 0, the y for it are `negative` elements further on.
struct OuterProducts {
    int64_t n, stride, rows;
    const double *x, *y;
    int64_t negative;
};

// -1 for a negative number, else 0: by integer instructions, which do not delay the multiplications.
inline int64_t sign_mask(const double* x) {
    int64_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits >> 63;
}

// block (n, n) += sum x_i y_j, for kOuterObjectives objectives i and Vectors vectors of objectives j.
template <bool Signed, int Vectors, class V = DoubleV>
__attribute__((noinline)) void add_outer_block(const OuterProducts& p, int64_t i, int64_t j, double* block) {
    constexpr int64_t width = Lanes<double>::count;
    V s[kOuterObjectives][Vectors] = {};
    const double *x = p.x + i, *y = p.y + j;
    const int64_t stride = p.stride, negative = p.negative;
    for (int64_t row = 0; row < p.rows; ++row, x += stride, y += stride)
        for (int k = 0; k < kOuterObjectives; ++k) {
            const double* own = y;
            if constexpr (Signed) own += sign_mask(x + k) & negative;
            for (int v = 0; v < Vectors; ++v) s[k][v] += x[k] * load<V>(own + v * width);
        }
    PAMA_UNROLL
    for (int k = 0; k < kOuterObjectives; ++k) {
        if (i + k >= p.n) return;
        PAMA_UNROLL
        for (int v = 0; v < Vectors; ++v)
            add_lanes(block + (i + k) * p.n + j + v * width, s[k][v], p.n - j - v * width);
    }
}

// Of a symmetric sum, only the upper triangle is computed; what is left of it in the vector of the diagonal has no
// meaning.
template <bool Signed>
inline void add_outer_products(const OuterProducts& p, bool symmetric, double* block) {
    constexpr int64_t width = Lanes<double>::count;
    for (int64_t i = 0; i < p.n; i += kOuterObjectives)
        for (int64_t j = symmetric ? i / width * width : 0; j < p.n; j += kOuterVectors * width) {
            const int64_t vectors = (p.n - j + width - 1) / width;
            const auto add = vectors == 1   ? add_outer_block<Signed, 1>
                             : vectors == 2 ? add_outer_block<Signed, 2>
                             : vectors == 3 ? add_outer_block<Signed, 3>
                                            : add_outer_block<Signed, kOuterVectors>;
            add(p, i, j, block);
        }
}

PAMA_END
