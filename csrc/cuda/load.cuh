// Elements of tensors of any dtype, and where a token stands in them.
#pragma once

#include "../core/numbers.hpp"
#include "device.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

// F32: every array holds float32.
template <class T, bool F32>
__device__ inline T load_number(const Array& array, long at) {
    if (F32) return static_cast<T>(static_cast<const float*>(array.data)[at]);
    switch (array.dtype) {
        case Dtype::f64:
            return static_cast<T>(static_cast<const double*>(array.data)[at]);
        case Dtype::bf16:
            return static_cast<T>(bf16_to_float(static_cast<const unsigned short*>(array.data)[at]));
        case Dtype::f16:
            return static_cast<T>(f16_to_float(static_cast<const unsigned short*>(array.data)[at]));
        default:
            return static_cast<T>(static_cast<const float*>(array.data)[at]);
    }
}

// Whether an element is not zero; -0 is.
__device__ inline bool load_truth(const Array& array, long at) {
    switch (array.dtype) {
        case Dtype::f32:
            return static_cast<const float*>(array.data)[at] != 0;
        case Dtype::f64:
            return static_cast<const double*>(array.data)[at] != 0;
        case Dtype::bf16:
        case Dtype::f16:
            return (static_cast<const unsigned short*>(array.data)[at] & 0x7fff) != 0;
        case Dtype::i16:
            return static_cast<const short*>(array.data)[at] != 0;
        case Dtype::i32:
            return static_cast<const int*>(array.data)[at] != 0;
        case Dtype::i64:
            return static_cast<const long long*>(array.data)[at] != 0;
        default:
            return static_cast<const unsigned char*>(array.data)[at] != 0;
    }
}

// How threads go through the tokens, `stride` apart. Made on the host, so that kernels read it as constants.
struct Walk {
    long end, stride, stride_rows, stride_tokens;  // end < 0: the last offset
    bool find_rows;                                // packed, and something is per sequence

    Walk() = default;
    Walk(const Tokens& p, long threads) : end(0), stride(threads), stride_rows(0), stride_tokens(threads) {
        if (p.rows > 0) end = p.offsets ? p.width : p.rows * p.width;
        if (!p.offsets && p.width > 0) {
            stride_rows = threads / p.width;
            stride_tokens = threads % p.width;
        }
        find_rows = p.offsets && (p.advantages.token == 0 || (p.objective_mask && p.objective_mask.token == 0));
    }
    __device__ long last(const Tokens& p) const { return end >= 0 ? end : p.offsets[p.rows]; }
};

struct Position {
    long index, row, token;  // of all tokens; of the array

    __device__ void start(const Tokens& p, const Walk& walk, long first, long end) {
        index = token = first;
        row = 0;
        if (!p.offsets && p.width > 0) {
            row = first / p.width;
            token = first % p.width;
        }
        if (walk.find_rows && index < end) find(p);
    }

    __device__ void next(const Tokens& p, const Walk& walk, long end) {
        index += walk.stride;
        token += walk.stride_tokens;
        row += walk.stride_rows;
        if (!p.offsets && token >= p.width) {
            token -= p.width;
            ++row;
        }
        if (walk.find_rows && index < end) find(p);
    }

    // The last row from this one on that begins at or before the token; always one of [0, rows).
    __device__ void find(const Tokens& p) {
        long high = p.rows;
        while (high - row > 1) {
            const long middle = (row + high) / 2;
            if (p.offsets[middle] <= index)
                row = middle;
            else
                high = middle;
        }
    }

    __device__ long in(const Array& array) const { return row * array.row + token * array.token; }
};

}  // namespace cuda
}  // namespace pama
