// Computes objective weights from statistics: for a batch, a sequence or a token.
#pragma once

#include <cstddef>

#include "min_norm.hpp"
#include "records.hpp"
#include "simplex.hpp"
#include "softmin.hpp"
#include "statistics.hpp"
#include "upgrad.hpp"

PAMA_BEGIN

// Weights of a rule that needs one value per objective (SCORES, SOFTMIN). a: the values; p: the preference; c: on input
// 1 for objectives that are included, else 0; on output the weights. a and p are overwritten. scale: the factor of the
// regularization, a square of the values' size. Returns the optimum a.c. N as in simplex_solve. Batch: omits SOFTMIN,
// which has no weights per batch.
template <int N = 0, bool Batch = false>
PAMA_HD inline double vector_weights(const Rule& rule, int n, double* a, double* p, double scale, double* c) {
    if constexpr (!Batch) {
        if (rule.kind == Kind::softmin) return softmin_solve(N > 0 ? N : n, a, p, rule.number, c);
    }
    // Squares that underflow give no scale: -1 stands for max a^2.
    return simplex_row<N>(n, a, p, rule.number, scale < kLeastSquare ? -1.0 : scale, c);
}

// As vector_weights, with the values read from the statistics of a batch or a sequence; the scale is the largest mean
// of I^2. a, p (n): workspace.
template <int N = 0, bool Batch = false>
PAMA_HD inline double statistics_weights(const Rule& rule, const double* statistics, int given_n,
                                         const double* preference, double* a, double* p, double* c) {
    const int n = N > 0 ? N : given_n;
    double scale = 0;
    PAMA_UNROLL
    for (int i = 0; i < n; ++i) {
        a[i] = !Batch && rule.kind == Kind::softmin ? advantage_mean(statistics, n, i) : score(statistics, n, i);
        p[i] = preference[i];
        const double moment = c[i] != 0 ? second_moment(statistics, n, i) : 0.0;
        scale = moment > scale || moment != moment ? moment : scale;
    }
    return vector_weights<N, Batch>(rule, n, a, p, scale, c);
}

// Restricts the preference to the objectives that have a signal and normalises it to sum 1. If their preferences sum to
// 0, `effective` is the given preference. part (n): set to 1 for objectives with a signal, else 0. Returns whether any
// objective has a signal.
PAMA_HD inline bool effective_preference(const double* statistics, int n, bool bound, const double* preference,
                                         double* part, double* effective) {
    double mass = 0;
    bool some = false;
    for (int i = 0; i < n; ++i) {
        part[i] = has_signal(statistics, n, i, bound) ? 1 : 0;
        mass += part[i] * preference[i];
        some = some || part[i] != 0;
    }
    for (int i = 0; i < n; ++i) effective[i] = mass > 0 ? part[i] * preference[i] / mass : preference[i];
    return some;
}

// Weights of the batch for rules without pair statistics. If no objective has a signal, or the rule is FIXED, the
// weights are `effective` (n), the result of effective_preference. c (n): on input the `part` of that function.
template <int N = 0>
PAMA_HD inline double batch_vector_weights(const Rule& rule, const double* statistics, int given_n,
                                           const double* preference, const double* effective, double* a, double* p,
                                           double* c) {
    const int n = N > 0 ? N : given_n;
    bool some = false;
    for (int i = 0; i < n; ++i) some = some || c[i] != 0;
    if (some && rule.kind != Kind::fixed) return statistics_weights<N, true>(rule, statistics, n, preference, a, p, c);
    double optimum = 0;
    for (int i = 0; i < n; ++i) {
        c[i] = effective[i];
        if (some && c[i] != 0) optimum += c[i] * score(statistics, n, i);
    }
    return optimum;
}

// Size of the workspace of batch_weights, in doubles.
PAMA_HD inline std::size_t batch_workspace(int n, Kind kind) {
    const std::size_t size = n, solver = kind == Kind::gram ? min_norm_workspace(n) : upgrad_workspace(n);
    return 2 * size + (needs_pairs(kind) ? size * size + solver : 0);
}

PAMA_HD inline double batch_entry(const Rule& rule, const double* statistics, int n, int i, int j) {
    return rule.kind == Kind::gram ? cosine_entry(statistics, n, i, j) : gram_entry(statistics, n, i, j);
}

// Calls solve() for the objectives that have 1 in c, which are marked in `present` (n). A NaN optimum makes every
// weight NaN.
template <class Solve>
PAMA_HD inline SolverResult solve_present(int n, double* c, unsigned char* present, Solve solve) {
    for (int i = 0; i < n; ++i) present[i] = c[i] != 0;
    const SolverResult result = solve();
    for (int i = 0; i < n; ++i) c[i] += 0 * result.optimum;
    return result;
}

// upgrad_solve, or a function that is called in its place.
struct Upgrad {
    PAMA_HD SolverResult operator()(const MatrixView<double>& gram, const double* preference,
                                    const unsigned char* present, double* weights, double* workspace) const {
        return upgrad_solve(gram, preference, present, weights, workspace);
    }
};

// Weights of a rule that needs pair statistics (GRAM, UPGRAD), given the matrix (n, n) of batch_entry. c: on input 1
// for objectives that are included, else 0; on output the weights. present (n), solver: workspace.
template <class Solve>
PAMA_HD inline SolverResult batch_matrix_weights(const Rule& rule, int n, const double* matrix,
                                                 const double* preference, double* c, unsigned char* present,
                                                 double* solver, Solve upgrad) {
    const MatrixView<double> view = {n, matrix, n, 1};
    return solve_present(n, c, present, [&] {
        return rule.kind == Kind::gram ? min_norm_solve(view, preference, present, rule.number, c, solver)
                                       : upgrad(view, preference, present, c, solver);
    });
}

// Computes the weights c (n) of the batch over the objectives that have a signal; if there are none, c is the
// preference. effective (n): receives the preference normalised over the objectives with a signal. Returns the optimum
// a.c or, for rules with pair statistics, the optimum and residual of the matrix problem.
template <class Solve = Upgrad>
PAMA_HD inline SolverResult batch_weights(const double* statistics, int n, const Rule& rule, const double* preference,
                                          double* c, double* effective, double* work, Solve upgrad = {}) {
    const bool gram = rule.kind == Kind::gram;
    const bool some = effective_preference(statistics, n, gram, preference, c, effective);
    SolverResult result = {0.0, 0.0, SolveStatus::solved, 0};
    if (!some || !needs_pairs(rule.kind)) {
        result.optimum = batch_vector_weights(rule, statistics, n, preference, effective, work, work + n, c);
        return result;
    }
    const std::size_t size = n;
    double* const matrix = work + 2 * size;
    for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j)
            matrix[i * size + j] = matrix[j * size + i] = batch_entry(rule, statistics, n, i, j);
    return batch_matrix_weights(rule, n, matrix, preference, c, reinterpret_cast<unsigned char*>(work),
                                matrix + size * size, upgrad);
}

PAMA_END
