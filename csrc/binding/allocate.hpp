// New tensors, made from C through DLPack's exchange table where torch has it, else by Python.
#pragma once

#include "tensor.hpp"

namespace pama {
namespace binding {

// `make(shape, name of the dtype)` is the way without the table.
class Allocator {
  public:
    Allocator(const Tensor& like, py::function make) : make_(std::move(make)) {
        prototype_ = like.lent;
        by_table_ = exchange::table() && like.lent.strides;
    }

    // `data` receives the memory.
    py::object operator()(Dtype dtype, int ndim, const int64_t* shape, void** data) {
        if (!by_table_) return by_python(dtype, ndim, shape, data);
        const bool floats = dtype == Dtype::f32 || dtype == Dtype::f64 || dtype == Dtype::f16;
        if (!floats && dtype != Dtype::bf16) throw py::type_error("a new tensor is floating-point");
        int64_t sizes[kMaxDimensions];
        for (int d = 0; d < ndim; ++d) sizes[d] = shape[d];
        prototype_.code = floats ? exchange::kFloat : exchange::kBfloat;
        prototype_.bits = static_cast<uint8_t>(8 * size_of(dtype));
        prototype_.shape = sizes;
        return exchange::make(prototype_, ndim, data);
    }
    py::object vector(Dtype dtype, int64_t size, void** data) { return (*this)(dtype, 1, &size, data); }
    py::object scalar(Dtype dtype, void** data) { return (*this)(dtype, 0, nullptr, data); }

  private:
    py::object by_python(Dtype dtype, int ndim, const int64_t* shape, void** data) {
        py::tuple sizes(static_cast<size_t>(ndim));
        for (int d = 0; d < ndim; ++d) sizes[static_cast<size_t>(d)] = shape[d];
        const py::object made = make_(sizes, kDtypeNames[static_cast<int>(dtype)]);
        *data = reinterpret_cast<void*>(made.attr("data_ptr")().cast<uintptr_t>());
        return made;
    }
    exchange::Tensor prototype_;
    py::function make_;
    bool by_table_;
};

}  // namespace binding
}  // namespace pama
