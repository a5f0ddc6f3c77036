// A tensor as the kernels see it.
#pragma once

#include "config.hpp"

namespace pama {

enum class Dtype { f32, f64, bf16, f16, u8, i8, i16, i32, i64 };

// A strided array (rows, tokens, objectives); a stride of 0 broadcasts. No data: the argument was not given.
struct Array {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    long row = 0, token = 0, objective = 0;
    PAMA_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace pama
