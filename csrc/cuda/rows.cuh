// Statistics from the sums of each sequence (row_sums.cuh) and its advantages, in double: a thread adds up sequences.
#pragma once

#include "row_sums.cuh"
#include "slots.cuh"

namespace pama {
namespace cuda {

struct RowTokens {
    DeviceTokens p;
    const double* sums;    // as RowSumsTask has them; null: log-probabilities and importance weights were not given
    const double* counts;  // then the valid tokens of each sequence; null: its length
    int64_t segments, stride;
};

// What one sequence contributes for each unit of advantage.
struct RowFactors {
    double omega, tokens, values[kRowSums];

    // Fields of a token of the sequence times its count, where nothing is clipped and everything is 1.
    __device__ void start(const RowTokens& source, int64_t row) {
        if (source.sums) {
            PAMA_UNROLL
            for (int k = 0; k < kRowSums; ++k) {
                values[k] = 0;
                PAMA_UNROLL_BY(4)
                for (int64_t s = 0; s < source.segments; ++s)
                    values[k] += source.sums[(k * source.segments + s) * source.p.rows + row];
            }
            tokens = values[kRowTokens];
        } else {
            tokens = source.counts ? source.counts[row] : static_cast<double>(source.p.length(row));
            PAMA_UNROLL
            for (int k = 0; k < kRowSums; ++k) {
                const bool zero =
                    k == kRowGradPosLogp || k == kRowGradNegLogp || k == kRowKl || k == kRowOffPos || k == kRowOffNeg;
                values[k] = zero ? 0 : tokens;
            }
        }
        const bool mean = source.p.aggregation == Aggregation::seq_mean_token_mean;
        omega = mean && tokens > 0 ? 1 / tokens : 1;
    }
};

struct RowAdvantage {
    double a;  // 0 where absent or where the sequence has no token
    bool here, negative;
};

__device__ inline RowAdvantage row_advantage(const DeviceTokens& p, int64_t row, int64_t objective, double tokens) {
    RowAdvantage x;
    x.here = objective < p.n && tokens > 0;
    if (x.here && p.objective_mask)
        x.here = load_truth(p.objective_mask, row * p.objective_mask.row + objective * p.objective_mask.objective);
    const double a =
        x.here ? load_number<double>(p.advantages, row * p.advantages.row + objective * p.advantages.objective) : 0;
    x.a = a + 0 * a;
    x.negative = x.a < 0;
    return x;
}

// The advantage with Noon: of 0 a bad token still makes NaN.
__device__ inline double kept(const RowAdvantage& x, bool noon) { return noon && x.negative ? 0 : x.a; }

// sum over the sequence's tokens of I_i I_j, over omega.
__device__ inline double row_product(const RowFactors& f, const RowAdvantage& x, const RowAdvantage& y, bool noon) {
    const double both = x.negative == y.negative
                            ? (x.negative ? f.values[kRowGradNegSquare] : f.values[kRowGradPosSquare])
                            : f.values[kRowGradProduct];
    return x.here || y.here ? kept(x, noon) * kept(y, noon) * both : 0;
}

__device__ inline void add_rows(const RowTokens& source, int first, int64_t thread,
                                Values<Slots<kGroup, true>::kAll>& all) {
    constexpr int G = kGroup;
    using S = Slots<G, true>;
    const bool noon = source.p.noon;
    PAMA_ROLLED
    for (int64_t row = thread; row < source.p.rows; row += source.stride) {
        RowFactors f;
        f.start(source, row);
        const double* const v = f.values;
        all[S::kKl] += f.omega * v[kRowKl];
        all[S::kTokens] += f.omega * f.tokens;
        RowAdvantage x[G];
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            x[k] = row_advantage(source.p, row, first + k, f.tokens);
            const bool down = x[k].negative, here = x[k].here;
            const double a = x[k].a, used = f.omega * kept(x[k], noon);
            all[0 * G + k] += here ? used * (down ? v[kRowGradNeg] : v[kRowGradPos]) : 0;
            all[1 * G + k] += f.omega * row_product(f, x[k], x[k], noon);
            all[2 * G + k] += here ? used * (down ? v[kRowGradNegLogp] : v[kRowGradPosLogp]) : 0;
            all[3 * G + k] += here ? used * (down ? v[kRowNeg] : v[kRowPos]) : 0;
            all[4 * G + k] += f.omega * f.tokens * a;
            all[5 * G + k] += f.omega * f.tokens * a * a;
            const double off = a > 0 ? v[kRowOffPos] : down && !noon ? v[kRowOffNeg] : 0;
            all[S::kCounts + k] += here ? f.omega * f.tokens : 0;
            all[S::kCounts + G + k] += a > 0 ? f.omega * f.tokens : 0;
            all[S::kCounts + 2 * G + k] += f.omega * off;
            int pair = S::kProduct + k - 1;
            PAMA_UNROLL
            for (int j = 0; j < k; ++j) {
                all[pair] += f.omega * row_product(f, x[j], x[k], noon);
                all[pair + S::kEach] += f.omega * f.tokens * x[j].a * a;
                pair += G - 2 - j;
            }
        }
    }
}

__device__ inline void multiply_rows(const RowTokens& source, const Layer& layer, int64_t thread,
                                     Values<2 * kGroup * kGroup>& all) {
    constexpr int G = kGroup;
    PAMA_ROLLED
    for (int64_t row = thread; row < source.p.rows; row += source.stride) {
        RowFactors f;
        f.start(source, row);
        RowAdvantage x[G], y[G];
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            x[k] = row_advantage(source.p, row, layer.first + k, f.tokens);
            y[k] = row_advantage(source.p, row, layer.second + k, f.tokens);
        }
        PAMA_UNROLL
        for (int i = 0; i < G; ++i) {
            PAMA_UNROLL
            for (int j = 0; j < G; ++j) {
                all[i * G + j] += f.omega * row_product(f, x[i], y[j], source.p.noon);
                all[(G + i) * G + j] += f.omega * f.tokens * x[i].a * y[j].a;
            }
        }
    }
}

__device__ inline void pair_rows(const RowTokens& source, const Layer& layer, int64_t thread,
                                 Values<kGroup * kGroup>& all) {
    constexpr int G = kGroup;
    PAMA_ROLLED
    for (int64_t row = thread; row < source.p.rows; row += source.stride) {
        RowFactors f;
        f.start(source, row);
        double here[G];
        PAMA_UNROLL
        for (int j = 0; j < G; ++j) here[j] = row_advantage(source.p, row, layer.second + j, f.tokens).here ? 1 : 0;
        PAMA_UNROLL
        for (int i = 0; i < G; ++i) {
            const RowAdvantage x = row_advantage(source.p, row, layer.first + i, f.tokens);
            const double one = x.here ? 1 : 0;
            const double value = layer.kind == kPairCount ? one : layer.kind == kPairAdvantage ? x.a : x.a * x.a;
            PAMA_UNROLL
            for (int j = 0; j < G; ++j) all[i * G + j] += f.omega * f.tokens * value * here[j];
        }
    }
}

}  // namespace cuda
}  // namespace pama
