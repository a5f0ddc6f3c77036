// Layout of the statistics: one float64 buffer of sums over valid tokens under the token weights of the aggregation, so
// that micro-batches and ranks add up. Field f of objective i is at f * n + i; then the two totals; then, on request,
// the n x n blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "token.hpp"

PAMA_BEGIN

enum Field {
    kCount,               // tokens where the objective is present
    kBoundSum,            // I
    kBoundSquareSum,      // I^2
    kLogprobSum,          // I * logp
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

// The same names as in pama_kernels/_call.py.
constexpr const char* kFieldNames[kFields] = {
    "count",         "bound_sum",     "bound_square_sum",     "logprob_sum",
    "surrogate_sum", "advantage_sum", "advantage_square_sum", "positive_count",
    "clipped_count"};
constexpr const char* kTotalNames[kTotals] = {"token_count", "kl_sum"};
constexpr const char* kPairNames[kPairs] = {"bound_product", "advantage_product", "pair_count", "pair_advantage",
                                            "pair_advantage_square"};

// Whether a field is a token count; all other fields are sums of real values.
PAMA_HD constexpr bool counts_tokens(int field) { return field == kCount || field >= kPositiveCount; }

// Sums over the valid tokens of one sequence that do not depend on the objectives: with advantages per sequence, the
// pass over tokens costs the same for any number of objectives. The factors are those of core/token.hpp, multiplied by
// the importance weight.
enum RowSum {
    kValid,
    kOffPos,  // tokens without a gradient
    kOffNeg,
    kRowCounted,  // the sums before this one are token counts
    kGradPos = kRowCounted,
    kGradNeg,
    kGradPosSquare,
    kGradNegSquare,
    kGradBoth,  // product of the two
    kGradPosLogp,
    kGradNegLogp,
    kPos,
    kNeg,
    kK3,
    kRowStatistics,  // the statistics need the sums before this one
    kRefKl = kRowStatistics,
    kRowSums
};

// If all factors are 1, each sum is either the number of valid tokens (true) or 0 (false).
PAMA_HD constexpr bool factors_are_one(int sum) {
    return sum != kOffPos && sum != kOffNeg && sum != kGradPosLogp && sum != kGradNegLogp && sum < kK3;
}

// What one token adds to the counts: `one` is its token weight; off_pos and off_neg are that weight if the token has no
// gradient for positive or negative advantages, else 0.
template <class C>
struct TokenCount {
    C one, off_pos, off_neg;
};

// Adds one token, or one token per SIMD lane, to the fields of one objective: counts to `counts`, all other terms,
// multiplied by `omega`, to `sums`. Returns the bound term I.
template <class V, class Mask, class C>
PAMA_HD inline V add_token(const TokenFactors<V>& f, bool noon, V a, Mask here, V omega, const TokenCount<C>& count,
                           V (&sums)[kFields], C (&counts)[kFields]) {
    const V zero{};
    const C none{};
    V bound, surrogate;
    surrogate_terms(noon, a, f.pos, f.neg, f.grad_pos, f.grad_neg, surrogate, bound);
    bound = choose(here, bound, zero);
    const V weighted = omega * bound, own = omega * a;
    const auto positive = a > zero;
    counts[kCount] += choose(here, count.one, none);
    sums[kBoundSum] += weighted;
    sums[kBoundSquareSum] += weighted * bound;
    sums[kLogprobSum] += weighted * f.logp;
    sums[kSurrogateSum] += omega * choose(here, surrogate, zero);
    sums[kAdvantageSum] += own;
    sums[kAdvantageSquareSum] += own * a;
    counts[kPositiveCount] += choose(positive, count.one, none);
    counts[kClippedCount] += choose(positive, count.off_pos, noon ? none : choose(a < zero, count.off_neg, none));
    return bound;
}

// Adds one token to the sums of its sequence. Under Noon, the sums for negative advantages are skipped.
template <class V, class Mask, class C>
PAMA_HD inline void add_to_row(const TokenFactors<V>& f, bool noon, Mask valid, C one, V (&sums)[kRowSums],
                               C (&counts)[kRowSums]) {
    const C none{};
    counts[kValid] += choose(valid, one, none);
    counts[kOffPos] += choose(f.off_pos, one, none);
    sums[kGradPos] += f.grad_pos;
    sums[kGradPosSquare] += f.grad_pos * f.grad_pos;
    sums[kGradPosLogp] += f.grad_pos * f.logp;
    sums[kPos] += f.pos;
    sums[kK3] += f.kl;
    if (noon) return;
    counts[kOffNeg] += choose(f.off_neg, one, none);
    sums[kGradNeg] += f.grad_neg;
    sums[kGradNegSquare] += f.grad_neg * f.grad_neg;
    sums[kGradBoth] += f.grad_pos * f.grad_neg;
    sums[kGradNegLogp] += f.grad_neg * f.logp;
    sums[kNeg] += f.neg;
}

// Adds one sequence to the fields of one objective. a: the sequence's advantage; r: the sequence's sums, multiplied by
// its token weight.
template <class V, class Mask>
PAMA_HD inline void add_row(const double* r, bool noon, V a, Mask here, V (&sums)[kFields]) {
    const V zero{};
    const auto above = a > zero, below = a < zero;
    const auto sum = [&](int k) { return r[k] - zero; };  // in all lanes, without an addition
    const V kept = noon ? choose(below, zero, a) : a, own = a * r[kValid];
    const auto by_sign = [&](int positive, int negative) {
        return noon ? sum(positive) : choose(below, sum(negative), sum(positive));
    };
    sums[kCount] += choose(here, sum(kValid), zero);
    sums[kBoundSum] += choose(here, kept * by_sign(kGradPos, kGradNeg), zero);
    sums[kBoundSquareSum] += choose(here, kept * kept * by_sign(kGradPosSquare, kGradNegSquare), zero);
    sums[kLogprobSum] += choose(here, kept * by_sign(kGradPosLogp, kGradNegLogp), zero);
    sums[kSurrogateSum] += choose(here, kept * by_sign(kPos, kNeg), zero);
    sums[kAdvantageSum] += own;
    sums[kAdvantageSquareSum] += own * a;
    sums[kPositiveCount] += choose(above, sum(kValid), zero);
    sums[kClippedCount] += choose(above, sum(kOffPos), noon ? zero : choose(below, sum(kOffNeg), zero));
}

// Whether the sums are finite.
template <class T>
PAMA_HD inline bool row_is_finite(const T* sums) {
    T poison = T(0);
    PAMA_UNROLL
    for (int k = kRowCounted; k < kRowStatistics; ++k) poison += T(0) * sums[k];
    return poison == T(0);
}

// Whether the sums were computed without overflow or underflow in T: squares in float32 overflow above 1e19 and
// underflow below 1e-19.
template <class T>
PAMA_HD inline bool row_in_range(const T (&sums)[kRowSums]) {
    const T tiny = static_cast<T>(0x1p-80);
    return row_is_finite(sums) && (sums[kGradPosSquare] >= tiny || sums[kGradPos] == T(0)) &&
           (sums[kGradNegSquare] >= tiny || sums[kGradNeg] == T(0));
}

PAMA_HD constexpr int64_t total_offset(int64_t n) { return kFields * n; }
PAMA_HD constexpr int64_t pair_offset(int64_t n, int pair) { return kFields * n + kTotals + pair * n * n; }
PAMA_HD constexpr int64_t statistics_size(int64_t n, bool pairs) { return pair_offset(n, pairs ? kPairs : 0); }

// A sum or mean of squares below this counts as underflowed: it has lost digits, or is 0.
constexpr double kLeastSquare = 0x1p-972;

// Score a_i = mean of I_i over the tokens where i is present; 0 where there are none.
PAMA_HD inline double score(const double* statistics, int64_t n, int64_t i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSum * n + i] / count : 0.0;
}

PAMA_HD inline double advantage_mean(const double* statistics, int64_t n, int64_t i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kAdvantageSum * n + i] / count : 0.0;
}

PAMA_HD inline double second_moment(const double* statistics, int64_t n, int64_t i) {
    const double count = statistics[kCount * n + i];
    return count > 0 ? statistics[kBoundSquareSum * n + i] / count : 0.0;
}

// Whether objective i has a signal in the batch, that is a nonzero raw advantage: all raw advantages are exactly 0 if
// and only if none is positive and their sum is 0. `bound`: also requires a nonzero bound term. NaN is a signal.
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

// M_ij = sum I_i I_j / sqrt(count_i count_j): the mean if all objectives are present at every token, and positive
// semidefinite in every case.
PAMA_HD inline double gram_entry(const double* statistics, int64_t n, int64_t i, int64_t j) {
    const double own = statistics[kCount * n + i], other = statistics[kCount * n + j], counts = own * other;
    const double product = statistics[pair_offset(n, kBoundProduct) + i * n + j];
    return counts > 0 ? product / (own == other ? own : std::sqrt(counts)) : 0.0;
}

PAMA_END
