// A tensor as the kernels see it.
#pragma once

#include <cstdint>

#include "config.hpp"

namespace pama {

enum class Dtype { f32, f64, bf16, f16, u8, i8, i16, i32, i64 };

PAMA_HD constexpr int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::f64:
        case Dtype::i64:
            return 8;
        case Dtype::f32:
        case Dtype::i32:
            return 4;
        case Dtype::bf16:
        case Dtype::f16:
        case Dtype::i16:
            return 2;
        default:
            return 1;
    }
}

// A strided array (rows, tokens, objectives); a stride of 0 broadcasts. No data: the argument was not given.
struct Array {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t row = 0, token = 0, objective = 0;
    PAMA_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace pama
