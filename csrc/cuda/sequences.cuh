// The kernel of sequences.hpp. The segments of the sequences are distributed over the blocks. Each block sums its
// statistics and writes them to its own partial sums. The last block to finish adds the partial sums in a fixed order,
// solves for the weights, and writes the results of all sequences.
#pragma once

#include "../core/weights.hpp"
#include "count.cuh"
#include "min_norm.cuh"
#include "sequence_rows.cuh"

namespace pama {
namespace cuda {

__device__ inline void write_statistics(const Sequences& s, const double* sums, double* statistics) {
    const unsigned n = s.p.n, fields = kFields * n, size = static_cast<unsigned>(statistics_size(n, s.pairs));
    for (unsigned k = threadIdx.x; k < size; k += blockDim.x) {
        double value;
        if (k < fields) {
            value = field_of(s.terms, sums, k / n, k % n);
        } else if (k < fields + kTotals) {
            value = sums[k - fields];
        } else {
            const unsigned row = (k - fields - kTotals) / n;
            value = pair_of(s.terms, sums, row / n, row % n, k - fields - kTotals - row * n);
        }
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
        if (lane == 0) m.share.parts[unit] = sum;
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
        if (lane < kRowStatistics) m.share.items[item].factors.values[lane] = sum;
        if (lane == kValid) m.share.parts[item] = static_cast<unsigned>(sum);
    }
}

// Completes the items once their numbers of valid tokens are known. A segment without valid tokens is ignored,
// including NaN advantages.
__device__ inline void finish_items(const Sequences& s, int64_t first, int count, SequenceMemory& m, int each) {
    const int n = s.p.n;
    for (int k = threadIdx.x; k < count * n; k += blockDim.x) {
        const int item = k / n, i = k % n;
        unsigned tokens = 0;
        for (int part = 0; part < each; ++part) tokens += m.share.parts[item * each + part];
        if (tokens == 0) m.share.items[item].x[i] = {0, false, false};
        if (i != 0) continue;
        s.counts[first + item] = tokens;
        RowFactors& f = m.share.items[item].factors;
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
    const auto segments = static_cast<unsigned>(s.segments);  // 64-bit divisions are slow
    const int64_t items = s.p.rows * s.segments, block = blockIdx.x;
    const int64_t begin = block * items / s.blocks, end = (block + 1) * items / s.blocks;
    for (int k = threadIdx.x; k < s.terms.size(); k += blockDim.x) m.sums[k] = 0;
    for (int64_t first = begin; first < end; first += kItems) {
        const int count = static_cast<int>(end - first < kItems ? end - first : kItems), n = s.p.n;
        for (int k = threadIdx.x; k < count * n; k += blockDim.x)
            m.share.items[k / n].x[k % n] =
                row_advantage(s.p, static_cast<unsigned>(first + k / n) / segments, k % n, 1);
        const int each = !s.factors && count < kSequenceWarps ? kSequenceWarps / count : 1;
        read_items(s, first, count, m, each);
        __syncthreads();
        finish_items(s, first, count, m, each);
        __syncthreads();
        add_items(s.terms, m.share.items, count, m.share.fields, m.sums);
        __syncthreads();
    }
    double* const to = s.partials + block * s.terms.size();
    for (int k = threadIdx.x; k < s.terms.size(); k += blockDim.x) to[k] = m.sums[k];
}

// --- the last block ----------------------------------------------------------------------------------------

// The code of the last block is short, with loops that are not unrolled: no other block of its multiprocessor has run
// it, so its instructions come from the level-2 cache.
__device__ inline void add_blocks(const Sequences& s, SequenceMemory& m) {
    const unsigned size = s.terms.size(), threads = blockDim.x, width = size < threads ? size : threads;
    const unsigned groups = threads / width, group = threadIdx.x / width, place = threadIdx.x % width;
    const auto blocks = static_cast<unsigned>(s.blocks);
    PAMA_ROLLED
    for (unsigned first = 0; first < size; first += width) {
        const unsigned k = first + place;
        double sum = 0;
        if (group < groups && k < size) {
            constexpr int kTogether = 12;  // loads in flight
            PAMA_ROLLED
            for (unsigned block = group; block < blocks; block += kTogether * groups) {
                double own[kTogether];
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) {
                    const unsigned at = block + u * groups;
                    own[u] = at < blocks ? __ldcg(s.partials + (at * size + k)) : 0.0;
                }
                PAMA_UNROLL
                for (int u = 0; u < kTogether; ++u) sum += own[u];
            }
        }
        m.table[threadIdx.x] = sum;
        __syncthreads();
        if (group == 0 && k < size) {
            PAMA_ROLLED
            for (unsigned g = 1; g < groups; ++g) sum += m.table[g * width + place];
            m.sums[k] = sum;
        }
        __syncthreads();
    }
}

// By one thread, what the warps do not solve: singular matrices, and objectives without a signal. Not inlined, since
// the solvers use all registers. The general solvers alone: those in registers would make the kernel larger.
__device__ PAMA_NOINLINE void solve_matrix(const Sequences& s, SequenceMemory& m) {
    const int n = s.p.n;
    double *const matrix = m.solver + n, *const work = matrix + n * n;
    auto* const present = reinterpret_cast<unsigned char*>(m.solver);
    m.optimum = solve_present(n, m.weights, present, [&] {
                    return s.rule.kind == Kind::gram
                               ? min_norm::solve_general(MatrixView<double>{n, matrix, n, 1}, m.preference, present,
                                                         s.rule.number, m.weights, work)
                               : upgrad::solve_general(upgrad::Given<double>{{n, matrix, n, 1}, m.preference, present},
                                                       m.weights, work, Lanes{0, 1});
                }).optimum;
}

// Which objectives have a signal (1 in `weights`), and the preferences over those. Called by one warp. The function of
// solve.cuh, for any number of objectives, would add 400 instructions to this kernel.
__device__ inline void choose_objectives(const Sequences& s, SequenceMemory& m) {
    const int n = s.p.n, i = threadIdx.x;
    const bool real = i < n;
    const double p = !real ? 0 : s.preference ? s.preference[i] : 1.0 / n;
    const bool part = real && has_signal(m.statistics, n, i, s.rule.kind == Kind::gram);
    const double mass = warp_sum(part ? p : 0);
    const unsigned count = __reduce_add_sync(kAllLanes, part ? 1u : 0u);
    if (i == 0) m.count = static_cast<int>(count);
    if (!real) return;
    m.preference[i] = p;
    m.weights[i] = part ? 1 : 0;
    m.effective[i] = !(mass > 0) ? p : part ? p / mass : 0;
}

__device__ inline void solve_weights(const Sequences& s, SequenceMemory& m) {
    const int n = s.p.n;
    const bool pairs = needs_pairs(s.rule.kind);
    double *const matrix = m.solver + n, *const work = matrix + n * n;
    if (threadIdx.x < kWarp) choose_objectives(s, m);
    if (pairs)
        for (int k = threadIdx.x; k < n * n; k += blockDim.x)
            matrix[k] = batch_entry(s.rule, m.statistics, n, k / n, k % n);
    if (threadIdx.x == 0) m.solved = false;
    __syncthreads();
    if (pairs && m.count == n && n > 2) {
        if (s.rule.kind == Kind::upgrad) {
            const bool solved = upgrad_by_warps<1>(n, matrix, m.preference, m.weights, &m.optimum, work);
            if (threadIdx.x == 0) m.solved = solved;
        } else if (threadIdx.x < kWarp) {
            const bool solved =
                min_norm_by_warp<1>(n, matrix, m.preference, s.rule.number, m.weights, &m.optimum, work);
            if (threadIdx.x == 0) m.solved = solved;
        }
    }
    if (threadIdx.x != 0 || m.solved) return;
    if (m.count == 0 || !pairs)
        m.optimum =
            batch_vector_weights(s.rule, m.statistics, n, m.preference, m.effective, m.solver, matrix, m.weights);
    else
        solve_matrix(s, m);
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
