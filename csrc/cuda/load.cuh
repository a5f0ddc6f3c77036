// Elements of tensors of any dtype, and where a token stands in them.
#pragma once

#include "../core/numbers.hpp"
#include "device.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

__device__ inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <class T>
__device__ inline T load_number(const Array& array, int64_t at) {
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

__device__ inline void store_number(const Array& to, int64_t at, double value) {
    switch (to.dtype) {
        case Dtype::f64:
            static_cast<double*>(to.data)[at] = value;
            return;
        case Dtype::bf16:
            static_cast<unsigned short*>(to.data)[at] = float_to_bf16(static_cast<float>(value));
            return;
        case Dtype::f16:
            static_cast<unsigned short*>(to.data)[at] = float_to_f16(static_cast<float>(value));
            return;
        default:
            static_cast<float*>(to.data)[at] = static_cast<float>(value);
    }
}

// Whether an element is not zero; -0 is.
__device__ inline bool load_truth(const Array& array, int64_t at) {
    switch (array.dtype) {
        case Dtype::f32:
            return static_cast<const float*>(array.data)[at] != 0;
        case Dtype::f64:
            return static_cast<const double*>(array.data)[at] != 0;
        case Dtype::bf16:
        case Dtype::f16:
            return (static_cast<const unsigned short*>(array.data)[at] & 0x7fff) != 0;
        case Dtype::i16:
            return static_cast<const int16_t*>(array.data)[at] != 0;
        case Dtype::i32:
            return static_cast<const int32_t*>(array.data)[at] != 0;
        case Dtype::i64:
            return static_cast<const int64_t*>(array.data)[at] != 0;
        default:
            return static_cast<const unsigned char*>(array.data)[at] != 0;
    }
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
