// The line search of Newton's method, on random functions with very small r: it ends where the slope is at most a tenth
// of the slope at the start.
#include "core/line_search.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using Vec = std::vector<double>;

// A problem of n unknowns, padded to `stride`.
struct Line {
    int n, stride;
    Vec g, b, z, y, at_z, at_y, inverse;

    Vec force(const Vec& x) const {  // b - Gx
        Vec result(stride);
        for (int i = 0; i < n; ++i) {
            result[i] = b[i];
            for (int j = 0; j < n; ++j) result[i] -= g[i * n + j] * x[j];
        }
        return result;
    }
    double slope(double t) const {
        Vec x(n);
        for (int i = 0; i < n; ++i) x[i] = z[i] + t * (y[i] - z[i]);
        const Vec at = force(x);
        double sum = 0.0;
        for (int i = 0; i < n; ++i) {
            const double change = at_y[i] - at_z[i];
            sum += -x[i] * change + std::max(at[i], 0.0) * inverse[i] * change;
        }
        return sum;
    }
};

// length: of the step, over that of about the best one.
Line random_line(int n, double r, double length, std::mt19937_64& engine) {
    std::normal_distribution<double> normal;
    const int rank = std::max(n / 2, 1), stride = (n + 7) / 8 * 8;
    Vec factor(n * rank);
    for (double& x : factor) x = normal(engine);
    Line line{n, stride, Vec(n * n), Vec(n), Vec(stride), Vec(stride), {}, {}, Vec(stride)};
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j)
            for (int k = 0; k < rank; ++k) line.g[i * n + j] += factor[i * rank + k] * factor[j * rank + k] / rank;
        line.z[i] = normal(engine);
        line.inverse[i] = 1.0 / r;
    }
    // b in the range of G, and y a step of steepest descent: the slope at z is negative.
    for (int i = 0; i < n; ++i) line.b[i] = -line.g[i];
    line.at_z = line.force(line.z);
    for (int i = 0; i < n; ++i) {
        double gradient = 0.0;
        for (int j = 0; j < n; ++j)
            gradient += line.g[i * n + j] * (line.z[j] - std::max(line.at_z[j], 0.0) * line.inverse[j]);
        line.y[i] = line.z[i] - gradient * std::fabs(normal(engine)) * r * length;
    }
    line.at_y = line.force(line.y);
    return line;
}

}  // namespace

int main() {
    std::mt19937_64 engine(5);
    int failures = 0, descents = 0;
    for (int i = 0; i < 3000; ++i) {
        const double r = std::pow(10.0, -9.0 * (i % 10) / 9.0);
        const Line line = random_line(1 + i % 40, r, std::pow(10.0, i % 7), engine);
        const double start = line.slope(0.0);
        if (!(start < 0.0)) continue;
        ++descents;
        const double t = pama::nnqp::line_step(line.stride, line.z.data(), line.y.data(), line.at_z.data(),
                                               line.at_y.data(), line.inverse.data());
        const double end = line.slope(t), most = -0.1001 * start;
        const bool minimum = t == 1.0 ? end <= most : std::fabs(end) <= most;
        if (!(t >= 0.0 && t <= 1.0 && minimum) && ++failures < 20)
            std::printf("n=%d r=%g: slope %g at 0, %g at %g\n", line.n, r, start, end, t);
    }
    if (descents < 1000) std::printf("only %d descents\n", descents), ++failures;
    if (failures) std::printf("%d checks failed\n", failures);
    return failures != 0;
}
