// The problem of one of UPGrad's projections (upgrad.hpp), scaled, for the search of active_set.hpp.
#pragma once

#include "upgrad_small.hpp"

PAMA_BEGIN
namespace upgrad {

constexpr double kLargestUnit = 1024.0;
constexpr double kSame = 1e-14;  // of entries of about 1

// m = f 2^e, 1 <= f < 2.
PAMA_HD inline int exponent_of(double m) {
    int exponent;
    std::frexp(m, &exponent);
    return exponent - 1;
}

// The power of two S with 1 <= S^2 m / 2^odd < 4. `odd`: the last bit of the largest diagonal entry's exponent, so that
// M times any power of two is the same problem.
PAMA_HD inline double unit_of(double m, int odd) {
    const int above = exponent_of(m) - odd;
    return std::ldexp(1.0, -(above - (above & 1)) / 2);
}

// S M S for the objectives with a nonzero gradient.
struct Problem : nnqp::ActiveSet<Problem> {
    static constexpr bool kBounded = false, kSearches = true, kKeepsSupport = false;
    static constexpr int kOwnVectors = 10;  // see share
    int objective = 0;                      // i

    // Makes this a problem on the matrix of `other`, with vectors of its own in `memory`, kOwnVectors * ld.
    PAMA_HD void share(const Problem& other, double* memory) {
        *this = other;
        double** const vectors[] = {&diagonal, &target, &product, &point,           &saved,
                                    &kept,     &moved,  &force,   &scratch.solution};
        for (double** const vector : vectors) {
            *vector = memory;
            memory += ld;
        }
        support = reinterpret_cast<int*>(memory);
        inside = support + ld;
    }

    // Adds p_i x of projection i to `answer`, in the units of the given matrix.
    PAMA_HD void add(int i, const double* x) {
        const double p = preference[i], inverse = 1.0 / unit[i];
        for (int j = 0; j < n; ++j) answer[j] += p * min_of(unit[j] * inverse, kLargestRatio) * x[j];
    }

    // Whether the gradients i and k are the same, up to the rounding of their products.
    PAMA_HD bool same(int i, int k) const {
        const double *const first = row_of(i), *const second = row_of(k);
        if (std::fabs(first[k] - first[i]) > kSame || unit[i] != unit[k]) return false;
        for (int j = 0; j < n; ++j)
            if (std::fabs(first[j] - second[j]) > kSame) return false;
        return true;
    }
    // The solution is shared equally among equal objectives, which is nearest to p. This also solves the projection
    // once for all of them.
    PAMA_HD void merge() {
        merge_same([&](int i, int k) { return same(i, k); }, kSame);
    }

    PAMA_HD bool convex() const { return false; }
    PAMA_HD bool flat() const { return false; }
    PAMA_HD bool refine() { return false; }
    PAMA_HD double proximal(int j) const { return ridge * centre[j]; }

    double halved = 1.0;  // M is multiplied by it
    // The proximal term (in `centre`) in the units of M, with the smallest unit scaled to 1; `unit` contains S.
    PAMA_HD void set_metric() {
        double smallest = nnqp::kLargestDouble;
        for (int j = 0; j < n; ++j) smallest = min_of(unit[j], smallest);
        metric = 1.0;
        for (int j = 0; j < n; ++j) {
            const double relative = min_of(unit[j] / smallest, kLargestUnit);
            centre[j] = relative * relative / members[j];  // x_j shared equally has 1 / members of its square
            metric = max_of(centre[j], metric);
        }
    }

    PAMA_HD void set() {
        const int count = n;  // with the pointers below, which nothing aliases, the loops are ones of vectors
        const double *const PAMA_RESTRICT row = row_of(objective), *const PAMA_RESTRICT entries = own;
        double *const PAMA_RESTRICT h = diagonal, *const PAMA_RESTRICT b = target;
        for (int j = 0; j < count; ++j) {
            h[j] = entries[j];
            b[j] = -row[j];
        }
        for (int j = 0; ridge > 0.0 && j < count; ++j) {
            h[j] += proximal(j);
            b[j] += proximal(j) * point[j];
        }
        fixed_total = 1.0;
        fixed_terms = row[objective];
    }
    // guess: null, or x_j where it is likely to be positive, at guess[j * guess_stride].
    const float* guess = nullptr;
    int guess_stride = 0;
    PAMA_HD void start() {
        const double* const row = row_of(objective);
        for (int j = 0; guess && j < n; ++j) inside[j] = guess[j * guess_stride] > 0.0f;
        for (int j = 0; !guess && j < n; ++j) inside[j] = row[j] < 0.0;
    }
    PAMA_HD void reset() {
        for (int j = 0; j < stride; ++j) point[j] = 0.0;
    }
    PAMA_HD void accept() {
        reset();
        for (int a = 0; a < size; ++a) {
            const double y = scratch.solution[a];
            point[support[a]] = y > 0.0 ? y : 0.0;
        }
    }
    PAMA_HD void fall_back() {
        reset();
        for (int j = 0; j < stride; ++j) product[j] = 0.0;
    }

    // The violation of x >= 0, g = M (e_i + x) >= 0, x.g = 0, with e_i + x scaled to sum 1.
    PAMA_HD double residual_of_product() {
        using ldlt::vector_at;
        const double* const row = row_of(objective);
        ldlt::Vector lowest_g = {};
        ldlt::Vector total_x[ldlt::kParts] = {}, slack_x[ldlt::kParts] = {};
        for (int tile = 0; tile < stride; tile += ldlt::kStep)
            for (int p = 0; p < ldlt::kParts; ++p) {
                const int j = tile + p * ldlt::kLanes;
                const ldlt::Vector y = vector_at(point + j), g = vector_at(product + j) + vector_at(row + j);
                total_x[p] += y;
                lowest_g = g < lowest_g ? g : lowest_g;
                slack_x[p] += y * (g < 0.0 ? -g : g);
            }
        const double* const PAMA_RESTRICT x = point;
        int* const PAMA_RESTRICT in = inside;
        for (int j = 0; j < stride; ++j) in[j] = x[j] > 0.0;
        const double sum = 1.0 + ldlt::sum_parts(total_x), slack = ldlt::sum_parts(slack_x);
        const double violation = -ldlt::least_lane(lowest_g) / sum, complementarity = slack / sum / sum;
        return violation > complementarity || violation != violation ? violation : complementarity;
    }
    PAMA_HD double residual_of_point() {
        multiply(point);
        return residual_of_product();
    }
};

}  // namespace upgrad
PAMA_END
