// Non-negative quadratic problems: minimise over y >= 0
//
//     1/2 y'Hy - b'y,    H_ij = M_ij + u_i + u_j + r_i [i = j],
//
// This header has the problem, stored in the caller's workspace, and the linear algebra on one support S: the optimum
// on S solves H_SS y_S = b_S, with one factorisation. min_norm.hpp and upgrad.hpp define M, u, r and b.
#pragma once

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "ldlt.hpp"
#include "numbers.hpp"
#include "solution.hpp"

PAMA_BEGIN
namespace nnqp {

constexpr int kVectorCount = 24;  // arrays of leading_dimension(n) doubles in the workspace, the integers included

constexpr int kLargestInRegisters = 8;
#if defined(__CUDACC__)
constexpr int kLargestExact = 4;  // larger sizes are padded: each exact size adds half a minute to the CUDA build
#else
constexpr int kLargestExact = kLargestInRegisters;
#endif

// Calls visit(integral constant N) with N = n, Smallest <= n <= Largest.
template <int Smallest, int Largest, class Visit>
PAMA_HD inline auto with_size(int n, Visit visit) {
    if constexpr (Largest > Smallest)
        if (n < Largest) return with_size<Smallest, Largest - 1>(n, visit);
    return visit(std::integral_constant<int, Largest>{});
}

// Size of the workspace for n unknowns, in doubles.
PAMA_HD constexpr std::size_t workspace(int n) {
    const std::size_t ld = ldlt::leading_dimension(n), blocks = ldlt::round_up_to_block(n);
    return (n + blocks + kVectorCount) * ld + ldlt::kBlock * blocks;
}

struct System {
    int n, ld, stride;   // unknowns; of the vectors; of the rows of gram
    double* gram;        // M: n rows of `stride`, symmetric, scaled, zero-padded
    double* preference;  // p
    double* centre;      // of the proximal term
    double* shift;       // u
    double* own;         // M_ii
    double* diagonal;    // H_ii
    double* target;      // b
    double* product;     // M y
    double* point;       // the answer; in descend a feasible y
    double* saved;       // descend's best y
    double* kept;        // the best `point` of the proximal steps
    double* moved;       // of the line searches: z,
    double* force;       // and b - Gz (active_set.hpp)
    double* answer;      // the sum of the solutions of several problems
    double* unit;        // of each unknown
    double* members;     // of each unknown: how many objectives it stands for
    double* compact;     // u on the support
    double* ones;        // e on the support, zero-padded
    ldlt::Scratch scratch;
    int* support;  // sorted
    int* inside;   // 1 in the support
    int* group;    // of each objective: the unknown that stands for it
    int size = 0, factorisations = 0, most = 0;
    double value = 0.0, total = 0.0, linear = 0.0;  // b'y, e'y, u'y
    double fixed_total = 0.0, fixed_terms = 0.0;    // contributions of a fixed e_i to total and terms
    double terms = 0.0;                             // sum of H_ii |y_i|
    double metric = 1.0;                            // the largest r_i of a proximal term, over its ridge
    bool strict = true;                             // fail on a pivot at or below
    double vanishing = kSingularPivot;              // this multiple of H_ii

    PAMA_HD void bind(int count, double* workspace) {
        n = count;
        ld = ldlt::leading_dimension(n);
        stride = ld - ldlt::kTileRows;
        most = most_factorisations(n);
        const auto take = [&](std::ptrdiff_t doubles) {
            double* const start = workspace;
            workspace += doubles;
            return start;
        };
        const int blocks = ldlt::round_up_to_block(n);
        gram = take(static_cast<std::ptrdiff_t>(n) * stride);
        scratch.columns = take(static_cast<std::ptrdiff_t>(blocks) * ld);
        scratch.panel = take(static_cast<std::ptrdiff_t>(ldlt::kBlock) * blocks);
        double** const vectors[kVectorCount - 2] = {
            &preference,      &centre,  &shift, &own,         &diagonal,      &target,          &product,
            &point,           &saved,   &kept,  &moved,       &force,         &answer,          &unit,
            &members,         &compact, &ones,  &scratch.rhs, &scratch.floor, &scratch.inverse, &scratch.forward,
            &scratch.solution};
        for (double** const vector : vectors) *vector = take(ld);
        support = reinterpret_cast<int*>(take(ld));
        inside = support + ld;
        group = reinterpret_cast<int*>(take(ld));
        for (int i = 0; i < n; ++i) unit[i] = 1.0;
    }

    PAMA_HD double* row_of(int i) const { return gram + static_cast<std::ptrdiff_t>(i) * stride; }

    // Computes y on the current support. Returns false if the matrix is singular there and the solve is strict, if the
    // result is not finite (possible only for a matrix that is not positive semidefinite), or if the limit of
    // factorisations is reached.
    PAMA_HD PAMA_ONCE bool solve() {
        if (factorisations >= most) return false;
        ++factorisations;
        if (!factorise()) return false;
        value = total = linear = terms = 0.0;
        for (int a = 0; a < size; ++a) {
            const int i = support[a];
            const double y = scratch.solution[a];
            value += target[i] * y;
            total += y;
            linear += shift[i] * y;
            terms += diagonal[i] * (y < 0.0 ? -y : y);
        }
        return value >= 0.0 && terms < kLargestDouble;
    }

    PAMA_HD bool factorise() {
        if (n > kLargestInRegisters) return factorise_gathered();
        if (n > kLargestExact) {
            for (int i = n; i < kLargestInRegisters; ++i) inside[i] = 0;
            return factorise_registers<kLargestInRegisters>();
        }
        return with_size<1, kLargestExact>(n, [&](auto count) {
            constexpr int k = decltype(count)::value;
            return factorise_registers<k>();
        });
    }
    // N >= n unknowns, those outside the support replaced by the identity.
    template <int N>
    PAMA_HD bool factorise_registers() {
        ldlt::Triangle<double, N> h;
        double floor[N], y[N], inverse[N];
        PAMA_UNROLL
        for (int i = 0; i < N; ++i) {
            PAMA_UNROLL
            for (int j = 0; j < i; ++j) h(i, j) = inside[i] && inside[j] ? row_of(i)[j] + (shift[i] + shift[j]) : 0.0;
            h(i, i) = inside[i] ? diagonal[i] : 1.0;
            floor[i] = (strict ? vanishing : kSmallestPivot) * h(i, i);
            y[i] = inside[i] ? target[i] : 0.0;
        }
        const bool regular = ldlt::factorise<double, N, true>(h, floor, y, inverse);
        ldlt::substitute_back<double, N>(h, inverse, y);
        size = 0;
        for (int i = 0; i < N; ++i) {
            support[size] = i;
            scratch.solution[size] = y[i];
            size += inside[i];
        }
        return regular || !strict;
    }
    // The unknowns of the support.
    // Lists the support; returns its size.
    PAMA_HD int gather_support() {
        int count = 0;
        int* const PAMA_RESTRICT list = support;
        for (int i = 0; i < n; ++i) {
            list[count] = i;
            count += inside[i];
        }
        return size = count;
    }
    PAMA_HD bool factorise_gathered() {
        gather_support();
        const int end = ldlt::round_up_to_block(size), rows = ldlt::leading_dimension(size);
        const auto pad = [](double* array, int from, int to) {
            for (int b = from; b < to; ++b) array[b] = 0.0;
        };
        for (int a = 0; a < size; ++a) {
            compact[a] = shift[support[a]];
            scratch.rhs[a] = target[support[a]];
            ones[a] = 1.0;
        }
        pad(compact, size, rows);
        pad(ones, size, rows);
        pad(scratch.rhs, size, rows);
        const double relative_floor = strict ? vanishing : kSmallestPivot;
        for (int a = 0; a < end; ++a) {
            double* const column = scratch.columns + static_cast<std::ptrdiff_t>(a) * rows;
            const int first = a / ldlt::kBlock * ldlt::kBlock;
            if (a >= size) {
                pad(column, first, rows);
                column[a] = 1.0;
                scratch.floor[a] = 0.0;
                continue;
            }
            const double* const row = row_of(support[a]);
            const double u = compact[a];
            if (size == n) {
                for (int b = first; b < stride; ++b) column[b] = row[b] + (u * ones[b] + compact[b]);
                pad(column, stride, rows);
            } else {
                for (int b = first; b < size; ++b) column[b] = row[support[b]] + (u + compact[b]);
                pad(column, size, rows);
            }
            column[a] = diagonal[support[a]];
            scratch.floor[a] = relative_floor * column[a];
        }
        return ldlt::solve(size, rows, scratch, strict);
    }

    // Whether a pivot of M vanishes. Overwrites the problem's data.
    PAMA_HD bool singular() {
        for (int i = 0; i < n; ++i) {
            inside[i] = 1;
            target[i] = 0.0;
            diagonal[i] = own[i];
        }
        strict = true;
        return !factorise();
    }

    // Whether M + 2 kSmallestRidge is clearly positive definite. Overwrites the problem's data.
    PAMA_HD bool semidefinite() {
        for (int i = 0; i < n; ++i) {
            inside[i] = 1;
            shift[i] = 0.0;
            diagonal[i] = own[i] + 2.0 * kSmallestRidge;
        }
        strict = true;
        vanishing = kSmallestRidge / 2.0;
        const bool definite = factorise();
        vanishing = kSingularPivot;
        return definite;
    }

    template <int Tiles>
    PAMA_HD void multiply_columns(int first) {
        constexpr int kCount = Tiles * ldlt::kVectors;
        ldlt::Vector sum[kCount] = {};
        for (int a = 0; a < size; ++a) {
            const double* row = row_of(support[a]) + first;
            for (int v = 0; v < kCount; ++v) sum[v] += scratch.solution[a] * ldlt::vector_at(row + v * ldlt::kLanes);
        }
        for (int v = 0; v < kCount; ++v) ldlt::vector_at(product + first + v * ldlt::kLanes) = sum[v];
    }
    PAMA_HD void multiply() {
        int first = 0;
        for (; first + 4 * ldlt::kTileRows <= stride; first += 4 * ldlt::kTileRows) multiply_columns<4>(first);
        for (; first < stride; first += ldlt::kTileRows) multiply_columns<1>(first);
    }
    // M x of a dense vector x.
    PAMA_HD void multiply(const double* x) {
        size = 0;
        for (int j = 0; j < n; ++j) {
            scratch.solution[size] = x[j];
            support[size] = j;
            size += x[j] != 0.0;
        }
        multiply();
    }

    // (Hy - b)_j for an index j outside the support, and the magnitude of the terms that cancel in it.
    PAMA_HD double multiplier(int j) const { return product[j] + linear + shift[j] * total - target[j]; }
    PAMA_HD bool below(int j, double tolerance) const {
        return multiplier(j) < tolerance * (diagonal[j] * (total + fixed_total) + (terms + fixed_terms));
    }

    // Replaces equal objectives, by same(i, k), by one with the sum of their preferences, which removes the commonest
    // reason for a singular matrix. Equal ones have |M_ik - M_ii| <= tolerance. Uses `saved` and `support`.
    template <class Same>
    PAMA_HD void merge_same(Same same, double tolerance) {
        ldlt::Vector alike[ldlt::kParts] = {};  // how many M_ij are about M_ii: each M_ii is
        const ldlt::Vector one = ldlt::Vector{} + 1.0;
        for (int i = 0; i < n; ++i)
            for (int tile = 0; tile < stride; tile += ldlt::kStep)
                for (int p = 0; p < ldlt::kParts; ++p) {
                    const ldlt::Vector gap = ldlt::vector_at(row_of(i) + tile + p * ldlt::kLanes) - own[i];
                    alike[p] += choose((gap <= tolerance) & (gap >= -tolerance), one, ldlt::Vector{});
                }
        if (ldlt::sum_parts(alike) == n) {
            for (int i = 0; i < n; ++i) {
                group[i] = i;
                members[i] = 1.0;
            }
            return;
        }
        int count = 0;
        for (int i = 0; i < n; ++i) {
            const double* const row = row_of(i);
            bool some = false;  // whether M_ik = M_ii for a k before i
            for (int k = 0; k < i; ++k) some |= std::fabs(row[k] - row[i]) <= tolerance;
            int to = some ? 0 : count;
            while (to < count && !same(support[to], i)) ++to;
            group[i] = to;
            if (to == count) {
                members[count] = 0;
                saved[count] = 0.0;
                support[count++] = i;
            }
            ++members[to];
            saved[to] += preference[i];
        }
        if (count == n) return;
        for (int a = 0; a < count; ++a) {
            const double* const from = row_of(support[a]);
            double* const to = row_of(a);
            for (int b = 0; b < count; ++b) to[b] = from[support[b]];
            for (int b = count; b < stride; ++b) to[b] = 0.0;
            preference[a] = saved[a];
            unit[a] = unit[support[a]];
        }
        n = count;
        for (int a = 0; a < n; ++a) own[a] = row_of(a)[a];
    }

    PAMA_HD bool finite() const {
        ldlt::Vector sum[ldlt::kParts] = {};  // of 0 M_ij: 0, or NaN
        for (int i = 0; i < n * stride; i += ldlt::kStep)
            for (int p = 0; p < ldlt::kParts; ++p) sum[p] += 0.0 * ldlt::vector_at(gram + i + p * ldlt::kLanes);
        return ldlt::sum_parts(sum) == 0.0;
    }
};

}  // namespace nnqp
PAMA_END
