// Allocates the results of `apply` in host memory, as backends/operators.py does with torch. Through DLPack's exchange
// table a tensor takes half the time of torch.empty.
#pragma once

#include <vector>

#include "records.hpp"

namespace pama {
namespace binding {

// A new contiguous tensor.
inline py::object new_tensor(Dtype dtype, std::vector<int64_t> shape) {
    exchange::Tensor like{};
    like.device_type = exchange::kCpu;
    like.lanes = 1;
    for (const DtypeName& known : kDtypes)
        if (known.dtype == dtype) {
            like.code = known.code;
            like.bits = known.bits;
        }
    like.shape = shape.data();
    void* data;
    return exchange::make(like, static_cast<int>(shape.size()), &data);
}

// What the results depend on besides the records.
struct ResultsLike {
    py::handle type, nothing;  // the class Results; the tensor for what is not requested
    const Tensor &advantages, &logprobs;
    bool by_row;  // weights and optimum are per sequence
};

inline py::object new_results(const ResultsLike& like, const py::handle& asked, const Tokens& tokens,
                              const Rule& rule) {
    const Record<OutputNames> outputs(asked);
    const Tensor& source = like.logprobs ? like.logprobs : like.advantages;
    const py::object nothing = py::reinterpret_borrow<py::object>(like.nothing);
    py::object combined = nothing, square_sum = nothing, loss = nothing, gradient = nothing;
    Dtype dtype = source.dtype;
    if (truth(outputs[OutputNames::advantages])) {
        const bool by_token = tokens.per_sequence && like.logprobs && !tokens.one_result_per_row(rule);
        const Tensor& t = by_token ? like.logprobs : like.advantages;
        dtype = like.advantages.dtype;
        combined = new_tensor(dtype, {t.shape, t.shape + t.ndim - (by_token ? 0 : 1)});
        square_sum = new_tensor(Dtype::f64, {});
    }
    dtype = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    if (truth(outputs[OutputNames::loss])) loss = new_tensor(dtype, {});
    if (truth(outputs[OutputNames::gradient])) {
        const Dtype wide = source.dtype == Dtype::f16 ? Dtype::f32 : source.dtype;
        gradient = new_tensor(wide, {source.shape, source.shape + source.ndim});
    }
    std::vector<int64_t> rows, weights;
    if (like.by_row) rows = weights = {tokens.rows};
    weights.push_back(tokens.n);
    const int64_t size = statistics_size(tokens.n, truth(outputs[OutputNames::pairs]));
    const py::object fields = py::make_tuple(combined, loss, gradient, new_tensor(dtype, weights),
                                             new_tensor(dtype, rows), new_tensor(Dtype::f64, {size}), square_sum);
    const py::tuple arguments = py::make_tuple(fields);  // of tuple.__new__, as in _make
    PyObject* const made =
        PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(like.type.ptr()), arguments.ptr(), nullptr);
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

}  // namespace binding
}  // namespace pama
