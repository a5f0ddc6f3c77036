// The kernel of sequences.hpp. The segments of the sequences are distributed over the blocks. Each block sums its
// statistics and writes them to its own partial sums. The last block to finish adds the partial sums in a fixed order,
// solves for the weights, and writes the results of all sequences.
#pragma once

#include "../core/weights.hpp"
#include "count.cuh"
#include "sequence_terms.cuh"
#include "upgrad.cuh"

namespace pama {
namespace cuda {

constexpr int kSequenceThreads = limited(256);
constexpr int kSequenceWarps = kSequenceThreads / kWarp;
constexpr int kItems = 32;  // segments processed at a time; at least the number of warps
static_assert(kSequenceWarps <= kItems);
constexpr int kMostSums = kTotals + kFields * kSequenceObjectives + kSequenceObjectives * (kSequenceObjectives - 1) +
                          (kPairs - 2) * kSequenceObjectives * kSequenceObjectives;
constexpr int kMostStatistics =
    kTotals + kFields * kSequenceObjectives + kPairs * kSequenceObjectives * kSequenceObjectives;
constexpr int kSolverDoubles = 1600;
static_assert(kSequenceWarps * kSequenceObjectives * kFields <= kSolverDoubles);

struct SequenceMemory {
    Item items[kItems];
    unsigned parts[kItems];
    double sums[kMostSums], statistics[kMostStatistics], solver[kSolverDoubles];
    double preference[kSequenceObjectives], weights[kSequenceObjectives], effective[kSequenceObjectives];
    double table[kSequenceThreads], optimum, root;
    bool divided;  // whether the first warp solves for the weights, else the first thread
};

__device__ inline void write_statistics(const Sequences& s, const double* sums, double* statistics) {
    const int n = s.p.n, fields = kFields * n, size = static_cast<int>(statistics_size(n, s.pairs));
    for (int k = threadIdx.x; k < size; k += blockDim.x) {
        const int pair = k - fields - kTotals;
        const double value = k < fields ? field_of(s.terms, sums, k / n, k % n)
                             : pair < 0 ? sums[k - fields]
                                        : pair_of(s.terms, sums, pair / (n * n), pair / n % n, pair % n);
        statistics[k] = value;
        s.sums[k] = value;
    }
    __syncthreads();
}

// --- the segments of one block ----------------------------------------------------------------------------------

// Counts the valid tokens of sequences, with `each` warps per sequence.
__device__ inline void count_items(const Sequences& s, int64_t first, int count, SequenceMemory& m, int each) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const DeviceTokens& p = s.p;
    for (int unit = warp; unit < count * each; unit += warps) {
        const int64_t row = first + unit / each, length = p.length(row), base = p.starts ? p.starts[row] : 0;
        unsigned own = 0;
        if (p.mask)
            own = count_valid(p.mask, row * p.mask.row + base * p.mask.token, length, unit % each * kWarp + lane,
                              each * kWarp);
        else if (lane == 0 && unit % each == 0)
            own = static_cast<unsigned>(length);
        const unsigned sum = __reduce_add_sync(kAllLanes, own);
        if (lane == 0) m.parts[unit] = sum;
    }
}

// Computes the sums over the tokens of segments, one warp per segment.
template <class T, bool F32>
__device__ inline void sum_items(const Sequences& s, int64_t first, int count, SequenceMemory& m) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int item = warp; item < count; item += warps) {
        const int64_t row = (first + item) / s.segments, segment = (first + item) % s.segments;
        const int64_t length = s.p.length(row), each = (length + s.segments - 1) / s.segments;
        const int64_t begin = segment * each, end = begin + each < length ? begin + each : length;
        double all[kWarp] = {};
        if (!add_segment<T, F32>(s.p, row, begin, end, all)) {
            PAMA_UNROLL
            for (int k = 0; k < kWarp; ++k) all[k] = 0;
            add_segment<double, F32>(s.p, row, begin, end, all);
        }
        const double sum = transposed_sums(all, lane);
        if (lane < kRowStatistics) m.items[item].factors.values[lane] = sum;
        if (lane == kValid) m.parts[item] = static_cast<unsigned>(sum);
    }
}

// Completes the items once their numbers of valid tokens are known. A segment without valid tokens is ignored,
// including NaN advantages.
__device__ inline void finish_items(const Sequences& s, int64_t first, int count, SequenceMemory& m, int each) {
    const int n = s.p.n;
    for (int k = threadIdx.x; k < count * n; k += blockDim.x) {
        const int item = k / n, i = k % n;
        unsigned tokens = 0;
        for (int part = 0; part < each; ++part) tokens += m.parts[item * each + part];
        if (tokens == 0) m.items[item].x[i] = {0, false, false};
        if (i != 0) continue;
        s.counts[first + item] = tokens;
        RowFactors& f = m.items[item].factors;
        f.tokens = tokens;
        PAMA_UNROLL
        for (int v = 0; v < kRowStatistics; ++v)
            if (!s.factors) f.values[v] = factors_are_one(v) ? f.tokens : 0;
        f.weigh(s.p.aggregation);
    }
}

__device__ inline bool holds_float32(const Array& array) { return !array || array.dtype == Dtype::f32; }

__device__ inline void read_items(const Sequences& s, int64_t first, int count, SequenceMemory& m, int each) {
    const DeviceTokens& p = s.p;
    if (!s.factors) return count_items(s, first, count, m, each);
    if (p.wide) return sum_items<double, false>(s, first, count, m);
    const bool plain = holds_float32(p.logprobs) && holds_float32(p.old_logprobs) &&
                       holds_float32(p.importance_weights) && (!p.mask || size_of(p.mask.dtype) == 1);
    plain ? sum_items<float, true>(s, first, count, m) : sum_items<float, false>(s, first, count, m);
}

__device__ inline void add_share(const Sequences& s, SequenceMemory& m) {
    const int64_t items = s.p.rows * s.segments, block = blockIdx.x;
    const int64_t begin = block * items / s.blocks, end = (block + 1) * items / s.blocks;
    for (int k = threadIdx.x; k < s.terms.size(); k += blockDim.x) m.sums[k] = 0;
    for (int64_t first = begin; first < end; first += kItems) {
        const int count = static_cast<int>(end - first < kItems ? end - first : kItems), n = s.p.n;
        for (int k = threadIdx.x; k < count * n; k += blockDim.x)
            m.items[k / n].x[k % n] = row_advantage(s.p, (first + k / n) / s.segments, k % n, 1);
        const int each = !s.factors && count < kSequenceWarps ? kSequenceWarps / count : 1;
        read_items(s, first, count, m, each);
        __syncthreads();
        finish_items(s, first, count, m, each);
        __syncthreads();
        add_items(s.terms, m.items, count, m.solver, m.sums);
        __syncthreads();
    }
    double* const to = s.partials + block * s.terms.size();
    for (int k = threadIdx.x; k < s.terms.size(); k += blockDim.x) to[k] = m.sums[k];
}

// --- the last block ----------------------------------------------------------------------------------------

__device__ inline void add_blocks(const Sequences& s, SequenceMemory& m) {
    const int size = s.terms.size(), threads = blockDim.x, width = size < threads ? size : threads;
    const int groups = threads / width, group = threadIdx.x / width, place = threadIdx.x % width;
    for (int first = 0; first < size; first += width) {
        const int k = first + place;
        double sum = 0;
        if (group < groups && k < size) {
            constexpr int kTogether = 24;  // loads in flight
            for (int64_t block = group; block < s.blocks; block += kTogether * groups) {
                double own[kTogether];
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) {
                    const int64_t at = block + u * groups;
                    own[u] = at < s.blocks ? __ldcg(s.partials + at * size + k) : 0.0;
                }
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) sum += own[u];
            }
        }
        m.table[threadIdx.x] = sum;
        __syncthreads();
        if (group == 0 && k < size) {
            for (int g = 1; g < groups; ++g) sum += m.table[g * width + place];
            m.sums[k] = sum;
        }
        __syncthreads();
    }
}

// Runs in one thread. Not inlined, since the solvers use all registers.
__device__ PAMA_NOINLINE void solve_matrix(const Sequences& s, SequenceMemory& m) {
    const int n = s.p.n;
    double* const matrix = m.solver + n;
    m.optimum = batch_matrix_weights(s.rule, n, matrix, m.preference, m.weights,
                                     reinterpret_cast<unsigned char*>(m.solver), matrix + n * n)
                    .optimum;
}

__device__ inline void solve_weights(const Sequences& s, SequenceMemory& m) {
    const int n = s.p.n;
    const bool pairs = needs_pairs(s.rule.kind);
    for (int i = threadIdx.x; i < n; i += blockDim.x) m.preference[i] = s.preference ? s.preference[i] : 1.0 / n;
    if (pairs)
        for (int k = threadIdx.x; k < n * n; k += blockDim.x)
            m.solver[n + k] = batch_entry(s.rule, m.statistics, n, k / n, k % n);
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool some =
            effective_preference(m.statistics, n, s.rule.kind == Kind::gram, m.preference, m.weights, m.effective);
        int count = 0;
        for (int i = 0; i < n; ++i) count += m.weights[i] != 0;
        m.divided = s.rule.kind == Kind::upgrad && count == n;
        if (!some || !pairs)
            m.optimum = batch_vector_weights(s.rule, m.statistics, n, m.preference, m.effective, m.solver, m.solver + n,
                                             m.weights);
        else if (!m.divided)
            solve_matrix(s, m);
    }
    __syncthreads();
    // UPGrad of objectives that all have a signal: by the first warp.
    if (!m.divided || threadIdx.x >= kWarp) return;
    if (!upgrad_few(n, m.solver + n, m.preference, m.weights, &m.optimum) && threadIdx.x == 0) solve_matrix(s, m);
}

// Sums of c_i A_i over positive and over negative advantages of a sequence.
struct Signed {
    double tokens, omega, up, down;
};

__device__ inline Signed combine_row(const Sequences& s, const SequenceMemory& m, int64_t row) {
    const DeviceTokens& p = s.p;
    Signed x{0, 1, 0, 0};
    for (int64_t k = 0; k < s.segments; ++k) x.tokens += __ldcg(s.counts + row * s.segments + k);
    if (x.tokens == 0) return x;
    if (p.aggregation == Aggregation::seq_mean_token_mean) x.omega = 1 / x.tokens;
    double share = p.objective_mask ? 0 : 1;
    for (int i = 0; i < p.n; ++i) {
        const RowAdvantage own = row_advantage(p, row, i, x.tokens);
        if (!own.here) continue;
        if (p.objective_mask) share += m.effective[i];
        (own.negative && !p.noon ? x.down : x.up) += m.weights[i] * kept(own, p.noon);
    }
    // Divide by the sum of the preferences of the objectives that are present.
    const bool some = share > 0;
    x.up = some ? x.up / share : 0 * x.up;
    x.down = some ? x.down / share : 0 * x.down;
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
    const auto each = [&](auto visit) {
        for (int64_t row = threadIdx.x; row < s.p.rows; row += blockDim.x) visit(row, combine_row(s, m, row));
    };
    const auto write = [&](int64_t row, const Signed& x, double root) {
        const double sum = x.up + x.down;
        if (s.combined) store_number(s.combined, row, sum == 0 ? sum : sum / root);  // a NaN root: 0 without tokens
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

// One kernel for all input dtypes, since the solver takes long to compile.
__global__ void __launch_bounds__(kSequenceThreads, 1) sequences_kernel(const __grid_constant__ Sequences s) {
    PAMA_SHARED(SequenceMemory, m);
    add_share(s, m);
    if (!last_block(s.counter)) return;
    add_blocks(s, m);
    write_statistics(s, m.sums, m.statistics);
    if (!s.solved) return;
    solve_weights(s, m);
    __syncthreads();
    for (int i = threadIdx.x; i < s.p.n; i += blockDim.x) {
        store_number(s.weights, i, m.weights[i]);
        if (s.effective) s.effective[i] = m.effective[i];
    }
    if (threadIdx.x == 0) store_number(s.optimum, 0, m.optimum);
    write_rows(s, m);
}

}  // namespace cuda
}  // namespace pama
