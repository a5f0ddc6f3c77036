// The line search of Newton's method in active_set.hpp: minimises over t in [0, 1], at x = z + t (y - z),
//
//     1/2 x'Gx + sum_j max(0, (b - Gx)_j)^2 / (2 r_j).
#pragma once

#include <cmath>

#include "ldlt.hpp"
#include "solution.hpp"

PAMA_BEGIN
namespace nnqp {

// Returns t, to a tenth of the slope at z: the derivative increases and is piecewise linear, so that Newton's method
// with a bracket finds it. at_z, at_y: b - Gx there; inverse: 1 / r. `stride` numbers of each, 0 beyond the unknowns.
PAMA_HD inline double line_step(int stride, const double* z, const double* y, const double* at_z, const double* at_y,
                                const double* inverse) {
    using ldlt::Vector;
    using ldlt::vector_at;
    ldlt::Vector along[ldlt::kParts] = {}, across[ldlt::kParts] = {};
    for (int tile = 0; tile < stride; tile += ldlt::kStep)
        for (int p = 0; p < ldlt::kParts; ++p) {
            const int j = tile + p * ldlt::kLanes;
            const Vector drop = vector_at(at_z + j) - vector_at(at_y + j);  // G (y - z)
            along[p] += vector_at(z + j) * drop;
            across[p] += (vector_at(y + j) - vector_at(z + j)) * drop;
        }
    const double slope = ldlt::sum_parts(along), curvature = ldlt::sum_parts(across);  // of x'Gx / 2 at z
    double low = 0.0, high = 1.0, t = 0.0, least_slope = 0.0;
    for (int k = 0; k < kLineSteps; ++k) {
        ldlt::Vector sum[ldlt::kParts] = {}, sum_of_changes[ldlt::kParts] = {};
        for (int tile = 0; tile < stride; tile += ldlt::kStep)
            for (int p = 0; p < ldlt::kParts; ++p) {
                const int j = tile + p * ldlt::kLanes;
                const Vector change = vector_at(at_y + j) - vector_at(at_z + j), zero = {};
                const Vector at = vector_at(at_z + j) + t * change;
                const Vector by = (at > 0.0 ? change : zero) * vector_at(inverse + j);
                sum[p] += at * by;
                sum_of_changes[p] += change * by;
            }
        const double first = slope + t * curvature + ldlt::sum_parts(sum);
        const double second = curvature + ldlt::sum_parts(sum_of_changes);
        if (k == 0) {
            least_slope = -0.1 * first;
            t = 1.0;
            continue;
        }
        if (first <= least_slope && (k == 1 || first >= -least_slope)) break;
        (first > 0.0 ? high : low) = t;
        const double newton = t - first / second;
        t = newton > low && newton < high ? newton : 0.5 * (low + high);
    }
    return t;
}

}  // namespace nnqp
PAMA_END
