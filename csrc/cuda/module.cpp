// The Python module `pama_kernels._cuda`: device pointers and a stream in, errors raised here. Python allocates.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.hpp"

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

template <class T>
T* pointer(const py::handle& address) {
    return reinterpret_cast<T*>(address.cast<std::uintptr_t>());
}

// (pointer, dtype, row stride, token stride, objective stride), or None.
Array array(const py::handle& given) {
    if (given.is_none()) return {};
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    return {pointer<void>(t[0]), static_cast<Dtype>(t[1].cast<int>()), t[2].cast<long>(), t[3].cast<long>(),
            t[4].cast<long>()};
}

// The tuple that backends/_native.py builds.
Tokens tokens(const py::tuple& t) {
    Tokens p;
    p.rows = t[0].cast<long>();
    p.width = t[1].cast<long>();
    if (!t[2].is_none()) {
        const auto offsets = py::reinterpret_borrow<py::tuple>(t[2]);
        p.offsets = {pointer<void>(offsets[0]), offsets[1].cast<bool>(), offsets[3].cast<long>()};
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
    p.importance_weights = array(t[15]);
    return p;
}

// (gram, prior, regularization, wide, weights, optimum, work), or None.
Solve solve(const py::handle& given) {
    Solve s;
    if (given.is_none()) return s;
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    s.bound = t[0].cast<bool>() ? Bound::gram : Bound::scores;
    s.prior = pointer<double>(t[1]);
    s.regularization = t[2].cast<double>();
    s.wide = t[3].cast<bool>();
    s.weights = pointer<void>(t[4]);
    s.optimum = pointer<void>(t[5]);
    s.work = pointer<double>(t[6]);
    return s;
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
    // Doubles of work space: for the partial sums; and for the weights from them.
    m.def("statistics_partials",
          [](const py::tuple& t, bool pairs, int most) { return statistics_plan(tokens(t), pairs, most).partials; });
    m.def("solve_work", &solve_doubles);
    m.def("weights_work", &weights_doubles);
    m.def("min_norm_work", &min_norm_doubles);
    m.def("statistics", [](const py::tuple& t, bool pairs, int most, const py::int_& partials, const py::int_& counter,
                           const py::int_& sums, const py::object& how, int device, const py::int_& stream) {
        const Tokens p = tokens(t);
        const DeviceGuard guard(device);
        check(
            statistics(p, pairs, statistics_plan(p, pairs, most), pointer<double>(partials), pointer<unsigned>(counter),
                       pointer<double>(sums), solve(how), pointer<std::remove_pointer_t<cudaStream_t>>(stream)),
            "statistics");
    });
    m.def("batch_weights", [](const py::int_& sums, int n, const py::object& how, int device, const py::int_& stream) {
        const DeviceGuard guard(device);
        check(batch_weights(pointer<double>(sums), n, solve(how), pointer<std::remove_pointer_t<cudaStream_t>>(stream)),
              "batch_weights");
    });
    m.def("weights", [](long rows, int n, const py::object& scores, const py::int_& prior, double regularization,
                        const py::object& scale, const py::int_& out, const py::int_& optimum, const py::int_& work,
                        long slots, int device, const py::int_& stream) {
        Rows r;
        r.rows = rows;
        r.n = n;
        r.input = array(scores);
        r.wide = r.input.dtype == Dtype::f64;
        r.prior = pointer<double>(prior);
        r.regularization = regularization;
        const Array sizes = array(scale);
        r.scale = static_cast<const double*>(sizes.data);
        r.scale_stride = sizes.row;
        r.weights = pointer<void>(out);
        r.optimum = pointer<void>(optimum);
        r.work = pointer<double>(work);
        r.slots = slots;
        const DeviceGuard guard(device);
        check(weights(r, pointer<std::remove_pointer_t<cudaStream_t>>(stream)), "weights");
    });
    m.def("min_norm", [](long rows, int n, bool wide, const py::int_& data, long batch, long row, long column,
                         const py::int_& prior, double regularization, const py::int_& out, const py::int_& optimum,
                         const py::int_& work, long slots, int multiprocessors, int device, const py::int_& stream) {
        Rows r;
        r.rows = rows;
        r.n = n;
        r.wide = wide;
        r.input.data = pointer<void>(data);
        r.input.row = batch;
        r.row = row;
        r.column = column;
        r.prior = pointer<double>(prior);
        r.regularization = regularization;
        r.weights = pointer<void>(out);
        r.optimum = pointer<void>(optimum);
        r.work = pointer<double>(work);
        r.slots = slots;
        const DeviceGuard guard(device);
        check(min_norm(r, multiprocessors, pointer<std::remove_pointer_t<cudaStream_t>>(stream)), "min_norm");
    });
}
