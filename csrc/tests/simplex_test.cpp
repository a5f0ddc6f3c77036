// The scalar simplex problem: optimality by its KKT conditions, on random and hard rows.
#include "core/simplex.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

int failures = 0;

void expect(bool holds, const char* what, int n, double found) {
    if (holds) return;
    if (++failures < 20) std::printf("FAILED %s: n = %d, found %.17g\n", what, n, found);
}

struct Row {
    std::vector<double> scores, preference;
    double regularization = 0, scale = -1;
};

struct Answer {
    std::vector<double> weights;
    double optimum;
};

Answer solve(const Row& row) {
    std::vector<double> a = row.scores, p = row.preference, c(a.size(), 1.0);
    const double optimum =
        pama::simplex_row(static_cast<int>(a.size()), a.data(), p.data(), row.regularization, row.scale, c.data());
    return {c, optimum};
}

double largest(const std::vector<double>& a) {
    double result = 0;
    for (double x : a) result = std::fmax(result, std::fabs(x));
    return result;
}

template <int N>
Answer solve_sorted(const Row& row) {
    const double size = largest(row.scores), unit = std::ldexp(1.0, std::ilogb(size));  // exact
    double a[N], c[N], low = INFINITY, high = -INFINITY;
    for (int i = 0; i < N; ++i) {
        a[i] = row.scores[i] / unit;
        low = std::fmin(low, a[i]);
        high = std::fmax(high, a[i]);
    }
    const double rho = row.regularization * (row.scale < 0 ? size * size : row.scale) / unit / unit;
    const double optimum = std::fmax(low, std::fmin(high, pama::simplex_sorted<double, N>(a, rho, c)));
    return {{c, c + N}, optimum * unit};
}

Answer solve_newton(const Row& row) {
    const int n = static_cast<int>(row.scores.size());
    const double unit = largest(row.scores), scale = row.scale < 0 ? 1.0 : row.scale / unit / unit;
    double sum = 0;
    for (const double x : row.scores) sum += x / unit;
    const double sign = sum < 0 ? -1 : 1, rho = row.regularization * scale;
    const auto score = [&](int i) { return sign * row.scores[i] / unit; };
    const auto found = pama::newton_multipliers(n, score, sign * sum / n, rho);
    Answer answer{{}, sign * rho * found.lambda * unit};
    for (int i = 0; i < n; ++i)
        answer.weights.push_back(std::fmax(found.tau - found.lambda * (score(i) - found.pivot), 0.0));
    return answer;
}

// c = [p - lambda a - tau]_+ with one lambda and one tau: with a.c = rho lambda for rho > 0, a.c = s* for rho = 0.
// Rounding of the n-term sums in `scores` of size 1 leaves 1e-12 (n <= 1000) in the multipliers' products.
void check(const Row& row, const Answer& answer) {
    const int n = static_cast<int>(row.scores.size());
    const double unit = largest(row.scores), tolerance = 1e-11;
    double sum = 0, value = 0, low = row.scores[0], high = low;
    for (int i = 0; i < n; ++i) {
        expect(answer.weights[i] >= 0, "non-negative", n, answer.weights[i]);
        sum += answer.weights[i];
        value += answer.weights[i] * (row.scores[i] / (unit > 0 ? unit : 1));
        low = std::fmin(low, row.scores[i]);
        high = std::fmax(high, row.scores[i]);
    }
    expect(std::fabs(sum - 1) < 1e-12, "sum", n, sum);
    if (unit == 0) {
        for (int i = 0; i < n; ++i)
            expect(std::fabs(answer.weights[i] - row.preference[i]) < 1e-15, "preference", n, answer.weights[i]);
        return;
    }
    if (row.regularization == 0) {
        const double projection = low > 0 ? low : (high < 0 ? high : 0.0);
        expect(answer.optimum == projection, "projection of 0", n, answer.optimum);
    }
    expect(std::fabs(value - answer.optimum / unit) < 1e-12, "value", n, value);
    const double scale = row.scale < 0 ? 1.0 : row.scale / unit / unit;
    if (row.regularization == 0) return;
    // gradient_i = (a.c) a_i + rho (c_i - p_i): equal on the support, no smaller elsewhere
    const double rho = row.regularization * scale;
    double level = 0;
    for (int i = 0; i < n; ++i)
        level += answer.weights[i] * (value * row.scores[i] / unit + rho * (answer.weights[i] - row.preference[i]));
    for (int i = 0; i < n; ++i) {
        const double gradient = value * row.scores[i] / unit + rho * (answer.weights[i] - row.preference[i]);
        const double slack = tolerance * std::fmax(1.0, rho);
        expect(gradient >= level - slack, "gradient", n, gradient - level);
        if (answer.weights[i] > 1e-9) expect(gradient <= level + slack, "support", n, gradient - level);
    }
}

// The sorted form and the Newton steps are for uniform preferences.
void check_uniform(Row row) {
    const std::size_t n = row.scores.size();
    if (largest(row.scores) == 0) return;
    for (double& p : row.preference) p = 1.0 / static_cast<double>(n);
    if (row.regularization > 0) check(row, solve_newton(row));
    if (n == 2) check(row, solve_sorted<2>(row));
    if (n == 3) check(row, solve_sorted<3>(row));
    if (n == 4) check(row, solve_sorted<4>(row));
    if (n == 7) check(row, solve_sorted<7>(row));
    if (n == 8) check(row, solve_sorted<8>(row));
    if (n == 16) check(row, solve_sorted<16>(row));
}

// With rho = 0 the answer is the limit rho -> 0. Rounding over rho leaves 1e-16 / 1e-12, and rows of tiny spread
// amplify it.
void check_limit(const Row& row) {
    Row near = row;
    near.regularization = 1e-12;
    const Answer limit = solve(row), close = solve(near);
    for (std::size_t i = 0; i < row.scores.size(); ++i)
        expect(std::fabs(limit.weights[i] - close.weights[i]) < 1e-6, "limit", static_cast<int>(row.scores.size()),
               limit.weights[i] - close.weights[i]);
}

void check_permutation(const Row& row) {
    Row turned = row;
    const std::size_t n = row.scores.size();
    for (std::size_t i = 0; i < n; ++i) {
        turned.scores[i] = row.scores[n - 1 - i];
        turned.preference[i] = row.preference[n - 1 - i];
    }
    const Answer answer = solve(row), other = solve(turned);
    for (std::size_t i = 0; i < n; ++i)
        expect(std::fabs(answer.weights[i] - other.weights[n - 1 - i]) < 1e-10, "permutation", static_cast<int>(n),
               answer.weights[i] - other.weights[n - 1 - i]);
}

void check_scale(const Row& row) {
    for (double k : {0x1p-900, 0x1p-40, 0x1p60, 0x1p900}) {
        Row scaled = row;
        for (double& x : scaled.scores) x *= k;
        const Answer answer = solve(row), other = solve(scaled);
        for (std::size_t i = 0; i < row.scores.size(); ++i)
            expect(answer.weights[i] == other.weights[i], "scale", static_cast<int>(row.scores.size()), k);
        expect(answer.optimum * k == other.optimum, "scale", static_cast<int>(row.scores.size()), k);
    }
}

// On the simplex whatever the span, in double and in float, and the optimum within the hull and to rounding of the
// largest score.
void check_span(std::mt19937_64& random) {
    std::uniform_real_distribution<double> uniform;
    const int n = 1 + static_cast<int>(random() % 24);
    Row row;
    double mass = 0, least = INFINITY, most = -INFINITY;
    const bool even = random() % 2;
    for (int i = 0; i < n; ++i) {
        row.scores.push_back(std::pow(10.0, 600 * uniform(random) - 300) * (random() % 2 ? 1 : -1));
        row.preference.push_back(even ? 1 : std::exp(8 * uniform(random)) * static_cast<double>(random() % 2));
        mass += row.preference.back();
        least = std::fmin(least, row.scores.back());
        most = std::fmax(most, row.scores.back());
    }
    if (mass == 0) row.preference[0] = mass = 1;
    for (double& p : row.preference) p /= mass;
    row.regularization = random() % 2 ? std::pow(10.0, 40 * uniform(random) - 35) : 0.0;
    if (random() % 3 == 0) row.scale = std::pow(10.0, 600 * uniform(random) - 300);
    const Answer answer = solve(row);
    const double unit = largest(row.scores);
    double sum = 0, value = 0;
    for (int i = 0; i < n; ++i) {
        expect(answer.weights[i] >= 0, "span: non-negative", n, answer.weights[i]);
        sum += answer.weights[i];
        value += answer.weights[i] * (row.scores[i] / unit);
    }
    expect(std::fabs(sum - 1) <= 2e-15 * n, "span: sum", n, sum - 1);
    expect(answer.optimum >= least && answer.optimum <= most, "span: hull", n, answer.optimum);
    expect(std::fabs(value - answer.optimum / unit) <= 1e-14 * n, "span: value", n, value);
    std::vector<float> a(row.scores.begin(), row.scores.end()), p(row.preference.begin(), row.preference.end()),
        c(n, 1);
    for (int i = 0; i < n; ++i) a[i] = static_cast<float>(std::copysign(std::pow(10.0, -30 * uniform(random)), a[i]));
    const float rho = random() % 2 ? std::pow(10.0f, -30 * static_cast<float>(uniform(random))) : 0.0f;
    std::vector<float> scores = a, chosen(n, 1);
    if (n == 8) {
        pama::simplex_sorted<float, 8>(a.data(), rho, c.data());
        float total = 0;
        for (const float w : c) total += w, expect(w >= 0, "span: float", n, w);
        expect(std::fabs(total - 1) <= 2e-6f, "span: float sum", n, total - 1);
    }
    pama::simplex_solve<float>(n, scores.data(), p.data(), rho, chosen.data());
    float total = 0;
    for (const float w : chosen) total += w, expect(w >= 0, "span: float", n, w);
    expect(std::fabs(total - 1) <= 1e-6f * static_cast<float>(n), "span: float sum", n, total - 1);
}

// Without regularization, products of these scores underflow.
void check_one_sign() {
    for (const double sign : {1.0, -1.0}) {
        const Answer answer = solve_sorted<4>({{sign * 1e-200, sign, sign * 1e-200, sign * 2e-200}, {}, 0, -1});
        expect(answer.weights[0] == 0.5 && answer.weights[2] == 0.5, "one sign: tied", 4, answer.weights[0]);
        expect(answer.weights[1] == 0 && answer.weights[3] == 0, "one sign: others", 4, answer.weights[3]);
        expect(answer.optimum == sign * 1e-200, "one sign: optimum", 4, answer.optimum);
    }
}

void check_absent() {
    double a[] = {NAN, 1, -2, INFINITY}, p[] = {0.25, 0.25, 0.25, 0.25}, c[] = {0, 1, 1, 0};
    const double optimum = pama::simplex_row(4, a, p, 0, -1, c);
    expect(optimum == 0 && c[0] == 0 && c[3] == 0 && std::fabs(c[1] - 2.0 / 3) < 1e-15, "absent", 4, c[1]);
    double all[] = {1, NAN}, q[] = {0.5, 0.5}, d[] = {1, 1};
    expect(std::isnan(pama::simplex_row(2, all, q, 0, -1, d)) && std::isnan(d[0]) && std::isnan(d[1]), "NaN", 2, d[0]);
    double none[] = {1, 2}, r[] = {0.25, 0.75}, e[] = {0, 0};
    expect(pama::simplex_row(2, none, r, 0, -1, e) == 0 && e[1] == 0.75, "none present", 2, e[1]);
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 20000;
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const double regularizations[] = {0, 0, 1e-6, 0.1, 1, 100};
    for (int k = 0; k < cases; ++k) {
        const int n = k % 500 == 0 ? 1000 : 1 + static_cast<int>(random() % (k % 10 == 0 ? 64 : 9));
        Row row;
        const int kind = static_cast<int>(random() % 6), preference = static_cast<int>(random() % 3);
        double mass = 0;
        for (int i = 0; i < n; ++i) {
            double x = normal(random);
            if (kind == 1) x = std::fabs(x);
            if (kind == 2) x = -std::fabs(x);
            if (kind == 3) x = std::floor(3 * x);
            if (kind == 4) x = 1 + 1e-9 * x;
            if (kind == 5) x = std::exp(3 * x) * (random() % 2 ? 1 : -1);
            row.scores.push_back(x);
            const double p = preference == 0 ? 1
                                             : (preference == 1 ? uniform(random)
                                                                : (random() % 2 ? std::exp(4 * normal(random)) : 0));
            row.preference.push_back(p);
            mass += p;
        }
        if (mass == 0) row.preference[0] = mass = 1;
        for (double& p : row.preference) p /= mass;
        row.regularization = regularizations[random() % 6];
        if (row.regularization > 0 && random() % 3 == 0) row.scale = std::exp(3 * normal(random));
        check(row, solve(row));
        check_uniform(row);
        if (kind < 4 && row.regularization == 0 && n < 10) check_limit(row);
        check_permutation(row);
        if (k % 10 == 0 && row.scale < 0 && kind < 5) check_scale(row);
    }
    for (int k = 0; k < 10 * cases; ++k) check_span(random);
    check_one_sign();
    check_absent();
    std::printf("simplex: %d rows, %d failures\n", cases, failures);
    return failures != 0;
}
