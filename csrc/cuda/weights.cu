#include <cstdint>

#include "launch.hpp"
#include "solve.cuh"
#include "weights.cuh"

namespace pama {
namespace cuda {
namespace {

dim3 blocks_for(int64_t count, int64_t each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }

template <class T, int N>
cudaError_t rows_of(const Rows& rows, cudaStream_t stream) {
    const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(float4) == 0; };
    const bool vectors =
        rows.input.objective == 1 && rows.input.row % 4 == 0 && aligned(rows.input.data) && aligned(rows.weights);
    void (*kernel)(Rows, bool) = &weights_kernel<T, N>;
    return launch(kernel, blocks_for(rows.rows, kRowsThreads), kRowsThreads, stream, rows, vectors);
}

template <class T>
cudaError_t weights_of(const Rows& rows, cudaStream_t stream) {
    switch (rows.n) {
        case 1:
            return rows_of<T, 1>(rows, stream);
        case 2:
            return rows_of<T, 2>(rows, stream);
        case 3:
            return rows_of<T, 3>(rows, stream);
        case 4:
            return rows_of<T, 4>(rows, stream);
        case 8:
            return rows_of<T, 8>(rows, stream);
        default:
            void (*kernel)(Rows) = &weights_kernel;
            return launch(kernel, blocks_for(rows.slots, kWarp), kWarp, stream, rows);
    }
}

// FIXED or SCORES.
__global__ void scores_kernel(const __grid_constant__ Solve batch) { solve_scores<0>(batch); }

}  // namespace

int64_t weights_doubles(int n) { return n <= 4 || n == 8 ? 0 : 3L * n; }

cudaError_t weights(const Rows& rows, cudaStream_t stream) {
    if (rows.rows == 0) return cudaSuccess;
    return rows.wide ? weights_of<double>(rows, stream) : weights_of<float>(rows, stream);
}

int64_t solve_doubles(Kind kind, int n) {
    const int size = n > 2 ? n : 3;  // a batch always has its matrix in memory
    return kind == Kind::gram ? min_norm_doubles(size) : kind == Kind::upgrad ? upgrad_doubles(size) : 3 * n;
}

cudaError_t solve(const Solve& batch, cudaStream_t stream) {
    if (batch.rule.kind == Kind::gram) return min_norm(batch, stream);
    if (batch.rule.kind == Kind::upgrad) return upgrad(batch, stream);
    return launch(&scores_kernel, dim3(1), kWarp, stream, batch);
}

}  // namespace cuda
}  // namespace pama
