// From statistics to weights: the scalar problem on the scores of one sequence, or of the whole batch.
#pragma once

#include "simplex.hpp"
#include "statistics.hpp"

PAMA_BEGIN

// c (n) receives the weights, a and p (n) are work space; the scale is the largest mean of I^2. Objectives without a
// token take no part. Returns the optimum a.c. N as in simplex_solve.
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

PAMA_END
