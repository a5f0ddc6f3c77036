// Computes one set of weights for the batch from its statistics. Compiled once, for the baseline instruction set and
// without contraction (fused multiply-add), so that ranks on different processors get bitwise equal weights from equal
// sums.
#define PAMA_ISA batch
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/weights.hpp"
#include "driver.hpp"

namespace pama {

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
    std::vector<double> work(batch_workspace(n, rule.kind));
    const SolverResult result = batch_weights(sums, n, rule, p.data, c, effective, work.data());
    if (unsolved(result)) throw_unsolved(-1, result.residual);
    return result.optimum;
}

}  // namespace pama
