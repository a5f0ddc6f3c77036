// The min-norm point of a simplex, exactly: given a symmetric positive semidefinite M and a prior p,
//
//     minimise over c in D:  1/2 c'Mc + rho/2 ||c - p||^2,    rho = regularization * max_i M_ii
//
// Homogenised: over y >= 0 minimise 1/2 y'Hy - e'y and take c = y / e'y, where
//     H_ij = M_ij + u_i + u_j + rho [i = j],    u_i = sigma/2 + rho (|p|^2/2 - p_i),
// so that c'Hc is twice the objective plus sigma for every c in D. On a support S the optimum is
// H_SS y_S = e, one factorisation, and the point is optimal when y_S > 0 and (Hy)_j >= 1 outside.
//
// 1. Exchange: from the full support swap every index of the wrong sign (y_i < 0 inside, (Hy)_j < 1
//    outside) while their number reaches new minima, with kSpareExchanges exceptions: at most
//    n + 1 + kSpareExchanges factorisations, mostly one to five.
// 2. Descend, where exchange gave up: Lawson and Hanson's method (Wolfe's, in the cone) with block
//    additions. Every accepted step raises e'y, which is a function of the support alone and is
//    computed from the sorted support, so no support returns, in floating point too: it ends.
// 3. Where the minimiser may not be unique (a pivot vanishes, or a multiplier outside the support
//    does), proximal steps: add ridge/2 ||c - c_previous||^2, with c_0 = p, until Wolfe's certificate
//    holds for the problem itself. The first step finds the minimiser nearest to p, the next ones
//    remove the ridge's bias along the directions where M is positive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "config.hpp"
#include "ldlt.hpp"

PAMA_BEGIN

struct MinNormResult {
    double optimum;      // c'Mc
    double residual;     // Wolfe's gap, max_j (lambda - gradient_j), over max_i M_ii (1 + regularization)
    int factorisations;
};

namespace min_norm {

// All relative: M is scaled so that 1 <= max_i M_ii < 2.
constexpr double kSingularPivot = 1e-11;  // of H_ii; rounding leaves 1e-13 of an exact zero at n = 512
constexpr double kSmallestPivot = 1e-15;  // of H_ii, once a ridge is there
constexpr double kViolation = 1e-14;      // of the terms that cancel in a multiplier
constexpr double kTie = 1e-11;            // the same: below it a multiplier may be an exact zero
constexpr double kRidge = 1e-9;           // bias kRidge against rounding epsilon / kRidge
constexpr double kSmallestRidge = 1e-12;
constexpr double kCertified = 1e-13;      // Wolfe's gap that ends the proximal steps
constexpr int kProximalSteps = 12;
constexpr double kProximalSigma = 1e-2;
constexpr double kSmallestSigma = 1e-290;
constexpr double kPairSmallest = 1e-140, kPairLargest = 1e140;  // two objectives need no scaling within
constexpr int kSpareExchanges = 2;

constexpr int kVectorCount = 14;  // arrays of leading_dimension(n) doubles in the workspace

// The power of two s with 1 <= s x < 2 (up to the ends of the exponent range).
PAMA_HD inline double power_of_two_scale(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint64_t exponent = bits >> 52 & 0x7ff;
    bits = (exponent < 2046 ? 2046 - exponent : 1) << 52;
    double scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

PAMA_HD inline double not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }

// One problem in the workspace, over the n objectives that are present.
struct Solver {
    int n, ld;
    double rho, sigma;
    double* gram;      // n rows of ld, symmetric, scaled, zero-padded
    double* prior;     // p
    double* centre;    // p, or of a proximal step the mean of p and c
    double* shift;     // u
    double* product;   // M y
    double* point;     // c; in descend a feasible y
    double* saved;     // descend's best y
    double* compact;   // u on the support
    double* ones;      // e on the support, zero-padded
    ldlt::Scratch scratch;
    int* support;      // sorted
    int* inside;       // 1 in the support
    int size = 0, factorisations = 0;
    double total = 0.0, linear = 0.0;  // e'y, u'y
    bool strict = true;                // give up on a vanishing pivot

    PAMA_HD void bind(int count, double* workspace) {
        n = count;
        ld = ldlt::leading_dimension(n);
        const auto take = [&](std::ptrdiff_t doubles) {
            double* const start = workspace;
            workspace += doubles;
            return start;
        };
        const int blocks = ldlt::round_up_to_block(n);
        gram = take(static_cast<std::ptrdiff_t>(n) * ld);
        scratch.columns = take(static_cast<std::ptrdiff_t>(blocks) * ld);
        scratch.panel = take(static_cast<std::ptrdiff_t>(ldlt::kBlock) * blocks);
        double** const vectors[] = {&prior, &centre, &shift, &product, &point, &saved, &compact, &ones,
                                    &scratch.rhs, &scratch.floor, &scratch.inverse, &scratch.forward,
                                    &scratch.solution};
        for (double** const vector : vectors) *vector = take(ld);
        support = reinterpret_cast<int*>(take(ld));
        inside = support + ld;
    }

    // Sets H for this weight and centre of the quadratic term.
    PAMA_HD void set_quadratic(double weight, const double* middle, double smallest_sigma) {
        rho = weight;
        double norm2 = 0.0, smallest = gram[0];
        for (int i = 0; i < n; ++i) {
            norm2 += middle[i] * middle[i];
            const double diagonal = gram[static_cast<std::ptrdiff_t>(i) * ld + i];
            smallest = diagonal < smallest ? diagonal : smallest;
        }
        sigma = smallest + rho;
        if (!(sigma > smallest_sigma)) sigma = smallest_sigma;
        for (int i = n; i < ld; ++i) shift[i] = 0.0;
        for (int i = 0; i < n; ++i) shift[i] = 0.5 * (sigma + rho * norm2) - rho * middle[i];
    }

    PAMA_HD double diagonal_of(int i) const {
        return gram[static_cast<std::ptrdiff_t>(i) * ld + i] + 2.0 * shift[i] + rho;
    }

    // y on the current support, and its total. False: strict, and the matrix is singular there; or no
    // meaningful numbers came out (only for a matrix that is not positive semidefinite).
    PAMA_HD bool solve() {
        ++factorisations;
        if (!(n <= 8 ? solve_small() : solve_large())) return false;
        total = linear = 0.0;
        for (int a = 0; a < size; ++a) {
            total += scratch.solution[a];
            linear += shift[support[a]] * scratch.solution[a];
        }
        return total > 0.0 && total < std::numeric_limits<double>::max();
    }

    template <int K>
    PAMA_HD bool solve_registers() {
        return ldlt::solve_small<K>(gram, ld, shift, rho, inside,
                                    strict ? kSingularPivot : kSmallestPivot, strict, scratch.forward);
    }
    PAMA_HD bool solve_small() {
        bool solved;
        switch (n) {
            case 3: solved = solve_registers<3>(); break;
            case 4: solved = solve_registers<4>(); break;
            case 5: solved = solve_registers<5>(); break;
            case 6: solved = solve_registers<6>(); break;
            case 7: solved = solve_registers<7>(); break;
            case 8: solved = solve_registers<8>(); break;
            default: solved = solve_registers<1>(); break;
        }
        size = 0;
        for (int i = 0; i < n; ++i) {
            support[size] = i;
            scratch.solution[size] = scratch.forward[i];
            size += inside[i];
        }
        return solved;
    }
    PAMA_HD bool solve_large() {
        size = 0;
        for (int i = 0; i < n; ++i) {
            support[size] = i;
            size += inside[i];
        }
        const int end = ldlt::round_up_to_block(size), stride = ldlt::leading_dimension(size);
        const auto pad = [](double* array, int from, int to) {
            for (int b = from; b < to; ++b) array[b] = 0.0;
        };
        for (int a = 0; a < size; ++a) {
            compact[a] = shift[support[a]];
            ones[a] = scratch.rhs[a] = 1.0;
        }
        pad(compact, size, stride);
        pad(ones, size, stride);
        pad(scratch.rhs, size, stride);
        const double relative_floor = strict ? kSingularPivot : kSmallestPivot;
        for (int a = 0; a < end; ++a) {
            double* const column = scratch.columns + static_cast<std::ptrdiff_t>(a) * stride;
            const int first = a / ldlt::kBlock * ldlt::kBlock;
            if (a >= size) {
                pad(column, first, stride);
                column[a] = 1.0;
                scratch.floor[a] = 0.0;
                continue;
            }
            const double* const row = gram + static_cast<std::ptrdiff_t>(support[a]) * ld;
            const double u = compact[a];
            if (size == n) {
                for (int b = first; b < stride; ++b) column[b] = row[b] + (u * ones[b] + compact[b]);
            } else {
                for (int b = first; b < size; ++b) column[b] = row[support[b]] + (u + compact[b]);
                pad(column, size, stride);
            }
            column[a] += rho;
            scratch.floor[a] = relative_floor * column[a];
        }
        return ldlt::solve(size, stride, scratch, strict);
    }

    template <int Tiles>
    PAMA_HD void multiply_columns(int first) {
        constexpr int kCount = Tiles * ldlt::kVectors;
        ldlt::Vector sum[kCount] = {};
        for (int a = 0; a < size; ++a) {
            const double* row = gram + static_cast<std::ptrdiff_t>(support[a]) * ld + first;
            for (int v = 0; v < kCount; ++v)
                sum[v] += scratch.solution[a] * ldlt::vector_at(row + v * ldlt::kLanes);
        }
        for (int v = 0; v < kCount; ++v)
            ldlt::vector_at(product + first + v * ldlt::kLanes) = sum[v];
    }
    PAMA_HD void multiply() {
        int first = 0;
        for (; first + 4 * ldlt::kTileRows <= ld; first += 4 * ldlt::kTileRows)
            multiply_columns<4>(first);
        for (; first < n; first += ldlt::kTileRows) multiply_columns<1>(first);
    }

    // The size of the terms that cancel in (Hy)_j - 1, up to its own diagonal entry.
    PAMA_HD double magnitude() const {
        double sum = 0.0;
        for (int a = 0; a < size; ++a)
            sum += diagonal_of(support[a]) * (scratch.solution[a] < 0.0 ? -scratch.solution[a]
                                                                        : scratch.solution[a]);
        return sum;
    }
    PAMA_HD double multiplier(int j) const { return product[j] + linear + shift[j] * total - 1.0; }
    PAMA_HD bool below(int j, double tolerance, double terms) const {
        return multiplier(j) < tolerance * (diagonal_of(j) * total + terms);
    }

    // The first support: where one Jacobi step from the middle of the simplex leaves a positive weight.
    PAMA_HD void start() {
        size = n;
        for (int i = 0; i < n; ++i) {
            support[i] = i;
            scratch.solution[i] = 1.0;
        }
        multiply();
        double mean = 0.0;
        for (int i = 0; i < n; ++i) mean += product[i] / n;
        for (int i = 0; i < n; ++i)
            inside[i] = product[i] - mean <= gram[static_cast<std::ptrdiff_t>(i) * ld + i] + rho;
    }

    enum Outcome { kOptimal, kSingular, kStuck };

    PAMA_HD Outcome exchange() {
        int fewest = n + 1, spare = kSpareExchanges;
        for (;;) {
            if (!solve()) return strict ? kSingular : kStuck;
            int wrong = 0;
            for (int a = 0; a < size; ++a) wrong += scratch.solution[a] < 0.0;
            int outside = 0;
            if (size < n) {
                multiply();
                const double terms = magnitude();
                for (int j = 0; j < n; ++j)
                    if (!inside[j] && below(j, -kViolation, terms)) inside[j] = 2, ++outside;
            }
            if (wrong + outside == 0) return kOptimal;
            for (int a = 0; a < size; ++a)
                if (scratch.solution[a] < 0.0) inside[support[a]] = 0;
            for (int j = 0; j < n; ++j) inside[j] = inside[j] != 0;
            if (wrong + outside < fewest) {
                fewest = wrong + outside;
            } else if (spare-- == 0) {
                return kStuck;
            }
        }
    }

    // From a feasible `point` (y >= 0) with `inside` holding its support, and perhaps more, to the optimum
    // of a support within: e'y there, or 0 without meaningful numbers.
    PAMA_HD double descend_to_vertex() {
        for (;;) {
            if (!solve()) return 0.0;
            double step = 1.0;
            bool positive = true;
            for (int a = 0; a < size; ++a) {
                const double y = scratch.solution[a], x = point[support[a]];
                if (y > 0.0) continue;
                positive = false;
                const double ratio = x > 0.0 ? x / (x - y) : 0.0;
                step = ratio < step ? ratio : step;
            }
            if (positive) {
                for (int a = 0; a < size; ++a) point[support[a]] = scratch.solution[a];
                return total;
            }
            for (int a = 0; a < size; ++a) {
                const double y = scratch.solution[a];
                double& x = point[support[a]];
                const double ratio = x > 0.0 ? x / (x - y) : 0.0;
                if (y <= 0.0 && ratio <= step) {
                    x = 0.0;
                    inside[support[a]] = 0;
                } else {
                    x += step * (y - x);
                }
            }
        }
    }

    PAMA_HD bool descend() {
        strict = false;
        for (int i = 0; i < n; ++i) point[i] = 0.0;
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] > 0.0) point[support[a]] = scratch.solution[a];
        for (int i = 0; i < n; ++i) inside[i] = point[i] > 0.0;
        double value = descend_to_vertex();
        while (value > 0.0) {
            multiply();
            const double terms = magnitude();
            int worst = -1;
            for (int j = 0; j < n; ++j) {
                saved[j] = point[j];
                if (inside[j] || !below(j, -kViolation, terms)) continue;
                if (worst < 0 || multiplier(j) < multiplier(worst)) worst = j;
            }
            if (worst < 0) return true;
            for (int j = 0; j < n; ++j) inside[j] = inside[j] || below(j, -kViolation, terms);
            double next = descend_to_vertex();
            if (!(next > value)) {
                for (int j = 0; j < n; ++j) {
                    point[j] = saved[j];
                    inside[j] = point[j] > 0.0 || j == worst;
                }
                next = descend_to_vertex();
            }
            if (!(next > value)) {  // no support is better in floating point
                for (int j = 0; j < n; ++j) inside[j] = saved[j] > 0.0;
                const bool solved = solve();
                multiply();
                return solved;
            }
            value = next;
        }
        return false;
    }

    // Whether an objective outside the support could enter it at no cost.
    PAMA_HD bool tied() const {
        const double terms = magnitude();
        for (int j = 0; j < n; ++j)
            if (!inside[j] && below(j, kTie, terms)) return true;
        return false;
    }

    PAMA_HD void normalise() {
        for (int j = 0; j < n; ++j) point[j] = 0.0;
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a];
            point[support[a]] = y > 0.0 ? y / total : 0.0;
        }
    }

    // Identical objectives with equal prior share their weight equally.
    PAMA_HD void average_duplicates() {
        for (int i = 0; i < n; ++i) inside[i] = 1;
        for (int i = 0; i < n; ++i) {
            if (!inside[i]) continue;
            double sum = point[i];
            int count = 1;
            for (int k = i + 1; k < n; ++k)
                if (identical(i, k)) sum += point[k], ++count, inside[k] = 0;
            if (count == 1) continue;
            for (int k = i + 1; k < n; ++k)
                if (!inside[k] && identical(i, k)) point[k] = sum / count;
            point[i] = sum / count;
        }
    }
    PAMA_HD bool identical(int i, int k) const {
        const double* const first = gram + static_cast<std::ptrdiff_t>(i) * ld;
        const double* const second = gram + static_cast<std::ptrdiff_t>(k) * ld;
        if (first[i] != second[k] || prior[i] != prior[k]) return false;
        for (int j = 0; j < n; ++j)
            if (first[j] != second[j]) return false;
        return true;
    }

    // Wolfe's gap of `point`, and c'Mc.
    PAMA_HD double gap(double weight, double* optimum) {
        size = 0;
        for (int j = 0; j < n; ++j) {
            inside[j] = point[j] > 0.0;
            if (!inside[j]) continue;
            scratch.solution[size] = point[j];
            support[size++] = j;
        }
        multiply();
        double value = 0.0, mean = 0.0, smallest = std::numeric_limits<double>::infinity();
        for (int j = 0; j < n; ++j) {
            const double gradient = product[j] + weight * (point[j] - prior[j]);
            if (point[j] > 0.0) {
                value += point[j] * product[j];
                mean += point[j] * gradient;
            }
            smallest = gradient < smallest ? gradient : smallest;
        }
        *optimum = value;
        return mean - smallest;
    }

    // c into `point`; returns Wolfe's gap.
    PAMA_HD double minimise(double weight, double* optimum) {
        set_quadratic(weight, prior, 0.0);
        start();
        strict = true;
        if (sigma > kSmallestSigma && exchange() == kOptimal && (weight >= kRidge || !tied())) {
            normalise();
            if (weight > 0.0) average_duplicates();
            return gap(weight, optimum);
        }
        strict = false;
        double ridge = kRidge, residual = 0.0;
        start();
        for (int i = 0; i < n; ++i) point[i] = prior[i];
        for (int step = 0; step < kProximalSteps; ++step) {
            if (step > 1 && ridge > kSmallestRidge) ridge *= 0.1;
            for (int i = 0; i < n; ++i)
                centre[i] = (weight * prior[i] + ridge * point[i]) / (weight + ridge);
            set_quadratic(weight + ridge, centre, kProximalSigma);
            if (exchange() == kOptimal || descend()) {
                normalise();
            } else {  // not positive semidefinite: the best vertex
                int best = 0;
                for (int i = 0; i < n; ++i) {
                    point[i] = 0.0;
                    if (diagonal_of(i) < diagonal_of(best)) best = i;
                }
                point[best] = 1.0;
                step = kProximalSteps;
            }
            average_duplicates();
            residual = gap(weight, optimum);
            if (residual <= kCertified * (1.0 + weight)) break;
        }
        return residual;
    }
};

// Two objectives: with a = M_11, b = M_12, d = M_22 the first weight is s / (s + s'), where s and s' are the
// descents from the second vertex and from the first, cut off at 0.
PAMA_HD inline MinNormResult solve_pair(double a, double b, double d, double prior_first,
                                        double regularization, double* first, double* second) {
    const double largest = a > d ? a : d;
    if (!(largest > kPairSmallest && largest < kPairLargest) && largest > 0.0 &&
        largest <= std::numeric_limits<double>::max()) {
        const double scale = power_of_two_scale(largest);
        MinNormResult result = solve_pair(a * scale, b * scale, d * scale, prior_first, regularization,
                                          first, second);
        result.optimum /= scale;
        return result;
    }
    const double rho = regularization * largest, prior_second = 1.0 - prior_first;
    const double descent = d - b + 2.0 * rho * prior_first;
    const double descent_back = a - b + 2.0 * rho * prior_second;
    const double s = descent > 0.0 ? descent : 0.0, s_back = descent_back > 0.0 ? descent_back : 0.0;
    const double sum = s + s_back;
    double t = s / sum, rest = s_back / sum;
    if (!(sum > 0.0 && sum <= std::numeric_limits<double>::max())) {
        const bool equal = descent == descent_back;  // duplicates; else not positive semidefinite
        t = equal ? prior_first : descent > descent_back ? 1.0 : 0.0;
        rest = equal ? prior_second : 1.0 - t;
    }
    *first = t;
    *second = rest;
    const double product = t * a + rest * b, product_second = t * b + rest * d;
    const double difference = product - product_second + 2.0 * rho * (t - prior_first);
    const double gap = difference > 0.0 ? t * difference : -rest * difference;
    return {t * product + rest * product_second, gap > 0.0 ? gap / (largest + rho) : 0.0, 0};
}

}  // namespace min_norm

// Doubles that min_norm_solve needs for n objectives.
PAMA_HD inline std::size_t min_norm_workspace(int n) {
    const std::size_t ld = ldlt::leading_dimension(n), blocks = ldlt::round_up_to_block(n);
    return (n + blocks + min_norm::kVectorCount) * ld + ldlt::kBlock * blocks;
}

// gram: element (i, j) at i * row_stride + j * column_stride; (M + M')/2 is solved. prior: n non-negative
// numbers (normalised over those present; null or without mass there: uniform). present: null, or 0 for
// an objective that takes no part: its weight is 0 and its entries are not looked at. Any other NaN or
// infinity makes weights and optimum NaN. A matrix that is not positive semidefinite gives some point of
// the simplex. None present, or M = 0: c = p.
template <class T>
PAMA_HD MinNormResult min_norm_solve(int n, const T* gram, std::ptrdiff_t row_stride,
                                     std::ptrdiff_t column_stride, const double* prior,
                                     const unsigned char* present, double regularization,
                                     double* weights, double* workspace) {
    using namespace min_norm;
    const auto entry = [&](int i, int j) {
        return static_cast<double>(gram[i * row_stride + j * column_stride]);
    };
    const auto pair = [&](int i, int j, double prior_first) {
        const double a = entry(i, i), b = 0.5 * entry(i, j) + 0.5 * entry(j, i), d = entry(j, j);
        MinNormResult result = solve_pair(a, b, d, prior_first, regularization, weights + i, weights + j);
        if (0.0 * a + 0.0 * b + 0.0 * d + 0.0 * regularization + 0.0 * prior_first != 0.0)
            weights[i] = weights[j] = result.optimum = not_a_number();
        return result;
    };
    if (n == 2 && !present)
        return pair(0, 1, prior && prior[0] + prior[1] != 0.0 ? prior[0] / (prior[0] + prior[1]) : 0.5);
    int count = 0, last = 0, other = 0;  // the last two present
    double mass = 0.0, largest = 0.0;
    for (int i = 0; i < n; ++i) {
        weights[i] = 0.0;
        if (present && !present[i]) continue;
        ++count;
        other = last;
        last = i;
        mass += prior ? prior[i] : 0.0;
        const double diagonal = entry(i, i);
        largest = diagonal > largest ? diagonal : largest;
    }
    const auto prior_of = [&](int i) { return mass != 0.0 ? prior[i] / mass : 1.0 / count; };
    double check = 0.0 * mass + 0.0 * regularization;  // 0, or NaN
    MinNormResult result = {0.0, 0.0, 0};
    if (count == 0) {
        for (int i = 0; i < n; ++i) weights[i] = prior ? prior[i] : 1.0 / n;
        return result;
    }
    if (count == 2) return pair(other, last, prior_of(other));
    Solver s;
    s.bind(count, workspace);
    const double scale = largest > 0.0 ? power_of_two_scale(largest) : 1.0;
    for (int i = 0, a = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        double* const row = s.gram + static_cast<std::ptrdiff_t>(a) * s.ld;
        s.prior[a++] = prior_of(i);
        int b = 0;
        for (int j = 0; j < n; ++j) {
            if (present && !present[j]) continue;
            row[b++] = 0.5 * scale * entry(i, j) + 0.5 * scale * entry(j, i);
        }
        for (; b < s.ld; ++b) row[b] = 0.0;
    }
    if (check == 0.0 && largest > 0.0) {
        result.residual = s.minimise(regularization * largest * scale, &result.optimum);
        result.residual /= largest * scale * (1.0 + regularization);
    } else {
        for (int a = 0; a < count; ++a) s.point[a] = s.prior[a];
        s.gap(0.0, &result.optimum);
    }
    result.optimum /= scale;
    result.factorisations = s.factorisations;
    for (int i = 0, a = 0; i < n; ++i)
        if (!present || present[i]) weights[i] = s.point[a++];
    if (check != 0.0) {
        result.optimum = not_a_number();
        for (int i = 0; i < n; ++i) weights[i] = not_a_number();
    }
    return result;
}

// A contiguous matrix.
PAMA_HD inline MinNormResult min_norm_solve(int n, const double* gram, const double* prior,
                                            double regularization, double* weights,
                                            double* workspace) {
    return min_norm_solve(n, gram, n, 1, prior, nullptr, regularization, weights, workspace);
}
PAMA_END
