// Layout of the statistics: one float64 buffer of masked sums over tokens, so that micro-batches and ranks
// add up. Field f of objective i is at f * n + i; then the two totals; then, on request, the n x n blocks.
#pragma once

#include <cmath>

#include "config.hpp"

PAMA_BEGIN

enum Field {
    kCount,               // tokens where the objective is present
    kBoundSum,            // I
    kBoundSquareSum,      // I^2
    kBoundLogprobSum,     // I * logp, the reward-weighted log-probability
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

PAMA_HD constexpr long total_offset(long n) { return kFields * n; }
PAMA_HD constexpr long pair_offset(long n, int pair) { return kFields * n + kTotals + pair * n * n; }
PAMA_HD constexpr long statistics_size(long n, bool gram) { return pair_offset(n, gram ? kPairs : 0); }

// Score a_i = mean of I_i over the tokens where i is present; 0 where there are none.
PAMA_HD inline double score(const double* statistics, long n, long i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSum * n + i] / count : 0.0;
}

PAMA_HD inline double second_moment(const double* statistics, long n, long i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSquareSum * n + i] / count : 0.0;
}

// M_ij = sum I_i I_j / sqrt(count_i count_j): the mean where all are present, and positive semidefinite always.
PAMA_HD inline double gram_entry(const double* statistics, long n, long i, long j) {
    const double counts = statistics[kCount * n + i] * statistics[kCount * n + j];
    const double product = statistics[pair_offset(n, kBoundProduct) + i * n + j];
    return counts > 0 ? product / std::sqrt(counts) : 0.0;
}

PAMA_END
