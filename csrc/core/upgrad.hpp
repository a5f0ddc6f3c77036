// Temporary stand-in for the solver that is written beside this: plain Gauss-Seidel, for tests only.
#pragma once

#include <cstddef>

#include "config.hpp"

PAMA_BEGIN

struct UpgradResult {
    double optimum;
};

PAMA_HD inline std::size_t upgrad_workspace(int n) { return 2 * static_cast<std::size_t>(n); }

template <class T>
PAMA_HD inline UpgradResult upgrad_solve(int n, const T* gram, std::ptrdiff_t row, std::ptrdiff_t column,
                                         const double* preference, const unsigned char* present, double* weights,
                                         double* v) {
    double total = 0, optimum = 0;
    for (int i = 0; i < n; ++i) weights[i] = present && !present[i] ? 0 : preference[i];
    for (int k = 0; k < n; ++k) {
        if ((present && !present[k]) || preference[k] == 0) continue;
        for (int i = 0; i < n; ++i) v[i] = 0;
        for (int round = 0; round < 2000; ++round)
            for (int i = 0; i < n; ++i) {
                if (present && !present[i]) continue;
                double slope = gram[i * row + k * column];
                for (int j = 0; j < n; ++j) slope += v[j] * gram[i * row + j * column];
                const double own = gram[i * (row + column)], next = own > 0 ? v[i] - slope / own : v[i];
                v[i] = next > 0 ? next : 0;
            }
        for (int i = 0; i < n; ++i) weights[i] += preference[k] * v[i];
    }
    for (int i = 0; i < n; ++i) total += weights[i];
    for (int i = 0; i < n; ++i) weights[i] /= total;
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j)
            if (weights[i] != 0 && weights[j] != 0) optimum += weights[i] * weights[j] * gram[i * row + j * column];
    return {optimum};
}

PAMA_END
