// Statistics from the sums of each sequence (row_sums.cuh) and its advantages, in double. Each thread sums over several
// sequences.
#pragma once

#include "row_sums.cuh"
#include "slots.cuh"

namespace pama {
namespace cuda {

struct RowTokens {
    DeviceTokens p;
    const double* sums;    // as in RowSumsTask; null without log-probabilities and importance weights
    const double* counts;  // used if `sums` is null: valid tokens of each sequence; null: its length
    int64_t segments, stride;
};

// The sums over the tokens of one sequence, multiplied by its token weight.
struct RowFactors {
    double tokens, values[kRowStatistics];

    __device__ void start(const RowTokens& source, int64_t row) {
        if (source.sums) {
            PAMA_UNROLL
            for (int k = 0; k < kRowStatistics; ++k) {
                values[k] = 0;
                PAMA_UNROLL_BY(4)
                for (int64_t s = 0; s < source.segments; ++s)
                    values[k] += source.sums[(k * source.segments + s) * source.p.rows + row];
            }
            tokens = values[kValid];
        } else {
            tokens = source.counts ? source.counts[row] : static_cast<double>(source.p.length(row));
            PAMA_UNROLL
            for (int k = 0; k < kRowStatistics; ++k) values[k] = factors_are_one(k) ? tokens : 0;
        }
        weigh(source.p.aggregation);
    }

    __device__ void weigh(Aggregation aggregation) {
        if (aggregation != Aggregation::seq_mean_token_mean || !(tokens > 0)) return;
        const double omega = 1 / tokens;
        PAMA_UNROLL
        for (int k = 0; k < kRowStatistics; ++k) values[k] *= omega;
    }
};

struct RowAdvantage {
    double a;  // 0 if the objective is absent or the sequence has no valid token
    bool here, negative;
};

__device__ inline bool row_present(const DeviceTokens& p, int64_t row, int64_t objective, double tokens) {
    return objective < p.n && tokens > 0 &&
           (!p.objective_mask ||
            load_truth(p.objective_mask, row * p.objective_mask.row + objective * p.objective_mask.objective));
}

__device__ inline RowAdvantage row_advantage(bool here, double advantage) {
    const double a = here ? advantage : 0;
    RowAdvantage x;
    x.here = here;
    x.a = a + 0 * a;
    x.negative = x.a < 0;
    return x;
}

__device__ inline RowAdvantage row_advantage(const DeviceTokens& p, int64_t row, int64_t objective, double tokens) {
    const bool here = row_present(p, row, objective, tokens);
    return row_advantage(
        here,
        here ? load_number<double>(p.advantages, row * p.advantages.row + objective * p.advantages.objective) : 0);
}

// The advantage with Noon applied. It stays 0 rather than being skipped, so that a NaN token still gives NaN.
__device__ inline double kept(const RowAdvantage& x, bool noon) { return noon && x.negative ? 0 : x.a; }

// The sum of I_i I_j over the tokens of the sequence.
__device__ inline double row_product(const RowFactors& f, const RowAdvantage& x, const RowAdvantage& y, bool noon) {
    const double both = x.negative == y.negative ? (x.negative ? f.values[kGradNegSquare] : f.values[kGradPosSquare])
                                                 : f.values[kGradBoth];
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
        all[S::kTotal + kTokenCount] += f.values[kValid];
        all[S::kTotal + kKlSum] += f.values[kK3];
        RowAdvantage x[G];
        PAMA_UNROLL
        for (int k = 0; k < G; ++k) {
            x[k] = row_advantage(source.p, row, first + k, f.tokens);
            double sums[kFields] = {};
            add_row(f.values, noon, x[k].a, x[k].here, sums);
            PAMA_UNROLL
            for (int field = 0; field < kFields; ++field) all[S::field(field, k)] += sums[field];
            PAMA_UNROLL
            for (int j = 0; j < k; ++j) {
                all[S::product(kBoundProduct, j, k)] += row_product(f, x[j], x[k], noon);
                all[S::product(kAdvantageProduct, j, k)] += f.values[kValid] * x[j].a * x[k].a;
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
                all[i * G + j] += row_product(f, x[i], y[j], source.p.noon);
                all[(G + i) * G + j] += f.values[kValid] * x[i].a * y[j].a;
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
            for (int j = 0; j < G; ++j) all[i * G + j] += f.values[kValid] * value * here[j];
        }
    }
}

}  // namespace cuda
}  // namespace pama
