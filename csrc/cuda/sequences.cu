#include <cstdint>

#include "launch.hpp"
#include "sequences.cuh"

namespace pama {
namespace cuda {

namespace {

int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

}  // namespace

bool plan_sequences(const DeviceTokens& p, bool pairs, int multiprocessors, Sequences& s) {
    const bool factors = p.logprobs || p.importance_weights;
    if (!p.per_sequence || (p.objective_mask && !p.mask_per_sequence)) return false;
    if (p.n > kSequenceObjectives || p.rows < 1 || p.rows > kSequenceRows) return false;
    const int64_t tokens = p.mask || factors ? p.tokens() : 0;  // tokens that are read
    s.p = p;
    s.terms = Terms::of(p, pairs);
    s.pairs = pairs;
    s.factors = factors;
    if (factors && p.aggregation != Aggregation::seq_mean_token_mean) {  // which needs whole sequences
        const int64_t wanted = int64_t{kSequenceWarps} * multiprocessors / p.rows, most = tokens / (p.rows * 8 * kWarp);
        s.segments = least(wanted, most);
        s.segments = s.segments < 1 ? 1 : s.segments;
    }
    s.blocks = least(p.rows * s.segments, multiprocessors);
    return tokens <= kSequenceTokens * s.blocks;
}

cudaError_t sequences(const Sequences& s, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(s.blocks));
    return launch(&sequences_kernel, grid, kSequenceThreads, stream, s);
}

}  // namespace cuda
}  // namespace pama
