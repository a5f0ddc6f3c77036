#include "launch.hpp"
#include "matrices.cuh"
#include "min_norm.cuh"

namespace pama {
namespace cuda {
namespace {

struct MinNorm {
    static constexpr bool kNeedsMass = false;  // if the preferences sum to 0, a uniform preference is used
    static constexpr int kShared = min_norm_work(kMostByWarp);
    static bool always_together(int) { return false; }
    static int threads(int) { return kWarp; }
    PAMA_HD static std::size_t workspace(int n) { return min_norm_workspace(n); }
    __device__ static double entry(const double* sums, int64_t n, int64_t i, int64_t j) {
        return cosine_entry(sums, n, i, j);
    }
    __device__ static double solve(int n, const double* matrix, const double* preference, double regularization,
                                   double* c, double* work) {
        return min_norm_solve(n, matrix, preference, regularization, c, work).optimum;
    }
    // The optimum is returned to the first thread.
    __device__ static double together(int n, const double* matrix, const double* preference, double regularization,
                                      double* c, double* work, double* shared) {
        double optimum = 0;
        if (threadIdx.x < kWarp && n > 2 && n <= kMostByWarp &&
            min_norm_by_warp<kTogetherByWarp>(n, matrix, preference, regularization, c, &optimum, shared))
            return optimum;
        return threadIdx.x == 0 ? min_norm::solve_general(MatrixView<double>{n, matrix, n, 1}, preference, nullptr,
                                                          regularization, c, work)
                                      .optimum
                                : 0;
    }
};

}  // namespace

int64_t min_norm_doubles(int n) { return n == 2 ? 0 : matrix_room<MinNorm>(n); }

cudaError_t min_norm(const Rows& rows, int multiprocessors, cudaStream_t stream) {
    return solve_matrices<MinNorm>(rows, multiprocessors, stream);
}

cudaError_t min_norm(const Solve& batch, cudaStream_t stream) { return solve_batch<MinNorm>(batch, stream); }

}  // namespace cuda
}  // namespace pama
