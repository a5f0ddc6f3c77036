// The min-norm point of a simplex, exactly: given a symmetric positive semidefinite M and a preference p,
//
//     minimise over c in D:  1/2 c'Mc + rho/2 ||c - p||^2,    rho = regularization * max_i M_ii
//
// Homogenised: over y >= 0 minimise 1/2 y'Hy - e'y and take c = y / e'y, where
//     H_ij = M_ij + u_i + u_j + rho [i = j],    u_i = sigma/2 + rho (|p|^2/2 - p_i),
// so that c'Hc is twice the objective plus sigma for every c in D. This is a problem of nnqp.hpp, which active_set.hpp
// solves. Every answer carries Wolfe's gap, which bounds the distance of the objective from its minimum.
#pragma once

#include <cstddef>

#include "min_norm_pair.hpp"
#include "min_norm_small.hpp"

PAMA_BEGIN
namespace min_norm {

// The general problem: M is scaled so that 1 <= max_i M_ii < 2. Equal objectives of equal preference are one unknown,
// the sum of their weights, which they share equally; `preference` and `centre` are those of each of them.
struct Problem : nnqp::ActiveSet<Problem> {
    static constexpr bool kBounded = true, kSearches = false, kKeepsSupport = true;
    double optimum = 0.0;   // c'Mc of `point`; `weight` is the rho of the problem itself
    double share = 1.0;     // M c = share * product
    double smallest = 0.0;  // min_i M_ii

    PAMA_HD bool convex() const { return weight >= nnqp::kRidge; }
    // At an optimum of 0 the gap is quadratic in the error of the weights.
    PAMA_HD bool flat() const { return optimum < kFlat && weight == 0.0; }

    PAMA_HD bool same(int i, int k) const {
        const double *const first = row_of(i), *const second = row_of(k);
        if (first[i] != second[k] || preference[i] != preference[k]) return false;
        for (int j = 0; j < n; ++j)
            if (first[j] != second[j]) return false;
        return true;
    }
    PAMA_HD void merge() {
        merge_same([&](int i, int k) { return same(i, k); }, 0.0);
        smallest = own[0];
        for (int i = 0; i < n; ++i) {
            preference[i] /= members[i];
            smallest = own[i] < smallest ? own[i] : smallest;
        }
    }
    // Whether the optimum is 0, at an objective without a gradient.
    PAMA_HD bool vanishes() const { return smallest == 0.0 && weight == 0.0; }

    PAMA_HD double proximal(int i) const {
        const double rho = weight + ridge;
        return rho > 0.0 ? rho / members[i] : 0.0;
    }
    PAMA_HD void set() {
        const double rho = weight + ridge;
        double norm2 = 0.0;
        for (int i = 0; i < n; ++i) {
            centre[i] = ridge > 0.0 ? (weight * preference[i] + ridge * (point[i] / members[i])) / rho : preference[i];
            norm2 += members[i] * centre[i] * centre[i];
        }
        double sigma = smallest + rho;
        if ((ridge > 0.0 || vanishes()) && !(sigma > kProximalSigma)) sigma = kProximalSigma;
        for (int i = 0; i < n; ++i) {
            shift[i] = 0.5 * (sigma + rho * norm2) - rho * centre[i];
            diagonal[i] = own[i] + 2.0 * shift[i] + proximal(i);
            target[i] = 1.0;
        }
    }

    // The first support: indices that have a positive weight after one Jacobi step from the centre of the simplex.
    PAMA_HD void start() {
        if (strict && vanishes()) {
            for (int i = 0; i < n; ++i) inside[i] = own[i] == 0.0;
            return;
        }
        size = n;
        for (int i = 0; i < n; ++i) {
            support[i] = i;
            scratch.solution[i] = members[i];
        }
        multiply();
        double mean = 0.0, count = 0.0;
        for (int i = 0; i < n; ++i) {
            mean += members[i] * product[i];
            count += members[i];
        }
        mean /= count;
        for (int i = 0; i < n; ++i) inside[i] = product[i] - mean <= own[i] + weight;
    }
    PAMA_HD void reset() {
        for (int i = 0; i < n; ++i) point[i] = members[i] * preference[i];
    }
    // H c = nu e + ridge (point - p) on the support, where Hy = e is solved.
    PAMA_HD bool refine() {
#if defined(__CUDACC__)
        return false;
#else
        if (n <= nnqp::kLargestInRegisters) return false;
        for (int i = 0; i < n; ++i) kept[i] = point[i];
        for (int a = 0; a < size; ++a) {
            const int i = support[a];
            scratch.rhs[a] = point[i] / members[i] - preference[i];
            saved[a] = scratch.solution[a];
        }
        for (int a = size; a < ldlt::leading_dimension(size); ++a) scratch.rhs[a] = 0.0;
        ldlt::solve_again(size, ldlt::leading_dimension(size), scratch);
        double moved = 0.0;
        for (int a = 0; a < size; ++a) moved += scratch.solution[a];
        const double factor = (1.0 - ridge * moved) * share;
        total = 0.0;
        for (int a = 0; a < size; ++a) {
            const double c = saved[a] * factor + ridge * scratch.solution[a];
            scratch.solution[a] = c > 0.0 ? c : 0.0;
            total += scratch.solution[a];
        }
        multiply();
        accept();
        return true;
#endif
    }

    PAMA_HD void accept() {
        if (!(total > 0.0 && total <= nnqp::kLargestDouble)) return fall_back();
        for (int j = 0; j < n; ++j) point[j] = 0.0;
        share = 1.0 / total;
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a];
            point[support[a]] = y > 0.0 ? y * share : 0.0;
        }
    }
    // The best vertex, for a matrix so far from semidefinite that no step succeeded.
    PAMA_HD void fall_back() {
        int best = 0;
        for (int i = 0; i < n; ++i) {
            point[i] = 0.0;
            if (own[i] < own[best]) best = i;
        }
        point[best] = share = 1.0;
        for (int i = 0; i < n; ++i) product[i] = row_of(best)[i];
    }

    // Wolfe's gap of `point`, and c'Mc.
    PAMA_HD double residual_of_product() {
        double value = 0.0, mean = 0.0, least = nnqp::kLargestDouble;
        for (int j = 0; j < n; ++j) {
            const double along = share * product[j];
            const double gradient = weight > 0.0 ? along + weight * (point[j] / members[j] - preference[j]) : along;
            value += point[j] * along;
            mean += point[j] * gradient;
            least = gradient < least ? gradient : least;
            inside[j] = point[j] > 0.0;
        }
        optimum = value;
        return mean - least;
    }
    PAMA_HD double residual_of_point() {
        multiply(point);
        share = 1.0;
        return residual_of_product();
    }
};

template <class T>
PAMA_HD SolverResult solve_general(const MatrixView<T>& gram, const double* preference, const unsigned char* present,
                                   double regularization, double* weights, double* workspace) {
    const int n = gram.n;
    const auto entry = [&](int i, int j) { return gram(i, j); };
    int count = 0, last = 0, other = 0;  // the last two present
    double mass = 0.0, largest = 0.0;
    for (int i = 0; i < n; ++i) {
        weights[i] = 0.0;
        if (present && !present[i]) continue;
        ++count;
        other = last;
        last = i;
        mass += preference ? preference[i] : 0.0;
        const double own = entry(i, i);
        largest = own > largest ? own : largest;
    }
    const double share = 1.0 / (mass != 0.0 ? mass : count);
    const auto preference_of = [&](int i) { return mass != 0.0 ? preference[i] * share : share; };
    if (count == 0) {
        for (int i = 0; i < n; ++i) weights[i] = preference ? preference[i] : 1.0 / n;
        return {0.0, 0.0, SolveStatus::solved, 0};
    }
    if (count == 2)
        return solve_pair(entry(other, other), 0.5 * entry(other, last) + 0.5 * entry(last, other), entry(last, last),
                          preference_of(other), regularization, weights + other, weights + last);
    Problem s;
    s.bind(count, workspace);
    const nnqp::Scale scale(largest);
    for (int i = 0, a = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        double* const row = s.row_of(a);
        s.preference[a++] = preference_of(i);
        int b = 0;
        if (present) {
            for (int j = 0; j < n; ++j)
                if (present[j]) row[b++] = scale(0.5 * entry(i, j) + 0.5 * entry(j, i));
        } else if (scale.lift == 1.0) {
            const double half = 0.5 * scale.power;
            for (; b < n; ++b) row[b] = half * entry(i, b) + half * entry(b, i);
        } else {
            for (; b < n; ++b) row[b] = scale(entry(i, b)) * 0.5 + scale(entry(b, i)) * 0.5;
        }
        for (; b < s.stride; ++b) row[b] = 0.0;
        s.own[a - 1] = row[a - 1];
    }
    bool finite = 0.0 * mass + 0.0 * regularization == 0.0;
    if (!(finite && s.finite()))  // or out of range after scaling, because the matrix is far from semidefinite
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                if (!present || (present[i] && present[j])) finite = finite && 0.0 * entry(i, j) == 0.0;
    SolverResult result = {nnqp::kNan, nnqp::kNan, SolveStatus::not_finite, 0};
    if (finite) {
        // Above kLargestRegularization c = p in double precision; the limit avoids an overflow.
        s.weight = (regularization < kLargestRegularization ? regularization : kLargestRegularization) * scale(largest);
        double residual = 0.0;
        s.merge();
        if (largest > 0.0) {
            const double size = scale(largest) + s.weight;
            s.certified = nnqp::kCertified * (1.0 + s.weight);
            residual = s.residual = s.minimise() / size;
            result.status = s.status();
        } else {
            s.reset();
            s.weight = 0.0;
            s.residual_of_point();
            result.status = SolveStatus::solved;
        }
        result.residual = residual > 0.0 ? residual : 0.0;
        result.optimum = s.optimum > 0.0 ? scale.undo(s.optimum) : 0.0;
        result.factorisations = s.factorisations;
    }
    const bool answered = finite && !unsolved(result);
    if (!answered) result.optimum = nnqp::kNan;
    for (int i = 0, a = 0; i < n; ++i)
        if (!answered)
            weights[i] = nnqp::kNan;
        else if (!present || present[i]) {
            const int k = s.group[a++];
            weights[i] = s.point[k] / s.members[k];
        }
    return result;
}

}  // namespace min_norm

// Doubles that min_norm_solve needs for n objectives.
PAMA_HD inline std::size_t min_norm_workspace(int n) { return nnqp::workspace(n); }

// n = 2, all present.
template <class T>
PAMA_HD inline SolverResult min_norm_pair(const MatrixView<T>& gram, const double* preference, double regularization,
                                          double* weights) {
    const double a = gram(0, 0), b = 0.5 * gram(0, 1) + 0.5 * gram(1, 0), d = gram(1, 1);
    const double mass = preference ? preference[0] + preference[1] : 0.0;
    return min_norm::solve_pair(a, b, d, mass != 0.0 ? preference[0] * (1.0 / mass) + 0.0 * mass : 0.5, regularization,
                                weights, weights + 1);
}

// gram: (M + M')/2 is solved. preference: n non-negative numbers
// (normalised over those present; uniform if null or if those sum to 0). present: null, or an array with 0 for each
// objective that is excluded: its weight is 0 and its entries are ignored, including NaN. Any other NaN or infinity
// makes weights and optimum NaN. A matrix that is not positive semidefinite gives some point of the simplex. If no
// objective is present, or M = 0, c = p. The residual is Wolfe's gap c'g - min_j g_j, g the gradient, over max_i M_ii
// (1 + regularization).
template <class T>
PAMA_HD inline SolverResult min_norm_solve(const MatrixView<T>& gram, const double* preference,
                                           const unsigned char* present, double regularization, double* weights,
                                           double* workspace) {
    const int n = gram.n;
    if (present == nullptr && n == 2) return min_norm_pair(gram, preference, regularization, weights);
    SolverResult result = {0.0, 0.0, SolveStatus::solved, 0};
    if ((present || n <= min_norm::kLargestSmall) &&
        min_norm::solve_one(gram, preference, present, regularization, weights, &result))
        return result;
    return min_norm::solve_general(gram, preference, present, regularization, weights, workspace);
}

// A contiguous matrix.
PAMA_HD inline SolverResult min_norm_solve(int n, const double* gram, const double* preference, double regularization,
                                           double* weights, double* workspace) {
    return min_norm_solve(MatrixView<double>{n, gram, n, 1}, preference, nullptr, regularization, weights, workspace);
}
PAMA_END
