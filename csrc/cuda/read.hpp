// Tensors and records of Python as the launchers take them: addresses and strides, no memory is read.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "problem.hpp"

namespace pama {
namespace cuda {

namespace py = pybind11;

inline Dtype read_dtype(const py::handle& tensor) {
    static const auto known = [] {
        const py::module_ torch = py::module_::import("torch");
        constexpr std::pair<const char*, Dtype> names[] = {
            {"float32", Dtype::f32}, {"float64", Dtype::f64}, {"bfloat16", Dtype::bf16}, {"float16", Dtype::f16},
            {"bool", Dtype::u8},     {"uint8", Dtype::u8},    {"int8", Dtype::i8},       {"int16", Dtype::i16},
            {"int32", Dtype::i32},   {"int64", Dtype::i64}};
        std::array<std::pair<PyObject*, Dtype>, std::size(names)> result;
        for (std::size_t k = 0; k < result.size(); ++k)
            result[k] = {py::object(torch.attr(names[k].first)).release().ptr(), names[k].second};
        return result;
    }();
    const py::object dtype = tensor.attr("dtype");
    for (const auto& [object, code] : known)
        if (dtype.ptr() == object) return code;
    throw py::type_error("unexpected dtype " + std::string(py::str(dtype)));
}

inline void* read_address(const py::handle& tensor) {
    const auto address = tensor.attr("data_ptr")().cast<std::uintptr_t>();
    if (address == 0 && tensor.attr("numel")().cast<int64_t>() != 0) {
        const py::object error = py::module_::import("pama_kernels.backends.native").attr("NoMemory");
        PyErr_SetString(error.ptr(), "a tensor has no memory of its own");
        throw py::error_already_set();
    }
    return reinterpret_cast<void*>(address);
}

template <class T>
T* read_pointer(const py::handle& tensor) {
    return tensor.is_none() ? nullptr : static_cast<T*>(read_address(tensor));
}

inline int64_t read_stride(const py::handle& strides, py::ssize_t k) {
    return py::handle(PyTuple_GET_ITEM(strides.ptr(), k)).cast<int64_t>();
}

// (B, T) or (M,).
inline Array read_per_token(const py::handle& tensor) {
    if (tensor.is_none()) return {};
    const py::tuple strides = tensor.attr("stride")();
    const bool padded = strides.size() == 2;
    return {read_address(tensor), read_dtype(tensor), padded ? read_stride(strides, 0) : 0,
            read_stride(strides, padded ? 1 : 0), 0};
}

// (B, T, N), (B, N) where per sequence, or (M, N).
inline Array read_per_objective(const py::handle& tensor, bool per_sequence) {
    if (tensor.is_none()) return {};
    const py::tuple strides = tensor.attr("stride")();
    Array array{read_address(tensor), read_dtype(tensor), 0, 0, 0};
    const py::ssize_t last = static_cast<py::ssize_t>(strides.size()) - 1;
    array.objective = read_stride(strides, last);
    if (last == 2 || per_sequence) array.row = read_stride(strides, 0);
    if (last == 2 || !per_sequence) array.token = read_stride(strides, last - 1);
    return array;
}

inline double read_number(const py::handle& number) { return number.is_none() ? INFINITY : number.cast<double>(); }

inline DeviceTokens read_tokens(const py::handle& given) {
    DeviceTokens p;
    p.rows = given.attr("rows").cast<int64_t>();
    p.width = given.attr("width").cast<int64_t>();
    p.per_sequence = given.attr("per_sequence").cast<bool>();
    p.mask_per_sequence = given.attr("mask_per_sequence").cast<bool>();
    p.aggregation = static_cast<Aggregation>(given.attr("aggregation").cast<int>());
    p.noon = given.attr("noon").cast<bool>();
    p.clip = Clip::make(read_number(given.attr("eps_low")), read_number(given.attr("eps_high")),
                        read_number(given.attr("dual_clip")));
    const py::object advantages = given.attr("advantages"), offsets = given.attr("cu_seqlens");
    p.n = py::tuple(advantages.attr("shape"))[static_cast<std::size_t>(advantages.attr("ndim").cast<int>() - 1)]
              .cast<int>();
    p.advantages = read_per_objective(advantages, p.per_sequence);
    p.objective_mask = read_per_objective(given.attr("objective_mask"), p.mask_per_sequence);
    p.mask = read_per_token(given.attr("mask"));
    p.logprobs = read_per_token(given.attr("logprobs"));
    p.old_logprobs = read_per_token(given.attr("old_logprobs"));
    p.ref_logprobs = read_per_token(given.attr("ref_logprobs"));
    p.importance_weights = read_per_token(given.attr("importance_weights"));
    for (const Array* x : {&p.advantages, &p.logprobs, &p.old_logprobs, &p.ref_logprobs, &p.importance_weights})
        p.wide = p.wide || (*x && x->dtype == Dtype::f64);
    if (!offsets.is_none())
        p.starts = {read_address(offsets), read_dtype(offsets) == Dtype::i64, read_per_token(offsets).token};
    return p;
}

inline Rule read_rule(const py::handle& given) {
    Rule rule;
    rule.kind = static_cast<Kind>(given.attr("kind").cast<int>());
    rule.weights_per = static_cast<WeightsPer>(given.attr("weights_per").cast<int>());
    rule.number = given.attr("number").cast<double>();
    return rule;
}

}  // namespace cuda
}  // namespace pama
