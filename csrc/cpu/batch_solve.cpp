#define PAMA_ISA batch
#include "batch_solve.hpp"

#include <cstdio>
#include <stdexcept>
#include <vector>

#include "../core/min_norm.hpp"
#include "../core/statistics.hpp"
#include "../core/upgrad.hpp"

namespace pama {

void throw_unsolved(long row, double residual) {
    char text[160];
    std::snprintf(text, sizeof text, "gram: no solution with residual below %.0e, got %.1e", kPromisedResidual,
                  residual);
    throw std::runtime_error(text + (row < 0 ? std::string() : " at batch index " + std::to_string(row)));
}

namespace {

double checked(const SolverResult& result) {
    if (unsolved(result)) throw_unsolved(-1, result.residual);
    return result.optimum;
}

}  // namespace

double solve_batch_min_norm(int n, const double* m, const double* preference, const unsigned char* present,
                            double regularization, double* c) {
    std::vector<double> workspace(min_norm_workspace(n));
    return checked(min_norm_solve(n, m, n, 1, preference, present, regularization, c, workspace.data()));
}

double solve_batch_upgrad(int n, const double* m, const double* preference, const unsigned char* present, double* c) {
    std::vector<double> workspace(upgrad_workspace(n));
    return checked(upgrad_solve(n, m, n, 1, preference, present, c, workspace.data()));
}

double solve_batch_gram(const double* statistics, int n, const double* preference, double regularization, double* c) {
    std::vector<double> matrix(static_cast<size_t>(n) * static_cast<size_t>(n));
    std::vector<unsigned char> present(static_cast<size_t>(n));
    for (long i = 0; i < n; ++i) {
        present[static_cast<size_t>(i)] = statistics[kCount * n + i] > 0;
        for (long j = 0; j < n; ++j) matrix[static_cast<size_t>(i * n + j)] = gram_entry(statistics, n, i, j);
    }
    return solve_batch_min_norm(n, matrix.data(), preference, present.data(), regularization, c);
}

}  // namespace pama
