// Computes one set of weights for the batch from its statistics, for the baseline instruction set, and UPGrad's, which
// take long for many objectives, for the best one. Without contraction, see upgrad_batch.inl.
#define PAMA_ISA batch
#include <cstdio>
#include <stdexcept>
#include <string>

#include "../core/weights.hpp"
#include "blocks.hpp"
#include "driver.hpp"
#include "upgrad_batch.inl"

namespace pama {

BatchResult upgrad_batch_portable(const BatchGram& gram) { return batch::upgrad_batch(gram); }

void throw_unsolved(int64_t row, double residual) {
    char text[160];
    std::snprintf(text, sizeof text, "gram: no solution with residual below %.0e, got %.1e", kPromisedResidual,
                  residual);
    throw std::runtime_error(text + (row < 0 ? std::string() : " at batch index " + std::to_string(row)));
}

double solve(const double* sums, const Rule& rule, const double* preference, int n, double* c, double* effective) {
    if (rule.weights_per != WeightsPer::batch || weights_known(rule.kind) || rule.kind == Kind::softmin)
        throw std::invalid_argument("rule: expected one that is solved for the batch");
    const Preference p(preference, n);
    const Kernels& k = kernels();
    const int64_t solver = rule.kind == Kind::upgrad ? k.matrices->scratch_size(n) : 0;  // its vectors may be longer
    const int64_t bytes = 8 * static_cast<int64_t>(batch_workspace(n, rule.kind));
    auto* const work = static_cast<double*>(scratch(bytes + solver));
    const auto upgrad = [&](const MatrixView<double>& gram, const double* given, const unsigned char* present,
                            double* weights, double* workspace) {
        const BatchResult found = k.upgrad_batch({gram.n, gram.data, given, present, weights, workspace});
        return SolverResult{found.optimum, found.residual, found.solved ? SolveStatus::solved : SolveStatus::inexact,
                            0};
    };
    const SolverResult result = batch_weights(sums, n, rule, p.data, c, effective, work, upgrad);
    if (unsolved(result)) throw_unsolved(-1, result.residual);
    return result.optimum;
}

}  // namespace pama
