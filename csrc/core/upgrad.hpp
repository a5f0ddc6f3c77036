// UPGrad's weights, exactly (Quinton & Rey 2024, arXiv 2406.16232): given a symmetric positive semidefinite M, the Gram
// matrix of the objectives' gradients, and a preference p, the mean, weighted by p, of the projections of the gradients
// on the cone of directions in which no objective decreases:
//
// c = sum_i c^(i), normalised to sum 1,    c^(i) = argmin c'Mc over c >= p_i e_i.
//
// With c^(i) = p_i (e_i + x): minimise over x >= 0: 1/2 x'Mx + (M_i.) x, a problem of nnqp.hpp with u = 0 and b =
// -M_i., which does not depend on p_i; active_set.hpp solves it. The objectives are first scaled by powers of two: M is
// replaced by S M S with 1 <= (S M S)_ii < 4, and c by S^-1 c. The problem is otherwise unchanged, and tolerances
// become relative to each objective's own gradient norm.
//
// Where a minimiser is not unique, it is the one nearest to p_i e_i (among objectives whose norms span at most
// kLargestUnit): the proximal term is in the units of M.
#pragma once

#include <cstddef>

#include "upgrad_lanes.hpp"

PAMA_BEGIN
namespace upgrad {

constexpr double kCosine = 1.0 + 1e-12;

// Two objectives, in closed form at any scale: a = M_11, b = M_12, d = M_22, at least one of a and d positive; p and q
// sum to 1. The unknowns are those of `gather`: M is scaled to 1 <= M_ii < 4.
PAMA_HD inline SolverResult solve_pair(double a, double b, double d, double p, double q, double* first,
                                       double* second) {
    const double largest = a > d ? a : d;
    const int odd = exponent_of(largest) & 1;
    const double halved = odd ? 0.5 : 1.0;
    // An objective without a gradient keeps its preference.
    const double u = unit_of(a > 0.0 ? a : largest, odd), v = unit_of(d > 0.0 ? d : largest, odd);
    const bool both = a > 0.0 && d > 0.0;
    const double m = u * a * u * halved, own = v * d * v * halved,
                 across = both ? b * max_of(u, v) * min_of(u, v) * halved : 0.0;
    const double bound = std::sqrt(m) * std::sqrt(own);
    const double cut = across < -bound ? -bound : across > kCosine * bound ? bound : across;
    const double overlap = cut < 0.0 ? -cut : 0.0;
    const double down = min_of(u / v, kLargestRatio), up = min_of(v / u, kLargestRatio);
    const double c = both ? p + q * (down * (overlap / m)) : p, e = both ? q + p * (up * (overlap / own)) : q;
    const double share = 1.0 / (c + e);
    *first = c * share;
    *second = e * share;
    const double x = a > 0.0 ? *first / u : 0.0, y = d > 0.0 ? *second / v : 0.0;
    const double value = x * (x * m + y * cut) + y * (x * cut + y * own);
    const double defect = across < -bound ? -across / bound - 1.0 : 0.0;
    return {value > 0.0 ? value / halved : 0.0, defect,
            defect > kPromisedResidual ? SolveStatus::indefinite : SolveStatus::solved, 0};
}

// solve_all in registers. Returns false if the exchange does not solve a projection.
template <int N>
PAMA_HD inline bool solve_small(const Problem& s, double* answer, SolverResult* result) {
    Small<N> small;
    double sum[N];
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) {
        PAMA_UNROLL
        for (int j = 0; j <= i; ++j) small.x.m(i, j) = s.row_of(i)[j];
        small.unit[i] = s.unit[i];
        small.preference[i] = s.preference[i];
        sum[i] = 0.0;
    }
    if (!small.start()) return false;
    for (int own = 0; own < N; ++own)
        if (!small.project(own, N, sum, &result->residual)) return false;
    PAMA_UNROLL
    for (int j = 0; j < N; ++j) answer[j] = sum[j];
    return true;
}

// The threads that solve one problem together; this one does so alone. Thread `first` of `step` takes every step-th
// projection, with a workspace of its own.
struct Alone {
    static constexpr int first = 0, step = 1;
    static constexpr bool kInLanes = true;  // on a CPU
    PAMA_HD double sum(double x) const { return x; }
    PAMA_HD SolverResult worst(const SolverResult& result) const { return result; }
};

// The projections of the objectives in s: p in `preference`, S in `unit`; sum_i p_i x of them to `answer`.
template <class Threads>
PAMA_HD inline SolverResult solve_all(Problem& s, const Threads& threads, double* workspace) {
    SolverResult result = {0.0, 0.0, SolveStatus::solved, 0};
    if (threads.step == 1 && s.n >= kSmallestSmall && s.n <= kLargestSmall &&
        nnqp::with_size<kSmallestSmall, kLargestSmall>(
            s.n, [&](auto n) { return solve_small<decltype(n)::value>(s, s.answer, &result); }))
        return result;
    result.residual = 0.0;
    for (int j = 0; j < s.n; ++j) s.answer[j] = s.shift[j] = 0.0;
    s.set_metric();
    if constexpr (Threads::kInLanes && kLargestInLanes > 0)
        if (s.n <= kLargestInLanes) return solve_in_lanes(s, workspace);
    for (int i = threads.first; i < s.n; i += threads.step) {
        if (s.preference[i] == 0.0) continue;
        s.objective = i;
        s.factorisations = 0;
        const double residual = s.minimise();
        result.factorisations += s.factorisations;
        s.add(i, s.point);
        if (!is_worse(residual, result.residual)) continue;
        result.residual = residual;
        result.status = s.status();
        if (unsolved(result)) break;
    }
    for (int j = 0; j < s.n; ++j) s.answer[j] = threads.sum(s.answer[j]);
    return threads.worst(result);
}

// (M_ij + M_ji)/2 in the units u and v of the two objectives, with halved: 1, or 0.5 if M is halved. Rounding to
// float32, or an invalid matrix, may violate the Cauchy-Schwarz bound |M_ij| <= sqrt(M_ii M_jj). For equal rows it is
// exact.
PAMA_HD inline double scaled_entry(double upper, double lower, double u, double v, double halved, double bound) {
    const double larger = 0.5 * halved * max_of(u, v), smaller = min_of(u, v);  // in this order nothing underflows
    const double entry = larger * upper * smaller + larger * lower * smaller;
    return entry > kCosine * bound ? bound : entry < -kCosine * bound ? -bound : entry;
}

// The problem as it is given: M (n, n) and the preference over the objectives that are present. Passed by value, so
// that no write to the workspace can change it.
template <class T>
struct Given {
    MatrixView<T> gram;
    const double* preference;      // (n); null: equal preferences
    const unsigned char* present;  // (n); null: all are

    PAMA_HD bool is_present(int i) const { return !present || present[i]; }
    PAMA_HD bool takes_part(int i) const { return is_present(i) && gram(i, i) > 0.0; }
    PAMA_HD double preference_of(int i, double share) const { return preference ? preference[i] * share : share; }
};

// Writes (M + M')/2, scaled, for the objectives that are present and have a nonzero gradient, to s. Returns whether all
// entries of present objectives are finite.
template <class T>
PAMA_HD bool gather(Given<T> given, double share, double* workspace, Problem& s) {
    const int n = given.gram.n;
    int count = 0, bad = 0;
    double largest = 0.0;
    for (int i = 0; i < n; ++i) {
        if (!given.is_present(i)) continue;
        largest = given.gram(i, i) > largest ? given.gram(i, i) : largest;
        for (int j = 0; j < n; ++j) bad |= given.is_present(j) & !(std::fabs(given.gram(i, j)) <= nnqp::kLargestDouble);
        count += given.takes_part(i);
    }
    if (bad) return false;
    s.bind(count, workspace);
    const int odd = exponent_of(largest) & 1;
    s.halved = odd ? 0.5 : 1.0;
    int* const index = s.support;  // of each unknown
    for (int i = 0, a = 0; i < n; ++i) {
        if (!given.takes_part(i)) continue;
        index[a] = i;
        s.unit[a] = unit_of(given.gram(i, i), odd);
        s.diagonal[a] = std::sqrt(s.unit[a] * given.gram(i, i) * s.unit[a] * s.halved);
        s.preference[a++] = given.preference_of(i, share);
    }
    for (int a = 0; a < count; ++a) {
        double* const row = s.row_of(a);
        for (int b = 0; b <= a; ++b) {
            const double upper = given.gram(index[a], index[b]), lower = given.gram(index[b], index[a]);
            const double bound = s.diagonal[a] * s.diagonal[b];
            row[b] = s.row_of(b)[a] = scaled_entry(upper, lower, s.unit[a], s.unit[b], s.halved, bound);
        }
        for (int b = count; b < s.stride; ++b) row[b] = 0.0;
        s.own[a] = row[a];
    }
    return true;
}

// The first of the threads writes the weights and returns their optimum.
template <class T, class Threads>
PAMA_HD SolverResult solve_general(Given<T> given, double* weights, double* workspace, const Threads& threads) {
    const int n = given.gram.n;
    int count = 0;
    double mass = 0.0;
    for (int i = 0; i < n; ++i) {
        if (threads.first == 0) weights[i] = given.preference ? given.preference[i] : 1.0 / n;
        if (!given.is_present(i)) continue;
        ++count;
        mass += given.preference_of(i, 1.0);
    }
    if (count == 0 || mass == 0.0) return {0.0, 0.0, SolveStatus::solved, 0};
    const double share = 1.0 / mass;
    Problem s;
    SolverResult result = {nnqp::kNan, nnqp::kNan, SolveStatus::not_finite, 0};
    const bool finite = gather(given, share, workspace, s) && 0.0 * mass == 0.0;
    if (finite) {
        s.merge();
        result = solve_all(s, threads, workspace + nnqp::workspace(n));
    }
    if (threads.first != 0) return result;
    if (!finite || unsolved(result)) {
        for (int i = 0; i < n; ++i) weights[i] = nnqp::kNan;
        result.optimum = nnqp::kNan;
        return result;
    }
    double sum = 0.0;
    for (int i = 0, a = 0; i < n; ++i) {
        weights[i] = given.is_present(i) ? given.preference_of(i, share) : 0.0;
        if (given.takes_part(i)) {
            const int k = s.group[a++];
            weights[i] += s.answer[k] / s.members[k];
        }
        sum += weights[i];
    }
    const double inverse = 1.0 / sum;
    for (int a = 0; a < s.n; ++a) s.point[a] = 0.0;
    for (int i = 0, a = 0; i < n; ++i) {
        weights[i] *= inverse;
        if (given.takes_part(i)) {
            const int k = s.group[a++];
            s.point[k] += weights[i] / s.unit[k];
        }
    }
    s.multiply(s.point);
    double optimum = 0.0;
    for (int a = 0; a < s.n; ++a) optimum += s.point[a] * s.product[a];
    result.optimum = optimum > 0.0 ? optimum / s.halved : 0.0;
    return result;
}

}  // namespace upgrad

// Size of the workspace of upgrad_solve for n objectives, in doubles.
PAMA_HD inline std::size_t upgrad_workspace(int n) {
    return nnqp::workspace(n) + (upgrad::kLargestInLanes > 0 ? upgrad::lanes_workspace(n) : 0);
}

// Arguments as for min_norm_solve; if the preferences of the present objectives sum to 0, the preference is returned
// unchanged. The optimum is c'Mc of the normalised c. The residual is the largest violation of x >= 0, g = M (e_i + x)
// >= 0, x.g = 0 over all i, where e_i + x is scaled to sum 1 and M to diagonal entries from 1 to 4: for every j,
// (Mc^(i))_j lies at most twice the residual times sqrt(M_jj max_k M_kk) sum c^(i) below 0.
template <class T>
PAMA_HD inline SolverResult upgrad_solve(const MatrixView<T>& gram, const double* preference,
                                         const unsigned char* present, double* weights, double* workspace) {
    if (gram.n == 2 && !present) {  // without workspace
        const double a = gram(0, 0), b = 0.5 * gram(0, 1) + 0.5 * gram(1, 0), d = gram(1, 1);
        const double mass = preference ? preference[0] + preference[1] : 1.0;
        const double poison = 0.0 * a + 0.0 * b + 0.0 * d + 0.0 * mass;
        const double p = preference ? preference[0] : 0.5, q = preference ? preference[1] : 0.5;
        if (poison != 0.0) {
            weights[0] = weights[1] = nnqp::kNan;
            return {nnqp::kNan, nnqp::kNan, SolveStatus::not_finite, 0};
        }
        if (mass > 0.0 && (a > 0.0 || d > 0.0))
            return upgrad::solve_pair(a, b, d, p / mass, q / mass, weights, weights + 1);
        weights[0] = mass > 0.0 ? p / mass : p;
        weights[1] = mass > 0.0 ? q / mass : q;
        return {0.0, 0.0, SolveStatus::solved, 0};
    }
    return upgrad::solve_general(upgrad::Given<T>{gram, preference, present}, weights, workspace, upgrad::Alone{});
}

PAMA_END
