// The launchers: they start work on a stream and return CUDA's status.
#pragma once

#include "problem.hpp"
#if defined(PAMA_CUDA_EMULATION)
#include "emulation.hpp"
#else
#include <cuda_runtime_api.h>
#endif

namespace pama {
namespace cuda {

// `most` blocks at a time; a number of the device, so that it is filled.
Plan statistics_plan(const Tokens& tokens, bool pairs, int most);
cudaError_t statistics(const Tokens& tokens, bool pairs, const Plan& plan, double* partials, unsigned* counter,
                       double* sums, const Solve& solve, cudaStream_t stream);

cudaError_t batch_weights(const double* sums, int n, const Solve& solve, cudaStream_t stream);
long solve_doubles(int n, bool gram);

// Doubles of `work` for one problem of a batch; 0 where none is needed.
long weights_doubles(int n);
cudaError_t weights(const Rows& rows, cudaStream_t stream);
long min_norm_doubles(int n);
cudaError_t min_norm(const Rows& rows, int multiprocessors, cudaStream_t stream);

}  // namespace cuda
}  // namespace pama
