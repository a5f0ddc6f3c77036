// Rows of the two weight problems, one row to a thread; and the weights of a batch from its sums.
#pragma once

#include "../core/min_norm.hpp"
#include "device.cuh"
#include "solve.cuh"

namespace pama {
namespace cuda {

// Scores of one row, by a single access where they lie together.
template <class T, int N>
__device__ inline void load_scores(const Rows& rows, long row, bool vectors, double (&a)[N]) {
    const T* from = static_cast<const T*>(rows.input.data) + row * rows.input.row;
    if constexpr (sizeof(T) == 4 && N % 4 == 0) {
        if (vectors) {
            PAMA_UNROLL
            for (int i = 0; i < N; i += 4) {
                const float4 v = reinterpret_cast<const float4*>(from)[i / 4];
                a[i] = v.x, a[i + 1] = v.y, a[i + 2] = v.z, a[i + 3] = v.w;
            }
            return;
        }
    }
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) a[i] = static_cast<double>(from[i * rows.input.objective]);
}

template <class T, int N>
__device__ inline void store_weights(const Rows& rows, long row, bool vectors, const double (&c)[N]) {
    T* to = static_cast<T*>(rows.weights) + row * N;
    if constexpr (sizeof(T) == 4 && N % 4 == 0) {
        if (vectors) {
            PAMA_UNROLL
            for (int i = 0; i < N; i += 4)
                reinterpret_cast<float4*>(to)[i / 4] =
                    float4{static_cast<float>(c[i]), static_cast<float>(c[i + 1]), static_cast<float>(c[i + 2]),
                           static_cast<float>(c[i + 3])};
            return;
        }
    }
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) to[i] = static_cast<T>(c[i]);
}

// Exactly N objectives, in registers.
template <class T, int N>
__global__ void weights_kernel(const Rows rows, const bool vectors) {
    const long row = static_cast<long>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows.rows) return;
    double a[N], p[N], c[N];
    load_scores<T, N>(rows, row, vectors, a);
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) {
        p[i] = rows.prior[i];
        c[i] = 1;
    }
    const double scale = rows.scale ? rows.scale[row * rows.scale_stride] : -1.0;
    static_cast<T*>(rows.optimum)[row] = static_cast<T>(simplex_row<N>(N, a, p, rows.regularization, scale, c));
    store_weights<T, N>(rows, row, vectors, c);
}

__device__ inline double load_score(const Rows& rows, long at) {
    return rows.wide ? static_cast<const double*>(rows.input.data)[at]
                     : static_cast<double>(static_cast<const float*>(rows.input.data)[at]);
}

// Any number of objectives, in `work`.
__global__ void weights_kernel(const Rows rows) {
    const long slot = static_cast<long>(blockIdx.x) * kWarp + threadIdx.x;
    if (slot >= rows.slots) return;
    double* const a = rows.work + slot * 3 * rows.n;
    double *const p = a + rows.n, *const c = p + rows.n;
    for (long row = slot; row < rows.rows; row += rows.slots) {
        for (int i = 0; i < rows.n; ++i) {
            a[i] = load_score(rows, row * rows.input.row + i * rows.input.objective);
            p[i] = rows.prior[i];
            c[i] = 1;
        }
        const double scale = rows.scale ? rows.scale[row * rows.scale_stride] : -1.0;
        const double optimum = simplex_row(rows.n, a, p, rows.regularization, scale, c);
        for (int i = 0; i < rows.n; ++i) store_number(rows.weights, rows.wide, row * rows.n + i, c[i]);
        store_number(rows.optimum, rows.wide, row, optimum);
    }
}

// Doubles of one problem: the matrix, the weights, the prior of those present, and the solver's own.
PAMA_HD inline std::size_t min_norm_room(int n) {
    return static_cast<std::size_t>(n) * (static_cast<std::size_t>(n) + 2) + min_norm_workspace(n);
}

// The matrix of one row, in double. From the sums of a batch: that of the objectives with a token, whose prior goes to
// `prior`. Returns its size.
__device__ inline int load_matrix(const Rows& rows, long row, double* matrix, double* prior) {
    const long n = rows.n;
    if (!rows.sums) {
        const long base = row * rows.input.row;
        for (long i = 0; i < n; ++i)
            for (long j = 0; j < n; ++j) matrix[i * n + j] = load_score(rows, base + i * rows.row + j * rows.column);
        return rows.n;
    }
    int present = 0;
    for (long i = 0; i < n; ++i)
        if (rows.sums[kCount * n + i] > 0) prior[present++] = rows.prior[i];
    for (long i = 0, k = 0; i < n; ++i)
        for (long j = 0; j < n; ++j)
            if (rows.sums[kCount * n + i] > 0 && rows.sums[kCount * n + j] > 0)
                matrix[k++] = gram_entry(rows.sums, n, i, j);
    return present;
}

// One matrix to a thread, two objectives without work space; `active` threads of each warp have one, so that few are
// spread over many warps. The only kernel with the solver, which takes the compiler long.
__global__ void min_norm_kernel(const Rows rows, const int active) {
    const long slot = static_cast<long>(blockIdx.x) * active + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= active || slot >= rows.slots) return;
    const int n = rows.n;
    if (n == 2 && !rows.sums) {
        double matrix[4], c[2], *const none = nullptr;
        load_matrix(rows, slot, matrix, none);
        const double optimum = min_norm_solve(2, matrix, rows.prior, rows.regularization, c, none).optimum;
        for (int i = 0; i < 2; ++i) store_number(rows.weights, rows.wide, slot * 2 + i, c[i]);
        store_number(rows.optimum, rows.wide, slot, optimum);
        return;
    }
    double* const matrix = rows.work + slot * static_cast<long>(min_norm_room(n));
    double *const c = matrix + static_cast<long>(n) * n, *const prior = c + n;
    for (long row = slot; row < rows.rows; row += rows.slots) {
        const int size = load_matrix(rows, row, matrix, prior);
        double optimum = 0;
        if (size > 0)
            optimum = min_norm_solve(size, matrix, size, 1, rows.sums ? prior : rows.prior, nullptr,
                                     rows.regularization, c, prior + n)
                          .optimum;
        for (int i = n - 1, k = size; i >= 0; --i) {
            const bool present = size > 0 && (!rows.sums || rows.sums[kCount * n + i] > 0);
            store_number(rows.weights, rows.wide, row * n + i, size == 0 ? rows.prior[i] : (present ? c[--k] : 0.0));
        }
        store_number(rows.optimum, rows.wide, row, optimum);
    }
}

// The weights of a batch from its sums by their scores, by one thread.
__global__ void batch_weights_kernel(const double* sums, const int n, const Solve solve) {
    if (threadIdx.x == 0) solve_scores<1>(sums, n, solve);
}

}  // namespace cuda
}  // namespace pama
