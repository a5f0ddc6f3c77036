// The min-norm point of a simplex, exactly: given a symmetric positive semidefinite M and a prior p,
//
//     minimise over c in D:  1/2 c'Mc + rho/2 ||c - p||^2,    rho = regularization * max_i M_ii
//
// Homogenised: over y >= 0 minimise 1/2 y'Hy - e'y and take c = y / e'y, where
//     H_ij = M_ij + u_i + u_j + rho [i = j],    u_i = sigma/2 + rho (|p|^2/2 - p_i),
// so that c'Hc is twice the objective plus sigma for every c in D. On a support S the optimum is
// H_SS y_S = e, one factorisation, and the point is optimal when y_S > 0 and (Hy)_j >= 1 outside.
//
// 1. Exchange: swap every index of the wrong sign (y_i < 0 inside, (Hy)_j < 1 outside) while their number
//    reaches new minima, with kSpareExchanges exceptions: it ends after at most n + 1 + kSpareExchanges
//    factorisations, after one to six almost always.
// 2. Descend, where exchange gave up: Lawson and Hanson's method (Wolfe's, in the cone) with block additions.
//    Each addition ends because every round of it drops an index, and raises e'y, which is twice the descent of
//    the objective and a function of the support alone: no support returns, and there are finitely many. In
//    floating point too: what counts as a rise is a new record of the e'y computed from the sorted support, and
//    at most n additions (of one index each, where the rise may be lost to rounding) pass without a record.
// 3. Where the minimiser may not be unique (a pivot vanishes, or a multiplier outside the support does): at
//    most kProximalSteps proximal steps, which add ridge/2 ||c - c_previous||^2 with c_0 = p, until Wolfe's gap
//    of the problem itself closes. The first step finds the minimiser nearest to p up to O(ridge), the next
//    ones remove that bias where M is positive and leave the rest alone. Where a step fails, because M is not
//    quite semidefinite (a singular matrix rounded to float32), a larger ridge begins again.
//
// 1 alone decides where all pivots and all multipliers outside the support are positive: then the minimiser is
// unique. Every answer carries Wolfe's gap, which bounds the distance of the objective from its minimum.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "config.hpp"
#include "min_norm_active_set.hpp"

PAMA_BEGIN

struct MinNormResult {
    double optimum;   // c'Mc
    double residual;  // Wolfe's gap c'g - min_j g_j, g the gradient, over max_i M_ii (1 + regularization)
    int factorisations;
};

namespace min_norm {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargestRegularization = 1e100;
constexpr double kPairSmallest = 1e-140, kPairLargest = 1e140;  // two objectives need no scaling within

// The power of two s with 1 <= s x < 2 (up to the ends of the exponent range).
PAMA_HD inline double power_of_two_scale(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint64_t exponent = bits >> 52 & 0x7ff;
    bits = (exponent < 2046 ? 2046 - exponent : 1) << 52;
    double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// Two objectives: with a = M_11, b = M_12, d = M_22 the first weight is s / (s + s'), where s and s' are the
// descents from the second vertex and from the first, cut off at 0.
PAMA_HD inline MinNormResult solve_scaled_pair(double a, double b, double d, double prior_first, double regularization,
                                               double* first, double* second) {
    const double largest = a > d ? a : d;
    const double rho = regularization * largest, prior_second = 1.0 - prior_first;
    const double descent = d - b + 2.0 * rho * prior_first;
    const double descent_back = a - b + 2.0 * rho * prior_second;
    const double s = descent + std::fabs(descent), s_back = descent_back + std::fabs(descent_back);
    const double sum = s + s_back;  // twice the positive parts: a branch would be mispredicted
    double t = s / sum, rest = s_back / sum;
    if (!(sum > 0.0 && sum <= kLargestDouble)) {
        const double check = 0.0 * a + 0.0 * b + 0.0 * d + 0.0 * regularization + 0.0 * prior_first;
        const bool equal = descent == descent_back;  // duplicates; else not positive semidefinite
        t = check + (equal ? prior_first : descent > descent_back ? 1.0 : 0.0);
        rest = check + (equal ? prior_second : 1.0 - t);
    }
    *first = t;
    *second = rest;
    const double product = t * a + rest * b, product_second = t * b + rest * d;
    const double difference = product - product_second + 2.0 * rho * (t - prior_first);
    const double back = -rest * difference, forth = t * difference, gap = forth > back ? forth : back;
    return {t * product + rest * product_second, gap > 0.0 ? gap / (largest + rho) : 0.0, 0};
}

PAMA_HD inline MinNormResult solve_pair(double a, double b, double d, double prior_first, double regularization,
                                        double* first, double* second) {
    const double diagonal = a > d ? a : d;
    const double size = 0.25 * std::fabs(a) + 0.25 * std::fabs(b) + 0.25 * std::fabs(d);
    if ((diagonal > kPairSmallest && size < kPairLargest) || !(size > 0.0) || !(size <= kLargestDouble))
        return solve_scaled_pair(a, b, d, prior_first, regularization, first, second);
    const double scale = power_of_two_scale(size);
    MinNormResult result =
        solve_scaled_pair(scale * a, scale * b, scale * d, prior_first, regularization, first, second);
    result.optimum /= scale;
    return result;
}

template <class T>
PAMA_HD MinNormResult solve_general(int n, const T* gram, std::ptrdiff_t row_stride, std::ptrdiff_t column_stride,
                                    const double* prior, const unsigned char* present, double regularization,
                                    double* weights, double* workspace) {
    const auto entry = [&](int i, int j) { return static_cast<double>(gram[i * row_stride + j * column_stride]); };
    int count = 0, last = 0, other = 0;  // the last two present
    double mass = 0.0, largest = 0.0;
    for (int i = 0; i < n; ++i) {
        weights[i] = 0.0;
        if (present && !present[i]) continue;
        ++count;
        other = last;
        last = i;
        mass += prior ? prior[i] : 0.0;
        const double diagonal = entry(i, i);
        largest = diagonal > largest ? diagonal : largest;
    }
    const double share = 1.0 / (mass != 0.0 ? mass : count);
    const auto prior_of = [&](int i) { return mass != 0.0 ? prior[i] * share : share; };
    MinNormResult result = {0.0, 0.0, 0};
    if (count == 0) {
        for (int i = 0; i < n; ++i) weights[i] = prior ? prior[i] : 1.0 / n;
        return result;
    }
    if (count == 2)
        return solve_pair(entry(other, other), 0.5 * entry(other, last) + 0.5 * entry(last, other), entry(last, last),
                          prior_of(other), regularization, weights + other, weights + last);
    ActiveSet s;
    s.bind(count, workspace);
    const double scale = largest > 0.0 ? power_of_two_scale(largest) : 1.0, half = 0.5 * scale;
    for (int i = 0, a = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        double* const row = s.row_of(a);
        s.prior[a++] = prior_of(i);
        int b = 0;
        if (present) {
            for (int j = 0; j < n; ++j)
                if (present[j]) row[b++] = half * entry(i, j) + half * entry(j, i);
        } else {
            for (; b < n; ++b) row[b] = half * entry(i, b) + half * entry(b, i);
        }
        for (; b < s.stride; ++b) row[b] = 0.0;
    }
    bool finite = 0.0 * mass + 0.0 * regularization == 0.0;
    if (!(finite && s.finite()))  // or beyond the range after scaling, so far from semidefinite
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                if (!present || (present[i] && present[j])) finite = finite && 0.0 * entry(i, j) == 0.0;
    if (!finite) {
        result.optimum = kNan;
        for (int i = 0; i < n; ++i) weights[i] = kNan;
        return result;
    }
    // Beyond kLargestRegularization c = p in double, and before it overflows.
    if (!(regularization < kLargestRegularization)) regularization = kLargestRegularization;
    if (largest > 0.0) {
        result.residual =
            s.minimise(regularization * largest * scale, &result.optimum) / (largest * scale * (1.0 + regularization));
    } else {
        for (int a = 0; a < count; ++a) s.point[a] = s.prior[a];
        s.gap(0.0, &result.optimum);
    }
    result.optimum /= scale;
    result.factorisations = s.factorisations;
    for (int i = 0, a = 0; i < n; ++i)
        if (!present || present[i]) weights[i] = s.point[a++];
    return result;
}

}  // namespace min_norm

// Doubles that min_norm_solve needs for n objectives.
PAMA_HD inline std::size_t min_norm_workspace(int n) {
    const std::size_t ld = ldlt::leading_dimension(n), blocks = ldlt::round_up_to_block(n);
    return (n + blocks + min_norm::kVectorCount) * ld + ldlt::kBlock * blocks;
}

// gram: element (i, j) at i * row_stride + j * column_stride; (M + M')/2 is solved. prior: n non-negative
// numbers (normalised over those present; null or without mass there: uniform). present: null, or 0 for
// an objective that takes no part: its weight is 0 and its entries are not looked at. Any other NaN or
// infinity makes weights and optimum NaN. A matrix that is not positive semidefinite gives some point of
// the simplex. None present, or M = 0: c = p.
template <class T>
PAMA_HD inline MinNormResult min_norm_solve(int n, const T* gram, std::ptrdiff_t row_stride,
                                            std::ptrdiff_t column_stride, const double* prior,
                                            const unsigned char* present, double regularization, double* weights,
                                            double* workspace) {
    if (n != 2 || present)
        return min_norm::solve_general(n, gram, row_stride, column_stride, prior, present, regularization, weights,
                                       workspace);
    const double a = gram[0], d = gram[row_stride + column_stride];
    const double b = 0.5 * gram[column_stride] + 0.5 * gram[row_stride];
    const double mass = prior ? prior[0] + prior[1] : 0.0;
    return min_norm::solve_pair(a, b, d, mass != 0.0 ? prior[0] * (1.0 / mass) + 0.0 * mass : 0.5, regularization,
                                weights, weights + 1);
}

// A contiguous matrix.
PAMA_HD inline MinNormResult min_norm_solve(int n, const double* gram, const double* prior, double regularization,
                                            double* weights, double* workspace) {
    return min_norm_solve(n, gram, n, 1, prior, nullptr, regularization, weights, workspace);
}
PAMA_END
