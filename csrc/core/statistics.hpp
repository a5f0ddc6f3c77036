// Layout of the statistics: one float64 buffer of sums over valid tokens under the token weights of the aggregation, so
// that micro-batches and ranks add up. Field f of objective i is at f * n + i; then the two totals; then, on request,
// the n x n blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "config.hpp"

PAMA_BEGIN

enum Field {
    kCount,               // tokens where the objective is present
    kBoundSum,            // I
    kBoundSquareSum,      // I^2
    kLogprobSum,          // I * logp, the reward-weighted log-probability
    kSurrogateSum,        // g
    kAdvantageSum,        // A'
    kAdvantageSquareSum,  // A'^2
    kPositiveCount,       // A' > 0
    kClippedCount,        // A != 0 and no gradient
    kFields
};

enum Total { kTokenCount, kKlSum, kTotals };

enum Pair {
    kBoundProduct,         // I_i I_j
    kAdvantageProduct,     // A'_i A'_j
    kPairCount,            // tokens where both are present
    kPairAdvantage,        // A'_i where j is present
    kPairAdvantageSquare,  // A'_i^2 where j is present
    kPairs
};

// As pama_kernels/_call.py spells them.
constexpr const char* kFieldNames[kFields] = {
    "count",         "bound_sum",     "bound_square_sum",     "logprob_sum",
    "surrogate_sum", "advantage_sum", "advantage_square_sum", "positive_count",
    "clipped_count"};
constexpr const char* kTotalNames[kTotals] = {"token_count", "kl_sum"};
constexpr const char* kPairNames[kPairs] = {"bound_product", "advantage_product", "pair_count", "pair_advantage",
                                            "pair_advantage_square"};

PAMA_HD constexpr int64_t total_offset(int64_t n) { return kFields * n; }
PAMA_HD constexpr int64_t pair_offset(int64_t n, int pair) { return kFields * n + kTotals + pair * n * n; }
PAMA_HD constexpr int64_t statistics_size(int64_t n, bool pairs) { return pair_offset(n, pairs ? kPairs : 0); }

// Score a_i = mean of I_i over the tokens where i is present; 0 where there are none.
PAMA_HD inline double score(const double* statistics, int64_t n, int64_t i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSum * n + i] / count : 0.0;
}

PAMA_HD inline double second_moment(const double* statistics, int64_t n, int64_t i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSquareSum * n + i] / count : 0.0;
}

// Whether objective i says anything in the batch: its raw advantages are exactly 0 everywhere if and only if none is
// positive and their sum is 0. `bound`: its bound terms must not all be 0 either. NaN counts.
PAMA_HD inline bool has_signal(const double* statistics, int64_t n, int64_t i, bool bound) {
    const bool raw = statistics[kPositiveCount * n + i] > 0 || statistics[kAdvantageSum * n + i] != 0;
    return statistics[kCount * n + i] > 0 && raw && (!bound || statistics[kBoundSquareSum * n + i] != 0);
}

// C_ij = sum I_i I_j / sqrt(sum I_i^2 sum I_j^2), exactly 1 on the diagonal.
PAMA_HD inline double cosine_entry(const double* statistics, int64_t n, int64_t i, int64_t j) {
    const double* product = statistics + pair_offset(n, kBoundProduct);
    const double own = product[i * n + i], other = product[j * n + j];
    if (i == j) return own == own ? 1.0 : own;
    const double norms = std::sqrt(own) * std::sqrt(other);
    return norms == 0 ? 0.0 : product[i * n + j] / norms;
}

// M_ij = sum I_i I_j / sqrt(count_i count_j): the mean where all are present, and positive semidefinite always.
PAMA_HD inline double gram_entry(const double* statistics, int64_t n, int64_t i, int64_t j) {
    const double counts = statistics[kCount * n + i] * statistics[kCount * n + j];
    const double product = statistics[pair_offset(n, kBoundProduct) + i * n + j];
    return counts > 0 ? product / std::sqrt(counts) : 0.0;
}

PAMA_END
