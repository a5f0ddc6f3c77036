// Searches for the optimal support of a non-negative quadratic problem (nnqp.hpp), in three steps:
//
// 1. Exchange (block principal pivoting): swap every index of the wrong sign (y_i < 0 inside, (Hy - b)_j < 0 outside)
//    while their number reaches new minima, with kSpareExchanges exceptions: it ends after at most n + 1 +
// kSpareExchanges factorisations, and almost always after one to six.
// 2. Descend, where exchange gave up: Lawson and Hanson's method with block additions. Each addition ends because every
//    round of it drops an index, and raises b'y, which is twice the descent of the objective and a function of the
//    support alone: no support returns, and there are finitely many. In floating point too: what counts as a rise is a
//    new record of the b'y computed from the sorted support, and at most n additions (of one index each, where the rise
//    may be lost to rounding) pass without a record.
// 3. Where the minimiser may not be unique (a pivot vanishes, or a multiplier outside the support does and the support
//    with it is singular): at most kProximalSteps proximal steps, which add ridge/2 |x - x_previous|^2, until the
//    residual of the problem itself closes. The first step finds the minimiser nearest to the start up to O(ridge), the
//    next ones remove that bias where M is positive and leave the rest alone. Where a step fails, because M is not
//    quite semidefinite (a singular matrix rounded to float32), a larger ridge begins again.
#pragma once

#include "nnqp.hpp"
#include "numbers.hpp"

PAMA_BEGIN
namespace nnqp {

// Step 1, for one problem or for one problem per SIMD lane of V. The system solves on its current support and reports
// where that succeeded; it marks and counts the indices of the wrong sign, and moves the marked indices in or out of
// the support. Returns where the exchange ended at an optimum.
template <class V, class Searched>
PAMA_HD inline ldlt::Mask<V> exchange(Searched& s, int unknowns, ldlt::Mask<V> active) {
    const V zero = V{}, one = zero + 1.0;
    ldlt::Mask<V> optimal = zero != zero;
    V fewest = zero + (unknowns + 1.0), spare = zero + static_cast<double>(kSpareExchanges);
    while (any(active)) {
        active &= s.solve();
        if (!any(active)) break;
        const V wrong = s.mark();
        optimal |= active & (wrong == zero);
        active &= wrong != zero;
        spare -= choose(wrong < fewest, zero, one);
        fewest = min_of(wrong, fewest);
        active &= spare >= zero;
        s.flip(active);
    }
    return optimal;
}

// The problem supplies
//   set(ridge)      u, r, b and H_ii with the proximal term about `point` (0: the problem itself)
//   start()         the first support;   reset(): the first `point`
//   accept()        copies y to `point`;   fall_back(): the point to use if no step succeeded
//   residual()      of `point`, without the proximal term
//   convex() const  whether the problem itself is strictly convex, so that the minimiser is unique
//   kBounded        whether the feasible set is bounded; if not, proximal steps on an indefinite matrix diverge
template <class Problem>
struct ActiveSet : System {
    PAMA_HD double mark() {
        int wrong = 0;
        for (int a = 0; a < size; ++a) wrong += scratch.solution[a] < 0.0;
        if (size < n) {
            multiply();
            for (int j = 0; j < n; ++j)
                if (!inside[j] && below(j, -kViolation)) inside[j] = 2, ++wrong;
        }
        return wrong;
    }
    PAMA_HD void flip(bool active) {
        if (!active) return;
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] < 0.0) inside[support[a]] = 0;
        for (int j = 0; j < n; ++j) inside[j] = inside[j] != 0;
    }

    // Moves from a feasible `point` (y >= 0), whose support `inside` contains, to the optimum on a subset of `inside`.
    // Returns false if the numbers are not finite or not meaningful.
    PAMA_HD bool descend_within() {
        while (solve()) {
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
                return true;
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
        return false;
    }

    // Step 2: moves from the positive part of the y that the exchange ended with to the optimum.
    PAMA_HD bool descend() {
        for (int i = 0; i < n; ++i) point[i] = 0.0;
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] > 0.0) point[support[a]] = scratch.solution[a];
        for (int i = 0; i < n; ++i) inside[i] = point[i] > 0.0;
        if (!descend_within()) return false;
        double best = value;
        int spare = n;  // additions between two records of the value
        while (true) {
            multiply();
            int worst = -1;
            for (int j = 0; j < n; ++j) {
                saved[j] = point[j];
                if (inside[j] || !below(j, -kViolation)) continue;
                if (worst < 0 || multiplier(j) < multiplier(worst)) worst = j;
            }
            if (worst < 0 || spare == 0) return true;
            bool sound = true;
            if (spare == n) {
                for (int j = 0; j < n; ++j) inside[j] = inside[j] || below(j, -kViolation);
                sound = descend_within();
            }
            if (!sound || !(value > best)) {
                for (int j = 0; j < n; ++j) {
                    point[j] = saved[j];
                    inside[j] = point[j] > 0.0 || j == worst;
                }
                if (!descend_within()) return false;
            }
            spare = value > best ? n : spare - 1;
            best = value > best ? value : best;
        }
    }

    // At an optimum with a regular support: whether the minimiser is unique. If an index outside the support has a zero
    // multiplier, the minimiser is still unique if the support with that index added is regular.
    PAMA_HD bool unique() {
        bool tied = false;
        for (int j = 0; j < n; ++j)
            if (!inside[j] && below(j, kTie)) inside[j] = 2, tied = true;
        if (!tied) return true;
        for (int j = 0; j < n; ++j) inside[j] = inside[j] != 0;
        return solve();
    }

    // Writes the solution to `point` and returns its residual. weight: the coefficient of the problem's own quadratic
    // regularization.
    PAMA_HD double minimise(double weight, double certified) {
        Problem& self = static_cast<Problem&>(*this);
        strict = true;
        self.set(0.0);
        self.start();
        if (exchange<double>(*this, n, true)) {
            self.accept();
            if (self.convex() || unique()) {
                const double residual = self.residual();
                if (residual <= certified) return residual;
            }
        }
        strict = false;
        double ridge = kRidge, least = kSmallestRidge, residual = 0.0, best = kLargestDouble;
        bool solved = false;
        for (int step = 0; step < kProximalSteps; ++step) {
            if (!solved) {
                self.start();
                self.reset();
            }
            if (step > 1) ridge = 0.1 * ridge > least ? 0.1 * ridge : least;
            self.set(ridge);
            solved = exchange<double>(*this, n, true) || descend();
            if (solved)
                self.accept();
            else
                self.fall_back();
            residual = self.residual();
            if (residual <= certified) return residual;
            // Otherwise M has a negative eigenvalue larger than the ridge, for example after rounding to float32:
            // restart with a larger ridge.
            solved = solved && residual <= kProximalGap * metric * (ridge > kRidge ? ridge : kRidge) * (1.0 + weight);
            if (solved && residual < best) {
                best = residual;
                for (int j = 0; j < n; ++j) kept[j] = point[j];
            }
            if (!Problem::kBounded && (solved ? least > kSmallestRidge : best < kLargestDouble)) break;
            if (!solved) {
                if (ridge >= kLargestRidge || factorisations >= most) break;
                least = ridge = kRidgeFactor * ridge;
            }
        }
        if (!(best < residual)) return residual;
        for (int j = 0; j < n; ++j) point[j] = kept[j];
        return self.residual();
    }

    // Overwrites the problem's data if the residual is above the promised one.
    PAMA_HD SolveStatus status(double residual) {
        if (residual <= kPromisedResidual) return SolveStatus::solved;
        if (!semidefinite()) return SolveStatus::indefinite;
        return factorisations >= most ? SolveStatus::iteration_limit : SolveStatus::inexact;
    }
};

}  // namespace nnqp
PAMA_END
