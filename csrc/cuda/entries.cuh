// Loads inputs and stores results of batched weight problems.
#pragma once

#include "device.cuh"
#include "problem.hpp"

namespace pama {
namespace cuda {

__device__ inline double given_preference(const Rows& rows, int i) {
    return rows.preference ? rows.preference[i] : 1.0 / rows.n;
}

__device__ inline double load_score(const Rows& rows, int64_t at) {
    return rows.wide ? static_cast<const double*>(rows.input.data)[at]
                     : static_cast<double>(static_cast<const float*>(rows.input.data)[at]);
}

__device__ inline void store_number(void* to, bool wide, int64_t at, double value) {
    if (wide)
        static_cast<double*>(to)[at] = value;
    else
        static_cast<float*>(to)[at] = static_cast<float>(value);
}

}  // namespace cuda
}  // namespace pama
