// From statistics to weights: of the whole batch, one sequence or one token.
#pragma once

#include <cstddef>

#include "min_norm.hpp"
#include "records.hpp"
#include "simplex.hpp"
#include "softmin.hpp"
#include "statistics.hpp"
#include "upgrad.hpp"

PAMA_BEGIN

// The scalar problem on the scores of one sequence. c (n) receives the weights, a and p (n) are work space; the scale
// is the largest mean of I^2. Objectives without a token take no part. Returns the optimum a.c. N as in simplex_solve.
template <int N = 0>
PAMA_HD inline double statistics_weights(const double* statistics, int given_n, const double* preference,
                                         double regularization, double* a, double* p, double* c) {
    const int n = N > 0 ? N : given_n;
    double scale = 0;
    for (int i = 0; i < n; ++i) {
        a[i] = score(statistics, n, i);
        p[i] = preference[i];
        c[i] = statistics[kCount * n + i] > 0 ? 1 : 0;
        const double moment = second_moment(statistics, n, i);
        scale = moment > scale || moment != moment ? moment : scale;
    }
    return simplex_row<N>(n, a, p, regularization, scale, c);
}

// The preference over the objectives that have a signal (`part`: 1 or 0), as it is where they have no mass. Whether any
// has a signal.
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

// Doubles that batch_weights needs.
PAMA_HD inline std::size_t batch_workspace(int n, Kind kind) {
    const std::size_t size = n;
    const bool matrix = kind == Kind::gram || kind == Kind::upgrad;
    const std::size_t solver = kind == Kind::gram ? min_norm_workspace(n) : upgrad_workspace(n);
    return 2 * size + (matrix ? size * size + solver : 0);
}

// One set of weights for the batch: c (n), from objectives that have a signal; without any, the preference. `effective`
// (n): the preference over those. The optimum is a.c, or that of the matrix problem, whose residual comes with it.
PAMA_HD inline SolverResult batch_weights(const double* statistics, int n, Kind kind, double regularization,
                                          const double* preference, double* c, double* effective, double* work) {
    const bool gram = kind == Kind::gram;
    const bool some = effective_preference(statistics, n, gram, preference, c, effective);
    SolverResult result = {0.0, 0.0, SolveStatus::solved, 0};
    if (!some || kind == Kind::fixed) {
        for (int i = 0; i < n; ++i) {
            c[i] = some ? effective[i] : preference[i];
            if (some && c[i] != 0) result.optimum += c[i] * score(statistics, n, i);
        }
        return result;
    }
    if (kind == Kind::scores) {
        double *a = work, *p = work + n, scale = 0;
        for (int i = 0; i < n; ++i) {
            a[i] = score(statistics, n, i);
            p[i] = preference[i];
            const double moment = c[i] != 0 ? second_moment(statistics, n, i) : 0.0;
            scale = moment > scale || moment != moment ? moment : scale;
        }
        result.optimum = simplex_row(n, a, p, regularization, scale, c);
        return result;
    }
    const std::size_t size = n;
    auto* present = reinterpret_cast<unsigned char*>(work);
    double *matrix = work + 2 * size, *solver = matrix + size * size;
    for (int i = 0; i < n; ++i) {
        present[i] = c[i] != 0;
        for (int j = 0; j < n; ++j)
            matrix[i * size + j] = gram ? cosine_entry(statistics, n, i, j) : gram_entry(statistics, n, i, j);
    }
    result = gram ? min_norm_solve(n, matrix, n, 1, preference, present, regularization, c, solver)
                  : upgrad_solve(n, matrix, n, 1, preference, present, c, solver);
    for (int i = 0; i < n; ++i) c[i] += 0 * result.optimum;  // a NaN shows in every weight
    return result;
}

PAMA_END
