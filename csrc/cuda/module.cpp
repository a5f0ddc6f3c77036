// The Python module `pama_kernels.backends._cuda`: it reads records and device pointers and raises the errors. Memory
// is allocated by torch; empty(count) returns a float64 tensor on the device.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../binding/allocate.hpp"
#include "../binding/contract.hpp"
#include "launch.hpp"

namespace py = pybind11;
using namespace pama;
using namespace pama::cuda;
using binding::Tensor;

namespace {

#if defined(PAMA_CUDA_EMULATION)
std::string device_problem() { return ""; }
struct DeviceGuard {
    explicit DeviceGuard(int) {}
};
const char* describe(cudaError_t) { return "emulated"; }
constexpr bool kEmulated = true;
constexpr int kCudaVersion = 0;
#define PAMA_CUDA_ARCHITECTURES "host"
#else
const char* describe(cudaError_t status) { return cudaGetErrorString(status); }
constexpr bool kEmulated = false;
constexpr int kCudaVersion = CUDART_VERSION;

// The reason why no device can be used; empty if one can.
std::string device_problem() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) return describe(status);
    return count > 0 ? "" : "no CUDA device";
}

// Makes the device current during the lifetime of the object.
struct DeviceGuard {
    int before = -1;
    explicit DeviceGuard(int device);
    ~DeviceGuard() {
        if (before >= 0) cudaSetDevice(before);
    }
    DeviceGuard(const DeviceGuard&) = delete;
};
#endif

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + describe(status));
}

#if !defined(PAMA_CUDA_EMULATION)
DeviceGuard::DeviceGuard(int device) {
    int current = -1;
    check(cudaGetDevice(&current), "the current device");
    if (current == device) return;
    check(cudaSetDevice(device), "choosing the device");
    before = current;
}
#endif

// The device to run on, its number of multiprocessors, and the address of the stream.
struct Where {
    int device, multiprocessors;
    cudaStream_t stream;
    explicit Where(const py::tuple& given)
        : device(given[0].cast<int>()),
          multiprocessors(given[1].cast<int>()),
          stream(reinterpret_cast<cudaStream_t>(given[2].cast<std::uintptr_t>())) {}
};

DeviceTokens read_tokens(const py::handle& record) {
    Tensor offsets;
    DeviceTokens p{binding::read_tokens(record, offsets), {}};
    if (offsets) p.starts = {offsets.data, offsets.dtype == Dtype::i64, offsets.stride(0)};
    return p;
}

double* read_doubles(const py::handle& result, const char* name, int64_t count) {
    const Array array = binding::read_result(result, name, count);
    if (array.data && array.dtype != Dtype::f64) throw py::type_error(std::string(name) + ": expected float64");
    return static_cast<double*>(array.data);
}

// Float64 device memory.
struct Memory {
    py::object tensor;
    double* data;
    Memory(const py::function& empty, int64_t count)
        : tensor(empty(count)), data(read_doubles(tensor, "memory", count)) {}
};

// Computes a call with advantages per sequence in one launch. Returns (combined advantages, weights, optimum, sums,
// square_sum, row factors), with None for results that were not requested, or None if one launch cannot process the
// call. Without a rule, a tuple of the sums only.
py::object sequences_of(const py::object& record, const py::object& rule, const py::object& preference,
                        const py::tuple& asked, const py::object& counter, const py::tuple& place) {
    const DeviceTokens p = read_tokens(record);
    const Where where(place);
    const bool combined = binding::truth(asked[1]), factors = binding::truth(asked[3]), wide = binding::truth(asked[4]);
    Sequences s;
    if (!plan_sequences(p, binding::truth(asked[0]), where.multiprocessors, s)) return py::none();
    s.normalize = binding::truth(asked[2]);
    s.solved = !rule.is_none();
    if (s.solved) s.rule = binding::read_rule(rule);
    Tensor zero;
    binding::read_tensor(counter, "counter", zero);
    s.counter = static_cast<unsigned*>(zero.data);
    const binding::Allocator allocate(record.attr("advantages"));
    const DeviceGuard guard(where.device);
    void* data = nullptr;
    const py::object work = allocate.vector(Dtype::f64, s.work_doubles(), &data);
    s.set_work(static_cast<double*>(data));
    const auto doubles = [&](int64_t count, double*& to) {
        const py::object made = allocate.vector(Dtype::f64, count, &data);
        to = static_cast<double*>(data);
        return made;
    };
    const py::object sums = doubles(statistics_size(p.n, s.pairs), s.sums);
    py::object parts[] = {py::none(), py::none(), py::none(), sums, py::none(), py::none()};
    if (s.solved) {
        s.preference = binding::read_preference(preference, p.n);
        const Dtype dtype = wide ? Dtype::f64 : Dtype::f32;
        const auto array = [&](Dtype type) { return Array{data, type, 0, 0, 1}; };
        if (combined) {
            parts[0] = allocate.vector(p.advantages.dtype, p.rows, &data);
            s.combined = array(p.advantages.dtype);
        }
        parts[1] = allocate.vector(dtype, p.n, &data);
        s.weights = array(dtype);
        parts[2] = allocate.scalar(dtype, &data);
        s.optimum = array(dtype);
        parts[4] = allocate.scalar(Dtype::f64, &data);
        s.square_sum = static_cast<double*>(data);
        if (factors) {
            parts[5] = allocate(Dtype::f64, py::make_tuple(p.rows, 3), &data);
            s.row_factors = static_cast<double*>(data);
        }
    }
    check(sequences(s, where.stream), "sequences");
    return py::make_tuple(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]);
}

// results: 2 n + 1 doubles for weights, effective preference and optimum; then, optionally, weights and optimum in the
// dtype of the call.
Solve read_solve(const py::handle& rule, int n, const double* sums, const py::handle& preference,
                 const py::tuple& results) {
    Solve s;
    s.rule = binding::read_rule(rule);
    s.n = n;
    s.sums = sums;
    s.preference = binding::read_preference(preference, n);
    s.weights = read_doubles(results[0], "weights", 2 * int64_t{n} + 1);
    s.effective = s.weights + n;
    s.optimum = s.effective + n;
    if (results.size() == 3) {
        s.rounded[0] = binding::read_result(results[1], "weights", n);
        s.rounded[1] = binding::read_result(results[2], "optimum", 1);
    }
    return s;
}

// Writes the statistics into `sums` and, with a rule, its weights into `results`.
void statistics_of(const py::object& record, bool pairs, const py::object& sums, const py::object& rule,
                   const py::object& preference, const py::object& results, const py::object& counter,
                   const py::tuple& place) {
    const DeviceTokens p = read_tokens(record);
    const Where where(place);
    const Plan plan = statistics_plan(p, pairs, where.multiprocessors);
    double* const to = read_doubles(sums, "statistics", statistics_size(p.n, pairs));
    Solve s;
    int64_t more = 0;
    bool inside = false;  // the last block of the statistics solves
    if (!rule.is_none()) {
        s = read_solve(rule, p.n, to, preference, results);
        more = solve_doubles(s.rule.kind, p.n);
        inside = !needs_pairs(s.rule.kind) && !plan.apart;
        if (needs_pairs(s.rule.kind) && !pairs)
            throw py::value_error("pairs: expected true for a rule on pairs of objectives");
    }
    void* data = nullptr;
    const py::object work =
        binding::Allocator(record.attr("advantages")).vector(Dtype::f64, plan.doubles() + more, &data);
    s.work = static_cast<double*>(data) + plan.doubles();
    Tensor zero;
    binding::read_tensor(counter, "counter", zero);
    const DeviceGuard guard(where.device);
    check(statistics(p, pairs, plan, static_cast<double*>(data), static_cast<unsigned*>(zero.data), to,
                     inside ? &s : nullptr, where.stream),
          "statistics");
    if (!rule.is_none() && !inside) check(solve(s, where.stream), "solve");
}

void solve_of(const py::object& sums, int n, const py::object& rule, const py::object& preference,
              const py::tuple& results, const py::tuple& place) {
    const Where where(place);
    Tensor given;
    binding::read_tensor(sums, "statistics", given);
    Solve s = read_solve(rule, n, static_cast<const double*>(given.data), preference, results);
    const bool pairs = needs_pairs(s.rule.kind);
    if (given.dtype != Dtype::f64 || given.ndim != 1 || given.size(0) < statistics_size(n, pairs))
        throw py::value_error("statistics: expected at least " + std::to_string(statistics_size(n, pairs)) +
                              " float64 sums");
    void* data = nullptr;
    const py::object work = binding::Allocator(sums).vector(Dtype::f64, solve_doubles(s.rule.kind, n), &data);
    s.work = static_cast<double*>(data);
    const DeviceGuard guard(where.device);
    check(solve(s, where.stream), "solve");
}

// Scores (rows, n), or matrices (rows, n, n); results are contiguous and of the same dtype.
Rows read_rows(const py::object& input, int dimensions, const py::object& preference, double regularization,
               const py::object& weights, const py::object& optimum) {
    Tensor t;
    binding::read_tensor(input, "input", t);
    if (t.ndim != dimensions || (t.dtype != Dtype::f32 && t.dtype != Dtype::f64))
        throw py::value_error("input: expected float32 or float64 of " + std::to_string(dimensions) + " dimensions");
    Rows rows;
    rows.rows = t.size(0);
    rows.n = binding::objectives_of(t.size(-1), "input");
    rows.input = binding::by_objective(t, true);
    rows.wide = t.dtype == Dtype::f64;
    rows.preference = binding::read_preference(preference, rows.n);
    rows.regularization = regularization;
    const Array to = binding::read_result(weights, "weights", rows.rows * rows.n);
    const Array value = binding::read_result(optimum, "optimum", rows.rows);
    if (to.dtype != t.dtype || value.dtype != t.dtype) throw py::type_error("results: expected the dtype of the input");
    rows.weights = to.data;
    rows.optimum = value.data;
    return rows;
}

// Allocates workspace for all problems, or for as many as fit in kMost doubles.
py::object make_room(Rows& rows, int64_t each, const py::function& empty) {
    constexpr int64_t kMost = 1 << 24;  // maximum in doubles, unless a single problem needs more
    rows.slots = rows.rows;
    if (each == 0) return py::none();
    const int64_t most = kMost / each > 1 ? kMost / each : 1;
    rows.slots = rows.rows < most ? rows.rows : most;
    const Memory work(empty, rows.slots * each);
    rows.work = work.data;
    return work.tensor;
}

void weights_of(const py::object& scores, const py::object& preference, double regularization, const py::object& scale,
                const py::object& result, const py::object& optimum, const py::function& empty,
                const py::tuple& place) {
    const Where where(place);
    Rows rows = read_rows(scores, 2, preference, regularization, result, optimum);
    Tensor sizes;
    binding::read_tensor(scale, "scale", sizes);
    if (sizes) {
        if (sizes.dtype != Dtype::f64 || sizes.ndim != 1)
            throw py::value_error("scale: expected float64, one for each row");
        rows.scale = static_cast<const double*>(sizes.data);
        rows.scale_stride = sizes.stride(0);
    }
    const py::object room = make_room(rows, weights_doubles(rows.n), empty);
    const DeviceGuard guard(where.device);
    check(weights(rows, where.stream), "weights");
}

template <int64_t (*Doubles)(int), cudaError_t (*Solver)(const Rows&, int, cudaStream_t)>
void matrices_of(const py::object& gram, const py::object& preference, double regularization, const py::object& result,
                 const py::object& optimum, const py::function& empty, const py::tuple& place) {
    const Where where(place);
    Rows rows = read_rows(gram, 3, preference, regularization, result, optimum);
    const py::object room = make_room(rows, Doubles(rows.n), empty);
    const DeviceGuard guard(where.device);
    check(Solver(rows, where.multiprocessors, where.stream), "the solver");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    binding::define_shared(m);
    m.def("build_info", [] {
        py::dict info;
        info["cuda"] = std::to_string(kCudaVersion / 1000) + "." + std::to_string(kCudaVersion % 1000 / 10);
        info["architectures"] = PAMA_CUDA_ARCHITECTURES;
        info["emulated"] = kEmulated;
#if defined(PAMA_CUDA_EMULATION)
        info["launches"] = emulation::launches;
#endif
        return info;
    });
    m.def("device_problem", &device_problem);
    m.def("statistics", &statistics_of);
    m.def("sequences", &sequences_of);
    m.def("solve", &solve_of);
    m.def("weights", &weights_of);
    m.def("min_norm", &matrices_of<&min_norm_doubles, &min_norm>);
    m.def("upgrad", &matrices_of<&upgrad_doubles, &upgrad>);
}
