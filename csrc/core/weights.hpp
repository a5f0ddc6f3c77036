// From statistics to weights: the scalar problem on the scores of one sequence, or of the whole batch.
#pragma once

#include "simplex.hpp"
#include "statistics.hpp"

PAMA_BEGIN

// c (n) receives the weights, a and p (n) are work space; the scale is the largest mean of I^2. Objectives without a
// token take no part. Returns the optimum a.c.
PAMA_HD inline double statistics_weights(const double* statistics, int n, const double* prior, double regularization,
                                         double* a, double* p, double* c) {
    double scale = 0;
    for (int i = 0; i < n; ++i) {
        a[i] = score(statistics, n, i);
        p[i] = prior[i];
        c[i] = statistics[kCount * n + i] > 0 ? 1 : 0;
        const double moment = second_moment(statistics, n, i);
        scale = moment > scale || moment != moment ? moment : scale;
    }
    return simplex_row(n, a, p, regularization, scale, c);
}

PAMA_END
