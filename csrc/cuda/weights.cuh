// Solves many scalar problems, one per thread.
#pragma once

#include "../core/simplex.hpp"
#include "entries.cuh"

namespace pama {
namespace cuda {

constexpr int kRowsThreads = limited(128);

// Loads the scores of one row, with one vector load if they are contiguous.
template <class T, int N>
__device__ inline void load_scores(const Rows& rows, int64_t row, bool vectors, double (&a)[N]) {
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
__device__ inline void store_weights(const Rows& rows, int64_t row, bool vectors, const double (&c)[N]) {
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

// For exactly N objectives, in registers.
template <class T, int N>
__global__ void weights_kernel(const Rows rows, const bool vectors) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsThreads + threadIdx.x;
    if (row >= rows.rows) return;
    double a[N], p[N], c[N];
    load_scores<T, N>(rows, row, vectors, a);
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) {
        p[i] = given_preference(rows, i);
        c[i] = 1;
    }
    const double scale = rows.scale ? rows.scale[row * rows.scale_stride] : -1.0;
    static_cast<T*>(rows.optimum)[row] = static_cast<T>(simplex_row<N>(N, a, p, rows.regularization, scale, c));
    store_weights<T, N>(rows, row, vectors, c);
}

// For any number of objectives, with the workspace `work`.
__global__ void weights_kernel(const Rows rows) {
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
    if (slot >= rows.slots) return;
    double* const a = rows.work + slot * 3 * rows.n;
    double *const p = a + rows.n, *const c = p + rows.n;
    for (int64_t row = slot; row < rows.rows; row += rows.slots) {
        for (int i = 0; i < rows.n; ++i) {
            a[i] = load_score(rows, row * rows.input.row + i * rows.input.objective);
            p[i] = given_preference(rows, i);
            c[i] = 1;
        }
        const double scale = rows.scale ? rows.scale[row * rows.scale_stride] : -1.0;
        const double optimum = simplex_row(rows.n, a, p, rows.regularization, scale, c);
        for (int i = 0; i < rows.n; ++i) store_number(rows.weights, rows.wide, row * rows.n + i, c[i]);
        store_number(rows.optimum, rows.wide, row, optimum);
    }
}

}  // namespace cuda
}  // namespace pama
