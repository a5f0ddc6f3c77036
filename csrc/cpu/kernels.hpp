// The kernels that are compiled once per instruction set, and their argument structures: plain data, with sizes and
// strides in elements.
#pragma once

#include "../core/records.hpp"

namespace pama {

// What the scalar problem of every row has in common.
struct ScalarRule {
    const double* preference;  // (n), on the simplex
    bool uniform;              // its entries are equal
    double regularization;
};

// One pass of `apply` over tokens or rows, as the driver has prepared it.
struct Pass {
    Tokens tokens;
    Rule rule;  // scores or softmin, per sequence or token: solved in the pass; otherwise `weights` are known
    Outputs outputs;
    const double* preference = nullptr;  // (n), on the simplex
    bool uniform = true;                 // its entries are equal
    Array weights;                       // (n) or (rows, n)
    bool known = false, per_row = false;
    bool divided = false;           // known weights are divided by the preference of the objectives present
    const double* omega = nullptr;  // (rows) token weights; null: 1
    double scale = 0;               // factor of every token's loss
    bool statistics = true;         // false: the statistics are known already, or not requested

    bool by_rows() const { return known ? per_row : rule.weights_per == WeightsPer::sequence; }
    ScalarRule scalar_rule() const { return {preference, uniform, rule.number}; }
    double token_weight(int64_t row) const { return omega ? omega[row] : 1.0; }
};

// Partial sums of one block.
struct Partial {
    double* sums;     // statistics_size(n, pairs), or null
    double* weights;  // (n): sum over valid tokens of omega c(t), weights per token only
    double loss, optimum, square;
};

// One pass over the tokens of rows: their sums, the gradient, or both.
struct RowPass {
    double* sums = nullptr;        // (rows, kRowSums)
    const double* up = nullptr;    // (rows): sum_i c_i max(A_i, 0); null: no gradient
    const double* down = nullptr;  // (rows): sum_i c_i min(A_i, 0)
    const double* omega = nullptr;
    double scale = 0, kl_coef = 0;
    Array gradient;
    // Where the gradient follows in a second pass: the first one (`keep`) stores what it has computed of it, in
    // float32; the second one receives the rows' sums (`kept`).
    bool keep = false;
    const double* kept = nullptr;
    Array ratios;  // in the memory of the gradient or, where that is not float32, in memory of the driver
};

// Gram matrices (rows, n, n) in float or double, and the arrays that receive the solutions, in the same type.
struct Gram {
    int64_t rows = 0;
    int n = 0;
    bool wide = false;
    const void* data = nullptr;
    int64_t batch = 0, row = 0, column = 0;  // strides
    void *weights = nullptr, *optimum = nullptr;
    bool checked = true;  // reject matrices that are clearly not Gram matrices
};

// Rows of the scalar problem (rows, n) in float or double, and the contiguous arrays that receive the solutions, in the
// same type.
struct ScoreRows {
    int64_t rows = 0;
    int n = 0;
    Array scores;
    Array scale;  // (rows) in double; absent: max a^2
    void *weights = nullptr, *optimum = nullptr;
};

// The first matrix of a batch without a solution: clearly not a Gram matrix (residual 0), or with a residual above
// kPromisedResidual.
struct Refused {
    int64_t row = -1;
    double residual = 0;
    explicit operator bool() const { return row >= 0; }
};

// UPGrad's problem of a batch: the matrix (n, n) and, for each objective, the preference and whether it is present.
struct BatchGram {
    int n;
    const double *matrix, *preference;
    const unsigned char* present;
    double *weights, *workspace;
};
struct BatchResult {
    double optimum, residual;
    bool solved;
};

// The solvers of the rows [first, last) of matrices, float or double; in files of their own (matrices.inl).
struct MatrixSolvers {
    int64_t (*scratch_size)(int n);  // bytes, for each of them
    Refused (*min_norm)(const Gram& gram, const double* preference, double regularization, int64_t first, int64_t last,
                        void* scratch);
    Refused (*upgrad)(const Gram& gram, const double* preference, int64_t first, int64_t last, void* scratch);
};

// Solves a matrix of 3 to 13 objectives if it needs no general solver, for AVX2 and for AVX-512: one matrix fills no
// vectors. Returns whether it is solved; `passed`: 1 if it needs no is_gram.
unsigned min_norm_one_avx2(const Gram& gram, const double* preference, double regularization, int64_t row,
                           unsigned* passed);

// The largest number of objectives for which one row per SIMD lane is solved.
constexpr int kLaneObjectives = 32;

struct Kernels {
    const char* name;
    int64_t (*scratch_size)(int n);  // bytes
    // How many of `count` mask values, `stride` apart from element `offset` on, are not 0.
    int64_t (*count)(const Array& mask, int64_t offset, int64_t stride, int64_t count);
    // Statistics of the tokens [first, last). omega: as in Pass.
    void (*statistics)(const Tokens&, const double* omega, bool pairs, int64_t first, int64_t last, double* sums,
                       void* scratch);
    // Weights, advantages, loss and gradient of the tokens [first, last); of the rows [first, last) if weights are per
    // row.
    void (*apply)(const Pass&, int64_t first, int64_t last, Partial&, void* scratch);
    // Advantages per sequence. Over the tokens [first, last); `head` receives the sums of a row that begins before
    // `first`.
    void (*row_pass)(const Tokens&, const RowPass&, int64_t first, int64_t last, double* head);
    // The statistics of the rows [first, last) from their sums.
    void (*row_statistics)(const Tokens&, const double* omega, const double* row_sums, bool pairs, int64_t first,
                           int64_t last, double* sums, void* scratch);
    // Weights of the rows [first, last), and the results that need no pass over tokens; up and down as in RowPass.
    // Without row_sums, for known weights, only up and down.
    void (*row_apply)(const Pass&, const double* row_sums, double* up, double* down, int64_t first, int64_t last,
                      Partial&, void* scratch);
    // The rows [first, last) of the scalar problem: float32 scores, at most kLaneObjectives of them.
    void (*weights)(const ScoreRows&, const ScalarRule&, int64_t first, int64_t last, void* scratch);
    const MatrixSolvers* matrices;
    // The same bits from every instruction set.
    BatchResult (*upgrad_batch)(const BatchGram& gram);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;
extern const MatrixSolvers matrices_portable, matrices_avx2, matrices_avx512;
BatchResult upgrad_batch_portable(const BatchGram& gram);
BatchResult upgrad_batch_avx2(const BatchGram& gram);
BatchResult upgrad_batch_avx512(const BatchGram& gram);

}  // namespace pama
