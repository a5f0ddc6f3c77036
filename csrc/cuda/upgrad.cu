#include "../core/upgrad.hpp"
#include "launch.hpp"
#include "matrices.cuh"

namespace pama {
namespace cuda {
namespace {

struct UpGrad {
    static constexpr bool kNeedsMass = true;
    PAMA_HD static std::size_t workspace(int n) { return upgrad_workspace(n); }
    __device__ static double entry(const double* sums, int64_t n, int64_t i, int64_t j) {
        return gram_entry(sums, n, i, j);
    }
    __device__ static double solve(int n, const double* matrix, const double* preference, double, double* c,
                                   double* work) {
        return upgrad_solve(n, matrix, n, 1, preference, nullptr, c, work).optimum;
    }
};

}  // namespace

int64_t upgrad_doubles(int n) { return n == 2 ? 0 : matrix_room<UpGrad>(n); }

cudaError_t upgrad(const Rows& rows, int multiprocessors, cudaStream_t stream) {
    return solve_matrices<UpGrad>(rows, multiprocessors, stream);
}

cudaError_t upgrad(const Solve& batch, cudaStream_t stream) { return solve_batch<UpGrad>(batch, stream); }

}  // namespace cuda
}  // namespace pama
