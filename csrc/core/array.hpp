// A strided view of a tensor, as the kernels read and write it.
#pragma once

#include <cstdint>

#include "numbers.hpp"

namespace pama {

enum class Dtype { f32, f64, bf16, f16, u8, i8, i16, i32, i64 };  // first those with a sign bit that zeros may have

PAMA_HD constexpr bool is_float(Dtype dtype) { return dtype <= Dtype::f16; }

// The name of a dtype in torch, and its type code and bits in DLPack.
struct DtypeName {
    const char* name;
    Dtype dtype;
    int code, bits;
};
constexpr int kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;
constexpr DtypeName kDtypes[] = {{"float32", Dtype::f32, kFloat, 32},    {"float64", Dtype::f64, kFloat, 64},
                                 {"bfloat16", Dtype::bf16, kBfloat, 16}, {"float16", Dtype::f16, kFloat, 16},
                                 {"uint8", Dtype::u8, kUInt, 8},         {"bool", Dtype::u8, kBool, 8},
                                 {"int8", Dtype::i8, kInt, 8},           {"int16", Dtype::i16, kInt, 16},
                                 {"int32", Dtype::i32, kInt, 32},        {"int64", Dtype::i64, kInt, 64}};

constexpr const char* name_of(Dtype dtype) {
    for (const DtypeName& known : kDtypes)
        if (known.dtype == dtype) return known.name;
    return "";
}

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

PAMA_BEGIN

// How the elements of a floating-point dtype are stored, read and written.
template <class S>
struct Native {
    typedef S Stored;
    PAMA_HD static S read(S x) { return x; }
    template <class T>
    PAMA_HD static S write(T x) {
        return static_cast<S>(x);
    }
};
struct Bfloat16 {
    typedef unsigned short Stored;
    PAMA_HD static float read(Stored x) { return bf16_to_float(x); }
    template <class T>
    PAMA_HD static Stored write(T x) {
        return float_to_bf16(static_cast<float>(x));
    }
};
struct Float16 {
    typedef unsigned short Stored;
    PAMA_HD static float read(Stored x) { return f16_to_float(x); }
    template <class T>
    PAMA_HD static Stored write(T x) {
        return float_to_f16(static_cast<float>(x));
    }
};

// Calls visit(format).
template <class Visit>
PAMA_HD inline auto with_format(Dtype dtype, Visit visit) {
    switch (dtype) {
        case Dtype::f64:
            return visit(Native<double>{});
        case Dtype::bf16:
            return visit(Bfloat16{});
        case Dtype::f16:
            return visit(Float16{});
        default:
            return visit(Native<float>{});
    }
}

// Calls visit(first of the bits, those that decide whether an element is 0): all bits, except the sign bit of a
// floating-point number.
template <class Visit>
PAMA_HD inline auto with_bits(const Array& array, Visit visit) {
    const int sign = is_float(array.dtype) ? 1 : 0;
    switch (size_of(array.dtype)) {
        case 8:
            return visit(static_cast<const uint64_t*>(array.data), static_cast<uint64_t>(~uint64_t{0} >> sign));
        case 4:
            return visit(static_cast<const uint32_t*>(array.data), static_cast<uint32_t>(~uint32_t{0} >> sign));
        case 2:
            return visit(static_cast<const uint16_t*>(array.data), static_cast<uint16_t>(0xffff >> sign));
        default:
            return visit(static_cast<const uint8_t*>(array.data), static_cast<uint8_t>(0xff >> sign));
    }
}

// One element.
template <class T>
PAMA_HD inline T load_number(const Array& array, int64_t at) {
    return with_format(array.dtype, [&](auto format) {
        typedef decltype(format) Format;
        return static_cast<T>(Format::read(static_cast<const typename Format::Stored*>(array.data)[at]));
    });
}
PAMA_HD inline void store_number(const Array& to, int64_t at, double value) {
    with_format(to.dtype, [&](auto format) {
        typedef decltype(format) Format;
        static_cast<typename Format::Stored*>(to.data)[at] = Format::write(value);
    });
}
PAMA_HD inline bool load_truth(const Array& array, int64_t at) {
    return with_bits(array, [&](auto* data, auto bits) { return (data[at] & bits) != 0; });
}

PAMA_END
