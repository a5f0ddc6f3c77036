// Several systems H y = b of up to a few hundred unknowns at once, each in a SIMD lane of V: H = L D L' as in ldlt.hpp,
// left-looking in blocks of kLaneBlock rows and columns. The order of operations does not depend on the width of V or
// on the other lanes, so a system gets the same bits in any lane. For the host: a GPU thread solves one system.
#pragma once

#include <cstddef>

#include "ldlt.hpp"

PAMA_BEGIN
namespace ldlt {

constexpr int kLaneBlock = 4;
#if defined(__AVX512F__)
constexpr int kTileColumns = 4;  // of a block at a time: its sums, 4 rows each, stay in registers
#else
constexpr int kTileColumns = 2;
#endif

constexpr int round_up_to_lane_block(int k) { return (k + kLaneBlock - 1) / kLaneBlock * kLaneBlock; }
// Where row i of a lower triangle starts, with the rows of a block equally long; row k: the size of k rows.
constexpr std::ptrdiff_t lane_row(int i) {
    const std::ptrdiff_t block = i / kLaneBlock;
    return kLaneBlock * kLaneBlock * block * (block + 1) / 2 + (i - block * kLaneBlock) * (block + 1) * kLaneBlock;
}

// Systems in the lanes of V; every array has k entries but `rows` (lane_row(k)) and `panel` (kLaneBlock * k).
template <class V>
struct LaneScratch {
    V *rows, *panel;              // in: H by rows; out: L D below the diagonal
    V *rhs, *diagonal, *inverse;  // in: b, H_ii; out: y, H_ii, 1 / D
    V relative;                   // a pivot at or below this multiple of H_ii is raised to it
};
template <class V>
LaneScratch(V*, V*, V*, V*, V*, V) -> LaneScratch<V>;

// Rows `row` and onwards, `length` apart, of the tile that starts in column j, less the updates of the columns before.
template <class V>
inline void update_tile(V* row, std::ptrdiff_t length, int j, const V* panel) {
    for (int first = 0; first < kLaneBlock; first += kTileColumns) {
        V sum[kLaneBlock][kTileColumns];
        PAMA_UNROLL
        for (int r = 0; r < kLaneBlock; ++r) PAMA_UNROLL
        for (int c = 0; c < kTileColumns; ++c) sum[r][c] = row[r * length + j + first + c];
        const V* factor = panel + first;
        for (int p = 0; p < j; ++p, factor += kLaneBlock) {
            V f[kTileColumns];
            PAMA_UNROLL
            for (int c = 0; c < kTileColumns; ++c) f[c] = factor[c];
            PAMA_UNROLL
            for (int r = 0; r < kLaneBlock; ++r) {
                const V x = row[r * length + p];
                PAMA_UNROLL
                for (int c = 0; c < kTileColumns; ++c) sum[r][c] -= x * f[c];
            }
        }
        PAMA_UNROLL
        for (int r = 0; r < kLaneBlock; ++r) PAMA_UNROLL
        for (int c = 0; c < kTileColumns; ++c) row[r * length + j + first + c] = sum[r][c];
    }
}

// L' y = D^-1 z: each row of L D, times its y, is subtracted from z above it.
template <class V>
inline void substitute_back(int k, const LaneScratch<V>& s) {
    constexpr int B = kLaneBlock;
    V *const PAMA_RESTRICT inverse = s.inverse, *const PAMA_RESTRICT z = s.rhs;
    for (int i = k - B; i >= 0; i -= B) {
        const V* const rows = s.rows + lane_row(i);
        const std::ptrdiff_t length = lane_row(i + 1) - lane_row(i);
        V y[B];
        for (int r = B - 1; r >= 0; --r) {
            y[r] = z[i + r];
            for (int c = r + 1; c < B; ++c) y[r] -= rows[c * length + i + r] * y[c];
            y[r] *= inverse[i + r];
            z[i + r] = y[r];
        }
        for (int j = 0; j < i; ++j) {
            V sum = z[j];
            for (int r = 0; r < B; ++r) sum -= rows[r * length + j] * y[r];
            z[j] = sum;
        }
    }
}

// Solves for k unknowns, a multiple of kLaneBlock. Sets regular[lane] to whether every pivot was above its floor.
template <class V>
inline void solve_lanes(int k, const LaneScratch<V>& s, bool* regular) {
    constexpr int B = kLaneBlock;
    V *const PAMA_RESTRICT panel = s.panel, *const PAMA_RESTRICT inverse = s.inverse, *const PAMA_RESTRICT z = s.rhs;
    const V relative = s.relative;
    Mask<V> above_floor = V{} == V{};
    for (int j = 0; j < k; j += B) {
        V* const corner = s.rows + lane_row(j);
        const std::ptrdiff_t own = lane_row(j + 1) - lane_row(j);
        V w[B];
        for (int c = 0; c < B; ++c) w[c] = z[j + c];
        for (int p = 0; p < j; ++p)  // the block's rows of L, and L^-1 b
            for (int c = 0; c < B; ++c) {
                const V l = corner[c * own + p] * inverse[p];
                panel[p * B + c] = l;
                w[c] -= l * z[p];
            }
        update_tile(corner, own, j, panel);
        V lower[B][B] = {};
        for (int c = 0; c < B; ++c) {
            for (int b = 0; b < c; ++b) w[c] -= lower[c][b] * w[b];
            z[j + c] = w[c];
            const V pivot = corner[c * own + j + c], floor = relative * s.diagonal[j + c];
            const Mask<V> above = pivot > floor;
            above_floor &= above;
            const V reciprocal = 1.0 / (above ? pivot : floor);
            inverse[j + c] = reciprocal;
            for (int r = c + 1; r < B; ++r) {
                const V below = corner[r * own + j + c];
                lower[r][c] = below * reciprocal;
                for (int b = c + 1; b <= r; ++b) corner[r * own + j + b] -= below * lower[b][c];
            }
        }
        for (int i = j + B; i < k; i += B) {
            V* const rows = s.rows + lane_row(i);
            const std::ptrdiff_t length = lane_row(i + 1) - lane_row(i);
            update_tile(rows, length, j, panel);
            for (int r = 0; r < B; ++r) {
                V* const tile = rows + r * length + j;
                for (int c = 1; c < B; ++c)
                    for (int b = 0; b < c; ++b) tile[c] -= lower[c][b] * tile[b];
            }
        }
    }
    substitute_back<V>(k, s);
    for (int lane = 0; lane < static_cast<int>(sizeof(V) / sizeof(double)); ++lane)
        regular[lane] = above_floor[lane] != 0;
}

// Solves for another right-hand side with the factor that solve_lanes left.
template <class V>
inline void solve_lanes_again(int k, const LaneScratch<V>& s) {
    constexpr int B = kLaneBlock;
    V *const PAMA_RESTRICT scaled = s.panel, *const PAMA_RESTRICT z = s.rhs;  // D^-1 L^-1 b, L^-1 b
    for (int i = 0; i < k; i += B) {
        const V* const rows = s.rows + lane_row(i);
        const std::ptrdiff_t length = lane_row(i + 1) - lane_row(i);
        V w[B];
        for (int r = 0; r < B; ++r) w[r] = z[i + r];
        for (int p = 0; p < i; ++p)
            for (int r = 0; r < B; ++r) w[r] -= rows[r * length + p] * scaled[p];
        for (int r = 0; r < B; ++r) {
            for (int b = 0; b < r; ++b) w[r] -= rows[r * length + i + b] * scaled[i + b];
            z[i + r] = w[r];
            scaled[i + r] = w[r] * s.inverse[i + r];
        }
    }
    substitute_back<V>(k, s);
}

}  // namespace ldlt
PAMA_END
