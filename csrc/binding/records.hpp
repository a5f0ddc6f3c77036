// The records of pama_kernels/_call.py, read by the names of their fields.
#pragma once

#include <limits>
#include <stdexcept>
#include <vector>

#include "../core/records.hpp"
#include "../core/statistics.hpp"
#include "tensor.hpp"

namespace pama {
namespace binding {

// Finds the fields of a NamedTuple by name once for its type; `Names` lists those that are read.
template <class Names>
class Record {
  public:
    explicit Record(const py::handle& record) : tuple_(record.ptr()) {
        if (!PyTuple_Check(tuple_)) throw py::type_error(std::string(Names::record) + ": expected a NamedTuple");
        if (Py_TYPE(tuple_) != type()) find(record);
    }
    py::handle operator[](typename Names::Field field) const {
        return PyTuple_GET_ITEM(tuple_, positions()[static_cast<int>(field)]);
    }

  private:
    static PyTypeObject*& type() {
        static PyTypeObject* known = nullptr;
        return known;
    }
    static Py_ssize_t* positions() {
        static Py_ssize_t found[Names::count];
        return found;
    }
    void find(const py::handle& record) const {
        const py::object fields = record.attr("_fields");
        for (int k = 0; k < Names::count; ++k)
            positions()[k] = fields.attr("index")(Names::names[k]).template cast<Py_ssize_t>();
        Py_INCREF(Py_TYPE(tuple_));  // never released, since another type could get the same address
        type() = Py_TYPE(tuple_);
    }
    PyObject* tuple_;
};

struct TokenNames {
    static constexpr const char* record = "tokens";
    enum Field {
        advantages,
        mask,
        objective_mask,
        logprobs,
        old_logprobs,
        ref_logprobs,
        importance_weights,
        cu_seqlens,
        rows,
        width,
        per_sequence,
        mask_per_sequence,
        aggregation,
        noon,
        eps_low,
        eps_high,
        dual_clip,
        count
    };
    static constexpr const char* names[count] = {
        "advantages",         "mask",       "objective_mask", "logprobs", "old_logprobs", "ref_logprobs",
        "importance_weights", "cu_seqlens", "rows",           "width",    "per_sequence", "mask_per_sequence",
        "aggregation",        "noon",       "eps_low",        "eps_high", "dual_clip"};
};

struct RuleNames {
    static constexpr const char* record = "rule";
    enum Field { kind, weights_per, number, count };
    static constexpr const char* names[count] = {"kind", "weights_per", "number"};
};

struct OutputNames {
    static constexpr const char* record = "outputs";
    enum Field { advantages, loss, gradient, statistics, pairs, normalize, normalizer, kl_coef, count };
    static constexpr const char* names[count] = {"advantages", "loss",      "gradient",   "statistics",
                                                 "pairs",      "normalize", "normalizer", "kl_coef"};
};

struct ResultNames {
    static constexpr const char* record = "results";
    enum Field { advantages, loss, gradient, weights, optimum, sums, square_sum, count };
    static constexpr const char* names[count] = {"advantages", "loss", "gradient",  "weights",
                                                 "optimum",    "sums", "square_sum"};
};

// A number in host memory.
inline double number(const py::handle& value, double none = std::numeric_limits<double>::quiet_NaN()) {
    if (value.is_none()) return none;
    const double x = PyFloat_AsDouble(value.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    return x;
}

inline bool truth(const py::handle& value) { return PyObject_IsTrue(value.ptr()) == 1; }

// (B, T) or (M,).
inline Array by_token(const Tensor& t) {
    if (!t) return {};
    return {t.data, t.dtype, t.ndim > 1 ? t.stride(0) : 0, t.ndim > 0 ? t.stride(-1) : 0, 0};
}

// (B, T, N), (B, N) or (M, N).
inline Array by_objective(const Tensor& t, bool per_sequence) {
    if (!t) return {};
    if (t.ndim == 3) return {t.data, t.dtype, t.stride(0), t.stride(1), t.stride(2)};
    if (per_sequence) return {t.data, t.dtype, t.stride(0), 0, t.stride(1)};
    return {t.data, t.dtype, 0, t.stride(0), t.stride(1)};
}

inline Clip read_clip(const Record<TokenNames>& record) {
    constexpr double none = std::numeric_limits<double>::infinity();
    return Clip::make(number(record[TokenNames::eps_low]), number(record[TokenNames::eps_high], none),
                      number(record[TokenNames::dual_clip], none));
}

// Reads everything except the offsets: `packed` receives the tensor cu_seqlens, which may be in device memory.
inline Tokens read_tokens(const py::handle& object, Tensor& packed) {
    const Record<TokenNames> record(object);
    Tokens tokens;
    tokens.rows = record[TokenNames::rows].cast<int64_t>();
    tokens.width = record[TokenNames::width].cast<int64_t>();
    tokens.per_sequence = truth(record[TokenNames::per_sequence]);
    tokens.mask_per_sequence = truth(record[TokenNames::mask_per_sequence]);
    tokens.aggregation = static_cast<Aggregation>(record[TokenNames::aggregation].cast<int>());
    tokens.noon = truth(record[TokenNames::noon]);
    tokens.clip = read_clip(record);
    const auto read = [&](TokenNames::Field field, Tensor& t) {
        read_tensor(record[field], TokenNames::names[field], t);
        tokens.wide = tokens.wide ||
                      (t && t.dtype == Dtype::f64 && field != TokenNames::mask && field != TokenNames::objective_mask);
    };
    Tensor t;
    read(TokenNames::advantages, t);
    if (t.ndim < 2) throw py::value_error("advantages: expected objectives in the last dimension");
    tokens.n = objectives_of(t.size(-1), "advantages");
    tokens.advantages = by_objective(t, tokens.per_sequence);
    read(TokenNames::objective_mask, t);
    tokens.objective_mask = by_objective(t, tokens.mask_per_sequence);
    const std::pair<TokenNames::Field, Array*> fields[] = {
        {TokenNames::mask, &tokens.mask},
        {TokenNames::logprobs, &tokens.logprobs},
        {TokenNames::old_logprobs, &tokens.old_logprobs},
        {TokenNames::ref_logprobs, &tokens.ref_logprobs},
        {TokenNames::importance_weights, &tokens.importance_weights}};
    for (const auto& [field, array] : fields) {
        read(field, t);
        *array = by_token(t);
    }
    read_tensor(record[TokenNames::cu_seqlens], "cu_seqlens", packed);
    return tokens;
}

// Reads and checks plain tensors in host memory: logprobs, old_logprobs and mask (B, T), advantages (B, T, N) or (B,
// N). Returns false for others and for invalid ones, about which the caller's Python code raises the error.
inline bool read_padded(const py::handle& logprobs, const py::handle& old_logprobs, const py::handle& advantages,
                        const py::handle& mask, Tensor& l, Tensor& a, Tokens& tokens) {
    if (!exchange::table()) return false;
    const auto read = [](const py::handle& object, Tensor& t, bool floats) {
        read_tensor(object, "", t);
        return t.lent.strides && t.lent.device_type == exchange::kCpu && t.elements > 0 &&
               (!floats || is_float(t.dtype));
    };
    if (!read(logprobs, l, true) || !read(advantages, a, true) || l.ndim != 2 || a.ndim < 2 || a.ndim > 3) return false;
    if (a.size(0) != l.size(0) || (a.ndim == 3 && a.size(1) != l.size(1))) return false;
    tokens.rows = l.size(0);
    tokens.width = l.size(1);
    tokens.n = objectives_of(a.size(-1), "advantages");
    tokens.per_sequence = a.ndim == 2;
    tokens.advantages = by_objective(a, tokens.per_sequence);
    tokens.logprobs = by_token(l);
    tokens.wide = a.dtype == Dtype::f64 || l.dtype == Dtype::f64;
    Tensor t;
    const auto read_tokens = [&](const py::handle& object, bool floats, Array& array) {
        if (object.is_none()) return true;
        if (!read(object, t, floats) || t.ndim != 2 || t.size(0) != tokens.rows || t.size(1) != tokens.width)
            return false;
        array = by_token(t);
        tokens.wide = tokens.wide || (floats && t.dtype == Dtype::f64);
        return true;
    };
    return read_tokens(old_logprobs, true, tokens.old_logprobs) && read_tokens(mask, false, tokens.mask);
}

// Reads offsets in host memory as int64 and checks them, since kernels compute addresses from them. tokens < 0: the
// number of tokens is known only from the offsets.
inline std::vector<int64_t> read_offsets(const Tensor& t, int64_t rows, int64_t tokens) {
    if ((t.dtype != Dtype::i64 && t.dtype != Dtype::i32) || t.ndim != 1 || t.size(0) != rows + 1)
        throw py::value_error("cu_seqlens: expected int32 or int64 offsets of shape (B + 1,)");
    std::vector<int64_t> result(static_cast<size_t>(rows + 1));
    for (int64_t k = 0; k <= rows; ++k)
        result[static_cast<size_t>(k)] = t.dtype == Dtype::i64 ? static_cast<const int64_t*>(t.data)[k * t.stride(0)]
                                                               : static_cast<const int32_t*>(t.data)[k * t.stride(0)];
    const auto text = [&](size_t k) { return "cu_seqlens[" + std::to_string(k) + "] = " + std::to_string(result[k]); };
    const size_t last = result.size() - 1;
    for (size_t k = 0; k <= last; ++k) {
        const int64_t least = k == last && tokens >= 0 ? tokens : k == 0 ? 0 : result[k - 1];
        const int64_t most = k == 0 ? 0 : tokens >= 0 ? tokens : std::numeric_limits<int64_t>::max();
        if (least <= result[k] && result[k] <= most) continue;
        throw py::value_error(
            "cu_seqlens: expected offsets that start at 0, never fall and end at the number of tokens" +
            (tokens < 0 ? std::string() : " (" + std::to_string(tokens) + ")") + ", got " + text(k) +
            (k == 0 ? std::string() : " after " + text(k - 1)));
    }
    return result;
}

inline Rule read_rule(const py::handle& object) {
    const Record<RuleNames> record(object);
    return {static_cast<Kind>(record[RuleNames::kind].cast<int>()),
            static_cast<WeightsPer>(record[RuleNames::weights_per].cast<int>()), number(record[RuleNames::number])};
}

inline double* float64_result(const py::handle& object, const char* name, int64_t elements) {
    const Array result = read_result(object, name, elements);
    if (result.dtype != Dtype::f64) throw py::value_error(std::string(name) + ": expected float64 for a result");
    return static_cast<double*>(result.data);
}

// Reads the requested results and the memory they are written to. `by_row`: weights and optimum are per sequence.
inline Outputs read_outputs(const py::handle& asked, const py::handle& results, const Tokens& tokens, const Rule& rule,
                            bool by_row) {
    const Record<OutputNames> record(asked);
    const Record<ResultNames> into(results);
    Outputs outputs;
    outputs.statistics = truth(record[OutputNames::statistics]);
    outputs.pairs = truth(record[OutputNames::pairs]);
    outputs.normalizer = number(record[OutputNames::normalizer], kNoNormalizer);
    outputs.kl_coef = number(record[OutputNames::kl_coef]);
    const auto result = [&](ResultNames::Field field, int64_t elements) {
        return read_result(into[field], ResultNames::names[field], elements);
    };
    const int64_t count = tokens.tokens(), rows = by_row ? tokens.rows : 1;
    if (truth(record[OutputNames::advantages])) {
        outputs.advantages = result(ResultNames::advantages, tokens.one_result_per_row(rule) ? tokens.rows : count);
        outputs.square_sum = float64_result(into[ResultNames::square_sum], "square_sum", 1);
    }
    if (truth(record[OutputNames::loss])) outputs.loss = result(ResultNames::loss, 1);
    if (truth(record[OutputNames::gradient])) outputs.gradient = result(ResultNames::gradient, count);
    outputs.weights = result(ResultNames::weights, rows * tokens.n);
    outputs.optimum = result(ResultNames::optimum, rows);
    outputs.sums = float64_result(into[ResultNames::sums], "sums", statistics_size(tokens.n, outputs.pairs));
    return outputs;
}

}  // namespace binding
}  // namespace pama
