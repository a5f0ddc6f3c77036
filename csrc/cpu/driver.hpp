// The entry points of the CPU backend. Results are bitwise equal for any number of threads.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace pama {

// The kernels of the best instruction set that this processor has; `name` forces one (null: no change).
const Kernels& kernels(const char* name = nullptr);

// The preference (n) on the simplex; uniform if none is given.
struct Preference {
    std::vector<double> own;
    const double* data;
    bool uniform = true;  // its entries are equal
    Preference(const double* given, int n) : data(given) {
        if (!given) {
            own.assign(static_cast<size_t>(n), 1.0 / n);
            data = own.data();
        }
        for (int i = 1; i < n; ++i) uniform = uniform && data[i] == data[0];
    }
    Preference(const Preference&) = delete;
};

void statistics(const Tokens& tokens, bool pairs, double* out, int threads);

// Computes from the (possibly merged) statistics of a batch the weights c (n) and the preference over the objectives
// with a signal, `effective` (n). Returns the optimum; throws if no solution has a residual below kPromisedResidual.
double solve(const double* sums, const Rule& rule, const double* preference, int n, double* c, double* effective);

// `weights`: (n) or, `per_row`, (rows, n); absent if this call solves the rule.
void apply(const Tokens& tokens, const Rule& rule, const double* preference, const Array& weights, bool per_row,
           const Outputs& outputs, int threads);

// Solves the scalar problem for many rows.
void weights(const ScoreRows& rows, const ScalarRule& rule, int threads);

// Solve the min-norm problem and UPGrad for many matrices. They return -1, or the index of the first matrix that is
// clearly not a Gram matrix, and throw if a problem has no solution with a residual below kPromisedResidual.
int64_t min_norm(const Gram& gram, const double* preference, double regularization, int threads);
int64_t upgrad(const Gram& gram, const double* preference, int threads);
// std::runtime_error: "gram: no solution with residual below ..., got ..."; row < 0: of no batch.
[[noreturn]] void throw_unsolved(int64_t row, double residual);

struct Gae {
    int64_t rows, width;
    int n;
    double gamma, lam;
    Array rewards, values, mask, dones, truncated, last_values, final_values;
    Array advantages, returns;
};
void multi_objective_gae(const Gae& problem, int threads);

// `order`: the rows, group after group; `begin`: count + 1 positions in it.
struct Groups {
    int64_t count;
    const int64_t* begin;
    const int64_t* order;
};
void group_normalize(const Groups& groups, int n, const Array& rewards, bool scale, double eps, const Array& result,
                     int threads);

}  // namespace pama
