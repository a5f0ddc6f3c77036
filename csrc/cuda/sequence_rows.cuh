// The shared memory of the kernel of sequences.hpp, and the results of the sequences, given the weights.
#pragma once

#include "sequence_terms.cuh"
#include "upgrad.cuh"

namespace pama {
namespace cuda {

constexpr int kSequenceThreads = limited(512);
constexpr int kSequenceWarps = kSequenceThreads / kWarp;
constexpr int kItems = 32;  // segments processed at a time; at least the number of warps
static_assert(kSequenceWarps <= kItems);
constexpr int kMostSums = kTotals + kFields * kSequenceObjectives + kSequenceObjectives * (kSequenceObjectives - 1) +
                          (kPairs - 2) * kSequenceObjectives * kSequenceObjectives;
constexpr int kMostStatistics =
    kTotals + kFields * kSequenceObjectives + kPairs * kSequenceObjectives * kSequenceObjectives;
// A matrix and flags, and the workspace of the solver with the largest one.
constexpr int kSolverDoubles = kSequenceObjectives * (kSequenceObjectives + 1) + upgrad_work(kSequenceObjectives);
static_assert(nnqp::workspace(kSequenceObjectives) <= upgrad_work(kSequenceObjectives), "for one thread");

struct Share {  // of a block, some segments at a time
    Item items[kItems];
    unsigned parts[kItems];
    double fields[kFieldWarps * kSequenceObjectives * kFields];
};

struct SequenceMemory {
    union {
        Share share;
        double table[kSequenceThreads];  // once the items are done
        double solver[kSolverDoubles];
    };
    double sums[kMostSums], statistics[kMostStatistics];
    double preference[kSequenceObjectives], weights[kSequenceObjectives], effective[kSequenceObjectives];
    double optimum;
    int count;    // objectives with a signal
    bool solved;  // by warps; else the first thread solves
};

// Sums of c_i A_i over positive and over negative advantages of a sequence.
struct Signed {
    double tokens, omega, up, down, share;  // share: the preferences of the objectives that are present

    __device__ void add(const SequenceMemory& m, bool noon, int i, bool here, double advantage) {
        const RowAdvantage own = row_advantage(here, advantage);
        const bool below = own.negative && !noon;
        const double term = here ? m.weights[i] * kept(own, noon) : 0;
        share += here ? m.effective[i] : 0;
        up += below ? 0 : term;
        down += below ? term : 0;
    }
};

// vectors: the advantages of a sequence are float32 and contiguous, and begin at multiples of 16 bytes.
__device__ inline Signed combine_row(const Sequences& s, const SequenceMemory& m, int64_t row, bool vectors) {
    const DeviceTokens& p = s.p;
    Signed x{0, 1, 0, 0, 0};
    PAMA_ROLLED
    for (int64_t k = 0; k < s.segments; ++k) x.tokens += __ldcg(s.counts + row * s.segments + k);
    if (x.tokens == 0) return x;
    if (p.aggregation == Aggregation::seq_mean_token_mean) x.omega = 1 / x.tokens;
    if (vectors) {
        const float4* const from =
            reinterpret_cast<const float4*>(static_cast<const float*>(p.advantages.data) + row * p.advantages.row);
        PAMA_ROLLED
        for (int first = 0; first < p.n; first += 8) {
            const float4 low = from[first / 4], high = first + 4 < p.n ? from[first / 4 + 1] : float4{0, 0, 0, 0};
            const float a[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            PAMA_UNROLL
            for (int k = 0; k < 8; ++k) x.add(m, p.noon, first + k, first + k < p.n, static_cast<double>(a[k]));
        }
    } else {
        double poison = 0;
        PAMA_ROLLED
        for (int i = 0; i < p.n; ++i) {
            const bool here = row_present(p, row, i, x.tokens);
            const int64_t at = row * p.advantages.row + i * p.advantages.objective;
            const double advantage = here ? load_number<double>(p.advantages, at) : 0;
            x.add(m, p.noon, i, here, advantage);
            poison += 0 * advantage;
        }
        if (!p.objective_mask) return x;
        const bool some = x.share > 0;
        x.up = some ? x.up / x.share : poison;
        x.down = some ? x.down / x.share : poison;
    }
    return x;
}

__device__ inline double block_sum(double value, double* table) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const double sum = warp_sum(value);
    __syncthreads();
    if (lane == 0) table[warp] = sum;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < warps; ++w) total += table[w];
    return total;
}

// The root mean square of the combined advantages; 1 if they are 0 up to rounding, since dividing would amplify
// rounding errors, or too small for exact squares. NaN if the squares overflow.
__device__ inline double root_of(const Sequences& s, const SequenceMemory& m, double square) {
    const int n = s.p.n;
    const double tokens = m.sums[kTokenCount], root = std::sqrt(square / (tokens > 0 ? tokens : 1));
    double terms = 0;
    for (int i = 0; i < n; ++i) {
        const double count = m.statistics[kCount * n + i];
        if (count > 0) terms += m.weights[i] * std::sqrt(m.statistics[kAdvantageSquareSum * n + i] / count);
    }
    const bool wide = s.weights.dtype == Dtype::f64;
    const double rounding = wide ? 0x1p-52 : 0x1p-23, least = wide ? 0x1p-486 : 0x1p-126;
    if (square == INFINITY) return NAN;
    return root <= max_of(32 * rounding * terms, least) ? 1.0 : root;
}

// Writes the results of each sequence, which need the weights.
__device__ inline void write_rows(const Sequences& s, SequenceMemory& m) {
    if (!s.combined && !s.row_factors) return;
    double squares = 0;
    const Array& a = s.p.advantages;
    const bool vectors = a.dtype == Dtype::f32 && a.objective == 1 && a.row % 4 == 0 && s.p.n % 4 == 0 &&
                         !s.p.objective_mask && reinterpret_cast<std::uintptr_t>(a.data) % 16 == 0;
    const auto each = [&](auto visit) {
        PAMA_ROLLED
        for (int64_t row = threadIdx.x; row < s.p.rows; row += blockDim.x) visit(row, combine_row(s, m, row, vectors));
    };
    const auto write = [&](int64_t row, const Signed& x, double root) {
        const double sum = x.up + x.down;  // 0, such as that of no token, is not divided by a NaN
        if (s.combined) store_number(s.combined, row, s.normalize && sum != 0 ? sum / root : sum);
        if (!s.row_factors) return;
        s.row_factors[3 * row] = x.up;
        s.row_factors[3 * row + 1] = x.down;
        s.row_factors[3 * row + 2] = x.tokens > 0 ? x.omega : 0;
    };
    each([&](int64_t row, const Signed& x) {
        squares += x.omega * x.tokens * (x.up + x.down) * (x.up + x.down);
        if (!s.normalize) write(row, x, 1);
    });
    const double square = block_sum(squares, m.table);
    if (threadIdx.x == 0 && s.square_sum) *s.square_sum = square;
    if (!s.normalize) return;
    const double root = root_of(s, m, square);
    each([&](int64_t row, const Signed& x) { write(row, x, root); });
}

}  // namespace cuda
}  // namespace pama
