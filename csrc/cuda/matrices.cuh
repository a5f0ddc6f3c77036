// Solves min-norm or UPGrad problems: many matrices, one per thread; few, one per block; or that of one batch, given
// its statistics.
#pragma once

#include "entries.cuh"
#include "solve.cuh"

namespace pama {
namespace cuda {

constexpr int kSmallBatch = 8;  // objectives of a batch up to which one warp builds the matrix

// Workspace of one problem in doubles: the matrix, the weights, the preference and the solver's workspace.
template <class Problem>
PAMA_HD inline int64_t matrix_room(int n) {
    return static_cast<int64_t>(n) * (n + 2) + static_cast<int64_t>(Problem::workspace(n));
}

// Called by `threads` threads; this is thread `first`.
__device__ inline int load_matrix(const Rows& rows, int64_t row, double* matrix, double* preference, int first = 0,
                                  int threads = 1) {
    const int n = rows.n;
    const int64_t base = row * rows.input.row;
    for (int i = first; i < n; i += threads)
        preference[i] = rows.preference ? rows.preference[i] : 1.0 / static_cast<double>(n);
    for (int k = first; k < n * n; k += threads)
        matrix[k] = load_score(rows, base + k / n * rows.input.token + k % n * rows.input.objective);
    return n;
}

// Builds the matrix over the objectives with a signal, with all threads of the block. Returns their number, or 0 if
// there are none or if the rule needs a positive preference among them and there is none. position (n): the index of
// each of them in the matrix.
template <class Problem>
__device__ inline int batch_matrix(const Solve& s, double* matrix, double* preference, double* position) {
    const Chosen chosen = choose_objectives(s);
    const int n = s.n, count = chosen.count;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        double before = 0;
        PAMA_UNROLL_BY(4)
        for (int j = 0; j < i; ++j) before += s.weights[j];
        position[i] = before;
        if (s.weights[i] != 0) preference[static_cast<int>(before)] = s.effective[i];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < n * n; k += blockDim.x) {
        const int i = k / n, j = k % n;
        if (s.weights[i] != 0 && s.weights[j] != 0)
            matrix[static_cast<int>(position[i]) * count + static_cast<int>(position[j])] =
                Problem::entry(s.sums, n, i, j);
    }
    __syncthreads();
    return Problem::kNeedsMass && !(chosen.mass > 0) ? 0 : count;
}

// Two objectives need no workspace.
template <class Problem>
__device__ inline void solve_two(const Rows& rows, int64_t row) {
    double entries[4], c[2], preference[2];
    load_matrix(rows, row, entries, preference);
    const double optimum = Problem::solve(2, entries, preference, rows.regularization, c, nullptr);
    for (int i = 0; i < 2; ++i) store_number(rows.weights, rows.wide, row * 2 + i, c[i]);
    store_number(rows.optimum, rows.wide, row, optimum);
}

// `active` threads of each warp solve a matrix each, so that few matrices are spread over many warps.
template <class Problem>
__global__ void matrices_kernel(const Rows rows, const int active) {
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * active + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= active || slot >= rows.slots) return;
    const int n = rows.n;
    if (n == 2) return solve_two<Problem>(rows, slot);
    double* const matrix = rows.work + slot * matrix_room<Problem>(n);
    double *const c = matrix + static_cast<int64_t>(n) * n, *const preference = c + n;
    for (int64_t row = slot; row < rows.rows; row += rows.slots) {
        load_matrix(rows, row, matrix, preference);
        const double optimum = Problem::solve(n, matrix, preference, rows.regularization, c, preference + n);
        for (int i = 0; i < n; ++i) store_number(rows.weights, rows.wide, row * n + i, c[i]);
        store_number(rows.optimum, rows.wide, row, optimum);
    }
}

// Each block solves one matrix at a time; with `of_batch` the only matrix is that of `batch`.
template <class Problem>
__global__ void matrix_kernel(const Rows rows, const bool of_batch, const Solve batch) {
    using Work = double[Problem::kShared];
    PAMA_SHARED(Work, shared);
    const int n = rows.n;
    double* const matrix = rows.work + blockIdx.x * matrix_room<Problem>(n);
    double *const c = matrix + static_cast<int64_t>(n) * n, *const preference = c + n;
    for (int64_t row = blockIdx.x; row < rows.rows; row += rows.slots) {
        const int size = of_batch ? batch_matrix<Problem>(batch, matrix, preference, c)
                                  : load_matrix(rows, row, matrix, preference, threadIdx.x, blockDim.x);
        __syncthreads();
        double optimum = 0;
        if (size > 0)
            optimum = Problem::together(size, matrix, preference, rows.regularization, c, preference + n, shared);
        __syncthreads();
        if (threadIdx.x == 0 && !of_batch) {
            for (int i = 0; i < n; ++i) store_number(rows.weights, rows.wide, row * n + i, c[i]);
            store_number(rows.optimum, rows.wide, row, optimum);
        } else if (threadIdx.x == 0) {
            for (int i = 0, k = 0; i < n; ++i)
                batch.weights[i] = size == 0 ? batch.effective[i] : batch.weights[i] != 0 ? c[k++] : 0 * optimum;
            *batch.optimum = optimum;
            store_rounded(batch);
        }
        __syncthreads();
    }
}

template <class Problem>
inline cudaError_t solve_matrices(const Rows& rows, int multiprocessors, cudaStream_t stream) {
    constexpr int64_t kWarpsPerSM = 16;  // over which a batch of matrices is spread
    if (rows.rows == 0) return cudaSuccess;
    int64_t active = rows.slots / (multiprocessors * kWarpsPerSM);
    active = active < 1 ? 1 : active > kWarp ? kWarp : active;
    if (rows.n > 2 && (active == 1 || Problem::always_together(rows.n)))
        return launch(&matrix_kernel<Problem>, dim3(static_cast<unsigned>(rows.slots)), Problem::threads(rows.n),
                      stream, rows, false, Solve{});
    const dim3 grid(static_cast<unsigned>((rows.slots + active - 1) / active));
    return launch(&matrices_kernel<Problem>, grid, kWarp, stream, rows, static_cast<int>(active));
}

template <class Problem>
inline cudaError_t solve_batch(const Solve& batch, cudaStream_t stream) {
    Rows rows;
    rows.rows = rows.slots = 1;
    rows.n = batch.n;
    rows.regularization = batch.rule.number;
    rows.work = batch.work;
    const int builders = batch.n > kSmallBatch ? limited(8 * kWarp) : kWarp, solvers = Problem::threads(batch.n);
    return launch(&matrix_kernel<Problem>, dim3(1), builders > solvers ? builders : solvers, stream, rows, true, batch);
}

}  // namespace cuda
}  // namespace pama
