// UPGrad's weights of one matrix by the warps of a block.
#pragma once

#include "../core/upgrad.hpp"
#include "warp_system.cuh"

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
            const bool larger = is_worse(other, residual);
            residual = larger ? other : residual;
            status = larger ? its : status;
        }
        result.residual = residual;
        result.status = static_cast<SolveStatus>(static_cast<int>(status));
        return result;
    }
};

// Warps of a block that project the gradients of one matrix, and the doubles of their shared memory.
constexpr int kUpgradWarps = 8;
PAMA_HD constexpr int upgrad_work(int n) { return n * warp_pitch(n) + 2 * n + 3 + kUpgradWarps * (warp_work(n) + n); }

// The problem of core/upgrad.hpp for 2 < n <= kMostByWarp objectives, all with a gradient: upgrad::Small by the warps
// of a block, at most kUpgradWarps of them; warp w projects the gradients w, w + warps and so on. matrix (n, n);
// work: shared memory. Called by all threads of the block. Returns, to every thread, whether the problem was solved;
// the first thread writes the results.
template <int Together>
__device__ inline bool upgrad_by_warps(int n, const double* matrix, const double* preference, double* c,
                                       double* optimum, double* work) {
    const int pitch = warp_pitch(n), given = static_cast<int>(blockDim.x) / kWarp, warp = threadIdx.x / kWarp;
    const int warps = given < kUpgradWarps ? given : kUpgradWarps;
    double *const units = work + n * pitch, *const shares = units + n, *const flags = shares + n;  // halved, 2 x failed
    double* const sums = flags + 3;                                                                // (warps, n)
    WarpSystem<Together> s(n, work, sums + warps * n + (warp < warps ? warp : 0) * warp_work(n));
    const bool first = threadIdx.x == 0, writes = s.real && s.part == 0;
    if (warp == 0) {
        const double entry = s.real ? matrix[s.unknown * (n + 1)] : 0, p = s.real ? preference[s.unknown] : 0;
        double poison = 0;
        PAMA_ROLLED
        for (int j = 0; s.real && j < n; ++j) poison += 0 * matrix[s.unknown * n + j];
        const double mass = s.sum(p);
        const bool usable = !s.real || (entry > 0 && poison == 0 && mass > 0 && 0 * mass == 0);
        const bool failed = __any_sync(kAllLanes, !usable);
        const int odd = failed ? 0 : upgrad::exponent_of(s.largest(entry)) & 1;
        const double halved = odd ? 0.5 : 1.0, unit = failed || !s.real ? 1 : upgrad::unit_of(entry, odd);
        const double root = std::sqrt(unit * entry * unit * halved);
        if (writes) {
            units[s.unknown] = unit;
            shares[s.unknown] = p / mass;
            s.vector[s.unknown] = root;
        }
        __syncwarp();
        PAMA_ROLLED
        for (int j = s.part; s.real && j < n; j += s.parts)
            work[s.unknown * pitch + j] = upgrad::scaled_entry(matrix[s.unknown * n + j], matrix[j * n + s.unknown],
                                                               unit, units[j], halved, root * s.vector[j]);
        __syncwarp();
        const bool same = s.duplicates();
        if (first) {
            flags[0] = halved;
            flags[1] = failed || same ? 1 : 0;
            flags[2] = 0;
        }
    }
    __syncthreads();
    double sum = 0;
    for (int own = warp; warp < warps && own < n && flags[1] == 0; own += warps) {
        const double row = s.real ? work[own * pitch + s.unknown] : 0, share = shares[own];
        if (share == 0) continue;
        s.diagonal = s.real ? s.own_entry() : 1;
        s.fixed_total = 1;
        s.fixed_terms = work[own * (pitch + 1)];
        s.target = -row;
        s.inside = row < 0 ? 1 : 0;
        bool solved = nnqp::exchange<double>(s, n, true) && !s.tied;
        const double gradient = s.product + row, total = 1 + s.total;
        const double least = -s.largest(s.real ? max_of(-gradient, 0.0) : 0), slack = s.sum(s.y * std::fabs(gradient));
        solved = solved && max_of(-least / total, slack / total / total) <= nnqp::kCertified;
        if (!solved) {
            if (s.unknown == 0 && s.part == 0) flags[2] = 1;
            break;
        }
        const double ratio = s.real ? min_of(units[s.unknown] / units[own], upgrad::kLargestRatio) : 0;
        sum += s.y > 0 ? share * ratio * s.y : 0;
        if (s.unknown == own) sum += share;
    }
    if (warp < warps && writes) sums[warp * n + s.unknown] = sum;
    __syncthreads();
    const bool solved = flags[1] == 0 && flags[2] == 0;
    if (solved && warp == 0) {
        double own = 0;
        PAMA_ROLLED
        for (int w = 0; w < warps; ++w) own += s.real ? sums[w * n + s.unknown] : 0;
        own /= s.sum(own);
        if (writes) c[s.unknown] = own;
        const double x = s.real ? own / units[s.unknown] : 0, value = s.sum(x * s.row_times(x));
        if (first) *optimum = value > 0 ? value / flags[0] : 0;
    }
    __syncthreads();
    return solved;
}

}  // namespace cuda
}  // namespace pama
