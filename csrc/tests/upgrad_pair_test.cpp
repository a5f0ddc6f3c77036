// UPGrad of two objectives: the closed form, which needs no workspace, beside the general solver, at all scales.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/upgrad.hpp"

namespace {

int failures = 0;

struct Case {
    double a, b, d, p, q;
};

#define CHECK(condition, x)                                                                               \
    do {                                                                                                  \
        if (!(condition) && ++failures < 40)                                                              \
            std::printf("%s: a=%g b=%g d=%g p=%g q=%g\n", #condition, (x).a, (x).b, (x).d, (x).p, (x).q); \
    } while (0)

double check(const Case& x) {
    const double gram[4] = {x.a, x.b, x.b, x.d}, preference[2] = {x.p, x.q};
    const unsigned char present[2] = {1, 1};
    double c[2], wanted[2];
    std::vector<double> workspace(pama::upgrad_workspace(2), std::nan(""));
    const pama::MatrixView<double> view = {2, gram, 2, 1};
    const pama::SolverResult found = pama::upgrad_solve(view, preference, nullptr, c, nullptr);
    const pama::SolverResult general = pama::upgrad_solve(view, preference, present, wanted, workspace.data());
    CHECK(c[0] >= 0.0 && c[1] >= 0.0 && std::fabs(c[0] + c[1] - 1.0) <= 1e-14, x);
    CHECK(std::fabs(found.optimum - general.optimum) <= 1e-13 * std::max(x.a, x.d), x);
    CHECK(found.status == general.status || x.b < 0.0, x);
    return std::max(std::fabs(c[0] - wanted[0]), std::fabs(c[1] - wanted[1]));
}

}  // namespace

int main() {
    const double sizes[] = {0.0, 1e-320, 1e-300, 1e-150, 1e-20, 0.7, 1.0, 3.0, 1e20, 1e150, 1e300};
    const double cosines[] = {-1.0, -0.999999, -0.5, -1e-9, 0.0, 0.3, 1.0};
    const double preferences[][2] = {{0.5, 0.5}, {0.25, 0.75}, {1.0, 0.0}, {3.0, 5.0}};
    double worst = 0.0;
    for (const double a : sizes)
        for (const double d : sizes)
            for (const double cosine : cosines)
                for (const auto& p : preferences)
                    worst = std::max(worst, check({a, cosine * std::sqrt(a) * std::sqrt(d), d, p[0], p[1]}));
    // c_1 : c_2 = 1/2 : -b / (2 d) = 1 : 1e100, although the cosine is 1e-200.
    const double pair[4] = {1e300, -1e-200, -1e-200, 1e-300};
    double c[2];
    pama::upgrad_solve(pama::MatrixView<double>{2, pair, 2, 1}, nullptr, nullptr, c, nullptr);
    failures += !(std::fabs(c[0] / 1e-100 - 1.0) <= 1e-12);
    std::printf("weights differ by at most %.1e\n", worst);
    return failures != 0 || !(worst <= 1e-12);
}
