// The min-norm problem on all supports: exchange, descend, and proximal steps, as min_norm.hpp lays out.
#pragma once

#include "config.hpp"
#include "min_norm_problem.hpp"

PAMA_BEGIN
namespace min_norm {

// All relative: M is scaled so that 1 <= max_i M_ii < 2.
constexpr double kViolation = 1e-14;  // of the terms that cancel in a multiplier
constexpr double kTie = 1e-11;        // the same: below it a multiplier may be an exact zero
constexpr double kCertified = 1e-13;  // Wolfe's gap of an answer
constexpr double kRidge = 1e-9;       // bias kRidge against rounding epsilon / kRidge
constexpr double kSmallestRidge = 1e-12;
constexpr double kLargestRidge = 1e-2, kRidgeFactor = 100.0;  // where M is not semidefinite
constexpr double kProximalGap = 10.0;                         // of the ridge: more than a proximal step can leave
constexpr int kProximalSteps = 12;
constexpr double kProximalSigma = 1e-2;  // keeps H regular along c where c'Mc = 0
constexpr double kSmallestSigma = 1e-290;
constexpr int kSpareExchanges = 2;

struct ActiveSet : Problem {
    // The first support: where one Jacobi step from the middle of the simplex leaves a positive weight.
    PAMA_HD void start() {
        size = n;
        for (int i = 0; i < n; ++i) {
            support[i] = i;
            scratch.solution[i] = 1.0;
        }
        multiply();
        double mean = 0.0;
        for (int i = 0; i < n; ++i) mean += product[i];
        mean /= n;
        for (int i = 0; i < n; ++i) inside[i] = product[i] - mean <= row_of(i)[i] + rho;
    }

    enum Outcome { kOptimal, kGaveUp };

    // Leaves y in scratch.solution, M y in `product` unless the support is full.
    PAMA_HD Outcome exchange() {
        int fewest = n + 1, spare = kSpareExchanges;
        while (solve()) {
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
                break;
            }
        }
        return kGaveUp;
    }

    // From a feasible `point` (y >= 0) with `inside` holding its support, and perhaps more, to the optimum
    // of a support within: e'y there, or 0 without meaningful numbers.
    PAMA_HD double descend_within() {
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
        return 0.0;
    }

    // From the positive part of the last y to the optimum; exchange has left its y and support.
    PAMA_HD bool descend() {
        strict = false;
        for (int i = 0; i < n; ++i) point[i] = 0.0;
        for (int a = 0; a < size; ++a)
            if (scratch.solution[a] > 0.0) point[support[a]] = scratch.solution[a];
        for (int i = 0; i < n; ++i) inside[i] = point[i] > 0.0;
        double value = descend_within(), best = value;
        int spare = n;  // additions between two records of the value
        while (value > 0.0) {
            multiply();
            const double terms = magnitude();
            int worst = -1;
            for (int j = 0; j < n; ++j) {
                saved[j] = point[j];
                if (inside[j] || !below(j, -kViolation, terms)) continue;
                if (worst < 0 || multiplier(j) < multiplier(worst)) worst = j;
            }
            if (worst < 0 || spare == 0) return true;
            if (spare == n) {
                for (int j = 0; j < n; ++j) inside[j] = inside[j] || below(j, -kViolation, terms);
                value = descend_within();
            }
            if (!(value > best)) {
                for (int j = 0; j < n; ++j) {
                    point[j] = saved[j];
                    inside[j] = point[j] > 0.0 || j == worst;
                }
                value = descend_within();
            }
            spare = value > best ? n : spare - 1;
            best = value > best ? value : best;
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
        const double inverse = 1.0 / total;
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a];
            point[support[a]] = y > 0.0 ? y * inverse : 0.0;
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
        const double* const first = row_of(i);
        const double* const second = row_of(k);
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
        double value = 0.0, mean = 0.0, smallest = kLargestDouble;
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
        const double certified = kCertified * (1.0 + weight);
        set_quadratic(weight, prior, 0.0);
        start();
        strict = true;
        if (sigma > kSmallestSigma && exchange() == kOptimal && (weight >= kRidge || !tied())) {
            normalise();
            if (weight > 0.0) average_duplicates();
            const double residual = gap(weight, optimum);
            if (residual <= certified) return residual;
        }
        strict = false;
        double ridge = kRidge, least = kSmallestRidge, residual = 0.0;
        bool solved = false;
        for (int step = 0; step < kProximalSteps; ++step) {
            if (!solved) {
                start();
                for (int i = 0; i < n; ++i) point[i] = prior[i];
            }
            if (step > 1) ridge = 0.1 * ridge > least ? 0.1 * ridge : least;
            for (int i = 0; i < n; ++i) centre[i] = (weight * prior[i] + ridge * point[i]) / (weight + ridge);
            set_quadratic(weight + ridge, centre, kProximalSigma);
            solved = exchange() == kOptimal || descend();
            if (solved) {
                normalise();
            } else {
                best_vertex();
            }
            average_duplicates();
            residual = gap(weight, optimum);
            if (residual <= certified) break;
            // Else M is less semidefinite than the ridge makes up for, as after rounding to float32: begin again,
            // larger.
            solved = solved && residual <= kProximalGap * (ridge > kRidge ? ridge : kRidge) * (1.0 + weight);
            if (!solved) {
                if (ridge >= kLargestRidge) break;
                least = ridge = kRidgeFactor * ridge;
            }
        }
        return residual;
    }

    // The answer for a matrix so far from semidefinite that nothing else came out.
    PAMA_HD void best_vertex() {
        int best = 0;
        for (int i = 0; i < n; ++i) {
            point[i] = 0.0;
            if (row_of(i)[i] < row_of(best)[best]) best = i;
        }
        point[best] = 1.0;
    }
};

}  // namespace min_norm
PAMA_END
