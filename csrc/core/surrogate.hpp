// The clipped surrogate and its bound term, for one token.
//
// With u = exp(clamp(d, -20, 20)), d = logp - old, both branches of PPO's min reduce to one factor each:
//     A >= 0:  g = u_pos A,  u_pos = min(u, 1 + eps_high)                  gradient while d <= log(1 + eps_high)
//     A <  0:  g = u_neg A,  u_neg = max(min(u, dual_clip), 1 - eps_low)   gradient while log(1 - eps_low) <= d <=
//     log(dual_clip)
// and neither has a gradient where the clamp binds. The bound term I is A where there is a gradient, else 0.
#pragma once

#include <cmath>

#include "config.hpp"

namespace pama {

constexpr double kMaxLogRatio = 20.0;

struct Clip {
    double low, high, dual;              // 1 - eps_low, 1 + eps_high, dual_clip (infinity: none)
    double log_low, log_high, log_dual;  // their logarithms

    PAMA_HD static Clip make(double eps_low, double eps_high, double dual_clip) {
        return {1 - eps_low,          1 + eps_high,       dual_clip, eps_low < 1 ? std::log1p(-eps_low) : -INFINITY,
                std::log1p(eps_high), std::log(dual_clip)};
    }
};

}  // namespace pama
