// Properties of the min-norm solver.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <vector>

#include "min_norm_checks.hpp"
#include "min_norm_families.hpp"

namespace {

using namespace min_norm_tests;

// KKT, with and without regularization; scaling by powers of two; permutation; determinism.
void test_properties() {
    families::Generator random(11);
    double worst_kkt = 0.0, worst_permuted = 0.0;
    for (int i = 0; i < 4000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, i % 10 ? 12 : 64);
        const Vec gram = random.gram(family, n), preference = random.preference(n, random.integer(0, 1));
        const double regularization = random.integer(0, 1) ? 0.0 : std::pow(10.0, random.uniform(-6.0, 1.0));
        const Solution s = solve(n, gram, preference, regularization);
        const double kkt = families::kkt_residual(n, gram, preference, regularization, s.weights);
        worst_kkt = std::max(worst_kkt, kkt);
        CHECK(kkt <= 1e-10, "%s n=%d regularization=%g: %g", families::name(family), n, regularization, kkt);
        CHECK(s.result.residual <= 1e-10, "%s n=%d: %g", families::name(family), n, s.result.residual);
        CHECK(s.result.status == pama::SolveStatus::solved && s.result.optimum >= 0.0, "%s n=%d: optimum %g",
              families::name(family), n, s.result.optimum);

        Vec scaled = gram;
        const int exponent = family == families::kDiagonal ? 10 : random.integer(-400, 400);
        for (double& x : scaled) x = std::ldexp(x, exponent);
        const Solution t = solve(n, scaled, preference, regularization);
        CHECK(t.weights == s.weights, "%s n=%d: not invariant under 2^%d", families::name(family), n, exponent);
        CHECK(t.result.optimum == std::ldexp(s.result.optimum, exponent), "%s n=%d", families::name(family), n);

        std::vector<int> order(n);
        std::iota(order.begin(), order.end(), 0);
        for (int k = n - 1; k > 0; --k) std::swap(order[k], order[random.integer(0, k)]);
        Vec permuted(gram.size()), permuted_preference(n);
        for (int a = 0; a < n; ++a) {
            permuted_preference[a] = preference[order[a]];
            for (int b = 0; b < n; ++b) permuted[a * n + b] = gram[order[a] * n + order[b]];
        }
        const Solution u = solve(n, permuted, permuted_preference, regularization);
        CHECK(std::fabs(u.result.optimum - s.result.optimum) <= 2e-12 * largest_diagonal(n, gram), "%s n=%d",
              families::name(family), n);
        // Weights follow only where the problem determines them: strictly convex, or nearest to p.
        if (regularization < 1e-4 && !families::singular_by_construction(family)) continue;
        for (int a = 0; a < n; ++a)
            worst_permuted = std::max(worst_permuted, std::fabs(u.weights[a] - s.weights[order[a]]));
        CHECK(worst_permuted <= 2e-6, "%s n=%d: %g", families::name(family), n, worst_permuted);
    }
    std::printf("properties: kkt %.1e, permutation within %.1e\n", worst_kkt, worst_permuted);
}

void test_duplicates() {
    families::Generator random(13);
    for (int i = 0; i < 1000; ++i) {
        const int n = random.integer(2, 12);
        const Vec gram = random.gram(i & 1 ? families::kDuplicates : families::kIntegerDuplicates, n);
        const double regularization = i % 3 ? 0.0 : std::pow(10.0, random.uniform(-13.0, 1.0));
        const Solution s = solve(n, gram, {}, regularization);
        for (int a = 0; a < n; ++a)
            for (int b = 0; b < a; ++b)
                if (std::equal(gram.begin() + a * n, gram.begin() + (a + 1) * n, gram.begin() + b * n))
                    CHECK(std::fabs(s.weights[a] - s.weights[b]) <= 1e-12, "n=%d regularization=%g: %g, %g", n,
                          regularization, s.weights[a], s.weights[b]);
    }
}

void test_presence() {
    families::Generator random(17);
    for (int i = 0; i < 1000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, 16);
        Vec gram = random.gram(family, n);
        const Vec preference = random.preference(n, random.integer(0, 1));
        const double regularization = random.integer(0, 1) ? 0.0 : random.uniform(0.0, 1.0);
        std::vector<unsigned char> present(n);
        std::vector<int> kept;
        double mass = 0.0;
        for (int k = 0; k < n; ++k) {
            present[k] = static_cast<unsigned char>(random.integer(0, 1));
            if (!present[k]) continue;
            kept.push_back(k);
            mass += preference[k];
        }
        const int m = static_cast<int>(kept.size());
        Vec part(m * m), part_preference(m);
        for (int a = 0; a < m; ++a) {
            part_preference[a] = mass > 0.0 ? preference[kept[a]] : 1.0 / m;
            for (int b = 0; b < m; ++b) part[a * m + b] = gram[kept[a] * n + kept[b]];
        }
        for (int a = 0; a < n; ++a)  // absent entries are not looked at
            for (int b = 0; b < n; ++b)
                if (!present[a] || !present[b]) gram[a * n + b] = std::nan("");
        const Solution s = solve(n, gram, preference, regularization, present.data());
        if (m == 0) {
            CHECK(s.weights == preference && s.result.optimum == 0.0, "n=%d none present", n);
            continue;
        }
        const Solution t = solve(m, part, part_preference, regularization);
        for (int k = 0, a = 0; k < n; ++k) {
            const double expected = present[k] ? t.weights[a++] : 0.0;
            CHECK(s.weights[k] == expected, "%s n=%d m=%d: %g, not %g", families::name(family), n, m, s.weights[k],
                  expected);
        }
        CHECK(s.result.optimum == t.result.optimum, "%s n=%d", families::name(family), n);
    }
}

// As the regularization grows, c moves towards p and c'Mc rises.
void test_regularization_path() {
    families::Generator random(19);
    for (int i = 0; i < 500; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, 12);
        const Vec gram = random.gram(family, n), preference = random.preference(n, false);
        const double scale = largest_diagonal(n, gram);
        double last_value = -HUGE_VAL, last_distance = HUGE_VAL;
        for (double regularization = 0.0; regularization < 1e4;
             regularization = regularization == 0.0 ? 1e-6 : 3.0 * regularization) {
            const Solution s = solve(n, gram, preference, regularization);
            double distance = 0.0;
            for (int k = 0; k < n; ++k) distance += std::pow(s.weights[k] - preference[k], 2);
            CHECK(s.result.optimum >= last_value - 1e-12 * scale, "%s n=%d regularization=%g: %g < %g",
                  families::name(family), n, regularization, s.result.optimum, last_value);
            const bool exact = regularization > 0.0 || families::singular_by_construction(family);
            if (exact)
                CHECK(distance <= last_distance + 1e-6, "%s n=%d regularization=%g: %g > %g", families::name(family), n,
                      regularization, distance, last_distance);
            last_value = s.result.optimum;
            if (exact) last_distance = distance;
        }
        CHECK(last_distance <= 1e-6, "%s n=%d: %g from the preference", families::name(family), n, last_distance);
    }
}

void test_not_finite() {
    const double bad[] = {std::nan(""), HUGE_VAL, -HUGE_VAL};
    families::Generator random(23);
    for (int n = 1; n <= 9; ++n)
        for (int i = 0; i < n; ++i)
            for (int k = 0; k < n; ++k)
                for (const double value : bad)
                    for (const int family : {families::kSquareWishart, families::kZeros}) {
                        Vec gram = random.gram(family, n);
                        gram[i * n + k] = value;
                        const Solution s = solve(n, gram);
                        CHECK(std::isnan(s.result.optimum), "n=%d (%d, %d) = %g", n, i, k, value);
                        for (const double w : s.weights) CHECK(std::isnan(w), "n=%d (%d, %d) = %g", n, i, k, value);
                    }
    for (int n = 1; n <= 9; ++n)
        for (const double value : bad) {
            Vec preference(n, 1.0 / n);
            preference[n - 1] = value;
            const Solution s = solve(n, random.gram(families::kSquareWishart, n), preference);
            CHECK(std::isnan(s.weights[0]) && std::isnan(s.result.optimum), "n=%d preference %g", n, value);
            const Solution t = solve(n, random.gram(families::kSquareWishart, n), {}, value);
            CHECK(std::isnan(t.weights[0]) && std::isnan(t.result.optimum), "n=%d regularization %g", n, value);
        }
}

// A matrix that breaks the contract still ends with a point of the simplex.
void test_any_finite_matrix() {
    families::Generator random(29);
    int most = 0;
    for (int i = 0; i < 4000; ++i) {
        const int n = random.integer(1, i % 10 ? 8 : 48);
        Vec gram(n * n);
        const double range = i % 4 == 3 ? 300.0 : 3.0;
        for (double& x : gram) x = random.normal() * (i % 2 ? std::pow(10.0, random.uniform(-range, range)) : 1.0);
        if (i % 4 == 2)
            for (int a = 0; a < n; ++a)
                for (int b = 0; b < a; ++b) gram[a * n + b] = gram[b * n + a];
        const Solution s = solve(n, gram, random.preference(n, false), i % 3 ? 0.0 : 0.1);
        most = std::max(most, s.result.factorisations);
        double sum = 0.0;
        bool inside = true;
        for (const double w : s.weights) {
            sum += w;
            inside = inside && w >= 0.0;
        }
        CHECK(inside && std::fabs(sum - 1.0) <= 1e-12, "n=%d (%d): sum %g", n, i, sum);
    }
    std::printf("any finite matrix: at most %d factorisations\n", most);
}

// Without a factorisation left, the status says so.
void test_iteration_limit() {
    families::Generator random(41);
    const int n = 20;
    const Vec gram = random.gram(families::kSquareWishart, n);
    Vec workspace(pama::min_norm_workspace(n));
    pama::min_norm::Problem s;
    s.bind(n, workspace.data());
    s.weight = 0.0;
    s.most = 1;
    for (int i = 0; i < n; ++i) {
        s.preference[i] = 1.0 / n;
        for (int k = 0; k < s.stride; ++k) s.row_of(i)[k] = k < n ? gram[i * n + k] / n : 0.0;
        s.own[i] = s.row_of(i)[i];
    }
    const double residual = s.minimise();
    CHECK(s.status() == pama::SolveStatus::iteration_limit && s.factorisations == 1, "residual %g", residual);
}

void test_layouts() {
    families::Generator random(31);
    for (const int n : {1, 2, 3, 8, 33}) {
        const Vec gram = random.gram(families::kSquareWishart, n);
        const Solution s = solve(n, gram);
        std::vector<float> wide(3 * n * 2 * n, std::numeric_limits<float>::quiet_NaN());
        Vec single(n * n), weights(n), workspace(pama::min_norm_workspace(n));
        for (int i = 0; i < n * n; ++i)
            wide[i / n * 2 * n * 3 + i % n * 3] = static_cast<float>(gram[i]),
                                             single[i] = static_cast<double>(static_cast<float>(gram[i]));
        pama::min_norm_solve(pama::MatrixView<float>{n, wide.data(), 6 * n, 3}, nullptr, nullptr, 0.0, weights.data(),
                             workspace.data());
        CHECK(weights == solve(n, single).weights, "n=%d float32 with strides", n);
        Vec skewed = gram;  // only the symmetric part counts
        for (int a = 0; a < n; ++a)
            for (int b = 0; b < a; ++b) skewed[a * n + b] += 0.25, skewed[b * n + a] -= 0.25;
        const Solution t = solve(n, skewed);
        for (int a = 0; a < n; ++a) CHECK(std::fabs(t.weights[a] - s.weights[a]) <= 1e-9, "n=%d", n);
    }
}

void test_known() {
    CHECK(solve(1, {4.0}).weights == Vec{1.0} && solve(1, {4.0}).result.optimum == 4.0, "n=1");
    const Solution pair = solve(2, {4.0, 0.0, 0.0, 1.0});
    CHECK(pair.weights == (Vec{0.2, 0.8}) && std::fabs(pair.result.optimum - 0.8) < 1e-15, "n=2");
    CHECK(solve(2, {1.0, 1.0, 1.0, 1.0}, {0.25, 0.75}).weights == (Vec{0.25, 0.75}), "duplicates");
    CHECK(solve(2, {1.0, -1.0, -1.0, 1.0}).weights == (Vec{0.5, 0.5}), "opposites");
    CHECK(solve(2, {1.0, 2.0, 2.0, 4.0}).weights == (Vec{1.0, 0.0}), "parallel");
    CHECK(solve(3, Vec(9, 0.0), {0.5, 0.25, 0.25}).weights == (Vec{0.5, 0.25, 0.25}), "zeros");
    const Solution wide = solve(3, {1.0, 0.0, 0.0, 0.0, 1e-30, 0.0, 0.0, 0.0, 1e-30});
    for (const double huge : {1e12, 1e40, 1e300}) {
        const Solution s = solve(3, {4.0, 1.0, 0.0, 1.0, 3.0, 1.0, 0.0, 1.0, 2.0}, {0.5, 0.25, 0.25}, huge);
        CHECK(std::fabs(s.weights[0] - 0.5) < 1e-11 && std::fabs(s.weights[1] - 0.25) < 1e-11,
              "regularization %g: %g, %g", huge, s.weights[0], s.weights[1]);
    }
    CHECK(wide.weights[1] == 0.5 && std::fabs(wide.weights[0] / 5e-31 - 1.0) < 1e-12, "wide diagonal");
    for (const int n : {1, 2, 3, 4, 8, 9, 20})
        for (const double scale : {1e-310, 1e-300, 1.0, 1e300, 1.7e308})
            for (const double huge : {1e9, 1e100, 1e200, 1.79e308}) {
                Vec gram(n * n, 0.0);
                for (int i = 0; i < n; ++i) gram[i * (n + 1)] = scale;
                for (const double w : solve(n, gram, {}, huge).weights)
                    CHECK(std::fabs(w - 1.0 / n) < 1e-15, "n=%d %g times 1, regularization %g: %g", n, scale, huge, w);
            }
    families::Generator random(37);
    for (const int n : {128, 300, 512}) {
        const Vec gram = random.gram(n == 300 ? families::kRankDeficient : families::kSquareWishart, n);
        const double kkt = families::kkt_residual(n, gram, Vec(n, 1.0 / n), 0.0, solve(n, gram).weights);
        CHECK(kkt <= 1e-10, "n=%d: %g", n, kkt);
    }
}

}  // namespace

int main() {
    test_known();
    test_properties();
    test_duplicates();
    test_presence();
    test_regularization_path();
    test_not_finite();
    test_any_finite_matrix();
    test_iteration_limit();
    test_layouts();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
