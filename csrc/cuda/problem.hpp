// Arguments of the CUDA launchers in addition to the records: plain data, with pointers to device memory and strides in
// elements.
#pragma once

#include "../core/records.hpp"

namespace pama {
namespace cuda {

// rows + 1 offsets of packed sequences, int32 or int64. Not validated, since the host does not read device memory.
struct Offsets {
    const void* data = nullptr;
    bool wide = false;
    int64_t stride = 1;
    PAMA_HD explicit operator bool() const { return data != nullptr; }
    PAMA_HD int64_t operator[](int64_t k) const {
        return wide ? static_cast<const int64_t*>(data)[k * stride]
                    : static_cast<int64_t>(static_cast<const int32_t*>(data)[k * stride]);
    }
};

// The record `Tokens` with int32 or int64 offsets; the inherited `offsets` is unused. For packed tokens `width` is -1
// if only the offsets have the number of tokens, that is if no tensor is per token.
struct DeviceTokens : Tokens {
    Offsets starts;

    PAMA_HD int64_t begin(int64_t row) const { return starts ? starts[row] : row * width; }
    PAMA_HD int64_t length(int64_t row) const { return starts ? starts[row + 1] - starts[row] : width; }
    PAMA_HD int64_t tokens() const { return starts ? width : rows * width; }
};

// The problem of the weights of a batch, given its statistics; results in double.
struct Solve {
    Rule rule;
    int n = 0;
    const double* sums = nullptr;
    const double* preference = nullptr;  // (n); null: uniform
    double *weights = nullptr, *optimum = nullptr, *effective = nullptr;
    double* work = nullptr;  // solve_doubles(kind, n) doubles
    Array rounded[2] = {};   // optional: weights and optimum in the dtype of the call's results
};

// How the statistics are computed. Partial sums are added in the order of the blocks, so the grid affects rounding; it
// depends only on the sizes.
struct Plan {
    bool by_row = false;   // sums over each sequence without an objective index, then over the sequences
    bool flat = false;     // contiguous float32 tokens
    bool counted = false;  // the valid tokens of each sequence are counted first
    bool apart = false;    // the partial sums are added by a launch of their own
    int64_t segments = 1;  // segments per sequence, one warp each
    int64_t blocks = 1;    // blocks over which the tokens, or the sequences, are distributed
    int64_t layers = 1;    // groups of objectives and tiles of pairs
    int threads = 0;       // threads of a block
    int64_t row_doubles = 0, partials = 0;

    int64_t doubles() const { return row_doubles + partials; }
};

// A batch of weight problems.
struct Rows {
    int64_t rows = 0;
    int n = 0;
    bool wide = false;
    Array input;                         // scores (rows, n), or matrices (rows, n, n): strides row, token, objective
    const double* preference = nullptr;  // (n); null: uniform
    double regularization = 0;
    const double* scale = nullptr;  // scores: one per row, or null
    int64_t scale_stride = 0;
    void *weights = nullptr, *optimum = nullptr;  // (rows, n), (rows), in the type of the input
    double* work = nullptr;
    int64_t slots = 0;  // number of problems that fit in `work`
};

}  // namespace cuda
}  // namespace pama
