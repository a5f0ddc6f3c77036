// Advantages from rewards: generalised advantage estimation and group normalisation.
#include <cmath>
#include <vector>

#include "../core/gae.hpp"
#include "driver.hpp"
#include "threads.hpp"
#include "values.hpp"

namespace pama {
namespace {

constexpr int64_t kParallel = 1 << 14;  // values

// The normalisation of one objective in one group.
class Group {
  public:
    // Values that differ by at most `rounding` times the largest count as equal.
    Group(std::vector<double> values, double rounding) : values_(std::move(values)) {
        double low = INFINITY, high = -INFINITY;
        for (const double x : values_) {
            if (std::isnan(x)) continue;
            low = std::fmin(low, x);
            high = std::fmax(high, x);
            count_ += 1;
        }
        largest_ = std::fmax(std::fabs(low), std::fabs(high));
        constant_ = std::isfinite(largest_) && high - low <= rounding * largest_;
    }

    // Subtracts the mean and, if `scale` is set, divides by the standard deviation plus eps. The result is 0 for a
    // missing reward (NaN), and exactly 0 if the rewards are equal. An infinity makes all other results of the group
    // NaN.
    void normalize(bool scale, double eps) {
        if (constant_ || !std::isfinite(largest_)) {
            for (double& x : values_) x = std::isnan(x) || constant_ ? 0.0 : NAN;
            return;
        }
        int exponent;
        std::frexp(largest_, &exponent);
        const double unit = std::ldexp(1.0, exponent < -1000 ? 1000 : -exponent);  // sums of values below 1 stay finite
        double sum = 0, reach = 0, squares = 0;
        for (const double x : values_) sum += std::isnan(x) ? 0.0 : x * unit;
        const double mean = sum / count_;
        for (double& x : values_) {
            x = x * unit - mean;
            reach = std::fmax(reach, std::fabs(x));
        }
        for (const double x : values_) squares += std::isnan(x) ? 0.0 : (x / reach) * (x / reach);
        const double deviation = reach * std::sqrt(squares / (count_ - 1)) + eps * unit;
        for (double& x : values_) x = std::isnan(x) ? 0.0 : (scale ? x / deviation : x / unit);
    }

    double operator[](int64_t k) const { return values_[static_cast<size_t>(k)]; }

  private:
    std::vector<double> values_;
    double count_ = 0, largest_ = 0;
    bool constant_ = false;
};

}  // namespace

void multi_objective_gae(const Gae& g, int threads) {
    const int64_t n = g.n;
    const auto value_of = [](const Array& array, int64_t b, int64_t t, int64_t i) {
        return load_number<double>(array, b * array.row + t * array.token + i * array.objective);
    };
    const auto is_set = [](const Array& mask, int64_t b, int64_t t) {
        return mask && load_truth(mask, b * mask.row + t * mask.token);
    };
    const bool parallel = g.rows * g.width * n > kParallel;
    for_each_block(g.rows, parallel ? threads : 1, [&](int64_t b) {
        std::vector<GaeState> states(static_cast<size_t>(n));
        for (int64_t i = 0; i < n && g.last_values; ++i)
            states[static_cast<size_t>(i)].value = value_of(g.last_values, b, 0, i);
        for (int64_t t = g.width - 1; t >= 0; --t) {
            const int64_t at = (b * g.width + t) * n;
            if (g.mask && !is_set(g.mask, b, t)) {
                for (int64_t i = 0; i < n; ++i) {
                    store_value(g.advantages, at + i, 0);
                    store_value(g.returns, at + i, 0);
                }
                continue;
            }
            const bool done = is_set(g.dones, b, t), ends = done || is_set(g.truncated, b, t);
            for (int64_t i = 0; i < n; ++i) {
                GaeState& state = states[static_cast<size_t>(i)];
                if (ends) state.end(done ? 0.0 : value_of(g.final_values, b, t, i));
                const double value = value_of(g.values, b, t, i);
                gae_step(value_of(g.rewards, b, t, i), value, g.gamma, g.lam, state);
                store_value(g.advantages, at + i, state.advantage);
                store_value(g.returns, at + i, state.advantage + value);
            }
        }
    });
}

void group_normalize(const Groups& groups, int n, const Array& rewards, bool scale, double eps, const Array& result,
                     int threads) {
    const double rounding = rewards.dtype == Dtype::f64 ? 0x1p-49 : 0x1p-20;  // eight units in the last place
    const bool parallel = groups.count > 0 && groups.begin[groups.count] * n > kParallel;
    for_each_block(groups.count, parallel ? threads : 1, [&](int64_t group) {
        const int64_t first = groups.begin[group], last = groups.begin[group + 1];
        const int64_t* const order = groups.order;
        for (int64_t i = 0; i < n; ++i) {
            std::vector<double> values;
            values.reserve(static_cast<size_t>(last - first));
            for (int64_t k = first; k < last; ++k)
                values.push_back(load_number<double>(rewards, order[k] * rewards.row + i * rewards.objective));
            Group normalized(std::move(values), rounding);
            normalized.normalize(scale, eps);
            for (int64_t k = first; k < last; ++k) store_value(result, order[k] * n + i, normalized[k - first]);
        }
    });
}

}  // namespace pama
