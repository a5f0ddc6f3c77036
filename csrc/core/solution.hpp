// The result type of the solvers in this directory, and all their tolerances and limits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "config.hpp"

PAMA_BEGIN

enum class SolveStatus : int {
    solved,           // the residual is below kPromisedResidual
    indefinite,       // the matrix is not positive semidefinite: a point of the simplex, optimal for M plus a ridge
    not_finite,       // a NaN or infinity in the input: weights and optimum are NaN
    iteration_limit,  // residual above kPromisedResidual after most_factorisations: weights and optimum are NaN
    inexact           // residual above kPromisedResidual for another reason: weights and optimum are NaN
};

struct SolverResult {
    double optimum;   // c'Mc, never negative
    double residual;  // relative violation of the optimality conditions, as defined by each solver
    SolveStatus status;
    int factorisations;
};
using MinNormResult = SolverResult;

// An n x n matrix in the caller's memory, of any strides.
template <class T>
struct MatrixView {
    int n;
    const T* data;
    std::ptrdiff_t row, column;
    PAMA_HD double operator()(int i, int j) const { return static_cast<double>(data[i * row + j * column]); }
};

// Whether the residual is above kPromisedResidual: the caller raises an error or returns the NaN.
PAMA_HD inline bool unsolved(const SolverResult& result) {
    return result.status == SolveStatus::iteration_limit || result.status == SolveStatus::inexact;
}

// Whether a residual is the larger one of two. NaN is larger than any number.
PAMA_HD inline bool is_worse(double residual, double than) { return !(residual <= than) && than == than; }

constexpr double kPromisedResidual = 1e-10;

namespace nnqp {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLargestDouble = std::numeric_limits<double>::max();

// All relative, with diagonal entries of about 1.
constexpr double kSingularPivot = 1e-11;  // a pivot that counts as zero: rounding leaves 1e-13 of a zero at n = 512
constexpr double kSmallestPivot = 1e-15;  // what a smaller pivot is raised to where a ridge has made H regular
constexpr double kViolation = 1e-14;      // of the terms that cancel in a multiplier
constexpr double kTie = 1e-11;            // the same: below it a multiplier may be an exact zero
constexpr double kCertified = 1e-13;      // residual at which a solver stops
constexpr double kRidge = 1e-9;           // bias kRidge against rounding epsilon / kRidge
constexpr double kSmallestRidge = 1e-12;
constexpr double kLargestRidge = 1.0, kRidgeFactor = 100.0;  // where M is not semidefinite
constexpr double kProximalGap = 10.0;                        // of the ridge: more than a proximal step can leave
constexpr int kProximalSteps = 12;
constexpr int kSpareExchanges = 2;
constexpr int kLineSteps = 30;  // evaluations of a line search, which need not be exact

// No proof bounds the factorisations of one problem by a polynomial; this limit is several times the largest number
// observed.
PAMA_HD constexpr int most_factorisations(int n) { return 100 + 10 * n; }

// The power of two s with 1 <= s x < 2 for normal x > 0 (up to the ends of the exponent range).
PAMA_HD inline double power_of_two_scale(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint64_t exponent = bits >> 52 & 0x7ff;
    bits = (exponent < 2046 ? 2046 - exponent : 1) << 52;
    double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// x -> s x with the power of two s that brings `largest` to [1, 2) (or near, at the ends of the range); subnormal
// numbers are scaled in two steps, since one factor does not suffice.
struct Scale {
    double lift, power;
    PAMA_HD explicit Scale(double largest)
        : lift(largest < 0x1p-900 ? 0x1p200 : 1.0), power(largest > 0.0 ? power_of_two_scale(largest * lift) : 1.0) {}
    PAMA_HD double operator()(double x) const { return x * lift * power; }
    PAMA_HD double undo(double x) const { return lift == 1.0 ? x / power : x / power / lift; }
};

}  // namespace nnqp
PAMA_END
