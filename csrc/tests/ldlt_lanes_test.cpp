// Systems solved in SIMD lanes: each to rounding, with the same bits in any lane of vectors of any width, and a pivot
// that vanishes reported for its own lane only.
#include "core/ldlt_lanes.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

using Vec = std::vector<double>;

typedef double Two __attribute__((vector_size(16)));
typedef double Four __attribute__((vector_size(32)));

int failures = 0;

void check(bool condition, const char* what, int k) {
    if (!condition && ++failures < 20) std::printf("%s, k=%d\n", what, k);
}

struct System {
    Vec h, b;  // (k, k) and k
};
struct Solution {
    std::vector<Vec> y, again;  // again: for the reverse of b, with the same factor
    std::vector<int> regular;
};

template <class V>
Solution solve(int k, const std::vector<System>& systems) {
    constexpr int lanes = sizeof(V) / sizeof(double);
    const int end = pama::ldlt::round_up_to_lane_block(k);
    std::vector<V> rows(pama::ldlt::lane_row(end)), panel(pama::ldlt::kLaneBlock * end), rhs(end), diagonal(end),
        inverse(end);
    for (int a = 0; a < end; ++a)
        for (int lane = 0; lane < lanes; ++lane) {
            const System& s = systems[lane];
            for (int b = 0; b <= a; ++b)
                rows[pama::ldlt::lane_row(a) + b][lane] = a < k ? s.h[a * k + b] : a == b ? 1.0 : 0.0;
            diagonal[a][lane] = a < k ? s.h[a * k + a] : 1.0;
            rhs[a][lane] = a < k ? s.b[a] : 0.0;
        }
    bool above[lanes] = {};
    const pama::ldlt::LaneScratch scratch = {rows.data(),     panel.data(),   rhs.data(),
                                             diagonal.data(), inverse.data(), V{} + 1e-11};
    pama::ldlt::solve_lanes<V>(end, scratch, above);
    Solution s{std::vector<Vec>(lanes, Vec(k)), std::vector<Vec>(lanes, Vec(k)), std::vector<int>(lanes)};
    for (int lane = 0; lane < lanes; ++lane) {
        s.regular[lane] = above[lane];
        for (int a = 0; a < k; ++a) {
            s.y[lane][a] = rhs[a][lane];
            rhs[a][lane] = systems[lane].b[k - 1 - a];
        }
        for (int a = k; a < end; ++a) rhs[a][lane] = 0.0;
    }
    pama::ldlt::solve_lanes_again<V>(end, scratch);
    for (int lane = 0; lane < lanes; ++lane)
        for (int a = 0; a < k; ++a) s.again[lane][a] = rhs[a][lane];
    return s;
}

// The largest |Hy - b|, relative to the largest term.
double residual(int k, const System& s, const Vec& y, bool reversed) {
    double error = 0.0, size = 0.0;
    for (int a = 0; a < k; ++a) {
        double sum = -s.b[reversed ? k - 1 - a : a];
        for (int b = 0; b < k; ++b) {
            const double term = s.h[a * k + b] * y[b];
            sum += term;
            size = std::max(size, std::fabs(term));
        }
        error = std::max(error, std::fabs(sum));
    }
    return error / (size + 1.0);
}

bool same(const Vec& x, const Vec& y) { return std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0; }

}  // namespace

int main() {
    std::mt19937_64 engine(3);
    std::normal_distribution<double> normal;
    for (int k = 1; k <= 40; ++k) {
        std::vector<System> systems(4, {Vec(k * k), Vec(k)});
        for (int lane = 0; lane < 4; ++lane) {
            Vec j(k * 2 * k);
            for (double& x : j) x = normal(engine);
            if (lane == 3 && k > 1) std::copy_n(j.begin(), 2 * k, j.begin() + 2 * k * (k - 1));  // a duplicate
            System& s = systems[lane];
            for (int a = 0; a < k; ++a) {
                s.b[a] = normal(engine);
                for (int b = 0; b < k; ++b)
                    for (int c = 0; c < 2 * k; ++c) s.h[a * k + b] += j[a * 2 * k + c] * j[b * 2 * k + c];
            }
        }
        const Solution all = solve<Four>(k, systems);
        for (int lane = 0; lane < 3; ++lane) {
            const double bound = 1e-14 * k;  // backward stable: k roundings of each term
            check(residual(k, systems[lane], all.y[lane], false) <= bound, "residual", k);
            check(residual(k, systems[lane], all.again[lane], true) <= bound, "residual, solved again", k);
            check(all.regular[lane], "regular", k);
        }
        check(k == 1 || !all.regular[3], "singular", k);
        const Solution swapped = solve<Four>(k, {systems[1], systems[3], systems[0], systems[2]});
        const Solution narrow = solve<Two>(k, {systems[2], systems[0]});
        check(same(all.y[0], swapped.y[2]) && same(all.y[1], swapped.y[0]) && same(all.y[2], swapped.y[3]),
              "another lane", k);
        check(same(all.y[0], narrow.y[1]) && same(all.y[2], narrow.y[0]), "another width", k);
        check(same(all.again[0], swapped.again[2]) && same(all.again[2], narrow.again[0]), "solved again", k);
    }
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
