// The weights of a batch from its sums, by one thread.
#pragma once

#include <cmath>

#include "../core/min_norm.hpp"
#include "../core/weights.hpp"
#include "problem.hpp"

namespace pama {
namespace cuda {

// Whether an objective takes part: its advantages are not all 0, and where cosines are asked for its bound terms.
// NaN takes part.
__device__ inline bool has_signal(const double* sums, int64_t n, int64_t i, Kind kind) {
    const bool any = sums[kPositiveCount * n + i] > 0 || sums[kAdvantageSum * n + i] != 0;
    return any && sums[kCount * n + i] > 0 && (kind != Kind::gram || sums[kBoundSquareSum * n + i] != 0);
}

__device__ inline double given_preference(const Solve& s, int i) { return s.preference ? s.preference[i] : 1.0 / s.n; }

// The preference over the objectives with a signal, to `effective`. Returns how many have one.
__device__ inline int effective_preference(const Solve& s) {
    int count = 0;
    double mass = 0;
    for (int i = 0; i < s.n; ++i) {
        if (!has_signal(s.sums, s.n, i, s.rule.kind)) continue;
        ++count;
        mass += given_preference(s, i);
    }
    for (int i = 0; i < s.n; ++i) {
        const double p = given_preference(s, i);
        s.effective[i] = !(mass > 0) ? p : has_signal(s.sums, s.n, i, s.rule.kind) ? p / mass : 0.0;
    }
    return count;
}

__device__ inline double mean_score(const Solve& s) {
    double optimum = 0;
    for (int i = 0; i < s.n; ++i) optimum += s.weights[i] * score(s.sums, s.n, i);
    return optimum;
}

// C_ij = sum I_i I_j / sqrt(sum I_i^2 sum I_j^2); its diagonal is 1, or NaN.
__device__ inline double cosine(const double* sums, int64_t n, int64_t i, int64_t j) {
    const double own = sums[kBoundSquareSum * n + i], other = sums[kBoundSquareSum * n + j];
    if (i == j) return 1 + 0 * own;
    return sums[pair_offset(n, kBoundProduct) + i * n + j] / (std::sqrt(own) * std::sqrt(other));
}

// FIXED and SCORES. N > 0 objectives in registers.
template <int N>
__device__ inline void solve_scores(const Solve& s) {
    const int n = N > 0 ? N : s.n, count = effective_preference(s);
    if (count == 0 || s.rule.kind == Kind::fixed) {
        for (int i = 0; i < n; ++i) s.weights[i] = count == 0 ? given_preference(s, i) : s.effective[i];
        *s.optimum = count == 0 ? 0 : mean_score(s);
        return;
    }
    double in_registers[3 * (N > 0 ? N : 1)];
    double *const a = N > 0 ? in_registers : s.work, *const p = a + n, *const c = p + n;
    double scale = 0;
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) {
        const bool here = has_signal(s.sums, n, i, s.rule.kind);
        a[i] = score(s.sums, n, i);
        p[i] = given_preference(s, i);
        c[i] = here ? 1 : 0;
        const double moment = second_moment(s.sums, n, i);
        scale = here && (moment > scale || moment != moment) ? moment : scale;
    }
    *s.optimum = simplex_row<N>(n, a, p, s.rule.number, scale, c);
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) s.weights[i] = c[i];
}

}  // namespace cuda
}  // namespace pama
