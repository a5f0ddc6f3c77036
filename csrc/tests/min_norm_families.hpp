// Random Gram matrices for the tests of min_norm.hpp: everyday ones and every hard kind we know of.
#pragma once

#include <cmath>
#include <random>
#include <vector>

namespace families {

enum Family {
    kSquareWishart,
    kTallWishart,
    kRankDeficient,
    kOffsetWishart,   // gradients that share a direction
    kIntegerRankOne,  // from here to kZeros singular by construction, exact in double
    kIntegerLowRank,
    kIntegerDuplicates,
    kIntegerOpposites,
    kZeroRows,
    kSigns,  // gradients from {-1, 1}^d
    kZeros,
    kDuplicates,      // of real-valued gradients: identical rows
    kDiagonal,        // spans up to 1e40
    kIllConditioned,  // eigenvalues geometric down to 1e-14
    kScaled,          // 1e-150 to 1e150
    kGradedRows,      // objectives of different magnitude, up to 1e12
    kNearlyParallel,
    kNearTies,  // near duplicates, and multipliers near zero
    kHilbert,
    kFamilies
};

inline const char* name(int family) {
    static const char* const names[] = {"square Wishart",
                                        "tall Wishart",
                                        "rank deficient",
                                        "offset Wishart",
                                        "integer rank 1",
                                        "integer low rank",
                                        "integer duplicates",
                                        "integer opposites",
                                        "zero rows",
                                        "signs",
                                        "zeros",
                                        "duplicates",
                                        "diagonal",
                                        "ill-conditioned",
                                        "scaled",
                                        "graded rows",
                                        "nearly parallel",
                                        "near ties",
                                        "Hilbert"};
    return names[family];
}
inline bool singular_by_construction(int family) { return family >= kIntegerRankOne && family <= kZeros; }

class Generator {
  public:
    explicit Generator(unsigned long long seed) : engine_(seed) {}

    double normal() { return normal_(engine_); }
    double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
    int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }

    // Uniform, or random with some zeros.
    std::vector<double> preference(int n, bool even) {
        std::vector<double> p(n, 1.0 / n);
        if (even) return p;
        double sum = 0.0;
        for (double& x : p) sum += x = integer(0, 4) ? uniform(0.0, 1.0) : 0.0;
        if (sum == 0.0) return std::vector<double>(n, 1.0 / n);
        for (double& x : p) x /= sum;
        return p;
    }

    std::vector<double> gram(int family, int n) {
        const int d = family == kTallWishart      ? 8 * n
                      : family == kRankDeficient  ? integer(1, n)
                      : family == kIntegerRankOne ? 1
                      : family == kIntegerLowRank ? integer(1, 3)
                      : family == kSigns          ? integer(1, n)
                                                  : n;
        std::vector<double> j(static_cast<std::size_t>(n) * d), m(static_cast<std::size_t>(n) * n);
        const auto row = [&](int i) { return j.data() + static_cast<std::size_t>(i) * d; };
        const bool integers = singular_by_construction(family);
        for (double& x : j) x = integers ? integer(-3, 3) : normal();
        const double small = std::pow(10.0, uniform(-12.0, -2.0));
        switch (family) {
            case kSigns:
                for (double& x : j) x = integer(0, 1) ? 1.0 : -1.0;
                break;
            case kZeros:
                for (double& x : j) x = 0.0;
                break;
            case kOffsetWishart:
                for (int i = 0; i < n; ++i) row(i)[0] += std::sqrt(n);
                break;
            case kIntegerDuplicates:
            case kDuplicates:
            case kIntegerOpposites:
            case kZeroRows:
                for (int i = 1; i < n; ++i) {
                    if (integer(0, 1)) continue;
                    const int other = integer(0, i - 1);
                    const double sign = family == kZeroRows ? 0.0 : family == kIntegerOpposites ? -1.0 : 1.0;
                    for (int k = 0; k < d; ++k) row(i)[k] = sign * row(other)[k];
                }
                if (family == kZeroRows)
                    for (int k = 0, i = integer(0, n - 1); k < d; ++k) row(i)[k] = 0.0;
                break;
            case kDiagonal: {
                const double span = uniform(0.0, 40.0);
                for (int i = 0; i < n; ++i) {
                    for (int k = 0; k < d; ++k) row(i)[k] = 0.0;
                    row(i)[i] = std::pow(10.0, uniform(-0.5, 0.0) * span);
                }
                break;
            }
            case kIllConditioned:  // J = Q diag, Q orthogonal by Gram-Schmidt, twice
                for (int pass = 0; pass < 2; ++pass)
                    for (int i = 0; i < n; ++i) {
                        for (int h = 0; h < i; ++h) {
                            double dot = 0.0;
                            for (int k = 0; k < d; ++k) dot += row(i)[k] * row(h)[k];
                            for (int k = 0; k < d; ++k) row(i)[k] -= dot * row(h)[k];
                        }
                        double norm = 0.0;
                        for (int k = 0; k < d; ++k) norm += row(i)[k] * row(i)[k];
                        for (int k = 0; k < d; ++k) row(i)[k] /= std::sqrt(norm);
                    }
                for (int i = 0; i < n; ++i)
                    for (int k = 0; k < d; ++k) row(i)[k] *= std::pow(10.0, -7.0 * k / (n > 1 ? n - 1 : 1));
                break;
            case kScaled: {
                const double scale = std::pow(10.0, uniform(-75.0, 75.0));
                for (double& x : j) x *= scale;
                break;
            }
            case kGradedRows:
                for (int i = 0; i < n; ++i) {
                    const double scale = std::pow(10.0, uniform(-6.0, 0.0));
                    for (int k = 0; k < d; ++k) row(i)[k] *= scale;
                }
                break;
            case kNearlyParallel:
                for (int i = 1; i < n; ++i)
                    for (int k = 0; k < d; ++k) row(i)[k] = row(0)[k] + small * row(i)[k];
                break;
            case kNearTies:
                for (int i = 1; i < n; ++i) {
                    if (integer(0, 1)) continue;
                    const double* const other = row(integer(0, i - 1));
                    for (int k = 0; k < d; ++k) row(i)[k] = other[k] + small * row(i)[k];
                }
                break;
            default:
                break;
        }
        for (int a = 0; a < n; ++a)
            for (int b = 0; b <= a; ++b) {
                double sum = 0.0;
                for (int k = 0; k < d; ++k) sum += row(a)[k] * row(b)[k];
                if (family == kHilbert) sum = 1.0 / (a + b + 1);
                m[static_cast<std::size_t>(a) * n + b] = m[static_cast<std::size_t>(b) * n + a] = sum;
            }
        if (family == kNearTies && n > 1 && integer(0, 1)) {  // a row orthogonal to c's, as long as the optimum
            const int tied = integer(0, n - 1);
            const double level = uniform(0.0, 1.0) / n;
            for (int i = 0; i < n; ++i)
                m[static_cast<std::size_t>(tied) * n + i] = m[static_cast<std::size_t>(i) * n + tied] =
                    i == tied ? 1.0 + n : level * (1.0 + small);
            for (int i = 0; i < n; ++i)
                for (int k = 0; k < n; ++k)
                    if (i != tied && k != tied) m[static_cast<std::size_t>(i) * n + k] = i == k ? level * (n - 1) : 0.0;
        }
        return m;
    }

  private:
    std::mt19937_64 engine_;
    std::normal_distribution<double> normal_;
};

// Wolfe's certificate in long double: how far a gradient component lies below their mean over c, relative
// to max M_ii; infinity when c is not in the simplex. Objectives that are not present must have no weight.
inline double kkt_residual(int n, const std::vector<double>& m, const std::vector<double>& preference,
                           double regularization, const std::vector<double>& c,
                           const unsigned char* present = nullptr) {
    long double largest = 0.0L, sum = 0.0L, mass = 0.0L, mean = 0.0L, smallest = HUGE_VALL;
    int count = 0;
    for (int i = 0; i < n; ++i) {
        if (!(c[i] >= 0.0 && c[i] <= 1.0 + 1e-12)) return HUGE_VAL;
        sum += c[i];
        if (present && !present[i]) {
            if (c[i] != 0.0) return HUGE_VAL;
            continue;
        }
        ++count;
        mass += preference[i];
        largest = std::fmax(largest, static_cast<long double>(m[static_cast<std::size_t>(i) * n + i]));
    }
    if (std::fabs(static_cast<double>(sum - 1.0L)) > 1e-13) return HUGE_VAL;
    if (largest == 0.0L) largest = 1.0L;
    for (int i = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        const long double p = mass > 0.0L ? preference[i] / mass : 1.0L / count;
        long double gradient = regularization * largest * (c[i] - p);
        for (int k = 0; k < n; ++k)
            if (c[k] != 0.0) gradient += static_cast<long double>(m[static_cast<std::size_t>(i) * n + k]) * c[k];
        mean += c[i] * gradient;
        smallest = std::fmin(smallest, gradient);
    }
    return static_cast<double>((mean - smallest) / largest);
}

}  // namespace families
