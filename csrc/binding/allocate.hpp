// Allocates tensors with torch.empty: memory allocated by DLPack's exchange table is unknown to PyTorch's CUDA
// allocator, so that record_stream and CUDA graphs would not manage it.
#pragma once

#include "tensor.hpp"

namespace pama {
namespace binding {

class Allocator {
  public:
    // On the device of a tensor.
    explicit Allocator(const py::handle& like) : device_(like.attr("device")) {}

    // Of a floating-point dtype; `data` receives the memory.
    py::object operator()(Dtype dtype, const py::object& shape, void** data) const {
        PyObject* const arguments[] = {shape.ptr(), dtype_object(dtype), device_.ptr()};
        PyObject* const made = PyObject_Vectorcall(empty(), arguments, 1, names());
        if (!made) throw py::error_already_set();
        auto tensor = py::reinterpret_steal<py::object>(made);
        Tensor t;
        read_tensor(tensor, "a result", t);
        *data = t.data;
        return tensor;
    }
    py::object vector(Dtype dtype, int64_t size, void** data) const {
        return (*this)(dtype, py::make_tuple(size), data);
    }
    py::object scalar(Dtype dtype, void** data) const { return (*this)(dtype, py::tuple(), data); }

  private:
    static PyObject* dtype_object(Dtype dtype) {  // never released, like the objects below
        static PyObject* known[4] = {};
        PyObject*& found = known[static_cast<int>(dtype)];
        if (!found) found = py::object(py::module_::import("torch").attr(name_of(dtype))).release().ptr();
        return found;
    }
    static PyObject* empty() {
        static PyObject* const function = py::object(py::module_::import("torch").attr("empty")).release().ptr();
        return function;
    }
    static PyObject* names() {
        static PyObject* const made = py::make_tuple(py::str("dtype"), py::str("device")).release().ptr();
        return made;
    }
    py::object device_;
};

}  // namespace binding
}  // namespace pama
