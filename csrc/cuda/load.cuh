// The position of a token in the tensors.
#pragma once

#include "device.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

__device__ inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// How a thread iterates over the tokens, `stride` apart. Computed on the host, so that kernels read it from constant
// memory.
struct Walk {
    int64_t end = 0, stride = 0, stride_rows = 0, stride_tokens = 0;
    bool find_rows = false;  // packed, and something is per sequence

    Walk() = default;
    Walk(const DeviceTokens& p, int64_t threads, bool row_weights) : stride(threads), stride_tokens(threads) {
        if (p.rows > 0) end = p.tokens();
        if (!p.starts && p.width > 0) {
            stride_rows = threads / p.width;
            stride_tokens = threads % p.width;
        }
        const bool rows = p.advantages.token == 0 || (p.objective_mask && p.objective_mask.token == 0) || row_weights;
        find_rows = p.starts && rows;
    }
    // The end of the loop. `end` is -1 for packed tokens if no tensor's shape has the number of tokens; it is then the
    // last offset.
    __device__ int64_t last(const DeviceTokens& p) const { return end >= 0 ? end : p.starts[p.rows]; }
};

struct Position {
    int64_t index, row, token;  // index among all tokens; row and token in the arrays

    __device__ void start(const DeviceTokens& p, const Walk& walk, int64_t first, int64_t end) {
        index = token = first;
        row = 0;
        if (!p.starts && p.width > 0) {
            row = first / p.width;
            token = first % p.width;
        }
        if (walk.find_rows && index < end) find(p);
    }

    __device__ void next(const DeviceTokens& p, const Walk& walk, int64_t end) {
        index += walk.stride;
        token += walk.stride_tokens;
        row += walk.stride_rows;
        if (!p.starts && token >= p.width) {
            token -= p.width;
            ++row;
        }
        if (walk.find_rows && index < end) find(p);
    }

    // Binary search for the last row, from the current one on, that begins at or before the token; always in [0, rows).
    __device__ void find(const DeviceTokens& p) {
        int64_t high = p.rows;
        while (high - row > 1) {
            const int64_t middle = (row + high) / 2;
            if (p.starts[middle] <= index)
                row = middle;
            else
                high = middle;
        }
    }

    __device__ int64_t in(const Array& array) const { return row * array.row + token * array.token; }
};

}  // namespace cuda
}  // namespace pama
