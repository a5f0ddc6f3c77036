// A non-negative quadratic problem (core/nnqp.hpp) solved by one warp, as a system for nnqp::exchange: each lane has
// the numbers of one unknown and the matrices are in shared memory. With few unknowns several lanes have the same
// unknown and divide its row of the matrix. The code is short on purpose: a kernel that runs once a step is read from
// memory.
#pragma once

#include "../core/active_set.hpp"
#include "device.cuh"

namespace pama {
namespace cuda {

constexpr int kMostByWarp = kWarp;  // unknowns
constexpr int kTogetherByWarp = 4;  // `Together` below, where kMostByWarp unknowns are possible

// Rows of an odd number of doubles: lanes that read a column use different banks.
PAMA_HD constexpr int warp_pitch(int n) { return n | 1; }
// Where a row of a lower triangle begins, the rows one after another. The numbers i (i + 1) / 2 of any 16 rows from a
// multiple of 16 on differ modulo 16: here too, lanes that read a column use different banks.
PAMA_HD constexpr int triangle(int row) { return row * (row + 1) / 2; }
// Doubles of H and a vector.
PAMA_HD constexpr int warp_work(int n) { return triangle(n) + n; }

// Together: elements of a row that a lane updates with all loads in flight. More take more code, and are faster for
// many unknowns.
template <int Together>
struct WarpSystem {
    int n, pitch, width, unknown, part, parts;  // parts: lanes that have the same unknown, `width` apart
    bool real;                                  // whether the unknown exists
    const double* m;                            // M (n, pitch), shared by the warps
    double *h, *vector;                         // the lower triangle of H, then L D below its diagonal; (n)
    double shift = 0, diagonal = 1, target = 0, inside = 0, y = 0, product = 0;
    double total = 0, linear = 0, terms = 0, fixed_total = 0, fixed_terms = 0;
    bool enters = false, tied = false;

    __device__ WarpSystem(int size, const double* matrix, double* work)
        : n(size), pitch(warp_pitch(size)), width(kWarp), m(matrix), h(work), vector(work + triangle(size)) {
        while (width / 2 >= n) width /= 2;
        const int lane = threadIdx.x % kWarp;
        unknown = lane % width;
        part = lane / width;
        parts = kWarp / width;
        real = unknown < n;
    }

    // Over the unknowns; x must be 0 where there is none.
    __device__ double sum(double x) const {
        PAMA_ROLLED
        for (int half = width / 2; half > 0; half /= 2) x += __shfl_xor_sync(kAllLanes, x, half);
        return x;
    }
    __device__ double largest(double x) const {
        PAMA_ROLLED
        for (int half = width / 2; half > 0; half /= 2) x = max_of(__shfl_xor_sync(kAllLanes, x, half), x);
        return x;
    }
    __device__ double own_entry() const { return real ? m[unknown * pitch + unknown] : 0; }
    // The element `unknown` of Mx; x of each unknown.
    __device__ double row_times(double x) const {
        __syncwarp();
        if (real && part == 0) vector[unknown] = x;
        __syncwarp();
        double sum = 0;
        PAMA_ROLLED
        for (int j = part; real && j < n; j += parts) sum += m[unknown * pitch + j] * vector[j];
        PAMA_ROLLED
        for (int half = kWarp / 2; half >= width; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
        return sum;
    }
    // Whether two unknowns have identical rows: the general solver averages over them.
    __device__ bool duplicates() const {
        bool same = false;
        const double own = own_entry();
        PAMA_ROLLED
        for (int j = part; real && j < n; j += parts) {
            const double both = m[unknown * pitch + j];
            same = same || (j != unknown && both == own && both == m[j * pitch + j]);
        }
        return __any_sync(kAllLanes, same);
    }

    // --- for nnqp::exchange --------------------------------------------------------------------------------------

    __device__ bool solve() {
        const unsigned support = __reduce_add_sync(kAllLanes, part == 0 && inside > 0 ? 1u << unknown : 0u);
        double* const row = h + triangle(unknown);
        __syncwarp();
        if (real && part == 0) vector[unknown] = shift;
        __syncwarp();
        PAMA_ROLLED
        for (int j = part; inside > 0 && j <= unknown; j += parts)
            row[j] = j == unknown ? diagonal : m[unknown * pitch + j] + (shift + vector[j]);
        const double floor = nnqp::kSingularPivot * diagonal;
        double inverse = 1;
        y = inside > 0 ? target : 0;
        __syncwarp();
        PAMA_ROLLED
        for (int k = 0; k < n; ++k) {
            if (!(support >> k & 1)) continue;
            const double pivot = h[triangle(k) + k], reciprocal = 1 / pivot, before = __shfl_sync(kAllLanes, y, k);
            if (!(pivot > __shfl_sync(kAllLanes, floor, k))) return false;
            if (unknown == k) inverse = reciprocal;
            if (inside > 0 && unknown > k) {
                const double l = row[k] * reciprocal;
                PAMA_ROLLED
                for (int first = k + 1 + part; first <= unknown; first += Together * parts) {
                    double old[Together], other[Together];
                    PAMA_UNROLL
                    for (int u = 0; u < Together; ++u) {
                        const int j = first + u * parts;
                        const bool used = j <= unknown && (support >> j & 1) != 0;
                        old[u] = used ? row[j] : 0;
                        other[u] = used ? h[triangle(j) + k] : 0;
                    }
                    PAMA_UNROLL
                    for (int u = 0; u < Together; ++u) {
                        const int j = first + u * parts;
                        if (j <= unknown && (support >> j & 1) != 0) row[j] = old[u] - l * other[u];
                    }
                }
                y -= l * before;
            }
            __syncwarp();
        }
        PAMA_ROLLED
        for (int k = n - 1; k >= 0; --k) {
            if (!(support >> k & 1)) continue;
            const double found = __shfl_sync(kAllLanes, y * inverse, k);
            if (unknown == k) y = found;
            if (inside > 0 && unknown < k) y -= h[triangle(k) + unknown] * found;
        }
        total = sum(y);
        linear = sum(shift * y);
        terms = sum(diagonal * std::fabs(y));
        return sum(target * y) >= 0 && terms < nnqp::kLargestDouble;
    }

    __device__ double mark() {
        product = row_times(y);
        const bool outside = real && !(inside > 0);
        const double multiplier = product + linear + shift * total - target;
        const double size = diagonal * (total + fixed_total) + (terms + fixed_terms);
        enters = outside && multiplier < -nnqp::kViolation * size;
        tied = __any_sync(kAllLanes, outside && multiplier < nnqp::kTie * size);
        return __reduce_add_sync(kAllLanes, part == 0 && (y < 0 || enters) ? 1u : 0u);
    }

    __device__ void flip(bool active) {
        if (active) inside = enters ? 1 : y < 0 ? 0 : inside;
    }
};

}  // namespace cuda
}  // namespace pama
