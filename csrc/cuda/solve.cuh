// The weights of a batch from its sums, by one thread.
#pragma once

#include "../core/weights.hpp"
#include "load.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

// The preference over the objectives with a signal, to `effective`; 1 for each of these, else 0, to `weights`. Whether
// there is one.
__device__ inline bool choose_objectives(const Solve& s) {
    for (int i = 0; i < s.n; ++i) s.effective[i] = s.preference ? s.preference[i] : 1.0 / s.n;
    return effective_preference(s.sums, s.n, s.rule.kind == Kind::gram, s.effective, s.weights, s.effective);
}

__device__ inline void store_rounded(const Solve& s) {
    if (!s.rounded[0]) return;
    for (int i = 0; i < s.n; ++i) store_number(s.rounded[0], i, s.weights[i]);
    store_number(s.rounded[1], 0, *s.optimum);
}

// FIXED and SCORES. N > 0 objectives in registers.
template <int N>
__device__ inline void solve_scores(const Solve& s) {
    const int n = N > 0 ? N : s.n;
    const bool some = choose_objectives(s);
    if (!some || s.rule.kind == Kind::fixed) {
        double optimum = 0;
        for (int i = 0; i < n; ++i) {
            s.weights[i] = s.effective[i];
            optimum += some && s.effective[i] != 0 ? s.effective[i] * score(s.sums, n, i) : 0;
        }
        *s.optimum = optimum;
        store_rounded(s);
        return;
    }
    double in_registers[3 * (N > 0 ? N : 1)];
    double *const a = N > 0 ? in_registers : s.work, *const p = a + n, *const c = p + n;
    double scale = 0;
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) {
        a[i] = score(s.sums, n, i);
        p[i] = s.effective[i];
        c[i] = s.weights[i];
        const double moment = c[i] != 0 ? second_moment(s.sums, n, i) : 0;
        scale = moment > scale || moment != moment ? moment : scale;
    }
    *s.optimum = simplex_row<N>(n, a, p, s.rule.number, scale, c);
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) s.weights[i] = c[i];
    store_rounded(s);
}

}  // namespace cuda
}  // namespace pama
