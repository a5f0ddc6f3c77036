// Whole calls: work is cut into blocks whose number and order depend on the input alone, threads take blocks,
// and partial sums are added in the order of the blocks. So results are bitwise equal for any number of threads.
#pragma once

#include "problem.hpp"

namespace pama {

// The kernels of the best instruction set that this processor has; `name` forces one (null: no change).
const Kernels& kernels(const char* name = nullptr);

void statistics(const Problem& problem, bool pairs, double* out, int threads);

// Weights of the whole batch from its (possibly merged) statistics. c: (n).
double batch_weights(const double* statistics, int n, bool gram, const double* prior, double regularization, double* c);

void apply(Problem problem, Apply apply, int threads);

// Rows of the scalar problem. scores, scale, weights and optimum are float or double alike.
void weights(long rows, int n, const Array& scores, const double* prior, bool uniform, double regularization,
             const Array& scale, void* weights, void* optimum, int threads);

// Rows of the min-norm problem. Returns -1, or the first matrix that is clearly no Gram matrix; throws where one has no
// solution within the promised residual.
long min_norm(const Gram& gram, const double* preference, double regularization, int threads);
long upgrad(const Gram& gram, const double* preference, int threads);

struct Gae {
    long rows, width;
    int n;
    double gamma, lam;
    Array rewards, values, mask, dones, last_values;
    Array advantages, returns;
};
void multi_objective_gae(const Gae& problem, int threads);

// order: the rows, group after group; group_begin: groups + 1 positions in it.
void group_normalize(long groups, const long* group_begin, const long* order, int n, const Array& rewards, bool scale,
                     double eps, const Array& result, int threads);

}  // namespace pama
