// Scores to weights, by one thread.
#pragma once

#include "../core/weights.hpp"
#include "problem.hpp"

namespace pama {
namespace cuda {

__device__ inline void store_number(void* to, bool wide, long at, double value) {
    if (wide)
        static_cast<double*>(to)[at] = value;
    else
        static_cast<float*>(to)[at] = static_cast<float>(value);
}

__device__ inline void store_solution(const Solve& solve, int n, const double* c, double optimum) {
    for (int i = 0; i < n; ++i) store_number(solve.weights, solve.wide, i, c[i]);
    store_number(solve.optimum, solve.wide, 0, optimum);
}

// In registers where n is N; any n otherwise.
template <int N>
__device__ inline void solve_scores(const double* sums, int n, const Solve& solve) {
    if (n == N) {
        double a[N], p[N], c[N];
        const double optimum = statistics_weights<N>(sums, n, solve.prior, solve.regularization, a, p, c);
        store_solution(solve, n, c, optimum);
    } else {
        double* const c = solve.work;
        const double optimum = statistics_weights(sums, n, solve.prior, solve.regularization, c + n, c + 2 * n, c);
        store_solution(solve, n, c, optimum);
    }
}

}  // namespace cuda
}  // namespace pama
