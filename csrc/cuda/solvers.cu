#include <cstdint>

#include "launch.hpp"
#include "solvers.cuh"

namespace pama {
namespace cuda {
namespace {

constexpr int kWarpsPerProcessor = 16;  // that a batch of matrices is spread over

dim3 blocks_for(long count, long each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }

template <class T, int N>
cudaError_t rows_of(const Rows& rows, cudaStream_t stream) {
    const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(float4) == 0; };
    const bool vectors =
        rows.input.objective == 1 && rows.input.row % 4 == 0 && aligned(rows.input.data) && aligned(rows.weights);
    void (*kernel)(Rows, bool) = &weights_kernel<T, N>;
    return launch(kernel, blocks_for(rows.rows, kThreads), kThreads, stream, rows, vectors);
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

}  // namespace

long weights_doubles(int n) { return n <= 4 || n == 8 ? 0 : 3L * n; }

cudaError_t weights(const Rows& rows, cudaStream_t stream) {
    if (rows.rows == 0) return cudaSuccess;
    return rows.wide ? weights_of<double>(rows, stream) : weights_of<float>(rows, stream);
}

long min_norm_doubles(int n) { return n == 2 ? 0 : static_cast<long>(min_norm_room(n)); }

cudaError_t min_norm(const Rows& rows, int multiprocessors, cudaStream_t stream) {
    if (rows.rows == 0) return cudaSuccess;
    long active = rows.slots / (static_cast<long>(multiprocessors) * kWarpsPerProcessor);
    active = active < 1 ? 1 : (active > kWarp ? kWarp : active);
    return launch(&min_norm_kernel, blocks_for(rows.slots, active), kWarp, stream, rows, static_cast<int>(active));
}

long solve_doubles(int n, bool gram) { return gram ? static_cast<long>(min_norm_room(n)) : 3L * n; }

cudaError_t batch_weights(const double* sums, int n, const Solve& solve, cudaStream_t stream) {
    if (solve.bound == Bound::scores) return launch(&batch_weights_kernel, dim3(1), kWarp, stream, sums, n, solve);
    Rows rows;
    rows.rows = rows.slots = 1;
    rows.n = n;
    rows.wide = solve.wide;
    rows.sums = sums;
    rows.prior = solve.prior;
    rows.regularization = solve.regularization;
    rows.weights = solve.weights;
    rows.optimum = solve.optimum;
    rows.work = solve.work;
    return min_norm(rows, 1, stream);
}

}  // namespace cuda
}  // namespace pama
