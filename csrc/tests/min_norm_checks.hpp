// Shared by the tests of the min-norm solver: checks, and a call with memory of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/min_norm.hpp"

namespace min_norm_tests {

using Vec = std::vector<double>;

inline int failures = 0;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
            ++failures;                                                 \
        }                                                               \
    } while (0)

struct Solution {
    Vec weights;
    pama::MinNormResult result;
};

inline Solution solve(int n, const Vec& gram, const Vec& preference = {}, double regularization = 0.0,
                      const unsigned char* present = nullptr) {
    Solution s{Vec(n, -1.0), {}};
    Vec workspace(pama::min_norm_workspace(n), std::nan(""));
    s.result = pama::min_norm_solve(pama::MatrixView<double>{n, gram.data(), n, 1},
                                    preference.empty() ? nullptr : preference.data(), present, regularization,
                                    s.weights.data(), workspace.data());
    return s;
}

inline double largest_diagonal(int n, const Vec& gram) {
    double largest = 0.0;
    for (int i = 0; i < n; ++i) largest = std::max(largest, gram[i * n + i]);
    return largest;
}

inline double objective(int n, const Vec& gram, const Vec& c) {
    long double sum = 0.0L;
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < n; ++k) sum += static_cast<long double>(c[i]) * gram[i * n + k] * c[k];
    return static_cast<double>(sum);
}

}  // namespace min_norm_tests
