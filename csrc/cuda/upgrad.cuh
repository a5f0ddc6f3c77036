// UPGrad's weights of one matrix by one warp: each lane projects gradients of its own.
#pragma once

#include "../core/upgrad.hpp"
#include "device.cuh"
#include "sequences.hpp"

namespace pama {
namespace cuda {

// The threads of upgrad::solve_all: this one alone (step 1), or a warp.
struct Lanes {
    static constexpr bool kInLanes = false;
    int first, step;
    __device__ double sum(double x) const { return step == 1 ? x : warp_sum(x); }
    __device__ SolverResult worst(SolverResult result) const {
        if (step == 1) return result;
        double residual = result.residual, status = static_cast<int>(result.status);
        PAMA_UNROLL
        for (int half = kWarp / 2; half > 0; half /= 2) {
            const double other = __shfl_xor_sync(kAllLanes, residual, half);
            const double its = __shfl_xor_sync(kAllLanes, status, half);
            const bool larger = other > residual || other != other;
            residual = larger ? other : residual;
            status = larger ? its : status;
        }
        result.residual = residual;
        result.status = static_cast<SolveStatus>(static_cast<int>(status));
        return result;
    }
};

__device__ inline double warp_max(double value) {
    PAMA_UNROLL
    for (int half = kWarp / 2; half > 0; half /= 2) value = max_of(__shfl_xor_sync(kAllLanes, value, half), value);
    return value;
}

// n objectives, 3 <= n <= N, all with a gradient, in registers: the matrix (n, n) and the weights c as for
// upgrad_solve. Called by all lanes of a warp. Returns, to every lane, whether the problem was solved; lane 0 writes
// the results.
template <int N>
__device__ inline bool upgrad_in_registers(int n, const double* matrix, const double* preference, double* c,
                                           double* optimum) {
    const int lane = threadIdx.x % kWarp, i = lane < n ? lane : 0;
    double poison = 0, mass = 0;
    for (int j = 0; j < n; ++j) {
        poison += 0 * matrix[i * n + j];
        mass += preference[j];
    }
    const double own = matrix[i * n + i], largest = warp_max(own);
    const bool usable = own > 0 && poison == 0 && mass > 0 && 0 * mass == 0;
    if (__any_sync(kAllLanes, !usable)) return false;
    const int odd = upgrad::exponent_of(largest) & 1;
    const double halved = odd ? 0.5 : 1.0, unit = upgrad::unit_of(own, odd),
                 root = std::sqrt(unit * own * unit * halved);
    upgrad::Small<N> s;
    double roots[N], sum[N], share = 1 / mass;
    PAMA_UNROLL
    for (int j = 0; j < N; ++j) {
        s.unit[j] = __shfl_sync(kAllLanes, unit, j);
        roots[j] = __shfl_sync(kAllLanes, root, j);
        s.preference[j] = j < n ? preference[j] * share : 0;
        sum[j] = lane == 0 ? s.preference[j] : 0;
        PAMA_UNROLL
        for (int k = 0; k <= j; ++k)
            s.x.m(j, k) = j >= n ? (j == k ? 1.0 : 0.0)
                                 : upgrad::scaled_entry(matrix[j * n + k], matrix[k * n + j], s.unit[j], s.unit[k],
                                                        halved, roots[j] * roots[k]);
    }
    double residual = 0;
    const bool solved = s.start() && (lane >= n || s.project(lane, n, sum, &residual));
    if (__any_sync(kAllLanes, !solved)) return false;
    double total = 0, value = 0;
    PAMA_UNROLL
    for (int j = 0; j < N; ++j) {
        sum[j] = warp_sum(sum[j]);
        total += sum[j];
    }
    const double inverse = 1 / total;
    PAMA_UNROLL
    for (int j = 0; j < N; ++j) {
        sum[j] *= inverse;
        if (lane == 0 && j < n) c[j] = sum[j];
        sum[j] /= s.unit[j];
    }
    PAMA_UNROLL
    for (int j = 0; j < N; ++j) {
        double product = 0;
        PAMA_UNROLL
        for (int k = 0; k < N; ++k) product += s.x.m.symmetric(j, k) * sum[k];
        value += sum[j] * product;
    }
    if (lane == 0) *optimum = value > 0 ? value / halved : 0;
    return true;
}

// The same for any n up to kMostInRegisters; false for fewer than three objectives.
__device__ PAMA_NOINLINE bool upgrad_few(int n, const double* matrix, const double* preference, double* c,
                                         double* optimum) {
    if (n < upgrad::kSmallestSmall || n > kMostInRegisters) return false;
    return n <= upgrad::kLargestSmall ? upgrad_in_registers<upgrad::kLargestSmall>(n, matrix, preference, c, optimum)
                                      : upgrad_in_registers<kMostInRegisters>(n, matrix, preference, c, optimum);
}

}  // namespace cuda
}  // namespace pama
