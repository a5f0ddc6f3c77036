// Where a token stands in tensors.
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

// How threads go through the tokens, `stride` apart. Made on the host, so that kernels read it as constants.
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
    // Packed tokens of which no tensor tells the number: -1.
    __device__ int64_t last(const DeviceTokens& p) const { return end >= 0 ? end : p.starts[p.rows]; }
};

struct Position {
    int64_t index, row, token;  // of all tokens; of the array

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

    // The last row from this one on that begins at or before the token; always one of [0, rows).
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
