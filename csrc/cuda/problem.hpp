// What the CUDA launchers take beside the records: plain data, all pointers to device memory, strides in elements.
#pragma once

#include "../core/records.hpp"

namespace pama {
namespace cuda {

// rows + 1 offsets of packed sequences, int32 or int64. Not validated: nothing on the host sees them.
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

// The record with offsets of either width; its own `offsets` is not read. `width` of packed tokens is -1 where only the
// offsets tell it: then no tensor is per token.
struct DeviceTokens : Tokens {
    Offsets starts;

    PAMA_HD int64_t begin(int64_t row) const { return starts ? starts[row] : row * width; }
    PAMA_HD int64_t length(int64_t row) const { return starts ? starts[row + 1] - starts[row] : width; }
    PAMA_HD int64_t tokens() const { return starts ? width : rows * width; }
};

// The weights of a batch from its sums; results in double.
struct Solve {
    Rule rule;
    int n = 0;
    const double* sums = nullptr;
    const double* preference = nullptr;  // (n); null: uniform
    double *weights = nullptr, *optimum = nullptr, *effective = nullptr;
    double* work = nullptr;  // solve_doubles(kind, n) of them
    Array rounded[2] = {};   // weights and optimum in the type of a call's results, where given
};

// How the statistics are computed. Sums are added in the order of the blocks, so the grid is part of the result: it
// follows from the sizes alone.
struct Plan {
    bool by_row = false;   // sums over each sequence without an objective index, then over the sequences
    bool flat = false;     // one run of float32 tokens
    bool counted = false;  // the valid tokens of each sequence are counted first
    int64_t segments = 1;  // of a sequence, one warp each
    int64_t blocks = 1;    // that share the tokens, or the sequences
    int64_t layers = 1;    // groups of objectives and tiles of pairs
    int threads = 0;       // of a block
    int64_t row_doubles = 0, partials = 0;

    int64_t doubles() const { return row_doubles + partials; }
};

// Many weight problems.
struct Rows {
    int64_t rows = 0;
    int n = 0;
    bool wide = false;
    Array input;                         // scores (rows, n); matrices (rows, n, n) by the strides row, token, objective
    const double* preference = nullptr;  // (n); null: uniform
    double regularization = 0;
    const double* scale = nullptr;  // scores: one per row, or null
    int64_t scale_stride = 0;
    void *weights = nullptr, *optimum = nullptr;  // (rows, n), (rows), in the type of the input
    double* work = nullptr;
    int64_t slots = 0;  // problems that `work` has room for at a time
};

}  // namespace cuda
}  // namespace pama
