// Many min-norm or UPGrad problems, one matrix to a thread; and that of a batch, from its sums.
#pragma once

#include <cmath>
#include <cstddef>

#include "entries.cuh"
#include "solve.cuh"

namespace pama {
namespace cuda {

constexpr double kMinNormResidual = 1e-9;  // provisional

// Doubles of one problem: the matrix, the weights, the preference, and the solver's own.
template <class Problem>
PAMA_HD inline int64_t matrix_room(int n) {
    return static_cast<int64_t>(n) * (n + 2) + static_cast<int64_t>(Problem::workspace(n));
}

// The matrix of the objectives with a signal, and their preference. Returns how many there are.
template <class Problem>
__device__ inline int batch_matrix(const Solve& s, double* matrix, double* preference) {
    int count = 0;
    for (int i = 0; i < s.n; ++i)
        if (has_signal(s.sums, s.n, i, s.rule.kind)) preference[count++] = given_preference(s, i);
    for (int i = 0, k = 0; i < s.n; ++i) {
        if (!has_signal(s.sums, s.n, i, s.rule.kind)) continue;
        for (int j = 0; j < s.n; ++j)
            if (has_signal(s.sums, s.n, j, s.rule.kind)) matrix[k++] = Problem::entry(s.sums, s.n, i, j);
    }
    return count;
}

// `active` threads of each warp have a matrix, so that few are spread over many warps. With `of_batch` the one matrix
// is that of `batch`. The only kernel with the solver, which takes the compiler long.
template <class Problem>
__global__ void matrices_kernel(const Rows rows, const int active, const bool of_batch, const Solve batch) {
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * active + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= active || slot >= rows.slots) return;
    const int n = rows.n;
    double* const matrix = rows.work + slot * matrix_room<Problem>(n);
    double *const c = matrix + static_cast<int64_t>(n) * n, *const preference = c + n;
    for (int64_t row = slot; row < rows.rows; row += rows.slots) {
        int size = n;
        if (of_batch) {
            effective_preference(batch);
            size = batch_matrix<Problem>(batch, matrix, preference);
        } else {
            const int64_t base = row * rows.input.row;
            for (int i = 0; i < n; ++i) {
                preference[i] = given_preference(rows, i);
                for (int j = 0; j < n; ++j)
                    matrix[i * n + j] = load_score(rows, base + i * rows.input.token + j * rows.input.objective);
            }
        }
        bool solvable = size > 0;
        if (of_batch && batch.rule.kind == Kind::upgrad) {
            double mass = 0;
            for (int k = 0; k < size; ++k) mass += preference[k];
            solvable = mass > 0;
        }
        double optimum = 0;
        if (solvable) optimum = Problem::solve(size, matrix, preference, rows.regularization, c, preference + n);
        if (!of_batch) {
            for (int i = 0; i < n; ++i) store_number(rows.weights, rows.wide, row * n + i, c[i]);
            store_number(rows.optimum, rows.wide, row, optimum);
            continue;
        }
        for (int i = 0, k = 0; i < n; ++i) {
            const bool here = has_signal(batch.sums, n, i, batch.rule.kind);
            batch.weights[i] = !solvable ? given_preference(batch, i) : here ? c[k++] : 0.0;
        }
        *batch.optimum = optimum;
    }
}

template <class Problem>
inline cudaError_t solve_matrices(const Rows& rows, int multiprocessors, cudaStream_t stream) {
    constexpr int64_t kWarpsPerProcessor = 16;  // that a batch of matrices is spread over
    if (rows.rows == 0) return cudaSuccess;
    int64_t active = rows.slots / (multiprocessors * kWarpsPerProcessor);
    active = active < 1 ? 1 : active > kWarp ? kWarp : active;
    const dim3 grid(static_cast<unsigned>((rows.slots + active - 1) / active));
    return launch(&matrices_kernel<Problem>, grid, kWarp, stream, rows, static_cast<int>(active), false, Solve{});
}

template <class Problem>
inline cudaError_t solve_batch(const Solve& batch, cudaStream_t stream) {
    Rows rows;
    rows.rows = rows.slots = 1;
    rows.n = batch.n;
    rows.regularization = batch.rule.number;
    rows.work = batch.work;
    return launch(&matrices_kernel<Problem>, dim3(1), kWarp, stream, rows, 1, true, batch);
}

// The optimum, not below 0; NaN, as the weights then are, where the solver did not reach its promise.
__device__ inline double checked(const MinNormResult& result, int n, double* c) {
    if (!(result.residual <= kMinNormResidual))
        for (int i = 0; i < n; ++i) c[i] = NAN;
    const double optimum = result.residual <= kMinNormResidual ? result.optimum : NAN;
    return optimum < 0 ? 0 : optimum;
}

}  // namespace cuda
}  // namespace pama
