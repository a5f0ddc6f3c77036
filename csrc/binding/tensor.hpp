// Reads the pointer, dtype, shape and strides of a torch tensor through DLPack's exchange table if torch provides it,
// else from its Python attributes.
#pragma once

#include <string>

#include "../core/array.hpp"
#include "exchange.hpp"

namespace pama {
namespace binding {

namespace py = pybind11;

// Raised for a tensor that has elements but no memory of its own.
struct NoMemory : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

constexpr int kMaxDimensions = 64;  // the maximum of torch

// Does not own memory: valid as long as the tensor it was read from.
struct Tensor {
    void* data = nullptr;  // never null if the argument was given
    Dtype dtype = Dtype::f32;
    int ndim = 0;
    int64_t elements = 0;
    const int64_t *shape = nullptr, *strides = nullptr;
    exchange::Tensor lent;            // filled by DLPack; `strides` is null if DLPack was not used
    int64_t own[2 * kMaxDimensions];  // storage for shape and strides if DLPack was not used

    Tensor() = default;
    Tensor(const Tensor&) = delete;
    explicit operator bool() const { return data != nullptr; }
    int64_t size(int dimension) const { return shape[dimension < 0 ? dimension + ndim : dimension]; }
    int64_t stride(int dimension) const { return strides[dimension < 0 ? dimension + ndim : dimension]; }
};

[[noreturn]] inline void refuse_dtype(const char* name, const std::string& found) {
    throw py::type_error(std::string(name) + ": expected a dtype that the kernels read, got " + found);
}

inline Dtype dtype_of(const exchange::Tensor& t, const char* name) {
    for (const DtypeName& known : kDtypes)
        if (t.code == known.code && t.bits == known.bits) return known.dtype;
    refuse_dtype(name, "DLPack code " + std::to_string(t.code) + " of " + std::to_string(t.bits) + " bits");
}

inline Dtype dtype_of(const py::handle& dtype, const char* name) {
    constexpr int count = sizeof kDtypes / sizeof *kDtypes;
    static PyObject* objects[count] = {};
    for (int k = 0; k < count; ++k) {
        if (!objects[k])  // never released
            objects[k] = py::object(py::module_::import("torch").attr(kDtypes[k].name)).release().ptr();
        if (dtype.ptr() == objects[k]) return kDtypes[k].dtype;
    }
    refuse_dtype(name, py::str(dtype));
}

inline void read_attributes(const py::handle& object, const char* name, Tensor& out) {
    const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
    out.dtype = dtype_of(object.attr("dtype"), name);
    out.ndim = static_cast<int>(shape.size());
    if (out.ndim > kMaxDimensions) throw py::value_error(std::string(name) + ": expected at most 64 dimensions");
    for (int d = 0; d < out.ndim; ++d) {
        out.own[d] = shape[static_cast<size_t>(d)].cast<int64_t>();
        out.own[kMaxDimensions + d] = strides[static_cast<size_t>(d)].cast<int64_t>();
    }
    out.shape = out.own;
    out.strides = out.own + kMaxDimensions;
    out.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
}

// name: the argument, for error messages. None means that the argument was not given. A tensor without elements gets a
// non-null pointer that is never dereferenced.
inline void read_tensor(const py::handle& object, const char* name, Tensor& out) {
    exchange::Tensor& t = out.lent;
    out.data = nullptr;
    t.strides = nullptr;
    if (object.is_none()) return;
    if (exchange::read(object.ptr(), t) && t.strides) {
        out.dtype = dtype_of(t, name);
        out.ndim = t.ndim;
        out.shape = t.shape;
        out.strides = t.strides;
        out.data = t.data;
    } else {
        read_attributes(object, name, out);
    }
    out.elements = 1;
    for (int d = 0; d < out.ndim; ++d) out.elements *= out.shape[d];
    static double nothing;
    if (out.elements == 0) out.data = &nothing;
    if (!out.data)
        throw NoMemory(std::string(name) +
                       ": expected a tensor with memory of its own, got one without (freed storage or a wrapper)");
}

// Checks the number of objectives, which must fit an int.
inline int objectives_of(int64_t n, const char* name, int64_t least = 1) {
    if (n < least || n > (1 << 30) - 1)
        throw py::value_error(std::string(name) + ": expected " + std::to_string(least) + " to " +
                              std::to_string((1 << 30) - 1) + " objectives, got " + std::to_string(n));
    return static_cast<int>(n);
}

// A contiguous float64 vector of size n, or null for None.
inline const double* read_preference(const py::handle& object, int64_t n, const char* name = "preference") {
    if (object.is_none()) return nullptr;
    Tensor t;
    read_tensor(object, name, t);
    if (t.dtype != Dtype::f64 || t.ndim != 1 || t.size(0) != n || (n > 1 && t.stride(0) != 1))
        throw py::value_error(std::string(name) + ": expected a contiguous float64 tensor of shape (" +
                              std::to_string(n) + ",)");
    return static_cast<const double*>(t.data);
}

// Reads a contiguous result tensor that Python has allocated; the array is absent if it has no elements.
inline Array read_result(const py::handle& object, const char* name, int64_t elements = -1) {
    Tensor t;
    read_tensor(object, name, t);
    if (!t || (elements >= 0 && t.elements != elements))
        throw py::value_error(std::string(name) + ": expected " + std::to_string(elements) + " elements for a result");
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; expected *= t.size(d--))
        if (t.size(d) != 1 && t.elements > 0 && t.stride(d) != expected)
            throw py::value_error(std::string(name) + ": expected a contiguous tensor for a result");
    return {t.elements > 0 ? t.data : nullptr, t.dtype, 0, 0, 1};
}

// Flattens the leading dimensions: number of rows, and the stride between rows. Returns false if no single stride
// exists.
inline bool leading_rows(const Tensor& t, int trailing, int64_t& rows, int64_t& stride) {
    rows = 1;
    stride = 0;
    for (int d = t.ndim - trailing - 1; d >= 0; --d) {
        if (t.shape[d] == 1) continue;
        if (rows == 1) stride = t.strides[d];
        if (t.strides[d] != rows * stride) return false;
        rows *= t.shape[d];
    }
    return true;
}

}  // namespace binding
}  // namespace pama
