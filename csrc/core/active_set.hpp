// Searches for the optimal support of a non-negative quadratic problem (nnqp.hpp), in four steps:
//
// 1. Exchange (block principal pivoting): swap every index of the wrong sign (y_i < 0 inside, (Hy - b)_j < 0 outside)
//    while their number reaches new minima, with kSpareExchanges exceptions: it ends after at most n + 1 +
//    kSpareExchanges factorisations, and almost always after one to six.
// 2. Newton's method with line searches, in the place of the exchange of a proximal step (if kSearches), where an
//    exchange tends to cycle: at most n + 1 of them.
// 3. Descend, where these gave up: Lawson and Hanson's method with block additions. Each addition ends because every
//    round of it drops an index, and raises b'y, which is twice the descent of the objective and a function of the
//    support alone: no support returns, and there are finitely many. In floating point too: what counts as a rise is a
//    new record of the b'y computed from the sorted support, and at most n additions (of one index each, where the rise
//    may be lost to rounding) pass without a record.
// 4. Where the minimiser may not be unique (a pivot vanishes, or a multiplier outside the support does and the support
//    with it is singular): at most kProximalSteps proximal steps, which add ridge/2 |x - x_previous|^2, until the
//    residual of the problem itself closes. The first step finds the minimiser nearest to the start up to O(ridge), the
//    next ones remove that bias where M is positive and leave the rest alone. Where a step fails, because M is not
//    quite semidefinite (a singular matrix rounded to float32), a larger ridge begins again.
#pragma once

#include "line_search.hpp"
#include "nnqp.hpp"
#include "numbers.hpp"

PAMA_BEGIN
namespace nnqp {

// How often the number of indices of the wrong sign still may miss a new minimum: for one problem or one per SIMD lane.
template <class V>
struct Progress {
    V fewest, spare;
    PAMA_HD explicit Progress(int unknowns)
        : fewest(V{} + (unknowns + 1.0)), spare(V{} + static_cast<double>(kSpareExchanges)) {}
    // Returns where the exchange goes on.
    PAMA_HD ldlt::Mask<V> goes_on(V wrong) {
        const V zero = V{};
        spare -= choose(wrong < fewest, zero, zero + 1.0);
        fewest = min_of(wrong, fewest);
        return spare >= zero;
    }
};

// Step 1 alone, for one problem or for one problem per SIMD lane of V. The system solves on its current support and
// reports where that succeeded; it marks and counts the indices of the wrong sign, and moves the marked indices in or
// out of the support. Returns where the exchange ended at an optimum.
template <class V, class Searched>
PAMA_HD inline ldlt::Mask<V> exchange(Searched& s, int unknowns, ldlt::Mask<V> active) {
    const V zero = V{};
    ldlt::Mask<V> optimal = zero != zero;
    Progress<V> progress(unknowns);
    while (any(active)) {
        active &= s.solve();
        if (!any(active)) break;
        const V wrong = s.mark();
        optimal |= active & (wrong == zero);
        active &= wrong != zero;
        active &= progress.goes_on(wrong);
        s.flip(active);
    }
    return optimal;
}

// The search as a machine that stops wherever a system has to be solved, so that the systems of several problems can be
// solved at once: begin() and resume() return whether `solve` is to be called, on the support that they leave, and its
// result passed to resume(). The problem supplies
//   set()           u, b and H_ii with the proximal term about `point`, if `ridge` is positive
//   proximal(j)     r_j, where `ridge` is positive
//   start()         the first support;   reset(): the first `point`
//   accept()        copies y to `point`;   fall_back(): the point to use if no step succeeded, and its `product`
//   residual_of_product()  of `point`, without the proximal term; `product`: My of the accepted y
//   residual_of_point()    the same, of any `point`
//   convex() const  whether the problem itself is strictly convex, so that the minimiser is unique
//   flat() const    whether the residual of `point` says little about its distance from the minimiser: then the bias of
//                   the first proximal step is removed although its residual is small
//   kSearches       whether proximal steps take step 2
//   kKeepsSupport   whether the first proximal step begins with the support on which steps 1 or 3 ended
//   refine()        after the first proximal step: takes the second one with the support and the factor of the first.
//                   Returns whether it could; `kept`: `point` before
//   kBounded        whether the feasible set is bounded; if not, proximal steps on an indefinite matrix diverge
template <class Problem>
struct ActiveSet : System {
    double weight = 0.0;                            // coefficient of the problem's own quadratic regularization
    double certified = kCertified, residual = 0.0;  // where the search stops; of `point`, once it has stopped
    double ridge = 0.0;                             // of the current proximal step; 0: none
    bool repeats = false;                           // the pending solve has the matrix of the one before

    // Writes the solution to `point` and returns its residual.
    PAMA_HD double minimise() {
        for (bool more = begin(); more;) more = resume(solve());
        return residual;
    }

    PAMA_HD bool begin(bool singular = false) {
        if (singular) return begin_proximal();
        strict = true;
        ridge = 0.0;
        self().set();
        self().start();
        return begin_exchange();
    }

    // sound: the result of `solve`.
    PAMA_HD bool resume(bool sound) {
        repeats = false;
        if (stage == Stage::exchange) {
            if (!sound) return exchanged(false);
            const double wrong = mark();
            if (wrong == 0.0) return exchanged(true);
            if (Problem::kSearches && !strict) return searches > n ? exchanged(false) : search();
            if (!progress.goes_on(wrong)) return exchanged(false);
            flip();
            return true;
        }
        if (stage == Stage::unique) return sound ? certify() : begin_proximal();
        if (sound && !reached()) return true;
        return descended(sound);
    }

    // Overwrites the problem's data if the residual is above the promised one.
    PAMA_HD SolveStatus status() {
        if (residual <= kPromisedResidual) return SolveStatus::solved;
        if (!semidefinite()) return SolveStatus::indefinite;
        return factorisations >= most ? SolveStatus::iteration_limit : SolveStatus::inexact;
    }

  private:
    // What the pending solve is for: the exchange or Newton's method, the test of uniqueness, or a step of the descent:
    // the first, one with all violated indices added, one with the worst of them.
    enum class Stage { exchange, unique, first, block, single };
    Stage stage = Stage::exchange;
    Progress<double> progress = Progress<double>(0);
    double best = 0.0;                 // record of b'y
    int spare = 0;                     // additions that may still pass without a record
    int worst = -1;                    // index with the smallest multiplier
    double least = 0.0, lowest = 0.0;  // the smallest ridge and the smallest residual of the proximal steps
    int steps = 0, searches = 0;
    bool closes = false;  // whether the last step brought the point closer

    PAMA_HD Problem& self() { return static_cast<Problem&>(*this); }

    // ---- Step 1

    PAMA_HD bool begin_exchange() {
        progress = Progress<double>(n);
        searches = 0;
        stage = Stage::exchange;
        return true;
    }
    PAMA_HD double mark() {
        int wrong = 0;
        for (int a = 0; a < size; ++a) wrong += scratch.solution[a] < 0.0;
        if (size == n && wrong != 0) return wrong;
        multiply();
        return wrong + mark_below(-kViolation, 2);
    }
    // Marks the indices outside the support whose multiplier is below `tolerance`, relative to the terms that cancel in
    // it. Returns their number.
    PAMA_HD int mark_below(double tolerance, int as) {
        // Copies, which nothing aliases: the loop is one of vectors.
        const int count = n;
        const double u = linear, sum = total, bound = tolerance * (total + fixed_total),
                     rest = tolerance * (terms + fixed_terms);
        const double *const PAMA_RESTRICT own = diagonal, *const PAMA_RESTRICT gy = product,
                                          *const PAMA_RESTRICT shifts = shift, *const PAMA_RESTRICT b = target;
        int* const PAMA_RESTRICT in = inside;
        int marked = 0;
        for (int j = 0; j < count; ++j) {
            const bool below = gy[j] + u + shifts[j] * sum - b[j] < bound * own[j] + rest;
            const int now = in[j] == 0 && below ? as : in[j];
            marked += now != in[j];
            in[j] = now;
        }
        return marked;
    }
    PAMA_HD void flip() {
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] < 0.0) inside[support[a]] = 0;
        for (int j = 0; j < n; ++j) inside[j] = inside[j] != 0;
    }
    PAMA_HD bool exchanged(bool optimal) {
        if (!strict) return optimal ? stepped(true) : begin_descent();
        if (!optimal) return begin_proximal();
        self().accept();
        // If an index outside the support has a zero multiplier, the minimiser is still unique if the support with that
        // index added is regular.
        if (self().convex() || mark_below(kTie, 1) == 0) return certify();
        stage = Stage::unique;
        return true;
    }
    PAMA_HD bool certify() {
        residual = self().residual_of_product();
        return residual <= certified ? false : begin_proximal();
    }

    // ---- Step 2

    PAMA_HD bool search() {
        // y in `saved`, b - Gy in `product`: r y on the support, else less the multiplier.
        for (int j = 0; j < n; ++j) {
            saved[j] = 0.0;
            product[j] = inside[j] == 1 ? 0.0 : -multiplier(j);
        }
        for (int a = 0; a < size; ++a) {
            const int j = support[a];
            saved[j] = scratch.solution[a];
            product[j] = self().proximal(j) * saved[j];
        }
        const bool first = searches++ == 0;
        double* const inverse = scratch.rhs;  // 1 / r
        for (int j = 0; j < stride; ++j) {
            if (j >= n) force[j] = product[j] = saved[j] = moved[j] = 0.0;
            inverse[j] = j < n ? 1.0 / self().proximal(j) : 0.0;
        }
        const double step = first ? 1.0 : line_step(stride, moved, saved, force, product, inverse);
        bool changed = false;
        for (int j = 0; j < n; ++j) {
            moved[j] = first ? saved[j] : moved[j] + step * (saved[j] - moved[j]);
            force[j] = first ? product[j] : force[j] + step * (product[j] - force[j]);
            changed |= (inside[j] == 1) != (force[j] > 0.0);
        }
        if (!changed)
            flip();
        else
            for (int j = 0; j < n; ++j) inside[j] = force[j] > 0.0;
        return true;
    }

    // ---- Step 3: moves from the positive part of the y that the exchange ended with to the optimum.

    PAMA_HD bool begin_descent() {
        for (int i = 0; i < n; ++i) point[i] = 0.0;
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] > 0.0) point[support[a]] = scratch.solution[a];
        for (int i = 0; i < n; ++i) inside[i] = point[i] > 0.0;
        stage = Stage::first;
        return true;
    }
    // Moves from a feasible `point` (y >= 0) towards y, up to the first index that becomes 0, which leaves the support.
    // Returns true if there is none: `point` is the optimum on the support.
    PAMA_HD bool reached() {
        double step = 1.0;
        bool positive = true;
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a], x = point[support[a]];
            if (y > 0.0) continue;
            positive = false;
            const double ratio = x > 0.0 ? x / (x - y) : 0.0;
            step = ratio < step ? ratio : step;
        }
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a];
            double& x = point[support[a]];
            const double ratio = x > 0.0 ? x / (x - y) : 0.0;
            if (positive) {
                x = y;
            } else if (y <= 0.0 && ratio <= step) {
                x = 0.0;
                inside[support[a]] = 0;
            } else {
                x += step * (y - x);
            }
        }
        return positive;
    }
    // sound: whether the numbers are finite and meaningful.
    PAMA_HD bool descended(bool sound) {
        if (stage == Stage::block && !(sound && value > best)) return add_worst();
        if (!sound) return stepped(false);
        spare = stage == Stage::first || value > best ? n : spare - 1;
        best = stage == Stage::first || value > best ? value : best;
        multiply();
        worst = -1;
        for (int j = 0; j < n; ++j) {
            saved[j] = point[j];
            if (inside[j] || !below(j, -kViolation)) continue;
            if (worst < 0 || multiplier(j) < multiplier(worst)) worst = j;
        }
        if (worst < 0 || spare == 0) return stepped(true);
        if (spare < n) return add_worst();
        for (int j = 0; j < n; ++j) inside[j] = inside[j] || below(j, -kViolation);
        stage = Stage::block;
        return true;
    }
    PAMA_HD bool add_worst() {
        for (int j = 0; j < n; ++j) {
            point[j] = saved[j];
            inside[j] = point[j] > 0.0 || j == worst;
        }
        stage = Stage::single;
        return true;
    }

    // ---- Step 4

    PAMA_HD bool begin_proximal() {
        strict = closes = false;
        ridge = kRidge;
        least = kSmallestRidge;
        lowest = kLargestDouble;
        steps = 0;
        return begin_step();
    }
    PAMA_HD bool begin_step() {
        if (!closes) {
            if (!Problem::kKeepsSupport || steps > 0) self().start();
            for (int j = 0; j < n; ++j) inside[j] = inside[j] != 0;
            self().reset();
        }
        if (steps > 1) ridge = 0.1 * ridge > least ? 0.1 * ridge : least;
        repeats = closes && steps == 1;
        for (int a = 0; repeats && a < size; ++a) repeats = scratch.solution[a] > 0.0;
        self().set();
        return begin_exchange();
    }
    PAMA_HD bool stepped(bool solved) {
        solved ? self().accept() : self().fall_back();
        residual = self().residual_of_product();
        if (residual <= certified && (!solved || steps > 0 || !self().flat())) return false;
        if (solved && steps == 0 && self().refine()) {
            const double refined = self().residual_of_product();
            if (refined <= certified) {
                residual = refined;
                return false;
            }
            for (int j = 0; j < n; ++j) inside[j] = (point[j] = kept[j]) > 0.0;
        }
        // Otherwise M has a negative eigenvalue larger than the ridge, for example after rounding to float32:
        // restart with a larger ridge.
        closes = solved && residual <= kProximalGap * metric * (ridge > kRidge ? ridge : kRidge) * (1.0 + weight);
        if (closes && residual < lowest) {
            lowest = residual;
            for (int j = 0; j < n; ++j) kept[j] = point[j];
        }
        bool ends = !Problem::kBounded && (closes ? least > kSmallestRidge : lowest < kLargestDouble);
        if (!ends && !closes) {
            ends = ridge >= kLargestRidge || factorisations >= most;
            least = ridge = ends ? ridge : kRidgeFactor * ridge;
        }
        if (!ends && ++steps < kProximalSteps) return begin_step();
        if (lowest < kLargestDouble && !(residual <= lowest)) {
            for (int j = 0; j < n; ++j) point[j] = kept[j];
            residual = self().residual_of_point();
        } else if (!(residual <= kLargestDouble)) {  // a step overflowed, on a matrix that is far from semidefinite
            self().fall_back();
            residual = self().residual_of_product();
        }
        return false;
    }
};

}  // namespace nnqp
PAMA_END
