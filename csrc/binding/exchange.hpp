// Tensors read and made from C through DLPack's exchange table (DLPack 1.3; torch >= 2.10 has it), without linking
// PyTorch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pama {
namespace exchange {

// The memory layout defined by DLPack.
struct Version {
    uint32_t major, minor;
};
struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Managed {
    Version version;
    void* context;
    void (*deleter)(Managed*);
    uint64_t flags;
    Tensor tensor;
};
using SetError = void (*)(void*, const char*, const char*);
struct Table {
    Version version;
    Table* previous;
    int (*allocate)(Tensor* prototype, Managed** out, void* context, SetError set_error);
    int (*managed_from)(void* object, Managed** out);
    int (*to_object)(Managed* tensor, void** object);
    int (*from_object)(void* object, Tensor* out);
    int (*stream)(int32_t device_type, int32_t device_id, void** out);
};

constexpr int32_t kCpu = 1;

inline const Table*& table() {
    static const Table* known = nullptr;
    return known;
}

// The capsule torch.Tensor.__dlpack_c_exchange_api__, or None if it is not available; other major versions are not
// used.
inline bool use(const pybind11::object& capsule) {
    table() = nullptr;
    if (capsule.is_none()) return false;
    for (const auto* t = pybind11::capsule(capsule).get_pointer<Table>(); t; t = t->previous)
        if (t->version.major == 1 && t->version.minor >= 3) table() = t;
    return table() != nullptr;
}

// Reads a tensor without a copy; false for other objects.
inline bool read(PyObject* object, Tensor& out) {
    if (!table()) return false;
    if (table()->from_object(object, &out) != 0) {
        PyErr_Clear();
        return false;
    }
    if (out.data) out.data = static_cast<char*>(out.data) + out.byte_offset;
    return out.lanes == 1;
}

// A new CPU tensor of the dtype of `like` with its first `ndim` sizes; `data` receives its memory.
inline pybind11::object make(const Tensor& like, int ndim, void** data) {
    Tensor prototype = like;
    prototype.ndim = ndim;
    prototype.strides = nullptr;
    prototype.byte_offset = 0;
    Managed* managed = nullptr;
    const SetError raise = [](void*, const char*, const char* message) {
        PyErr_SetString(PyExc_RuntimeError, message);
    };
    if (table()->allocate(&prototype, &managed, nullptr, raise) != 0) throw pybind11::error_already_set();
    *data = managed->tensor.data;
    void* object = nullptr;
    if (table()->to_object(managed, &object) != 0) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
}

}  // namespace exchange
}  // namespace pama
