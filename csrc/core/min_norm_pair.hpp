// The min-norm problem of two objectives, in closed form.
#pragma once

#include "solution.hpp"

PAMA_BEGIN
namespace min_norm {

constexpr double kLargestRegularization = 1e100;
constexpr double kPairSmallest = 1e-140, kPairLargest = 1e140;  // no scaling is needed between these limits

// With a = M_11, b = M_12, d = M_22 the first weight is s / (s + s'), where s and s' are the descents from the second
// vertex and from the first, cut off at 0.
PAMA_HD inline SolverResult solve_scaled_pair(double a, double b, double d, double preference_first,
                                              double regularization, double* first, double* second) {
    const double largest = a > d ? a : d;
    const double rho = regularization * largest, preference_second = 1.0 - preference_first;
    const double descent = d - b + 2.0 * rho * preference_first;
    const double descent_back = a - b + 2.0 * rho * preference_second;
    const double s = descent + std::fabs(descent), s_back = descent_back + std::fabs(descent_back);
    const double sum = s + s_back;  // twice the positive parts: a branch would be mispredicted
    double t = s / sum, rest = s_back / sum;
    SolveStatus status = SolveStatus::solved;
    if (!(sum > 0.0 && sum <= nnqp::kLargestDouble)) {
        const double check = 0.0 * a + 0.0 * b + 0.0 * d + 0.0 * regularization + 0.0 * preference_first;
        const bool equal = descent == descent_back;  // duplicates; else not positive semidefinite
        t = check + (equal ? preference_first : descent > descent_back ? 1.0 : 0.0);
        rest = check + (equal ? preference_second : 1.0 - t);
        status = check != 0.0 ? SolveStatus::not_finite : equal ? status : SolveStatus::indefinite;
    }
    *first = t;
    *second = rest;
    const double product = t * a + rest * b, product_second = t * b + rest * d;
    const double difference = product - product_second + 2.0 * rho * (t - preference_first);
    const double back = -rest * difference, forth = t * difference, gap = forth > back ? forth : back;
    const double own = t * product + rest * product_second;
    return {own < 0.0 ? 0.0 : own, gap > 0.0 ? gap / (largest + rho) : 0.0, status, 0};
}

PAMA_HD inline SolverResult solve_pair(double a, double b, double d, double preference_first, double regularization,
                                       double* first, double* second) {
    const double diagonal = a > d ? a : d;
    const double size = 0.25 * std::fabs(a) + 0.25 * std::fabs(b) + 0.25 * std::fabs(d);
    // Above kLargestRegularization c = p in double precision; the limit avoids an overflow. An infinite or NaN
    // regularization becomes NaN.
    if (!(regularization < kLargestRegularization)) regularization = kLargestRegularization + 0.0 * regularization;
    if ((diagonal > kPairSmallest && size < kPairLargest) || !(size > 0.0) || !(size <= nnqp::kLargestDouble))
        return solve_scaled_pair(a, b, d, preference_first, regularization, first, second);
    const nnqp::Scale scale(size);
    SolverResult result =
        solve_scaled_pair(scale(a), scale(b), scale(d), preference_first, regularization, first, second);
    result.optimum = scale.undo(result.optimum);
    return result;
}

}  // namespace min_norm
PAMA_END
