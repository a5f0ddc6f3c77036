// The min-norm solver against complete enumeration of the faces of the simplex, for n <= 7.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "min_norm_checks.hpp"
#include "min_norm_families.hpp"

namespace {

using namespace min_norm_tests;

using Row = std::vector<long double>;

// The solution of A x = b nearest to the origin, by Gram-Schmidt on the rows; false if inconsistent.
bool least_norm(std::vector<Row> a, Row b, long double tolerance, Row* x) {
    const std::size_t columns = a[0].size();
    x->assign(columns, 0.0L);
    std::vector<Row> basis;
    Row values;
    for (std::size_t r = 0; r < a.size(); ++r) {
        for (int pass = 0; pass < 2; ++pass)
            for (std::size_t h = 0; h < basis.size(); ++h) {
                const long double dot = std::inner_product(a[r].begin(), a[r].end(), basis[h].begin(), 0.0L);
                for (std::size_t k = 0; k < columns; ++k) a[r][k] -= dot * basis[h][k];
                b[r] -= dot * values[h];
            }
        const long double norm = std::sqrt(std::inner_product(a[r].begin(), a[r].end(), a[r].begin(), 0.0L));
        if (norm <= tolerance) {
            if (std::fabs(b[r]) > tolerance) return false;
            continue;
        }
        for (std::size_t k = 0; k < columns; ++k) a[r][k] /= norm;
        basis.push_back(a[r]);
        values.push_back(b[r] / norm);
        for (std::size_t k = 0; k < columns; ++k) (*x)[k] += values.back() * a[r][k];
    }
    return true;
}

// Minimum of c'Mc over the simplex (gram scaled to max M_ii = 1) by solving the bordered system on every
// face: some minimiser has an affinely independent support, whose system is regular.
double enumerate_minimum(int n, const Vec& gram, Vec* best) {
    double minimum = HUGE_VAL;
    for (int mask = 1; mask < 1 << n; ++mask) {
        std::vector<int> s;
        for (int i = 0; i < n; ++i)
            if (mask >> i & 1) s.push_back(i);
        const std::size_t m = s.size();
        std::vector<Row> a(m + 1, Row(m + 2, 0.0L));
        for (std::size_t i = 0; i < m; ++i) {
            for (std::size_t k = 0; k < m; ++k) a[i][k] = gram[s[i] * n + s[k]];
            a[i][m] = a[m][i] = 1.0L;
        }
        a[m][m + 1] = 1.0L;
        bool regular = true;
        for (std::size_t k = 0; k <= m && regular; ++k) {
            std::size_t pivot = k;
            for (std::size_t r = k + 1; r <= m; ++r)
                if (std::fabs(a[r][k]) > std::fabs(a[pivot][k])) pivot = r;
            std::swap(a[k], a[pivot]);
            regular = std::fabs(a[k][k]) > 1e-17L;
            for (std::size_t r = 0; r <= m && regular; ++r) {
                if (r == k) continue;
                const long double factor = a[r][k] / a[k][k];
                for (std::size_t c = k; c < m + 2; ++c) a[r][c] -= factor * a[k][c];
            }
        }
        if (!regular) continue;
        Vec c(n, 0.0);
        bool feasible = true;
        double sum = 0.0;
        for (std::size_t i = 0; i < m; ++i) {
            sum += c[s[i]] = static_cast<double>(a[i][m + 1] / a[i][i]);
            feasible = feasible && c[s[i]] >= -1e-15;
        }
        if (!feasible) continue;
        for (double& x : c) x /= sum;  // a nearly singular system may miss the plane
        const double value = objective(n, gram, c);
        if (value < minimum) {
            minimum = value;
            *best = c;
        }
    }
    return minimum;
}

// The minimisers are {c in D: Mc = Mc*}: the nearest of them to the preference, face by face.
Vec enumerate_nearest(int n, const Vec& gram, const Vec& minimiser, const Vec& preference) {
    Vec nearest;
    long double best = HUGE_VALL;
    for (int mask = 1; mask < 1 << n; ++mask) {
        std::vector<int> s;
        for (int i = 0; i < n; ++i)
            if (mask >> i & 1) s.push_back(i);
        std::vector<Row> a(n + 1, Row(s.size(), 1.0L));
        Row b(n + 1, 1.0L), x;
        for (int i = 0; i < n; ++i) {
            b[i] = 0.0L;
            for (int k = 0; k < n; ++k) b[i] += static_cast<long double>(gram[i * n + k]) * minimiser[k];
            for (std::size_t k = 0; k < s.size(); ++k) a[i][k] = gram[i * n + s[k]];
        }
        for (std::size_t k = 0; k < s.size(); ++k)
            for (int i = 0; i <= n; ++i) b[i] -= a[i][k] * preference[s[k]];
        if (!least_norm(a, b, 1e-9L, &x)) continue;
        long double distance = 0.0L;
        bool feasible = true;
        Vec c(n, 0.0);
        for (int i = 0; i < n; ++i) distance += static_cast<long double>(preference[i]) * preference[i];
        for (std::size_t k = 0; k < s.size(); ++k) {
            const long double p = preference[s[k]];
            distance += x[k] * x[k] - p * p;
            c[s[k]] = static_cast<double>(p + x[k]);
            feasible = feasible && c[s[k]] >= -1e-10;
        }
        if (feasible && distance < best) {
            best = distance;
            nearest = c;
        }
    }
    return nearest;
}

void test_enumeration() {
    families::Generator random(7);
    double worst_value = 0.0, worst_distance = 0.0;
    for (int i = 0; i < 6000; ++i) {
        const int family = i % families::kFamilies, n = random.integer(1, 7);
        const Vec gram = random.gram(family, n), preference = random.preference(n, random.integer(0, 1));
        const double scale = largest_diagonal(n, gram);
        if (scale == 0.0) continue;
        Vec scaled = gram;
        for (double& x : scaled) x /= scale;
        Vec minimiser;
        const double minimum = enumerate_minimum(n, scaled, &minimiser);
        const Solution s = solve(n, gram, preference);
        const double excess = std::fabs(objective(n, scaled, s.weights) - minimum);
        worst_value = std::max(worst_value, excess);
        CHECK(excess <= 1e-12, "%s n=%d: %g above the minimum %g", families::name(family), n, excess, minimum);
        CHECK(std::fabs(s.result.optimum / scale - minimum) <= 1e-12, "%s n=%d: optimum %g for %g",
              families::name(family), n, s.result.optimum / scale, minimum);
        if (!families::singular_by_construction(family)) continue;
        const Vec nearest = enumerate_nearest(n, scaled, minimiser, preference);
        double distance = nearest.empty() ? HUGE_VAL : 0.0;
        for (int k = 0; k < n && !nearest.empty(); ++k)
            distance = std::max(distance, std::fabs(nearest[k] - s.weights[k]));
        worst_distance = std::max(worst_distance, distance);
        CHECK(distance <= 1e-6, "%s n=%d (%d): %g from the minimiser nearest to the preference", families::name(family),
              n, i, distance);
    }
    std::printf("enumeration: objective within %.1e, nearest minimiser within %.1e\n", worst_value, worst_distance);
}

}  // namespace

int main() {
    test_enumeration();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
