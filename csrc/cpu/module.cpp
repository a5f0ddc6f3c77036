// The Python module `pama_kernels._cpu`: raw pointers in, errors raised here. Python allocates the results, except on
// the quick path of the solvers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "driver.hpp"
#include "exchange.hpp"

namespace py = pybind11;
using namespace pama;

namespace {

// (pointer, dtype, row stride, token stride, objective stride), or None.
Array array(const py::handle& given) {
    if (given.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<long>(),
            t[3].cast<long>(), t[4].cast<long>()};
}

double* doubles(uintptr_t pointer) { return reinterpret_cast<double*>(pointer); }

// Offsets (pointer, is_int64, rows + 1, stride) as long integers, checked: they decide what memory is read.
std::vector<long> offsets(const py::handle& given, long tokens) {
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    const auto pointer = t[0].cast<uintptr_t>();
    const bool wide = t[1].cast<bool>();
    const long count = t[2].cast<long>(), stride = t[3].cast<long>();
    std::vector<long> result(static_cast<size_t>(count));
    for (long k = 0; k < count; ++k)
        result[static_cast<size_t>(k)] = wide ? reinterpret_cast<const int64_t*>(pointer)[k * stride]
                                              : reinterpret_cast<const int32_t*>(pointer)[k * stride];
    bool sorted = result.front() == 0 && (tokens < 0 || result.back() == tokens);
    for (size_t k = 1; k < result.size(); ++k) sorted = sorted && result[k - 1] <= result[k];
    if (!sorted)
        throw std::invalid_argument(
            "cu_seqlens: expected offsets that start at 0, never fall and end at the number of tokens" +
            (tokens < 0 ? std::string() : " (" + std::to_string(tokens) + ")") + ", got offsets from " +
            std::to_string(result.front()) + " to " + std::to_string(result.back()));
    return result;
}

struct Given {
    Problem problem;
    std::vector<long> offsets;
};

// The tuple that backends/cpu.py builds.
Given problem(const py::tuple& t) {
    Given given;
    Problem& p = given.problem;
    p.rows = t[0].cast<long>();
    p.width = t[1].cast<long>();
    if (!t[2].is_none()) {
        given.offsets = offsets(t[2], p.width);
        p.width = given.offsets.back();
    }
    p.n = t[3].cast<int>();
    p.noon = t[4].cast<bool>();
    p.wide = t[5].cast<bool>();
    p.clip = Clip::make(t[6].cast<double>(), t[7].cast<double>(), t[8].cast<double>());
    p.advantages = array(t[9]);
    p.mask = array(t[10]);
    p.objective_mask = array(t[11]);
    p.logprobs = array(t[12]);
    p.old_logprobs = array(t[13]);
    p.ref_logprobs = array(t[14]);
    p.importance_weights = array(t[15]);
    return given;
}

// The interpreter is released while a large input runs.
template <class Work>
void run(long elements, Work work) {
    if (elements > 16384) {
        py::gil_scoped_release release;
        work();
    } else {
        work();
    }
}

int threads_for(long elements, int threads) { return elements > 32768 ? threads : 1; }

const double* uniform_prior(int n) {
    thread_local std::vector<double> prior;
    if (static_cast<int>(prior.size()) != n) prior.assign(static_cast<size_t>(n), 1.0 / n);
    return prior.data();
}

// The leading dimensions of a tensor as one; false where no single stride runs through them.
bool batch_of(const exchange::Tensor& t, int trailing, long& rows, long& stride) {
    const int leading = t.ndim - trailing;
    rows = 1;
    stride = 0;
    for (int d = leading - 1; d >= 0; --d) {
        if (t.shape[d] == 1) continue;
        if (rows == 1) stride = t.strides[d];
        if (t.strides[d] != rows * stride) return false;
        rows *= t.shape[d];
    }
    return rows > 0;
}

// The whole call of the solvers for what is common: a plain CPU tensor in float32 or float64, the uniform prior, new
// results. None for everything else: Python then looks closer.
py::object quick_weights(const py::handle& scores, double regularization, int threads) {
    exchange::Tensor t;
    long rows, stride;
    if (!exchange::read(scores, 1, t) || !batch_of(t, 1, rows, stride)) return py::none();
    const int n = static_cast<int>(t.shape[t.ndim - 1]);
    if (n < 1) return py::none();
    const Array a{t.data, t.bits == 64 ? Dtype::f64 : Dtype::f32, stride, 0, t.strides[t.ndim - 1]};
    void *out, *optimum;
    py::object first = exchange::make(t, t.ndim, &out), second = exchange::make(t, t.ndim - 1, &optimum);
    run(rows * n, [&] {
        weights(rows, n, a, uniform_prior(n), true, regularization, Array{}, out, optimum,
                threads_for(rows * n, threads));
    });
    return py::make_tuple(std::move(first), std::move(second));
}

// solve(Gram, threads) -> -1, or the matrix that was refused
template <class Solve>
py::object quick_matrices(const py::handle& matrices, int threads, Solve solve) {
    exchange::Tensor t;
    long rows, stride;
    if (!exchange::read(matrices, 2, t) || !batch_of(t, 2, rows, stride)) return py::none();
    const int n = static_cast<int>(t.shape[t.ndim - 1]);
    if (n < 1 || t.shape[t.ndim - 2] != n) return py::none();
    Gram gram{rows, n, t.bits == 64, t.data, stride, t.strides[t.ndim - 2], t.strides[t.ndim - 1]};
    py::object first = exchange::make(t, t.ndim - 1, &gram.weights),
               second = exchange::make(t, t.ndim - 2, &gram.optimum);
    long bad = -1;
    run(rows * n * n, [&] { bad = solve(gram, threads_for(rows * n * n, threads)); });
    return bad < 0 ? py::object(py::make_tuple(std::move(first), std::move(second))) : py::object(py::none());
}

py::object quick_min_norm(const py::handle& matrices, double regularization, int threads) {
    return quick_matrices(matrices, threads, [&](const Gram& gram, int most) {
        return min_norm(gram, uniform_prior(gram.n), regularization, most);
    });
}

py::object quick_upgrad(const py::handle& matrices, int threads) {
    return quick_matrices(matrices, threads,
                          [](const Gram& gram, int most) { return upgrad(gram, uniform_prior(gram.n), most); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.def("build_info", [] {
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
    });
    m.def("use_isa", [](const std::string& name) { return std::string(kernels(name.c_str()).name); });
    m.def("use_exchange", &exchange::use);
    m.def("quick_weights", &quick_weights);
    m.def("quick_min_norm", &quick_min_norm);
    m.def("quick_upgrad", &quick_upgrad);
    m.def("statistics", [](const py::tuple& t, bool pairs, uintptr_t out, int threads) {
        Given g = problem(t);
        g.problem.offsets = g.offsets.empty() ? nullptr : g.offsets.data();
        const long elements = g.problem.tokens() * g.problem.n;
        run(elements, [&] { statistics(g.problem, pairs, doubles(out), threads_for(elements, threads)); });
    });
    m.def("batch_weights", [](uintptr_t sums, int n, bool gram, uintptr_t prior, double regularization, bool wide,
                              uintptr_t weights, uintptr_t optimum) {
        std::vector<double> c(static_cast<size_t>(n));
        const double value = batch_weights(doubles(sums), n, gram, doubles(prior), regularization, c.data());
        for (size_t i = 0; i < c.size(); ++i) {
            if (wide)
                doubles(weights)[i] = c[i];
            else
                reinterpret_cast<float*>(weights)[i] = static_cast<float>(c[i]);
        }
        if (wide)
            *doubles(optimum) = value;
        else
            *reinterpret_cast<float*>(optimum) = static_cast<float>(value);
    });
    m.def("apply",
          [](const py::tuple& t, int weights_per, uintptr_t prior, bool uniform, double regularization,
             const py::object& given, bool given_per_row, int aggregation, double normalizer, double kl_coef,
             const py::object& combined, bool combined_per_row, const py::object& gradient, const py::object& loss,
             const py::object& weights, const py::object& optimum, uintptr_t sums, bool pairs, int threads) {
              Given g = problem(t);
              g.problem.offsets = g.offsets.empty() ? nullptr : g.offsets.data();
              Apply a;
              a.weights_per = static_cast<WeightsPer>(weights_per);
              a.prior = doubles(prior);
              a.uniform = uniform;
              a.regularization = regularization;
              a.given = array(given);
              a.given_per_row = given_per_row;
              a.aggregation = static_cast<Aggregation>(aggregation);
              a.normalizer = normalizer;
              a.kl_coef = kl_coef;
              a.combined = array(combined);
              a.combined_per_row = combined_per_row;
              a.gradient = array(gradient);
              a.loss = array(loss);
              a.weights = array(weights);
              a.optimum = array(optimum);
              a.statistics = doubles(sums);
              a.pairs = pairs;
              const long elements = g.problem.tokens() * g.problem.n;
              run(elements, [&] { apply(g.problem, a, threads_for(elements, threads)); });
          });
    m.def("weights", [](long rows, int n, const py::object& scores, uintptr_t prior, bool uniform,
                        double regularization, const py::object& scale, uintptr_t out, uintptr_t optimum, int threads) {
        const Array a = array(scores), s = array(scale);
        run(rows * n, [&] {
            weights(rows, n, a, doubles(prior), uniform, regularization, s, reinterpret_cast<void*>(out),
                    reinterpret_cast<void*>(optimum), threads_for(rows * n, threads));
        });
    });
    m.def("min_norm", [](long rows, int n, bool wide, uintptr_t data, long batch, long row, long column,
                         uintptr_t prior, double regularization, uintptr_t out, uintptr_t optimum, int threads) {
        const Gram gram{rows,
                        n,
                        wide,
                        reinterpret_cast<void*>(data),
                        batch,
                        row,
                        column,
                        reinterpret_cast<void*>(out),
                        reinterpret_cast<void*>(optimum)};
        long bad = -1;
        run(rows * n * n,
            [&] { bad = min_norm(gram, doubles(prior), regularization, threads_for(rows * n * n, threads)); });
        return bad;
    });
    m.def("upgrad", [](long rows, int n, bool wide, uintptr_t data, long batch, long row, long column,
                       uintptr_t preference, uintptr_t out, uintptr_t optimum, int threads) {
        const Gram gram{rows,
                        n,
                        wide,
                        reinterpret_cast<void*>(data),
                        batch,
                        row,
                        column,
                        reinterpret_cast<void*>(out),
                        reinterpret_cast<void*>(optimum)};
        long bad = -1;
        run(rows * n * n, [&] { bad = upgrad(gram, doubles(preference), threads_for(rows * n * n, threads)); });
        return bad;
    });
    m.def("multi_objective_gae",
          [](long rows, long width, int n, double gamma, double lam, const py::object& rewards,
             const py::object& values, const py::object& mask, const py::object& dones, const py::object& last_values,
             const py::object& advantages, const py::object& returns, int threads) {
              const Gae g{rows,
                          width,
                          n,
                          gamma,
                          lam,
                          array(rewards),
                          array(values),
                          array(mask),
                          array(dones),
                          array(last_values),
                          array(advantages),
                          array(returns)};
              run(rows * width * n, [&] { multi_objective_gae(g, threads); });
          });
    m.def("group_normalize", [](long groups, uintptr_t group_begin, uintptr_t order, int n, const py::object& rewards,
                                bool scale, double eps, const py::object& result, int threads) {
        const Array r = array(rewards), out = array(result);
        const long* begin = reinterpret_cast<const long*>(group_begin);
        run(begin[groups] * n, [&] {
            group_normalize(groups, begin, reinterpret_cast<const long*>(order), n, r, scale, eps, out, threads);
        });
    });
}
