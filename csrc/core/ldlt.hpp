// H y = b for a small symmetric positive definite H by H = L D L', with no square roots.
//
// Blocks of four columns, left-looking: while a tile of 4 columns and 8 rows is in registers it takes
// every update from the columns on its left, is finished, and is stored once. Columns hold L D.
#pragma once

#include "config.hpp"

PAMA_BEGIN
namespace ldlt {

constexpr int kBlock = 4;     // columns of a tile
constexpr int kTileRows = 8;  // rows of a tile

// Explicit vectors of the target's width: GCC's own vectorisation of the tile transposes it.
#if defined(__CUDACC__) || !defined(__GNUC__)
constexpr int kLanes = 1;
typedef double Vector;
PAMA_HD inline double sum_lanes(Vector v) { return v; }
#else
#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Vector __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
inline double sum_lanes(Vector v) {
    double sum = v[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += v[lane];
    return sum;
}
#endif
constexpr int kVectors = kTileRows / kLanes;

PAMA_HD inline Vector& vector_at(double* p) { return *reinterpret_cast<Vector*>(p); }
PAMA_HD inline const Vector& vector_at(const double* p) {
    return *reinterpret_cast<const Vector*>(p);
}

// Leading dimension for up to n columns: the last tile may start kBlock before the end.
PAMA_HD constexpr int leading_dimension(int n) {
    return (n + kTileRows - 1) / kTileRows * kTileRows + kTileRows;
}
PAMA_HD constexpr int round_up_to_block(int k) { return (k + kBlock - 1) / kBlock * kBlock; }

// Scratch of one solve; every array has `ld` entries but `columns` (round_up(k) * ld) and `panel`
// (kBlock * round_up(k)).
struct Scratch {
    double* columns;    // in: H, column by column, rows from the column's block on; out: L D
    double* rhs;        // in: b, 0 from k on; destroyed
    double* floor;      // in: a pivot at or below its floor counts as zero
    double* inverse;    // 1 / D
    double* forward;    // D^-1 L^-1 b
    double* solution;   // y, 0 from k on
    double* panel;
};

// Solves for k unknowns. Columns from k up to round_up_to_block(k) must be those of the identity, and
// rows from k on zero. A pivot at its floor ends the solve with false if `strict`, else is raised to it.
PAMA_HD inline bool solve(int k, int ld, const Scratch& s, bool strict) {
    const int end = round_up_to_block(k);
    for (int j = 0; j < end; j += kBlock) {
        double* block = s.columns + static_cast<long>(j) * ld;
        for (int i = 0; i < j; ++i) {  // the block's rows of L
            const double* row = s.columns + static_cast<long>(i) * ld + j;
            for (int c = 0; c < kBlock; ++c) s.panel[kBlock * i + c] = row[c] * s.inverse[i];
        }
        double lower[kBlock][kBlock], w[kBlock];
        for (int row = j; row < end; row += kTileRows) {
            Vector tile[kBlock][kVectors];
            for (int c = 0; c < kBlock; ++c)
                for (int v = 0; v < kVectors; ++v)
                    tile[c][v] = vector_at(block + static_cast<long>(c) * ld + row + v * kLanes);
            const double* left = s.columns + row;
            const double* panel = s.panel;
            for (int i = 0; i < j; ++i, left += ld, panel += kBlock)
                for (int v = 0; v < kVectors; ++v) {
                    const Vector x = vector_at(left + v * kLanes);
                    for (int c = 0; c < kBlock; ++c) tile[c][v] -= panel[c] * x;
                }
            if (row == j) {  // factorise the 4 x 4 corner, in scalars
                double corner[kBlock][kTileRows];
                for (int c = 0; c < kBlock; ++c)
                    for (int v = 0; v < kVectors; ++v)
                        vector_at(&corner[c][v * kLanes]) = tile[c][v];
                for (int c = 0; c < kBlock; ++c) {
                    double pivot = corner[c][c], z = s.rhs[j + c];
                    for (int b = 0; b < c; ++b) {
                        pivot -= lower[b][c] * corner[b][c];
                        z -= corner[b][c] * w[b];
                    }
                    if (!(pivot > s.floor[j + c])) {
                        if (strict) return false;
                        pivot = s.floor[j + c];
                    }
                    const double inverse = 1.0 / pivot;
                    s.inverse[j + c] = inverse;
                    s.forward[j + c] = w[c] = z * inverse;
                    for (int r = c + 1; r < kBlock; ++r) {
                        for (int b = 0; b < c; ++b) corner[c][r] -= lower[b][c] * corner[b][r];
                        lower[c][r] = corner[c][r] * inverse;
                    }
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                Vector& z = vector_at(s.rhs + row + v * kLanes);
                for (int c = 0; c < kBlock; ++c) {
                    for (int b = 0; b < c; ++b) tile[c][v] -= lower[b][c] * tile[b][v];
                    vector_at(block + static_cast<long>(c) * ld + row + v * kLanes) = tile[c][v];
                    z -= w[c] * tile[c][v];
                }
            }
        }
    }

    // L' y = forward, four unknowns at a time from the end.
    for (int v = 0; v < kVectors; ++v) vector_at(s.solution + end + v * kLanes) = Vector{};
    for (int j = end - kBlock; j >= 0; j -= kBlock) {
        const double* block = s.columns + static_cast<long>(j) * ld;
        Vector dot[kBlock] = {};
        for (int r = j + kBlock; r < end; r += kLanes)
            for (int c = 0; c < kBlock; ++c)
                dot[c] += vector_at(block + static_cast<long>(c) * ld + r) * vector_at(s.solution + r);
        for (int c = kBlock - 1; c >= 0; --c) {
            double sum = sum_lanes(dot[c]);
            for (int b = c + 1; b < kBlock; ++b)
                sum += block[static_cast<long>(c) * ld + j + b] * s.solution[j + b];
            s.solution[j + c] = s.forward[j + c] - sum * s.inverse[j + c];
        }
    }
    return true;
}

// The same for K unknowns in registers. `rows`: symmetric, its rows `stride` apart; H_ij = rows_ij + shift_i
// + shift_j + diagonal [i = j] where both are inside, else the identity; b = inside. Rows and shift must be
// finite up to a multiple of kLanes. Floors are relative to H_ii.
template <int K>
PAMA_HD inline bool solve_small(const double* rows, int stride, const double* shift, double diagonal,
                                const int* inside, double relative_floor, bool strict, double* y) {
    constexpr int kCount = (K + kLanes - 1) / kLanes, kPadded = kCount * kLanes;
    double mask[kPadded], below[K][kPadded], above[K][kPadded], buffer[kPadded], inverse[K], floor[K];
    for (int i = 0; i < kPadded; ++i) {
        mask[i] = i < K ? inside[i] : 0.0;
        for (int k = 0; k < K; ++k) {
            below[k][i] = i > k ? 1.0 : 0.0;
            above[k][i] = i < k ? 1.0 : 0.0;
        }
    }
    Vector h[K][kCount], b[kCount];
    for (int v = 0; v < kCount; ++v) b[v] = vector_at(mask + v * kLanes);
    for (int k = 0; k < K; ++k) {
        const double* const row = rows + static_cast<long>(k) * stride;
        const double entry = row[k] + 2.0 * shift[k] + diagonal;
        floor[k] = mask[k] * relative_floor * entry;
        for (int v = 0; v < kCount; ++v)
            h[k][v] = mask[k] * b[v] *
                      (vector_at(row + v * kLanes) + (vector_at(shift + v * kLanes) + shift[k]));
        h[k][k / kLanes] +=
            (mask[k] * diagonal + (1.0 - mask[k])) *
            (1.0 - vector_at(below[k] + k / kLanes * kLanes) - vector_at(above[k] + k / kLanes * kLanes));
    }
    for (int k = 0; k < K; ++k) {
        double pivot_column[kPadded];
        for (int v = 0; v < kCount; ++v) {
            vector_at(pivot_column + v * kLanes) = h[k][v];
            vector_at(buffer + v * kLanes) = b[v];
        }
        double pivot = pivot_column[k];
        if (!(pivot > floor[k])) {
            if (strict) return false;
            pivot = floor[k];
        }
        inverse[k] = 1.0 / pivot;
        for (int v = 0; v < kCount; ++v) {
            const Vector l = h[k][v] * vector_at(below[k] + v * kLanes) * inverse[k];
            for (int j = k + 1; j < K; ++j) h[j][v] -= pivot_column[j] * l;
            b[v] -= buffer[k] * l;
        }
    }
    for (int k = K - 1; k >= 0; --k) {
        for (int v = 0; v < kCount; ++v) vector_at(buffer + v * kLanes) = b[v];
        y[k] = buffer[k] * inverse[k];
        for (int v = 0; v < kCount; ++v)
            b[v] -= y[k] * h[k][v] * vector_at(above[k] + v * kLanes);
    }
    return true;
}

}  // namespace ldlt
PAMA_END
