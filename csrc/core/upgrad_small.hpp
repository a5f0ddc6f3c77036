// UPGrad's projections (upgrad.hpp) of few objectives in registers.
#pragma once

#include "small_system.hpp"

PAMA_BEGIN
namespace upgrad {

constexpr double kLargestRatio = 0x1p1000;            // of two objectives' norms
constexpr int kSmallestSmall = 3, kLargestSmall = 4;  // objectives that one thread solves so

// The problem of up to N objectives in registers, one exchange (nnqp::exchange) per projection. Padding has M_ii = 1
// and target -1: it stays outside every support.
template <int N>
struct Small {
    nnqp::SmallSystem<double, N> x;
    double unit[N], preference[N];

    // Whether no two of the objectives are identical: duplicates are averaged by the general solver.
    PAMA_HD bool start() {
        bool apart = true;
        PAMA_UNROLL
        for (int i = 0; i < N; ++i) {
            x.shift[i] = 0.0;
            x.diagonal[i] = x.m(i, i);
            PAMA_UNROLL
            for (int j = 0; j < i; ++j) apart = apart && (x.m(i, j) != x.m(i, i) || x.m(i, j) != x.m(j, j));
        }
        x.fixed_total = 1.0;
        return apart;
    }
    // Adds p_i x of the projection i = own to `sum`. Returns whether the exchange solved it.
    PAMA_HD bool project(int own, int n, double* sum, double* residual) {
        double share = 0.0, scale = 1.0, row[N];
        PAMA_UNROLL
        for (int j = 0; j < N; ++j) {
            row[j] = 0.0;
            PAMA_UNROLL
            for (int i = 0; i < N; ++i) row[j] = i == own ? x.m.symmetric(i, j) : row[j];
            row[j] = j < n ? row[j] : 1.0;
            share = j == own ? preference[j] : share;
            scale = j == own ? unit[j] : scale;
            x.fixed_terms = j == own ? x.m(j, j) : x.fixed_terms;
            x.target[j] = -row[j];
            x.inside[j] = row[j] < 0.0 ? 1.0 : 0.0;
        }
        if (share == 0.0) return true;
        if (!nnqp::exchange<double>(x, n, true) || x.tied) return false;
        double total = 1.0, least = 0.0, slack = 0.0;
        PAMA_UNROLL
        for (int j = 0; j < N; ++j) {
            const double gradient = x.product[j] + row[j], ratio = unit[j] / scale;
            total += x.y[j];
            least = min_of(gradient, least);
            slack += x.y[j] * std::fabs(gradient);
            sum[j] += x.y[j] > 0.0 ? share * min_of(ratio, kLargestRatio) * x.y[j] : 0.0;
        }
        const double violation = max_of(-least / total, slack / total / total);
        *residual = max_of(violation, *residual);
        return violation <= nnqp::kCertified;
    }
};

}  // namespace upgrad
PAMA_END
