// What the CPU kernels read and write. Plain data: pointers, sizes and strides in elements.
#pragma once

#include "../core/array.hpp"
#include "../core/surrogate.hpp"

namespace pama {

struct Problem {
    long rows = 0;                  // sequences
    long width = 0;                 // tokens in each (padded); all tokens (packed)
    const long* offsets = nullptr;  // packed: rows + 1 offsets; the row stride of per-token arrays is then 0
    int n = 0;                      // objectives
    bool noon = true;
    bool wide = false;  // compute in double
    Clip clip = {};
    Array advantages, mask, objective_mask, logprobs, old_logprobs, ref_logprobs, importance_weights;

    long tokens() const { return offsets ? width : rows * width; }
    long begin(long row) const { return offsets ? offsets[row] : row * width; }
};

enum class WeightsPer { given, batch, gram, sequence, token };
enum class Aggregation { token_mean, sequence_mean_token_sum, sequence_mean_token_mean };

constexpr double kNoNormalizer = -INFINITY;

// How to weight, and where the results go; every output may be absent.
struct Apply {
    WeightsPer weights_per = WeightsPer::given;
    const double* prior = nullptr;  // (n), on the simplex
    bool uniform = true;            // its entries are equal
    double regularization = 0;
    Array given;  // (n) or (rows, n)
    bool given_per_row = false;
    Aggregation aggregation = Aggregation::token_mean;
    double normalizer = kNoNormalizer;  // else replaces the denominator
    double kl_coef = 0;

    Array combined;  // like the log-probabilities, or one value per row
    bool combined_per_row = false;
    Array gradient;
    Array loss;     // scalar
    Array weights;  // (n) or (rows, n)
    Array optimum;  // scalar or (rows)
    double* statistics = nullptr;
    bool pairs = false;  // the n x n statistics too

    // Filled by the driver before the pass.
    double scale = 0;                   // of every token's loss
    const double* row_scale = nullptr;  // times this, per row
};

// Partial sums of one block beside its statistics.
struct Partial {
    double* statistics;  // statistics_size(n, pairs)
    double* weights;     // (n): sum over valid tokens of c(t), weights per token only
    double loss, optimum;
};

// Gram matrices (rows, n, n) in float or double, and where the solutions go, in the same type.
struct Gram {
    long rows = 0;
    int n = 0;
    bool wide = false;
    const void* data = nullptr;
    long batch = 0, row = 0, column = 0;  // strides
    void *weights = nullptr, *optimum = nullptr;
    bool checked = true;  // refuse what is clearly no Gram matrix
};

// The first matrix of a batch without a solution: clearly no Gram matrix (residual 0), or above the promised residual.
struct Refused {
    long row = -1;
    double residual = 0;
    explicit operator bool() const { return row >= 0; }
};

// At most so many objectives have a row per SIMD lane.
constexpr int kLaneObjectives = 32;

// Kernels, compiled once per instruction set.
struct Kernels {
    const char* name;
    long (*scratch_size)(int n);  // bytes
    // Statistics of the tokens [first, last).
    void (*statistics)(const Problem&, bool pairs, long first, long last, double* sums, void* scratch);
    // Weights, advantages, loss and gradient of the tokens [first, last); of the rows, with weights per sequence.
    void (*apply)(const Problem&, const Apply&, long first, long last, Partial& partial, void* scratch);
    // Rows of the scalar problem: float32 scores, at most kLaneObjectives of them.
    void (*weights)(long rows, int n, const float* scores, long row, long objective, const double* prior, bool uniform,
                    double regularization, const double* scale, long scale_row, float* weights, float* optimum,
                    void* scratch);
    long (*min_norm_scratch)(int n);  // bytes
    // Matrices of the min-norm problem, float or double; `present` (n bytes) may be null.
    Refused (*min_norm)(const Gram& gram, const double* preference, const unsigned char* present, double regularization,
                        long first, long last, void* scratch);
    Refused (*upgrad)(const Gram& gram, const double* preference, long first, long last, void* scratch);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;

}  // namespace pama
