// The weights of a batch from its sums, by one thread.
#pragma once

#include "../core/weights.hpp"
#include "problem.hpp"

namespace pama {
namespace cuda {

// The preference over the objectives with a signal, to `effective`; 1 for each of these, else 0, to `weights`. Whether
// there is one.
__device__ inline bool choose_objectives(const Solve& s) {
    for (int i = 0; i < s.n; ++i) s.effective[i] = s.preference ? s.preference[i] : 1.0 / s.n;
    return effective_preference(s.sums, s.n, s.rule.kind == Kind::gram, s.effective, s.weights, s.effective);
}

// Kinds without pairs. N > 0 objectives in registers.
template <int N>
__device__ inline void solve_scores(const Solve& s) {
    const int n = N > 0 ? N : s.n;
    choose_objectives(s);
    double in_registers[3 * (N > 0 ? N : 1)];
    double *const a = N > 0 ? in_registers : s.work, *const p = a + n, *const c = p + n;
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) c[i] = s.weights[i];
    *s.optimum = batch_vector_weights<N>(s.rule, s.sums, n, s.effective, s.effective, a, p, c);
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) s.weights[i] = c[i];
}

}  // namespace cuda
}  // namespace pama
