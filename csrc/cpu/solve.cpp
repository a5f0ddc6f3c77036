// One set of weights for the batch from its statistics. Compiled once, for every processor, without contraction: ranks on
// different processors get the same bits from the same sums.
#include <stdexcept>
#include <vector>

#include "../core/weights.hpp"
#include "driver.hpp"

namespace pama {

double solve(const double* sums, const Rule& rule, const double* preference, int n, double* c, double* effective) {
    if (rule.weights_per != WeightsPer::batch || rule.kind < Kind::fixed || rule.kind > Kind::upgrad)
        throw std::invalid_argument("rule: expected one that is solved for the batch");
    const Preference p(preference, n);
    std::vector<double> work(batch_workspace(n, rule.kind));
    return batch_weights(sums, n, rule.kind, rule.number, p.data, c, effective, work.data());
}

}  // namespace pama
