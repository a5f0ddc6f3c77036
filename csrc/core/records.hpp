// The records that are passed from Python to the kernels, and their enumerations. They mirror pama_kernels/_call.py,
// where the fields are documented. Sizes and strides are in elements.
#pragma once

#include <cmath>
#include <cstdint>

#include "array.hpp"
#include "surrogate.hpp"

namespace pama {

enum class Kind { given, solved, fixed, scores, gram, upgrad, softmin };
// Whether the weights are an argument of the call rather than computed by it.
PAMA_HD constexpr bool weights_known(Kind kind) { return kind == Kind::given || kind == Kind::solved; }
// Whether the rule needs the N x N statistics (pairs).
PAMA_HD constexpr bool needs_pairs(Kind kind) { return kind == Kind::gram || kind == Kind::upgrad; }

enum class WeightsPer { batch, sequence, token };
enum class Aggregation { token_mean, seq_mean_token_sum, seq_mean_token_mean };

// Names as in _call.py, in the order of the enumerations.
constexpr const char* kKindNames[] = {"GIVEN", "SOLVED", "FIXED", "SCORES", "GRAM", "UPGRAD", "SOFTMIN"};
constexpr const char* kWeightsPerNames[] = {"BATCH", "SEQUENCE", "TOKEN"};
constexpr const char* kAggregationNames[] = {"TOKEN_MEAN", "SEQ_MEAN_TOKEN_SUM", "SEQ_MEAN_TOKEN_MEAN"};

struct Rule {
    Kind kind = Kind::given;
    WeightsPer weights_per = WeightsPer::batch;
    double number = 0;  // regularization of scores and gram, temperature of softmin
};

struct Tokens {
    int64_t rows = 0;                  // sequences
    int64_t width = 0;                 // tokens of a padded row; all tokens where packed
    const int64_t* offsets = nullptr;  // packed: rows + 1 offsets; the row stride of per-token arrays is then 0
    int n = 0;                         // objectives
    bool noon = false;
    bool wide = false;          // compute in double
    bool per_sequence = false;  // advantages (B, N): their token stride is 0
    bool mask_per_sequence = false;
    Aggregation aggregation = Aggregation::token_mean;
    Clip clip = {};
    Array advantages, mask, objective_mask, logprobs, old_logprobs, ref_logprobs, importance_weights;

    int64_t tokens() const { return offsets ? width : rows * width; }
    int64_t begin(int64_t row) const { return offsets ? offsets[row] : row * width; }
    // Whether there is one combined advantage per sequence: with (B, N) advantages all tokens of a sequence have the
    // same one, except under weights that are solved per token and depend on the log-probabilities.
    bool one_result_per_row(const Rule& rule) const {
        return per_sequence && !(rule.weights_per == WeightsPer::token && !weights_known(rule.kind) && logprobs);
    }
};

constexpr double kNoNormalizer = -INFINITY;

// The results that `apply` computes and the memory that it writes them to; an absent array is not computed.
struct Outputs {
    bool statistics = true;
    bool pairs = false;
    double normalizer = kNoNormalizer;  // any other value replaces the denominator of the loss
    double kl_coef = 0;
    Array advantages, loss, gradient, weights, optimum;
    double* sums = nullptr;
    double* square_sum = nullptr;
};

}  // namespace pama
