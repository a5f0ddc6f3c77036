#include "launch.hpp"
#include "matrices.cuh"
#include "upgrad.cuh"

namespace pama {
namespace cuda {
namespace {

// Where each lane projects with a workspace of its own.
PAMA_HD inline bool by_lane(int n) { return n > kMostInRegisters; }

struct UpGrad {
    static constexpr bool kDivided = true, kNeedsMass = true;
    static bool always_together(int n) { return by_lane(n); }
    PAMA_HD static std::size_t workspace(int n) { return nnqp::workspace(n) * (by_lane(n) ? kWarp : 1); }
    __device__ static double entry(const double* sums, int64_t n, int64_t i, int64_t j) {
        return gram_entry(sums, n, i, j);
    }
    // The optimum is returned to the first lane.
    __device__ static double solve(int n, const double* matrix, const double* preference, double, double* c,
                                   double* work, bool together) {
        Lanes lanes = {0, 1};
        if (together) {
            const int lane = threadIdx.x % kWarp;
            double optimum;
            if (upgrad_few(n, matrix, preference, c, &optimum)) return optimum;
            if (by_lane(n)) {
                lanes = {lane, kWarp};
                work += nnqp::workspace(n) * lane;
            } else if (lane != 0) {
                return 0;
            }
        }
        if (n == 2) return upgrad_solve(n, matrix, n, 1, preference, nullptr, c, work).optimum;
        return upgrad::solve_general(n, matrix, n, 1, preference, nullptr, c, work, lanes).optimum;
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
