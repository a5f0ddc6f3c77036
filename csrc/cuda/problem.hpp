// What the CUDA launchers take: plain data, all pointers to device memory, strides in elements.
#pragma once

#include <cstddef>

#include "../core/array.hpp"
#include "../core/surrogate.hpp"

namespace pama {
namespace cuda {

// rows + 1 offsets of packed sequences, int32 or int64. Not validated: nothing on the host sees them.
struct Offsets {
    const void* data = nullptr;
    bool wide = false;
    long stride = 1;
    PAMA_HD explicit operator bool() const { return data != nullptr; }
    PAMA_HD long operator[](long k) const {
        return wide ? static_cast<long>(static_cast<const long long*>(data)[k * stride])
                    : static_cast<long>(static_cast<const int*>(data)[k * stride]);
    }
};

struct Tokens {
    long rows = 0;
    long width = 0;  // of a padded row; packed: all tokens, or -1 where only the offsets tell
    Offsets offsets;
    int n = 0;
    bool noon = true;
    bool wide = false;  // compute in double
    Clip clip = {};
    Array advantages, mask, objective_mask, logprobs, old_logprobs, importance_weights;
};

// Whether and how the weights are solved from the sums; from scores in the same launch.
enum class Bound { none, scores, gram };
struct Solve {
    Bound bound = Bound::none;
    const double* prior = nullptr;  // (n)
    double regularization = 0;
    bool wide = false;  // weights and optimum are double, else float
    void *weights = nullptr, *optimum = nullptr;
    double* work = nullptr;  // solve_doubles(n, bound == gram) of them
};

// Sums are added in the order of the blocks, so the grid is part of the result: it follows from the sizes alone.
struct Plan {
    int blocks, layers;  // grid.x, grid.y
    long partials;       // doubles
};

struct Rows {
    long rows = 0;
    int n = 0;
    bool wide = false;
    Array input;                    // (rows, n), or (rows, n, n) in row, and below
    long row = 0, column = 0;       // strides within one matrix
    const double* prior = nullptr;  // (n)
    double regularization = 0;
    const double* scale = nullptr;  // scores: one per row, or null
    long scale_stride = 0;
    void *weights = nullptr, *optimum = nullptr;  // (rows, n), (rows), in the type of the input
    const double* sums = nullptr;                 // the one matrix is that of these statistics
    double* work = nullptr;
    long slots = 0;  // problems that `work` has room for at a time
};

}  // namespace cuda
}  // namespace pama
