// The records that cross the border between Python and the kernels, and their enumerations: the same as in
// pama_kernels/_call.py, where the fields are documented. Pointers, sizes and strides in elements.
#pragma once

#include <cmath>
#include <cstdint>

#include "array.hpp"
#include "surrogate.hpp"

namespace pama {

enum class Kind { given, solved, fixed, scores, gram, upgrad, softmin };
// Whether `weights` are an argument, and not found by the call itself.
PAMA_HD constexpr bool weights_known(Kind kind) { return kind == Kind::given || kind == Kind::solved; }
// Whether the weights come from the N x N statistics.
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
    // Of (B, N) advantages all tokens of a sequence have the same combined one, unless weights solved per token tell
    // them apart.
    bool one_result_per_row(const Rule& rule) const {
        return per_sequence && !(rule.weights_per == WeightsPer::token && !weights_known(rule.kind) && logprobs);
    }
};

constexpr double kNoNormalizer = -INFINITY;

// What `apply` is asked for, and where the results go; an absent array was not asked for.
struct Outputs {
    bool pairs = false;
    double normalizer = kNoNormalizer;  // else replaces the denominator of the loss
    double kl_coef = 0;
    Array advantages, loss, gradient, weights, optimum;
    double* sums = nullptr;
    double* square_sum = nullptr;
};

}  // namespace pama
