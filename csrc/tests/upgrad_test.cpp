// UPGrad's weights on random matrices of every family: the conditions of optimality of each projection, non-conflict,
// linearity in the objectives' scales, permutation, presence. upgrad_test [count] [seed] [largest n]
#include "core/upgrad.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "min_norm_families.hpp"

namespace {

using Vec = std::vector<double>;

int failures = 0;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition) && ++failures < 40) {                          \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)

struct Solution {
    Vec weights;
    pama::SolverResult result;
};

Solution solve(int n, const Vec& gram, const Vec& preference = {}, const unsigned char* present = nullptr) {
    Solution s{Vec(n, -1.0), {}};
    Vec workspace(pama::upgrad_workspace(n), std::nan(""));
    s.result = pama::upgrad_solve(pama::MatrixView<double>{n, gram.data(), n, 1},
                                  preference.empty() ? nullptr : preference.data(), present, s.weights.data(),
                                  workspace.data());
    return s;
}

// How far (Mc)_j lies below 0, of |g_j| times the length of the longest c_k g_k, in long double.
double conflict(int n, const Vec& gram, const Vec& c) {
    long double worst = 0.0L, longest = 0.0L;
    for (int k = 0; k < n; ++k)
        longest = std::fmax(longest, c[k] * std::sqrt(static_cast<long double>(gram[k * n + k])));
    for (int j = 0; j < n; ++j) {
        if (!(gram[j * n + j] > 0.0)) continue;
        long double sum = 0.0L;
        for (int k = 0; k < n; ++k) sum += static_cast<long double>(gram[j * n + k]) * c[k];
        worst = std::fmin(worst, sum / std::sqrt(static_cast<long double>(gram[j * n + j])));
    }
    return longest > 0.0L ? static_cast<double>(-worst / longest) : 0.0;
}

void check_simplex(const char* what, int n, const Vec& c) {
    double sum = 0.0;
    for (const double w : c) {
        CHECK(w >= 0.0, "%s n=%d: %g", what, n, w);
        sum += w;
    }
    CHECK(std::fabs(sum - 1.0) <= 1e-14 * n + 1e-15, "%s n=%d: sum - 1 = %g", what, n, sum - 1.0);
}

// c from the definition, by Lawson and Hanson's method with one index at a time in long double, with its own ridge.
Vec judge(int n, const Vec& gram, const Vec& preference, long double ridge) {
    std::vector<long double> total(n, 0.0L);
    for (int i = 0; i < n; ++i) {
        std::vector<long double> x(n, 0.0L), b(n);
        for (int j = 0; j < n; ++j) b[j] = -static_cast<long double>(gram[i * n + j]);
        std::vector<int> inside(n, 0);
        for (int round = 0; round < 40 * n; ++round) {
            int enter = -1;
            long double most = 1e-15L;
            for (int j = 0; j < n; ++j) {
                if (inside[j]) continue;
                long double descent = b[j];
                for (int k = 0; k < n; ++k) descent -= gram[j * n + k] * x[k];
                if (descent > most) most = descent, enter = j;
            }
            if (enter < 0) break;
            inside[enter] = 1;
            while (true) {
                std::vector<int> s;
                for (int j = 0; j < n; ++j)
                    if (inside[j]) s.push_back(j);
                const int m = static_cast<int>(s.size());
                if (m == 0) break;
                std::vector<std::vector<long double>> a(m, std::vector<long double>(m + 1));
                for (int r = 0; r < m; ++r) {
                    for (int k = 0; k < m; ++k) a[r][k] = gram[s[r] * n + s[k]] + (r == k ? ridge : 0.0L);
                    a[r][m] = b[s[r]];
                }
                for (int k = 0; k < m; ++k)
                    for (int r = 0; r < m; ++r) {
                        if (r == k) continue;
                        const long double factor = a[r][k] / a[k][k];
                        for (int q = k; q <= m; ++q) a[r][q] -= factor * a[k][q];
                    }
                long double step = 1.0L;
                int leaves = -1;
                for (int k = 0; k < m; ++k) {
                    const long double y = a[k][m] / a[k][k];
                    if (y > 0.0L) continue;
                    const long double ratio = x[s[k]] > 0.0L ? x[s[k]] / (x[s[k]] - y) : 0.0L;
                    if (leaves < 0 || ratio < step) step = ratio, leaves = s[k];
                }
                for (int k = 0; k < m; ++k) x[s[k]] += step * (a[k][m] / a[k][k] - x[s[k]]);
                if (leaves < 0) break;
                inside[leaves] = 0;
                x[leaves] = 0.0L;
            }
        }
        for (int j = 0; j < n; ++j) total[j] += preference[i] * (x[j] + (i == j ? 1.0L : 0.0L));
    }
    const long double sum = std::accumulate(total.begin(), total.end(), 0.0L);
    Vec c(n);
    for (int j = 0; j < n; ++j) c[j] = static_cast<double>(total[j] / sum);
    return c;
}

void test_families(long long count, unsigned long long seed, int largest_n) {
    families::Generator random(seed);
    double worst[families::kFamilies] = {}, worst_conflict[families::kFamilies] = {};
    long long total[families::kFamilies] = {}, problems[families::kFamilies] = {};
    int most[families::kFamilies] = {};
    for (long long i = 0; i < count; ++i) {
        const int family = static_cast<int>(i % families::kFamilies);
        const int n = random.integer(0, 3) ? random.integer(1, std::min(largest_n, 12)) : random.integer(1, largest_n);
        const Vec gram = random.gram(family, n), p = random.preference(n, random.integer(0, 1));
        const Solution s = solve(n, gram, p);
        const double against = conflict(n, gram, s.weights);
        check_simplex(families::name(family), n, s.weights);
        CHECK(s.result.status == pama::SolveStatus::solved && s.result.residual <= 1e-10,
              "%s n=%d matrix=%lld: status %d, residual %g", families::name(family), n, i,
              static_cast<int>(s.result.status), s.result.residual);
        CHECK(against <= 1e-9, "%s n=%d matrix=%lld: conflict %g", families::name(family), n, i, against);
        CHECK(s.result.optimum >= 0.0, "%s n=%d: optimum %g", families::name(family), n, s.result.optimum);
        worst[family] = std::max(worst[family], s.result.residual);
        worst_conflict[family] = std::max(worst_conflict[family], against);
        most[family] = std::max(most[family], s.result.factorisations);
        total[family] += s.result.factorisations;
        problems[family] += n;
    }
    for (int f = 0; f < families::kFamilies; ++f)
        std::printf("%-20s factorisations for each objective %.2f residual %.1e conflict %.1e\n", families::name(f),
                    problems[f] ? static_cast<double>(total[f]) / static_cast<double>(problems[f]) : 0.0, worst[f],
                    worst_conflict[f]);
}

// Against the judge; on singular matrices the answer nearest to p_i e_i, which its ridge chooses too.
void test_judge() {
    families::Generator random(5);
    double worst = 0.0, worst_singular = 0.0;
    for (int i = 0; i < 4000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, 6);
        if (family >= families::kDiagonal && family != families::kNearTies) continue;
        const Vec gram = random.gram(family, n), p = random.preference(n, random.integer(0, 1));
        double largest = 0.0;
        for (int k = 0; k < n; ++k) largest = std::max(largest, gram[k * n + k]);
        Vec unit = gram;
        for (double& x : unit) x /= largest > 0.0 ? largest : 1.0;
        const bool singular = families::singular_by_construction(family) || family == families::kRankDeficient ||
                              family == families::kDuplicates;
        const Vec c = judge(n, unit, p, singular ? 1e-9L : 1e-17L);
        const Solution s = solve(n, gram, p);
        double distance = 0.0;
        if (family == families::kNearTies) {  // of near duplicates only Mc is determined
            for (int j = 0; j < n; ++j) {
                double product = 0.0;
                for (int k = 0; k < n; ++k) product += unit[j * n + k] * (c[k] - s.weights[k]);
                distance = std::max(distance, std::fabs(product));
            }
        } else {
            for (int k = 0; k < n; ++k) distance = std::max(distance, std::fabs(c[k] - s.weights[k]));
        }
        (singular ? worst_singular : worst) = std::max(singular ? worst_singular : worst, distance);
        CHECK(distance <= (singular ? 1e-6 : 1e-7), "%s n=%d (%d): %g", families::name(family), n, i, distance);
    }
    std::printf("judge: within %.1e, on singular matrices %.1e\n", worst, worst_singular);
}

// The matrix after objective i is multiplied by scales[i].
Vec rescaled(int n, Vec gram, const Vec& scales) {
    for (int a = 0; a < n; ++a)
        for (int b = 0; b < n; ++b) gram[a * n + b] *= scales[a] * scales[b];
    return gram;
}

// Well-posed matrices. The combined direction is linear in the objectives' scales: in multiples of the first gradients,
// c(s) is the sum of s_k p_k w_k, w_k = e_k + x being the projection of objective k, up to its normalisation. With all
// the preference on k, the answer is w_k over its sum at any scales.
void test_equivariance() {
    families::Generator random(6);
    double worst = 0.0, worst_sum = 0.0, worst_permuted = 0.0;
    for (int i = 0; i < 1000; ++i) {
        const int n = random.integer(1, 16);
        const Vec gram = random.gram(i & 1 ? families::kTallWishart : families::kOffsetWishart, n);
        const Vec p = random.preference(n, random.integer(0, 1));
        Vec scales(n), expected(n, 0.0);
        for (double& x : scales) x = std::pow(10.0, random.uniform(-3.0, 3.0));
        const Vec scaled = rescaled(n, gram, scales);
        const auto in_first_gradients = [&](const Vec& preference) {
            Vec c = solve(n, scaled, preference).weights;
            double sum = 0.0;
            for (int a = 0; a < n; ++a) sum += c[a] *= scales[a];
            for (double& x : c) x /= sum;
            return c;
        };
        bool known = true;
        for (int k = 0; k < n; ++k) {
            Vec only(n, 0.0);
            only[k] = 1.0;
            const Vec w = solve(n, gram, only).weights, v = in_first_gradients(only);
            double gradient = 0.0;
            for (int a = 0; a < n; ++a) {
                worst = std::max(worst, std::fabs(v[a] - w[a]));
                gradient += gram[k * n + a] * w[a];
                expected[a] += scales[k] * p[k] * w[a] / w[k];
            }
            known = known && gradient > 1e-9;  // then x_k = 0, which tells the sum of w_k
        }
        const double sum = std::accumulate(expected.begin(), expected.end(), 0.0);
        const Vec c = in_first_gradients(p);
        for (int a = 0; a < n && known; ++a) worst_sum = std::max(worst_sum, std::fabs(c[a] - expected[a] / sum));

        std::vector<int> order(n);
        std::iota(order.begin(), order.end(), 0);
        for (int k = n - 1; k > 0; --k) std::swap(order[k], order[random.integer(0, k)]);
        Vec permuted(gram.size()), permuted_p(n);
        for (int a = 0; a < n; ++a) {
            permuted_p[a] = p[order[a]];
            for (int b = 0; b < n; ++b) permuted[a * n + b] = gram[order[a] * n + order[b]];
        }
        const Vec straight = solve(n, gram, p).weights, turned = solve(n, permuted, permuted_p).weights;
        for (int a = 0; a < n; ++a)
            worst_permuted = std::max(worst_permuted, std::fabs(turned[a] - straight[order[a]]));
    }
    CHECK(worst <= 1e-9 && worst_sum <= 1e-9, "projections %g, directions %g", worst, worst_sum);
    CHECK(worst_permuted <= 1e-9, "%g", worst_permuted);
    std::printf("scales: projections within %.1e, directions %.1e; permutation within %.1e\n", worst, worst_sum,
                worst_permuted);
}

void test_exact_scaling_and_presence() {
    families::Generator random(9);
    for (int i = 0; i < 2000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, 12);
        const Vec gram = random.gram(family, n), p = random.preference(n, random.integer(0, 1));
        const Solution s = solve(n, gram, p);
        Vec scaled = gram;
        const int exponent = family == families::kDiagonal ? 10 : 2 * random.integer(-200, 200);
        for (double& x : scaled) x = std::ldexp(x, exponent);
        if (n != 2) {
            const Solution t = solve(n, scaled, p);
            CHECK(t.weights == s.weights && t.result.optimum == std::ldexp(s.result.optimum, exponent),
                  "%s n=%d: not invariant under 2^%d", families::name(family), n, exponent);
        }
        std::vector<unsigned char> present(n);
        std::vector<int> kept;
        double mass = 0.0;
        for (int k = 0; k < n; ++k) {
            present[k] = static_cast<unsigned char>(random.integer(0, 1));
            if (present[k]) kept.push_back(k), mass += p[k];
        }
        const int m = static_cast<int>(kept.size());
        Vec part(m * m), part_p(m), masked = gram;
        for (int a = 0; a < m; ++a) {
            part_p[a] = p[kept[a]];
            for (int b = 0; b < m; ++b) part[a * m + b] = gram[kept[a] * n + kept[b]];
        }
        for (int a = 0; a < n; ++a)
            for (int b = 0; b < n; ++b)
                if (!present[a] || !present[b]) masked[a * n + b] = std::nan("");
        const Solution u = solve(n, masked, p, present.data());
        if (mass == 0.0) {
            CHECK(u.weights == p && u.result.optimum == 0.0, "n=%d: no objective with a preference", n);
            continue;
        }
        const Solution v = solve(m, part, part_p);
        for (int k = 0, a = 0; k < n; ++k)
            CHECK(std::fabs(u.weights[k] - (present[k] ? v.weights[a++] : 0.0)) <= (m == 2 ? 1e-12 : 0.0),
                  "%s n=%d m=%d", families::name(family), n, m);
    }
}

void test_known() {
    CHECK(solve(1, {4.0}).weights == Vec{1.0} && solve(1, {4.0}).result.optimum == 4.0, "n=1");
    CHECK(solve(3, {1, 0, 0, 0, 2, 0, 0, 0, 3}).weights == (Vec{1.0 / 3, 1.0 / 3, 1.0 / 3}), "orthogonal");
    CHECK(solve(2, {1, -1, -1, 1}).weights == (Vec{0.5, 0.5}), "opposite");
    CHECK(solve(2, {1, -1, -1, 1}).result.optimum == 0.0, "opposite");
    const Vec pair = solve(2, {1, -0.5, -0.5, 4}, {0.25, 0.75}).weights;  // c = (1/4 + 3/8, 3/4 + 1/32)
    CHECK(std::fabs(pair[0] - 0.625 / 1.40625) < 1e-15, "pair %g", pair[0]);
    CHECK(solve(3, Vec(9, 0.0), {0.5, 0.25, 0.25}).weights == (Vec{0.5, 0.25, 0.25}), "zeros");
    // Duplicates share what their preferences give: symmetric.
    const Vec twins = solve(3, {1, 1, -0.5, 1, 1, -0.5, -0.5, -0.5, 1}).weights;
    CHECK(twins[0] == twins[1], "twins %g %g", twins[0], twins[1]);
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
        for (int n = 1; n <= 5; ++n)
            for (int k = 0; k < n * n; ++k) {
                families::Generator random(23);
                Vec gram = random.gram(families::kSquareWishart, n);
                gram[k] = bad;
                const Solution s = solve(n, gram);
                CHECK(std::isnan(s.weights[0]) && std::isnan(s.result.optimum), "n=%d %g", n, bad);
                Vec p(n, 1.0 / n);
                p[n - 1] = bad;
                CHECK(std::isnan(solve(n, random.gram(families::kSquareWishart, n), p).weights[0]), "n=%d p %g", n,
                      bad);
            }
}

// Singular matrices of half the rank, the hardest kind, need few systems; a NaN residual is the worst.
void test_work() {
    std::mt19937_64 engine(31);
    std::normal_distribution<double> normal;
    for (const int n : {31, 61, 100}) {
        const int rank = n / 2;
        double systems = 0.0;
        for (int i = 0; i < 5; ++i) {
            Vec factor(n * rank), gram(n * n);
            for (double& x : factor) x = normal(engine);
            for (int a = 0; a < n; ++a)
                for (int b = 0; b < n; ++b)
                    for (int k = 0; k < rank; ++k) gram[a * n + b] += factor[a * rank + k] * factor[b * rank + k];
            const Solution s = solve(n, gram);
            CHECK(s.result.residual <= pama::kPromisedResidual, "n=%d: residual %g", n, s.result.residual);
            systems += static_cast<double>(s.result.factorisations) / n / 5;
        }
        CHECK(systems <= (pama::upgrad::kLargestInLanes > 0 ? 12.0 : 40.0), "n=%d: %g systems", n, systems);
    }
    CHECK(pama::is_worse(std::nan(""), 1.0) && !pama::is_worse(1.0, std::nan("")) && pama::is_worse(2.0, 1.0) &&
              !pama::is_worse(1.0, 1.0),
          "residuals");
}

// Rounded to float32, and matrices that are no Gram matrices: a point of the simplex, never silently inexact.
void test_not_semidefinite() {
    families::Generator random(29);
    double worst = 0.0;
    for (int i = 0; i < 4000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, i % 10 ? 8 : 40);
        Vec gram = random.gram(family == families::kScaled ? families::kRankDeficient : family, n);
        for (double& x : gram) x = static_cast<double>(static_cast<float>(x));
        const Solution s = solve(n, gram);
        check_simplex("rounded", n, s.weights);
        worst = std::max(worst, s.result.residual);
        CHECK(s.result.residual <= 1e-4 && !pama::unsolved(s.result), "%s n=%d (%d) rounded: %g status %d",
              families::name(family), n, i, s.result.residual, static_cast<int>(s.result.status));
        for (double& x : gram) x = random.normal();
        const Solution any = solve(n, gram);
        CHECK(!pama::unsolved(any.result), "random n=%d (%d): %d", n, i, static_cast<int>(any.result.status));
        check_simplex("random", n, any.weights);
    }
    std::printf("rounded to float32: residual at most %.1e\n", worst);
}

}  // namespace

int main(int argc, char** argv) {
    const long long count = argc > 1 ? std::atoll(argv[1]) : 4000;
    test_known();
    test_families(count, argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1, argc > 3 ? std::atoi(argv[3]) : 40);
    test_judge();
    test_equivariance();
    test_exact_scaling_and_presence();
    test_not_semidefinite();
    test_work();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
