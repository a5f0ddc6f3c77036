// The Python module `pama_kernels.backends._cuda`: records and device pointers in, errors raised here. Python
// allocates: `empty(count)` gives float64 memory on the device.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../core/statistics.hpp"
#include "launch.hpp"
#include "read.hpp"

namespace py = pybind11;
using namespace pama;
using namespace pama::cuda;

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

// Why no device can be used; empty where one can.
std::string device_problem() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) return describe(status);
    return count > 0 ? "" : "no CUDA device";
}

// The device is current for as long as this lives.
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

// Where to run: the device, its number of multiprocessors, the address of the stream.
struct Where {
    int device, multiprocessors;
    cudaStream_t stream;
    explicit Where(const py::tuple& given)
        : device(given[0].cast<int>()),
          multiprocessors(given[1].cast<int>()),
          stream(reinterpret_cast<cudaStream_t>(given[2].cast<std::uintptr_t>())) {}
};

Solve read_solve(const py::handle& rule, int n, const double* sums, const py::handle& preference,
                 const py::tuple& results) {
    Solve s;
    s.rule = read_rule(rule);
    s.n = n;
    s.sums = sums;
    s.preference = read_pointer<const double>(preference);
    s.weights = read_pointer<double>(results[0]);
    s.optimum = read_pointer<double>(results[1]);
    s.effective = read_pointer<double>(results[2]);
    return s;
}

// The statistics; with a rule of the kinds FIXED or SCORES also the weights, optimum and effective preference.
py::object statistics_of(const py::object& record, bool pairs, const py::object& rule, const py::object& preference,
                         const py::object& results, const py::object& counter, const py::function& empty,
                         const py::tuple& place) {
    const DeviceTokens p = read_tokens(record);
    const Where where(place);
    const Plan plan = statistics_plan(p, pairs, where.multiprocessors);
    py::object sums = empty(statistics_size(p.n, pairs));
    const py::object work = empty(plan.doubles() + (rule.is_none() ? 0 : solve_doubles(Kind::scores, p.n)));
    auto* const to = read_pointer<double>(sums);
    Solve solve;
    if (!rule.is_none()) {
        solve = read_solve(rule, p.n, to, preference, results);
        solve.work = read_pointer<double>(work) + plan.doubles();
    }
    const DeviceGuard guard(where.device);
    check(statistics(p, pairs, plan, read_pointer<double>(work), read_pointer<unsigned>(counter), to,
                     rule.is_none() ? nullptr : &solve, where.stream),
          "statistics");
    return sums;
}

void solve_of(const py::object& sums, int n, const py::object& rule, const py::object& preference,
              const py::tuple& results, const py::function& empty, const py::tuple& place) {
    const Where where(place);
    Solve s = read_solve(rule, n, read_pointer<const double>(sums), preference, results);
    const py::object work = empty(solve_doubles(s.rule.kind, n));
    s.work = read_pointer<double>(work);
    const DeviceGuard guard(where.device);
    check(solve(s, where.stream), "solve");
}

// Room for as many problems at a time as there are, within reason.
py::object work_for(Rows& rows, int64_t each, const py::function& empty) {
    constexpr int64_t kMost = 1 << 24;  // doubles, unless one problem needs more
    rows.slots = rows.rows;
    if (each == 0) return py::none();
    const int64_t most = kMost / each > 1 ? kMost / each : 1;
    rows.slots = rows.rows < most ? rows.rows : most;
    py::object work = empty(rows.slots * each);
    rows.work = read_pointer<double>(work);
    return work;
}

// Scores (rows, n), or matrices (rows, n, n); results contiguous, of their dtype.
Rows read_rows(const py::object& input, const py::object& preference, double regularization, const py::object& weights,
               const py::object& optimum) {
    Rows rows;
    const py::tuple shape = input.attr("shape");
    rows.rows = shape[0].cast<int64_t>();
    rows.n = shape[1].cast<int>();
    rows.input = read_per_objective(input, shape.size() == 2);
    rows.wide = rows.input.dtype == Dtype::f64;
    rows.preference = read_pointer<const double>(preference);
    rows.regularization = regularization;
    rows.weights = read_pointer<void>(weights);
    rows.optimum = read_pointer<void>(optimum);
    return rows;
}

void weights_of(const py::object& scores, const py::object& preference, double regularization, const py::object& scale,
                const py::object& result, const py::object& optimum, const py::function& empty,
                const py::tuple& place) {
    const Where where(place);
    Rows rows = read_rows(scores, preference, regularization, result, optimum);
    rows.scale = read_pointer<const double>(scale);
    rows.scale_stride = read_per_token(scale).token;
    const py::object work = work_for(rows, weights_doubles(rows.n), empty);
    const DeviceGuard guard(where.device);
    check(weights(rows, where.stream), "weights");
}

template <int64_t (*Doubles)(int), cudaError_t (*Solver)(const Rows&, int, cudaStream_t)>
void matrices_of(const py::object& gram, const py::object& preference, double regularization, const py::object& result,
                 const py::object& optimum, const py::function& empty, const py::tuple& place) {
    const Where where(place);
    Rows rows = read_rows(gram, preference, regularization, result, optimum);
    const py::object work = work_for(rows, Doubles(rows.n), empty);
    const DeviceGuard guard(where.device);
    check(Solver(rows, where.multiprocessors, where.stream), "the solver");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.def("build_info", [] {
        py::dict info;
        info["cuda"] = std::to_string(kCudaVersion / 1000) + "." + std::to_string(kCudaVersion % 1000 / 10);
        info["architectures"] = PAMA_CUDA_ARCHITECTURES;
        info["emulated"] = kEmulated;
        return info;
    });
    m.def("device_problem", &device_problem);
    m.def("statistics", &statistics_of);
    m.def("solve", &solve_of);
    m.def("weights", &weights_of);
    m.def("min_norm", &matrices_of<&min_norm_doubles, &min_norm>);
    m.def("upgrad", &matrices_of<&upgrad_doubles, &upgrad>);
}
