// Advantages from rewards: generalised advantage estimation and group normalisation.
#include <cmath>
#include <vector>

#include "../core/gae.hpp"
#include "driver.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace pama {
namespace {

double read(const Array& array, long offset, bool truth = false) {
    double value;
    load_values(array, offset, 1, 1, truth, &value);
    return value;
}

void write(const Array& array, long offset, double value) {
    if (array.dtype == Dtype::f64)
        static_cast<double*>(array.data)[offset] = value;
    else
        static_cast<float*>(array.data)[offset] = static_cast<float>(value);
}

}  // namespace

void multi_objective_gae(const Gae& g, int threads) {
    const long n = g.n;
    const bool parallel = g.rows * g.width * n > 16384;
    for_each_block(g.rows, parallel ? threads : 1, [&](long b) {
        std::vector<GaeState> states(static_cast<size_t>(n));
        for (long i = 0; i < n && g.last_values; ++i)
            states[static_cast<size_t>(i)].value =
                read(g.last_values, b * g.last_values.row + i * g.last_values.objective);
        for (long t = g.width - 1; t >= 0; --t) {
            const long at = (b * g.width + t) * n;
            if (g.mask && read(g.mask, b * g.mask.row + t * g.mask.token, true) == 0) {
                for (long i = 0; i < n; ++i) {
                    write(g.advantages, at + i, 0);
                    write(g.returns, at + i, 0);
                }
                continue;
            }
            const bool done = g.dones && read(g.dones, b * g.dones.row + t * g.dones.token, true) != 0;
            for (long i = 0; i < n; ++i) {
                GaeState& state = states[static_cast<size_t>(i)];
                const double reward =
                    read(g.rewards, b * g.rewards.row + t * g.rewards.token + i * g.rewards.objective);
                const double value = read(g.values, b * g.values.row + t * g.values.token + i * g.values.objective);
                gae_step(reward, value, done, g.gamma, g.lam, state);
                write(g.advantages, at + i, state.advantage);
                write(g.returns, at + i, state.advantage + value);
            }
        }
    });
}

void group_normalize(long groups, const long* group_begin, const long* order, int n, const Array& rewards, bool scale,
                     double eps, const Array& result, int threads) {
    const bool parallel = group_begin[groups] * n > 16384;
    for_each_block(groups, parallel ? threads : 1, [&](long group) {
        const long first = group_begin[group], last = group_begin[group + 1];
        for (long i = 0; i < n; ++i) {
            const auto value = [&](long k) { return read(rewards, order[k] * rewards.row + i * rewards.objective); };
            double sum = 0, count = 0;
            for (long k = first; k < last; ++k) {
                const double x = value(k);
                if (std::isnan(x)) continue;
                sum += x;
                count += 1;
            }
            const double mean = sum / count;
            double squares = 0;
            for (long k = first; k < last; ++k) {
                const double x = value(k);
                if (!std::isnan(x)) squares += (x - mean) * (x - mean);
            }
            const double deviation = scale && count > 1 ? std::sqrt(squares / (count - 1)) + eps : 1.0;
            for (long k = first; k < last; ++k) {
                const double x = value(k);
                write(result, order[k] * n + i, std::isnan(x) ? 0.0 : (x - mean) / deviation);
            }
        }
    });
}

}  // namespace pama
