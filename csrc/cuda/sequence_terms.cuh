// The terms of sequences.hpp: the contributions of segments to the sums of a block, and the statistics computed from
// these sums.
#pragma once

#include "rows.cuh"
#include "sequences.hpp"

namespace pama {
namespace cuda {

struct Item {
    RowFactors factors;
    RowAdvantage x[kSequenceObjectives];
};

// --- contributions of segments ------------------------------------------------------------------------------

__device__ inline double pair_term(const Item& item, int kind, int i, int j, bool noon) {
    const RowAdvantage &x = item.x[i], &y = item.x[j];
    if (kind == kBoundProduct) return row_product(item.factors, x, y, noon);
    const double valid = item.factors.values[kValid];
    if (kind == kAdvantageProduct) return valid * (x.a * y.a);
    const double one = x.here ? 1 : 0, value = kind == kPairCount ? one : kind == kPairAdvantage ? x.a : x.a * x.a;
    return valid * value * (y.here ? 1 : 0);  // a NaN gives NaN whether or not j is present
}

constexpr int kFieldWarps = 8;  // at most

// The fields of every objective over the items of each of the first warps, [warp][objective][field]. Returns their
// number.
__device__ inline int add_fields(const Terms& t, const Item* items, int count, double* fields) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all = blockDim.x / kWarp;
    const int most = all < kFieldWarps ? all : kFieldWarps, warps = count < most ? count : most;
    if (lane >= t.n || warp >= warps) return warps;
    double sums[kFields] = {};
    for (int item = warp; item < count; item += warps) {
        const RowAdvantage& x = items[item].x[lane];
        add_row(items[item].factors.values, t.noon, x.a, x.here, sums);
    }
    PAMA_UNROLL
    for (int f = 0; f < kFields; ++f) fields[(warp * t.n + lane) * kFields + f] = sums[f];
    return warps;
}

__device__ inline void add_items(const Terms& t, const Item* items, int count, double* fields, double* sums) {
    const int n = t.n, triangle = n * (n - 1) / 2, warps = add_fields(t, items, count, fields);
    __syncthreads();
    for (int k = threadIdx.x; k < t.size(); k += blockDim.x) {
        double sum = 0;
        const auto add = [&](auto term) {
            for (int item = 0; item < count; ++item) sum += term(items[item]);
        };
        if (k < kTotals) {
            add([&](const Item& x) { return x.factors.values[k == kTokenCount ? kValid : kK3]; });
        } else if (k < t.first_product()) {
            const int field = t.field[(k - kTotals) / n], i = (k - kTotals) % n;
            for (int w = 0; w < warps; ++w) sum += fields[(w * n + i) * kFields + field];
        } else if (k < t.first_table()) {
            int pair = (k - t.first_product()) % triangle, i = 0;
            const int kind = t.product[(k - t.first_product()) / triangle];
            for (; pair >= n - 1 - i; ++i) pair -= n - 1 - i;
            const int j = i + 1 + pair;
            add([&](const Item& x) { return pair_term(x, kind, i, j, t.noon); });
        } else {
            const int at = k - t.first_table(), kind = t.table[at / (n * n)], i = at / n % n, j = at % n;
            add([&](const Item& x) { return pair_term(x, kind, i, j, t.noon); });
        }
        sums[k] += sum;
    }
}

// --- all statistics from the sums that were added up -------------------------------------------------------

__device__ inline double field_of(const Terms& t, const double* sums, int field, int i) {
    const Terms::Source source = t.sources[field];
    if (source.at < 0) return 0;
    const double value = sums[source.at + i * source.step];
    return source.poison ? 0 * value : value;
}

__device__ inline double pair_of(const Terms& t, const double* sums, int kind, int i, int j) {
    const int n = t.n, table = t.table_at[kind];
    if (table >= 0) return sums[table + i * n + j];
    if (kind > kAdvantageProduct || i == j)  // every objective is present everywhere
        return field_of(t, sums,
                        kind == kBoundProduct       ? kBoundSquareSum
                        : kind == kAdvantageProduct ? kAdvantageSquareSum
                        : kind == kPairCount        ? kCount
                        : kind == kPairAdvantage    ? kAdvantageSum
                                                    : kAdvantageSquareSum,
                        i);
    const int low = i < j ? i : j, high = i < j ? j : i;
    return sums[t.product_at[kind] + low * (2 * n - 3 - low) / 2 + high - 1];
}

}  // namespace cuda
}  // namespace pama
