#include "launch.hpp"
#include "matrices.cuh"
#include "upgrad.cuh"

namespace pama {
namespace cuda {
namespace {

// Whether each lane of a warp projects with a workspace of its own.
PAMA_HD inline bool by_lane(int n) { return n > kMostByWarp; }

struct UpGrad {
    static constexpr bool kNeedsMass = true;
    static constexpr int kShared = upgrad_work(kMostByWarp);
    static bool always_together(int n) { return n > upgrad::kLargestSmall; }
    static int threads(int n) { return by_lane(n) ? kWarp : limited(kUpgradWarps * kWarp); }
    PAMA_HD static std::size_t workspace(int n) { return nnqp::workspace(n) * (by_lane(n) ? kWarp : 1); }
    __device__ static double entry(const double* sums, int64_t n, int64_t i, int64_t j) {
        return gram_entry(sums, n, i, j);
    }
    __device__ static upgrad::Given<double> given(int n, const double* matrix, const double* preference) {
        return {{n, matrix, n, 1}, preference, nullptr};
    }
    __device__ static double solve(int n, const double* matrix, const double* preference, double, double* c,
                                   double* work) {
        const upgrad::Given<double> problem = given(n, matrix, preference);
        if (n == 2) return upgrad_solve(problem.gram, preference, nullptr, c, work).optimum;
        return upgrad::solve_general(problem, c, work, Lanes{0, 1}).optimum;
    }
    // The optimum is returned to the first thread.
    __device__ static double together(int n, const double* matrix, const double* preference, double, double* c,
                                      double* work, double* shared) {
        double optimum = 0;
        if (n > 2 && !by_lane(n) && upgrad_by_warps<kTogetherByWarp>(n, matrix, preference, c, &optimum, shared))
            return optimum;
        const int lane = threadIdx.x;
        if (lane >= (by_lane(n) ? kWarp : 1)) return 0;
        if (n == 2) return solve(n, matrix, preference, 0, c, work);
        const Lanes lanes = by_lane(n) ? Lanes{lane, kWarp} : Lanes{0, 1};
        work += by_lane(n) ? nnqp::workspace(n) * lane : 0;
        return upgrad::solve_general(given(n, matrix, preference), c, work, lanes).optimum;
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
