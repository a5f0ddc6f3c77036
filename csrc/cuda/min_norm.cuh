// Pama's weights of one matrix by one warp.
#pragma once

#include "../core/min_norm.hpp"
#include "warp_system.cuh"

namespace pama {
namespace cuda {

// Doubles of `work` of min_norm_by_warp.
PAMA_HD constexpr int min_norm_work(int n) { return n * warp_pitch(n) + warp_work(n); }

// The problem of core/min_norm.hpp for n <= kMostByWarp objectives, all of which take part: min_norm::solve_small by a
// warp. matrix (n, n); work: shared memory. Returns, to every lane, whether the problem was solved; lane 0 writes the
// results.
template <int Together>
__device__ inline bool min_norm_by_warp(int n, const double* matrix, const double* preference, double regularization,
                                        double* c, double* optimum, double* work) {
    WarpSystem<Together> s(n, work, work + n * warp_pitch(n));
    const double given = s.real ? matrix[s.unknown * (n + 1)] : 0, most = s.largest(given);
    const nnqp::Scale scale(most);
    PAMA_ROLLED
    for (int j = s.part; s.real && j < n; j += s.parts)
        work[s.unknown * s.pitch + j] = 0.5 * scale(matrix[s.unknown * n + j]) + 0.5 * scale(matrix[j * n + s.unknown]);
    __syncwarp();
    const double largest = scale(most), rho = largest * regularization, own = s.own_entry();
    const double mass = s.sum(s.real && preference ? preference[s.unknown] : 0);
    const double p = !s.real ? 0 : mass != 0 ? preference[s.unknown] / mass : 1.0 / n;
    const double product = s.row_times(s.real ? 1 : 0), mean = s.sum(product) / n, norm2 = s.sum(p * p);
    const double sigma = rho - s.largest(s.real ? -own : -nnqp::kLargestDouble);  // rho plus the smallest entry
    const bool usable = largest > 0 && regularization >= 0 && regularization <= 1 && sigma > min_norm::kSmallestSigma &&
                        0 * mean == 0 && 0 * mass == 0;
    if (!usable || (regularization > 0 && s.duplicates())) return false;
    if (s.real) {
        s.shift = 0.5 * (sigma + rho * (norm2 - 2 * p));
        s.diagonal = own + 2 * s.shift + rho;
        s.target = 1;
        s.inside = product - mean <= own + rho ? 1 : 0;
    }
    if (!nnqp::exchange<double>(s, n, true) || (s.tied && !(rho >= nnqp::kRidge))) return false;
    const double share = 1 / s.total, weight = s.y * share, gradient = s.product * share + rho * (weight - p);
    const double value = s.sum(weight * s.product * share);
    const double gap = s.sum(weight * gradient) + s.largest(s.real ? -gradient : -nnqp::kLargestDouble);
    if (!(gap <= nnqp::kCertified * (1 + rho))) return false;
    if (s.real && s.part == 0) c[s.unknown] = weight;
    if (s.unknown == 0 && s.part == 0) *optimum = scale.undo(max_of(value, 0.0));
    return true;
}

}  // namespace cuda
}  // namespace pama
