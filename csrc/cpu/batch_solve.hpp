// The weights of a whole batch from its statistics, in one translation unit without processor-specific instructions or
// contraction: every rank of a mixed cluster gets the same bits.
#pragma once

namespace pama {

// c (n) receives the weights; returns the optimum. Objectives without a token take no part.
double solve_batch_gram(const double* statistics, int n, const double* preference, double regularization, double* c);

// The bare problems: m (n x n), `present` (n bytes) may be null.
double solve_batch_min_norm(int n, const double* m, const double* preference, const unsigned char* present,
                            double regularization, double* c);
double solve_batch_upgrad(int n, const double* m, const double* preference, const unsigned char* present, double* c);

// std::runtime_error: "gram: no solution with residual below ..., got ..."; row < 0: of no batch.
[[noreturn]] void throw_unsolved(long row, double residual);

}  // namespace pama
