// The launchers: they start work on a stream and return CUDA's status.
#pragma once

#include "problem.hpp"
#include "sequences.hpp"
#if defined(PAMA_CUDA_EMULATION)
#include "emulation.hpp"
#else
#include <cuda_runtime_api.h>
#endif

namespace pama {
namespace cuda {

Plan statistics_plan(const DeviceTokens& tokens, bool pairs, int multiprocessors);

// work: plan.doubles() doubles. With `solve`, whose rule must be FIXED or SCORES, the same launch computes the weights;
// not possible if plan.apart.
cudaError_t statistics(const DeviceTokens& tokens, bool pairs, const Plan& plan, double* work, unsigned* counter,
                       double* sums, const Solve* solve, cudaStream_t stream);

// Whether one launch can process this call with advantages per sequence; if so, fills the inputs and the grid of
// `sequences`. The grid determines the order of the sums, so it depends only on the sizes. The caller adds the
// workspace, the counter and the results.
bool plan_sequences(const DeviceTokens& tokens, bool pairs, int multiprocessors, Sequences& sequences);
cudaError_t sequences(const Sequences& sequences, cudaStream_t stream);

int64_t solve_doubles(Kind kind, int n);
cudaError_t solve(const Solve& solve, cudaStream_t stream);

// Size of `work` for one problem of a batch, in doubles; 0 if none is needed.
int64_t weights_doubles(int n);
cudaError_t weights(const Rows& rows, cudaStream_t stream);
int64_t min_norm_doubles(int n);
cudaError_t min_norm(const Rows& rows, int multiprocessors, cudaStream_t stream);
cudaError_t min_norm(const Solve& batch, cudaStream_t stream);
int64_t upgrad_doubles(int n);
cudaError_t upgrad(const Rows& rows, int multiprocessors, cudaStream_t stream);
cudaError_t upgrad(const Solve& batch, cudaStream_t stream);

}  // namespace cuda
}  // namespace pama
