// H y = b for a small symmetric positive definite H by H = L D L', with no square roots.
//
// Many unknowns, in memory: blocks of four columns, left-looking; while a tile of 4 columns and 8 rows is in registers
// it takes every update from the columns on its left, is finished, and is stored once. Columns hold L D. Few unknowns,
// in registers: right-looking and unrolled. Each variant is several times slower than the other one on the other one's
// problem sizes.
#pragma once

#include <stdint.h>

#include "config.hpp"

PAMA_BEGIN
namespace ldlt {

constexpr int kBlock = 4;     // columns of a tile
constexpr int kTileRows = 8;  // rows of a tile

// Explicit vectors of the target's width: GCC's own vectorisation of the tile transposes it.
#if defined(__CUDACC__) || !defined(__GNUC__)
constexpr int kLanes = 1, kParts = 1;
typedef double Vector;
PAMA_HD inline double sum_parts(const Vector* part) { return part[0]; }
PAMA_HD inline double least_lane(Vector v) { return v; }
PAMA_HD inline void scale_block(const double* x, double factor, double* result) {
    for (int c = 0; c < kBlock; ++c) result[c] = x[c] * factor;
}
#else
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Vector __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
typedef double Block __attribute__((vector_size(8 * kBlock), aligned(8), may_alias));
inline void scale_block(const double* x, double factor, double* result) {
    *reinterpret_cast<Block*>(result) = *reinterpret_cast<const Block*>(x) * factor;
}
// A sum has kParts vectors, the rows of a tile, so that it does not depend on the width of the vectors.
constexpr int kParts = kTileRows / kLanes;
inline double sum_parts(const Vector* part) {  // pairwise: in sequence, each addition waits for the one before
    double sum[kTileRows];
    for (int p = 0; p < kParts; ++p)
        for (int lane = 0; lane < kLanes; ++lane) sum[p * kLanes + lane] = part[p][lane];
    PAMA_UNROLL
    for (int half = kTileRows / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    return sum[0];
}
inline double least_lane(Vector v) {
    double least = v[0];
    for (int lane = 1; lane < kLanes; ++lane) least = v[lane] < least ? v[lane] : least;
    return least;
}
#endif
constexpr int kVectors = kTileRows / kLanes, kStep = kParts * kLanes;

PAMA_HD inline Vector& vector_at(double* p) { return *reinterpret_cast<Vector*>(p); }
PAMA_HD inline const Vector& vector_at(const double* p) { return *reinterpret_cast<const Vector*>(p); }

// Leading dimension for up to n columns: the last tile may start kBlock before the end.
PAMA_HD constexpr int leading_dimension(int n) { return (n + kTileRows - 1) / kTileRows * kTileRows + kTileRows; }
PAMA_HD constexpr int round_up_to_block(int k) { return (k + kBlock - 1) / kBlock * kBlock; }

// Scratch of one solve; every array has `ld` entries but `columns` (round_up(k) * ld) and `panel`
// (kBlock * round_up(k)).
struct Scratch {
    double* columns;   // in: H, column by column, rows from the column's block on; out: L D
    double* rhs;       // in: b, 0 from k on; destroyed
    double* floor;     // in: a pivot at or below its floor counts as zero
    double* inverse;   // 1 / D
    double* forward;   // D^-1 L^-1 b
    double* solution;  // y, 0 from k on
    double* panel;
};

// L' y = forward, four unknowns at a time from the end.
PAMA_HD inline void substitute_back(int end, int ld, const Scratch& s) {
    double* const solution = s.solution;
    for (int v = 0; v < kVectors; ++v) vector_at(solution + end + v * kLanes) = Vector{};
    for (int j = end - kBlock; j >= 0; j -= kBlock) {
        const double* block = s.columns + static_cast<int64_t>(j) * ld;
        Vector dot[kBlock][kParts] = {};
        for (int r = j + kBlock; r < end; r += kStep)
            for (int c = 0; c < kBlock; ++c)
                for (int p = 0; p < kParts; ++p) {
                    const int at = r + p * kLanes;
                    dot[c][p] += vector_at(block + static_cast<int64_t>(c) * ld + at) * vector_at(solution + at);
                }
        for (int c = kBlock - 1; c >= 0; --c) {
            double sum = sum_parts(dot[c]);
            for (int b = kBlock - 1; b > c; --b) sum += block[static_cast<int64_t>(c) * ld + j + b] * solution[j + b];
            solution[j + c] = s.forward[j + c] - sum * s.inverse[j + c];
        }
    }
}

// Solves for another right-hand side with the factor that solve() left.
PAMA_HD inline void solve_again(int k, int ld, const Scratch& s) {
    const int end = round_up_to_block(k);
    for (int j = 0; j < end; ++j) {
        const double* const column = s.columns + static_cast<int64_t>(j) * ld;
        const double w = s.rhs[j] * s.inverse[j];
        s.forward[j] = w;
        for (int r = j / kBlock * kBlock; r < end; r += kLanes) vector_at(s.rhs + r) -= w * vector_at(column + r);
    }
    substitute_back(end, ld, s);
}

// Solves for k unknowns. Columns from k up to round_up_to_block(k) must be those of the identity, and
// rows from k on zero. A pivot at its floor ends the solve with false if `strict`, else is raised to it. Without Solve,
// only the pivots are found.
template <bool Solve = true>
PAMA_HD inline bool solve(int k, int ld, const Scratch& s, bool strict) {
    const int end = round_up_to_block(k);
    // Copies: a store through a vector may alias the members of `s`.
    double *const columns = s.columns, *const rhs = s.rhs, *const inverse = s.inverse, *const forward = s.forward;
    double* const panel = s.panel;
    const double* const floor = s.floor;
    for (int j = 0; j < end; j += kBlock) {
        double* block = columns + static_cast<int64_t>(j) * ld;
        for (int i = 0; i < j; ++i) {  // the block's rows of L
            const double* row = columns + static_cast<int64_t>(i) * ld + j;
            scale_block(row, inverse[i], panel + kBlock * i);
        }
        double lower[kBlock][kBlock], w[kBlock];
        for (int row = j; row < end; row += kTileRows) {
            Vector tile[kBlock][kVectors];
            for (int c = 0; c < kBlock; ++c)
                for (int v = 0; v < kVectors; ++v)
                    tile[c][v] = vector_at(block + static_cast<int64_t>(c) * ld + row + v * kLanes);
            const double* left = columns + row;
            const double* factor = panel;
            for (int i = 0; i < j; ++i, left += ld, factor += kBlock)
                for (int v = 0; v < kVectors; ++v) {
                    const Vector x = vector_at(left + v * kLanes);
                    for (int c = 0; c < kBlock; ++c) tile[c][v] -= factor[c] * x;
                }
            if (row == j) {  // factorise the 4 x 4 corner, in scalars
                double corner[kBlock][kTileRows];
                for (int c = 0; c < kBlock; ++c)
                    for (int v = 0; v < kVectors; ++v) vector_at(&corner[c][v * kLanes]) = tile[c][v];
                for (int c = 0; c < kBlock; ++c) {
                    double pivot = corner[c][c], z = rhs[j + c];
                    for (int b = 0; b < c; ++b) {
                        pivot -= lower[b][c] * corner[b][c];
                        z -= corner[b][c] * w[b];
                    }
                    if (!(pivot > floor[j + c])) {
                        if (strict) return false;
                        pivot = floor[j + c];
                    }
                    const double reciprocal = 1.0 / pivot;
                    inverse[j + c] = reciprocal;
                    forward[j + c] = w[c] = z * reciprocal;
                    for (int r = c + 1; r < kBlock; ++r) {
                        for (int b = 0; b < c; ++b) corner[c][r] -= lower[b][c] * corner[b][r];
                        lower[c][r] = corner[c][r] * reciprocal;
                    }
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                Vector& z = vector_at(rhs + row + v * kLanes);
                for (int c = 0; c < kBlock; ++c) {
                    for (int b = 0; b < c; ++b) tile[c][v] -= lower[b][c] * tile[b][v];
                    vector_at(block + static_cast<int64_t>(c) * ld + row + v * kLanes) = tile[c][v];
                    z -= w[c] * tile[c][v];
                }
            }
        }
    }

    if (Solve) substitute_back(end, ld, s);
    return true;
}

// The lower triangle of a symmetric N x N matrix by rows, in registers; one in each SIMD lane where V is a vector.
template <class V, int N>
struct Triangle {
    V entry[N * (N + 1) / 2];
    PAMA_HD V& operator()(int i, int j) { return entry[i * (i + 1) / 2 + j]; }
    PAMA_HD const V& symmetric(int i, int j) const {
        return i > j ? entry[i * (i + 1) / 2 + j] : entry[j * (j + 1) / 2 + i];
    }
};

template <class V>
using Mask = decltype(V{} < V{});

// h ends as L D below the diagonal, y (null: none) as L^-1 y, `inverse` as 1 / D. Returns where every pivot was above
// its floor; a pivot at its floor is raised to it if Raise, else the numbers mean nothing there. No sum has two
// products, of which a compiler could fuse either: V = double and a lane of a vector give the same bits.
template <class V, int N, bool Raise = false>
PAMA_HD inline Mask<V> factorise(Triangle<V, N>& h, const V* floor, V* y, V* inverse) {
    Mask<V> regular = V{} == V{};
    PAMA_UNROLL
    for (int k = 0; k < N; ++k) {
        const Mask<V> above = h(k, k) > floor[k];
        regular &= above;
        if constexpr (Raise)
            inverse[k] = 1.0 / (above ? h(k, k) : floor[k]);
        else
            inverse[k] = 1.0 / h(k, k);
        PAMA_UNROLL
        for (int i = k + 1; i < N; ++i) {
            const V l = h(i, k) * inverse[k];
            PAMA_UNROLL
            for (int j = k + 1; j <= i; ++j) h(i, j) -= l * h(j, k);
            if (y) y[i] -= l * y[k];
        }
    }
    return regular;
}
// y to L^-1 y, of a factor.
template <class V, int N>
PAMA_HD inline void substitute(const Triangle<V, N>& h, const V* inverse, V* y) {
    PAMA_UNROLL
    for (int k = 0; k < N; ++k) {
        PAMA_UNROLL
        for (int i = k + 1; i < N; ++i) {
            const V l = h.symmetric(i, k) * inverse[k];
            y[i] -= l * y[k];
        }
    }
}
template <class V, int N>
PAMA_HD inline void substitute_back(Triangle<V, N>& h, const V* inverse, V* y) {
    PAMA_UNROLL
    for (int k = N - 1; k >= 0; --k) {
        PAMA_UNROLL
        for (int i = k + 1; i < N; ++i) y[k] -= h(i, k) * y[i];
        y[k] *= inverse[k];
    }
}

}  // namespace ldlt
PAMA_END
