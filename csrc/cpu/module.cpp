// The Python module `pama_kernels.backends._cpu`: it reads records and tensors and raises the errors. Python allocates
// the results, except on the fast path of the solvers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../binding/contract.hpp"
#include "../binding/results.hpp"
#include "../core/statistics.hpp"
#include "driver.hpp"

namespace py = pybind11;
using namespace pama;
using namespace pama::binding;

namespace {

// Releases the global interpreter lock for large inputs.
template <class Work>
void run(int64_t elements, Work work) {
    if (elements > 16384) {
        py::gil_scoped_release release;
        work();
    } else {
        work();
    }
}

int threads_for(int64_t elements, int threads) { return elements > 32768 ? threads : 1; }

// Tokens with their offsets in host memory.
struct Given {
    Tokens tokens;
    std::vector<int64_t> offsets;

    explicit Given(const py::handle& record) {
        Tensor packed;
        tokens = read_tokens(record, packed);
        if (!packed) return;
        offsets = read_offsets(packed, tokens.rows, tokens.width);
        tokens.offsets = offsets.data();
        tokens.width = offsets.back();
    }
    Given(const Given&) = delete;
    int64_t elements() const { return tokens.tokens() * (tokens.per_sequence ? 1 : tokens.n); }
};

void statistics_of(const py::handle& record, bool pairs, const py::handle& sums, int threads) {
    const Given given(record);
    double* const out = float64_result(sums, "sums", statistics_size(given.tokens.n, pairs));
    run(given.elements(), [&] { statistics(given.tokens, pairs, out, threads_for(given.elements(), threads)); });
}

void solve_of(const py::handle& sums, const py::handle& rule, const py::handle& preference, int64_t objectives,
              const py::handle& weights, const py::handle& optimum, const py::handle& effective) {
    const int n = objectives_of(objectives, "objectives");
    const Rule asked = read_rule(rule);
    const bool pairs = needs_pairs(asked.kind);
    Tensor t;
    read_tensor(sums, "sums", t);
    if (t.dtype != Dtype::f64 || t.elements < statistics_size(n, pairs) || t.stride(0) != 1)
        throw py::value_error("sums: expected the contiguous float64 statistics of " + std::to_string(n) +
                              " objectives" + (pairs ? " with pairs" : ""));
    double *const c = float64_result(weights, "weights", n), *const value = float64_result(optimum, "optimum", 1),
                  *const p = float64_result(effective, "preference", n);
    *value = solve(static_cast<const double*>(t.data), asked, read_preference(preference, n), n, c, p);
}

// Returns the results: `results`, which Python has allocated, or new ones if that is the class of the record; `nothing`
// is then the tensor for those that are not asked for.
py::object apply_of(const py::handle& record, const py::handle& rule, const py::handle& preference,
                    const py::handle& weights, const py::handle& asked, const py::handle& results,
                    const py::handle& nothing, int threads) {
    const Given given(record);
    const Tokens& tokens = given.tokens;
    const Rule how = read_rule(rule);
    const double* const p = read_preference(preference, tokens.n);
    Tensor c;
    read_tensor(weights, "weights", c);
    const bool per_row = c.ndim == 2, known = weights_known(how.kind);
    if (known != static_cast<bool>(c))
        throw py::value_error("weights: expected a tensor where the rule solves nothing");
    if (known && (!is_float(c.dtype) || c.ndim < 1 || c.size(-1) != tokens.n || (per_row && c.size(0) != tokens.rows)))
        throw py::value_error("weights: expected floats of shape (N,) or (B, N)");
    const bool by_row = known ? per_row : how.weights_per == WeightsPer::sequence;
    py::object into = py::reinterpret_borrow<py::object>(results);
    if (PyType_Check(results.ptr())) {
        const Record<TokenNames> fields(record);
        Tensor advantages, logprobs;
        read_tensor(fields[TokenNames::advantages], "advantages", advantages);
        read_tensor(fields[TokenNames::logprobs], "logprobs", logprobs);
        into = new_results({results, nothing, advantages, logprobs, by_row}, asked, tokens, how);
    }
    const Outputs outputs = read_outputs(asked, into, tokens, how, by_row);
    if (outputs.kl_coef != 0 && outputs.loss && !tokens.ref_logprobs)
        throw py::value_error("ref_logprobs: expected a tensor with kl_coef, got None");
    if ((outputs.loss || outputs.gradient) && !tokens.logprobs)
        throw py::value_error("logprobs: expected a tensor for a loss, got None");
    if (outputs.advantages && tokens.one_result_per_row(how) && tokens.objective_mask && !tokens.mask_per_sequence)
        throw py::value_error("objective_mask: expected shape (B, N) with advantages per sequence");
    Array fixed;
    if (c) fixed = {c.data, c.dtype, per_row ? c.stride(0) : 0, 0, c.stride(-1)};
    run(given.elements(),
        [&] { apply(tokens, how, p, fixed, per_row, outputs, threads_for(given.elements(), threads)); });
    return into;
}

// `apply` for the loss alone, of plain CPU tensors (logprobs, old_logprobs, advantages, mask) that it checks itself.
// Returns None for other inputs, as the fast path of the solvers below.
py::object quick_loss(const py::tuple& tensors, const py::handle& rule, double clip, bool noon, const py::handle& asked,
                      const py::handle& type, const py::handle& nothing, int threads) {
    if (tensors.size() != 4) throw py::value_error("tensors: expected 4, got " + std::to_string(tensors.size()));
    const auto given = [&](int i) { return py::handle(PyTuple_GET_ITEM(tensors.ptr(), i)); };
    Tensor l, a;
    Tokens tokens;
    tokens.noon = noon;
    tokens.clip = Clip::make(clip, clip, std::numeric_limits<double>::infinity());
    if (!(clip >= 0 && clip <= 1) || !read_padded(given(0), given(1), given(2), given(3), l, a, tokens))
        return py::none();
    const Rule how = read_rule(rule);
    const bool by_row = how.weights_per == WeightsPer::sequence;
    const py::object results = new_results({type, nothing, a, l, by_row}, asked, tokens, how);
    const Outputs outputs = read_outputs(asked, results, tokens, how, by_row);
    const int64_t elements = tokens.tokens() * (tokens.per_sequence ? 1 : tokens.n);
    run(elements, [&] { apply(tokens, how, nullptr, {}, false, outputs, threads_for(elements, threads)); });
    return results;
}

// Matrices (..., N, N) in float32 or float64 with one stride through the leading dimensions; false for anything else.
bool read_gram(const Tensor& t, Gram& gram) {
    if ((t.dtype != Dtype::f32 && t.dtype != Dtype::f64) || t.ndim < 2 || t.size(-2) != t.size(-1)) return false;
    if (!leading_rows(t, 2, gram.rows, gram.batch)) return false;
    gram.n = objectives_of(t.size(-1), "gram");
    gram.wide = t.dtype == Dtype::f64;
    gram.data = t.data;
    gram.row = t.stride(-2);
    gram.column = t.stride(-1);
    return true;
}

Gram gram_of(const py::handle& matrices, const py::handle& weights, const py::handle& optimum) {
    Tensor t;
    Gram gram;
    read_tensor(matrices, "gram", t);
    if (!read_gram(t, gram)) throw py::value_error("gram: expected float32 or float64 matrices (..., N, N)");
    const Array c = read_result(weights, "weights", gram.rows * gram.n), s = read_result(optimum, "optimum", gram.rows);
    if (c.dtype != t.dtype || s.dtype != t.dtype) throw py::value_error("weights: expected the dtype of gram");
    gram.weights = c.data;
    gram.optimum = s.data;
    return gram;
}

int64_t size_of(const Gram& gram) { return gram.rows * gram.n * gram.n; }

int64_t min_norm_of(const py::handle& matrices, const py::handle& preference, double regularization,
                    const py::handle& weights, const py::handle& optimum, int threads) {
    const Gram gram = gram_of(matrices, weights, optimum);
    const Preference p(read_preference(preference, gram.n), gram.n);
    int64_t bad = -1;
    run(size_of(gram), [&] { bad = min_norm(gram, p.data, regularization, threads_for(size_of(gram), threads)); });
    return bad;
}

int64_t upgrad_of(const py::handle& matrices, const py::handle& preference, const py::handle& weights,
                  const py::handle& optimum, int threads) {
    const Gram gram = gram_of(matrices, weights, optimum);
    const Preference p(read_preference(preference, gram.n), gram.n);
    int64_t bad = -1;
    run(size_of(gram), [&] { bad = upgrad(gram, p.data, threads_for(size_of(gram), threads)); });
    return bad;
}

// Scores (..., N) in float32 or float64 with one stride through the leading dimensions; false for anything else.
bool read_scores(const Tensor& t, int64_t& rows, int& n, Array& scores) {
    int64_t stride;
    if ((t.dtype != Dtype::f32 && t.dtype != Dtype::f64) || t.ndim < 1 || !leading_rows(t, 1, rows, stride))
        return false;
    n = objectives_of(t.size(-1), "scores");
    scores = {t.data, t.dtype, stride, 0, t.stride(-1)};
    return true;
}

void weights_of(const py::handle& given, const py::handle& preference, double regularization, const py::handle& scale,
                const py::handle& result, const py::handle& optimum, int threads) {
    Tensor t, sizes;
    int64_t rows;
    int n;
    Array scores;
    read_tensor(given, "scores", t);
    if (!read_scores(t, rows, n, scores)) throw py::value_error("scores: expected float32 or float64 rows (..., N)");
    const Array c = read_result(result, "weights", rows * n), s = read_result(optimum, "optimum", rows);
    if (c.dtype != t.dtype || s.dtype != t.dtype) throw py::value_error("weights: expected the dtype of scores");
    read_tensor(scale, "scale", sizes);
    if (sizes && (sizes.dtype != Dtype::f64 || sizes.ndim != 1 || sizes.elements != rows))
        throw py::value_error("scale: expected one float64 number for each row");
    const Array by = sizes ? Array{sizes.data, Dtype::f64, sizes.stride(0), 0, 0} : Array{};
    const Preference p(read_preference(preference, n), n);
    run(rows * n, [&] {
        weights({rows, n, scores, by, c.data, s.data}, {p.data, p.uniform, regularization},
                threads_for(rows * n, threads));
    });
}

// The fast path of the solvers for the common case: a plain CPU tensor in float32 or float64, the uniform preference,
// newly allocated results. Returns None for other inputs, which the Python code then handles.
bool quick(const py::handle& object, Tensor& t) {
    if (!exchange::table()) return false;
    read_tensor(object, "", t);
    return t.lent.strides && t.lent.device_type == exchange::kCpu && t.elements > 0;
}

py::object quick_weights(const py::handle& given, double regularization, int threads) {
    Tensor t;
    int64_t rows;
    int n;
    Array a;
    if (!quick(given, t) || !read_scores(t, rows, n, a)) return py::none();
    void *out, *optimum;
    py::object first = exchange::make(t.lent, t.ndim, &out), second = exchange::make(t.lent, t.ndim - 1, &optimum);
    thread_local std::vector<double> uniform;
    if (static_cast<int>(uniform.size()) != n) uniform.assign(static_cast<size_t>(n), 1.0 / n);
    run(rows * n, [&] {
        weights({rows, n, a, Array{}, out, optimum}, {uniform.data(), true, regularization},
                threads_for(rows * n, threads));
    });
    return py::make_tuple(std::move(first), std::move(second));
}

template <class Solve>
py::object quick_gram(const py::handle& matrices, int threads, Solve solve) {
    Tensor t;
    Gram gram;
    if (!quick(matrices, t) || !read_gram(t, gram)) return py::none();
    py::object first = exchange::make(t.lent, t.ndim - 1, &gram.weights),
               second = exchange::make(t.lent, t.ndim - 2, &gram.optimum);
    thread_local std::vector<double> uniform;
    if (static_cast<int>(uniform.size()) != gram.n) uniform.assign(static_cast<size_t>(gram.n), 1.0 / gram.n);
    int64_t bad = -1;
    run(size_of(gram), [&] { bad = solve(gram, uniform.data(), threads_for(size_of(gram), threads)); });
    return bad < 0 ? py::object(py::make_tuple(std::move(first), std::move(second))) : py::object(py::none());
}

py::object quick_min_norm(const py::handle& matrices, double regularization, int threads) {
    return quick_gram(matrices, threads, [&](const Gram& gram, const double* p, int most) {
        return min_norm(gram, p, regularization, most);
    });
}

py::object quick_upgrad(const py::handle& matrices, double, int threads) {
    return quick_gram(matrices, threads,
                      [&](const Gram& gram, const double* p, int most) { return upgrad(gram, p, most); });
}

struct GaeNames {
    static constexpr const char* record = "problem";
    enum Field { rewards, values, mask, dones, truncated, last_values, final_values, gamma, lam, count };
    static constexpr const char* names[count] = {"rewards",     "values",       "mask",  "dones", "truncated",
                                                 "last_values", "final_values", "gamma", "lam"};
};

void gae_of(const py::handle& problem, const py::handle& advantages, const py::handle& returns, int threads) {
    const Record<GaeNames> record(problem);
    Tensor t;
    const auto read = [&](GaeNames::Field field) -> const Tensor& {
        read_tensor(record[field], GaeNames::names[field], t);
        return t;
    };
    Gae g{};
    g.rewards = by_objective(read(GaeNames::rewards), false);
    g.rows = t.size(0);
    g.width = t.size(1);
    g.n = objectives_of(t.size(2), "rewards", 0);
    g.gamma = number(record[GaeNames::gamma]);
    g.lam = number(record[GaeNames::lam]);
    g.values = by_objective(read(GaeNames::values), false);
    g.mask = by_token(read(GaeNames::mask));
    g.dones = by_token(read(GaeNames::dones));
    g.truncated = by_token(read(GaeNames::truncated));
    g.last_values = by_objective(read(GaeNames::last_values), true);
    g.final_values = by_objective(read(GaeNames::final_values), false);
    if (g.truncated && !g.final_values)
        throw py::value_error("final_values: expected a tensor with truncated, got None");
    const int64_t elements = g.rows * g.width * g.n;
    g.advantages = read_result(advantages, "advantages", elements);
    g.returns = read_result(returns, "returns", elements);
    run(elements, [&] { multi_objective_gae(g, threads); });
}

void group_normalize_of(const py::handle& rewards, const py::handle& begin, const py::handle& order, bool scale,
                        double eps, const py::handle& result, int threads) {
    Tensor t, first, rows;
    read_tensor(rewards, "rewards", t);
    read_tensor(begin, "group_begin", first);
    read_tensor(order, "order", rows);
    if (first.dtype != Dtype::i64 || rows.dtype != Dtype::i64 || rows.elements != t.size(0))
        throw py::value_error("group_ids: expected int64 positions");
    const Groups groups{first.elements - 1, static_cast<const int64_t*>(first.data),
                        static_cast<const int64_t*>(rows.data)};
    const Array r = by_objective(t, true), out = read_result(result, "result", t.elements);
    const int n = objectives_of(t.size(1), "rewards", 0);
    run(t.elements, [&] { group_normalize(groups, n, r, scale, eps, out, threads); });
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["isa"] = kernels().name;
#if defined(PAMA_HAVE_AVX512)
    info["isas"] = std::vector<std::string>{"portable", "avx2", "avx512"};
#else
    info["isas"] = std::vector<std::string>{"portable"};
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    define_shared(m);
    m.def("build_info", &build_info);
    m.def("use_isa", [](const std::string& name) { return std::string(kernels(name.c_str()).name); });
    m.def("statistics", &statistics_of);
    m.def("solve", &solve_of);
    m.def("apply", &apply_of);
    m.def("quick_loss", &quick_loss);
    m.def("weights", &weights_of);
    m.def("min_norm", &min_norm_of);
    m.def("upgrad", &upgrad_of);
    m.def("quick_weights", &quick_weights);
    m.def("quick_min_norm", &quick_min_norm);
    m.def("quick_upgrad", &quick_upgrad);
    m.def("gae", &gae_of);
    m.def("group_normalize", &group_normalize_of);
}
