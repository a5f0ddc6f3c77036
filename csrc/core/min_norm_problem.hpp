// One min-norm problem in the caller's workspace, and the linear algebra on one support of it. What is
// solved, and how H arises, is in min_norm.hpp.
#pragma once

#include <cstddef>
#include <limits>

#include "config.hpp"
#include "ldlt.hpp"

PAMA_BEGIN
namespace min_norm {

// Relative to H_ii: a pivot that counts as zero. Rounding leaves 1e-13 of an exact zero at n = 512.
constexpr double kSingularPivot = 1e-11;
// What a smaller pivot is raised to where a ridge has made the matrix regular.
constexpr double kSmallestPivot = 1e-15;

constexpr double kLargestDouble = std::numeric_limits<double>::max();
#if defined(__CUDACC__)
constexpr int kLargestInRegisters = 4;  // more would double the time of the whole CUDA build
#else
constexpr int kLargestInRegisters = 8;
#endif
constexpr int kVectorCount = 14;  // arrays of leading_dimension(n) doubles in the workspace

// One problem in the workspace, over the n objectives that are present.
struct Problem {
    int n, ld, stride;  // of the vectors, of the rows of gram
    double rho, sigma;
    double* gram;     // n rows of `stride`, symmetric, scaled, zero-padded
    double* prior;    // p
    double* centre;   // p, or of a proximal step the mean of p and c
    double* shift;    // u
    double* product;  // M y
    double* point;    // c; in descend a feasible y
    double* saved;    // descend's best y
    double* compact;  // u on the support
    double* ones;     // e on the support, zero-padded
    ldlt::Scratch scratch;
    int* support;  // sorted
    int* inside;   // 1 in the support
    int size = 0, factorisations = 0;
    double total = 0.0, linear = 0.0;  // e'y, u'y
    bool strict = true;                // give up on a vanishing pivot

    PAMA_HD void bind(int count, double* workspace) {
        n = count;
        ld = ldlt::leading_dimension(n);
        stride = ld - ldlt::kTileRows;
        const auto take = [&](std::ptrdiff_t doubles) {
            double* const start = workspace;
            workspace += doubles;
            return start;
        };
        const int blocks = ldlt::round_up_to_block(n);
        gram = take(static_cast<std::ptrdiff_t>(n) * stride);
        scratch.columns = take(static_cast<std::ptrdiff_t>(blocks) * ld);
        scratch.panel = take(static_cast<std::ptrdiff_t>(ldlt::kBlock) * blocks);
        double** const vectors[] = {
            &prior, &centre,      &shift,         &product,         &point,           &saved,           &compact,
            &ones,  &scratch.rhs, &scratch.floor, &scratch.inverse, &scratch.forward, &scratch.solution};
        for (double** const vector : vectors) *vector = take(ld);
        support = reinterpret_cast<int*>(take(ld));
        inside = support + ld;
    }

    PAMA_HD double* row_of(int i) const { return gram + static_cast<std::ptrdiff_t>(i) * stride; }

    // Sets H for this weight and centre of the quadratic term.
    PAMA_HD void set_quadratic(double weight, const double* middle, double smallest_sigma) {
        rho = weight;
        double norm2 = 0.0, smallest = gram[0];
        for (int i = 0; i < n; ++i) {
            norm2 += middle[i] * middle[i];
            const double diagonal = row_of(i)[i];
            smallest = diagonal < smallest ? diagonal : smallest;
        }
        sigma = smallest + rho;
        if (!(sigma > smallest_sigma)) sigma = smallest_sigma;
        for (int i = 0; i < n; ++i) shift[i] = 0.5 * (sigma + rho * norm2) - rho * middle[i];
    }

    PAMA_HD double diagonal_of(int i) const { return row_of(i)[i] + 2.0 * shift[i] + rho; }

    // y on the current support, and its total. False: strict, and the matrix is singular there; or no
    // meaningful numbers came out (only for a matrix that is not positive semidefinite).
    PAMA_HD bool solve() {
        ++factorisations;
        if (!(n <= kLargestInRegisters ? solve_small<kLargestInRegisters>() : solve_large())) return false;
        total = linear = 0.0;
        for (int a = 0; a < size; ++a) {
            total += scratch.solution[a];
            linear += shift[support[a]] * scratch.solution[a];
        }
        return total > 0.0 && total < kLargestDouble;
    }

    template <int K>
    PAMA_HD bool solve_registers() {
        double h[K][K], floor[K], y[K], mask[K];
        for (int i = 0; i < K; ++i) mask[i] = y[i] = inside[i];
        PAMA_UNROLL
        for (int i = 0; i < K; ++i) {
            PAMA_UNROLL
            for (int j = 0; j <= i; ++j) h[i][j] = mask[i] * mask[j] * (row_of(i)[j] + (shift[i] + shift[j]));
            h[i][i] += mask[i] * rho;
            floor[i] = (strict ? kSingularPivot : kSmallestPivot) * h[i][i];
            h[i][i] += 1.0 - mask[i];
        }
        const bool regular = ldlt::solve_registers<K>(h, floor, y);
        size = 0;
        for (int i = 0; i < K; ++i) {
            support[size] = i;
            scratch.solution[size] = y[i];
            size += inside[i];
        }
        return regular || !strict;
    }
    // n unknowns, those outside the support replaced by the identity.
    template <int K>
    PAMA_HD bool solve_small() {
        if constexpr (K > 1)
            if (n < K) return solve_small<K - 1>();
        return solve_registers<K>();
    }
    // The unknowns of the support, gathered.
    PAMA_HD bool solve_large() {
        size = 0;
        for (int i = 0; i < n; ++i) {
            support[size] = i;
            size += inside[i];
        }
        const int end = ldlt::round_up_to_block(size), rows = ldlt::leading_dimension(size);
        const auto pad = [](double* array, int from, int to) {
            for (int b = from; b < to; ++b) array[b] = 0.0;
        };
        for (int a = 0; a < size; ++a) {
            compact[a] = shift[support[a]];
            ones[a] = scratch.rhs[a] = 1.0;
        }
        pad(compact, size, rows);
        pad(ones, size, rows);
        pad(scratch.rhs, size, rows);
        const double relative_floor = strict ? kSingularPivot : kSmallestPivot;
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
            column[a] += rho;
            scratch.floor[a] = relative_floor * column[a];
        }
        return ldlt::solve(size, rows, scratch, strict);
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

    // The size of the terms that cancel in (Hy)_j - 1, up to its own diagonal entry.
    PAMA_HD double magnitude() const {
        double sum = 0.0;
        for (int a = 0; a < size; ++a)
            sum += diagonal_of(support[a]) * (scratch.solution[a] < 0.0 ? -scratch.solution[a] : scratch.solution[a]);
        return sum;
    }
    PAMA_HD double multiplier(int j) const { return product[j] + linear + shift[j] * total - 1.0; }
    PAMA_HD bool below(int j, double tolerance, double terms) const {
        return multiplier(j) < tolerance * (diagonal_of(j) * total + terms);
    }

    PAMA_HD bool finite() const {
        ldlt::Vector sum[ldlt::kVectors] = {};  // of 0 M_ij: 0, or NaN
        for (int i = 0; i < n * stride; i += ldlt::kTileRows)
            for (int v = 0; v < ldlt::kVectors; ++v) sum[v] += 0.0 * ldlt::vector_at(gram + i + v * ldlt::kLanes);
        double total_sum = 0.0;
        for (int v = 0; v < ldlt::kVectors; ++v) total_sum += ldlt::sum_lanes(sum[v]);
        return total_sum == 0.0;
    }
};

}  // namespace min_norm
PAMA_END
