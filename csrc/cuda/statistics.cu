#include <cstdint>

#include "count.cuh"
#include "launch.hpp"
#include "statistics.cuh"

namespace pama {
namespace cuda {
namespace {

constexpr int64_t kLeastRow = 16;      // tokens of a sequence, on average, that a warp is worth
constexpr int64_t kMostSegments = 32;  // of a sequence
constexpr int kRowThreads = limited(128);

template <class T>
T smaller(T x, T y) {
    return x < y ? x : y;
}
int64_t shares(int64_t count, int64_t each) { return (count + each - 1) / each; }
bool aligned(const void* data, unsigned bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

bool has_factors(const DeviceTokens& p) { return p.logprobs || p.importance_weights; }
bool row_mean(const DeviceTokens& p) { return p.aggregation == Aggregation::seq_mean_token_mean; }
bool is_float32(const Array& array) { return !array || array.dtype == Dtype::f32; }

bool by_row(const DeviceTokens& p) {
    if (!p.per_sequence || (p.objective_mask && !p.mask_per_sequence)) return false;
    return !has_factors(p) || p.tokens() >= kLeastRow * p.rows;
}

// Whether the tokens are one run without gaps, of what the fast kernel reads.
bool flat(const DeviceTokens& p) {
    if (p.per_sequence || p.wide || p.objective_mask || row_mean(p)) return false;
    for (const Array* array : {&p.logprobs, &p.old_logprobs, &p.importance_weights, &p.mask, &p.advantages}) {
        const int64_t step = array == &p.advantages ? p.n : 1;
        if (!*array) continue;
        if (array == &p.mask ? size_of(array->dtype) != 1 : array->dtype != Dtype::f32) return false;
        if (array->token != step || (!p.starts && p.rows > 1 && array->row != p.width * step)) return false;
    }
    return p.n == 1 || p.advantages.objective == 1;
}

// Whether the advantages of a group are loaded at once.
bool in_vectors(const DeviceTokens& p) {
    return p.n == 2 ? aligned(p.advantages.data, 8) : p.n % 4 == 0 && aligned(p.advantages.data, 16);
}

template <bool Vectors>
FlatTokens<Vectors> flat_tokens(const DeviceTokens& p, int64_t threads) {
    FlatTokens<Vectors> x;
    const auto* const some = static_cast<const float*>(p.advantages.data);  // holds as many numbers as there are tokens
    const auto floats = [&](const Array& array, const float* other) {
        return array ? static_cast<const float*>(array.data) : other;
    };
    x.advantages = some;
    x.logp = floats(p.logprobs, some);
    x.old = floats(p.old_logprobs, x.logp);
    x.w = floats(p.importance_weights, some);
    x.mask = static_cast<const unsigned char*>(p.mask ? p.mask.data : p.advantages.data);
    x.has_logp = static_cast<bool>(p.logprobs);
    x.has_w = static_cast<bool>(p.importance_weights);
    x.has_mask = static_cast<bool>(p.mask);
    x.n = p.n;
    x.count = p.tokens();
    x.stride = threads;
    return x;
}

struct Launch {
    const DeviceTokens& p;
    const Plan& plan;
    Finish finish;
    cudaStream_t stream;

    dim3 grid() const { return dim3(static_cast<unsigned>(plan.blocks * plan.layers)); }

    template <class Source>
    StatisticsTask<Source> task(const Source& source) const {
        return {source, p.clip, ClipIn<float>(p.clip), p.noon, finish};
    }

    template <int G, bool Vectors>
    cudaError_t flat() const {
        const int threads = flat_threads(G, finish.pairs);
        const auto what = task(flat_tokens<Vectors>(p, plan.blocks * threads));
        return finish.pairs ? launch(&flat_kernel<G, true, Vectors>, grid(), threads, stream, what)
                            : launch(&flat_kernel<G, false, Vectors>, grid(), threads, stream, what);
    }
};

cudaError_t row_sums(const DeviceTokens& p, const Plan& plan, double* sums, cudaStream_t stream) {
    if (plan.counted) {
        int threads = kWarp;
        while (threads < kFewThreads && threads * 16 < p.tokens() / (p.rows ? p.rows : 1)) threads *= 2;
        const dim3 grid(static_cast<unsigned>(smaller<int64_t>(p.rows, 1 << 20)));
        return launch(&row_counts_kernel<double>, grid, threads, stream, p, sums);
    }
    const int64_t warps = kFewThreads / kWarp, blocks = shares(p.rows * plan.segments, warps);
    const dim3 grid(static_cast<unsigned>(smaller<int64_t>(blocks, 1 << 20)));
    const RowSumsTask task{p, plan.segments, sums};
    const bool f32 = is_float32(p.logprobs) && is_float32(p.old_logprobs) && is_float32(p.importance_weights) &&
                     (!p.mask || size_of(p.mask.dtype) == 1);
    if (p.wide) return launch(&row_sums_kernel<double, false>, grid, kFewThreads, stream, task);
    return f32 ? launch(&row_sums_kernel<float, true>, grid, kFewThreads, stream, task)
               : launch(&row_sums_kernel<float, false>, grid, kFewThreads, stream, task);
}

}  // namespace

Plan statistics_plan(const DeviceTokens& p, bool pairs, int multiprocessors) {
    constexpr int64_t kMostPartials = 1 << 25;
    Plan plan;
    plan.by_row = by_row(p);
    plan.flat = !plan.by_row && flat(p);
    plan.layers = plan.flat && p.n < kGroup ? 1 : layers_of(p.n, pairs, static_cast<bool>(p.objective_mask));
    plan.counted = p.mask && p.rows > 0 && (plan.by_row ? !has_factors(p) : row_mean(p));
    const int64_t size = statistics_size(p.n, pairs), tokens = p.tokens();
    int64_t work = tokens, threads = kFewThreads;
    if (plan.by_row) {
        work = p.rows;
        threads = kRowThreads;
    } else if (plan.flat) {
        threads = flat_threads(p.n < kGroup ? p.n : kGroup, pairs);
    }
    if (plan.by_row && has_factors(p) && p.rows > 0) {
        const int64_t warps = static_cast<int64_t>(multiprocessors) * (2 * kFewThreads / kWarp);
        plan.segments = smaller(smaller(shares(warps, p.rows), kMostSegments), shares(tokens, 4 * kWarp * p.rows));
        plan.segments = plan.segments < 1 ? 1 : plan.segments;
        plan.row_doubles = kRowStatistics * plan.segments * p.rows;
    } else if (plan.counted) {
        plan.row_doubles = p.rows;
    }
    // One block to a multiprocessor, or four where layers are many and so uneven to share out, as long as a thread has
    // two tokens or a sequence.
    const int64_t most =
        4 * plan.layers > multiprocessors ? shares(4 * multiprocessors, plan.layers) : multiprocessors / plan.layers;
    plan.blocks = smaller(smaller(most, kMostPartials / size), shares(work, (plan.by_row ? 1 : 2) * threads));
    plan.blocks = plan.blocks < 1 ? 1 : plan.blocks;
    plan.partials = size * plan.blocks;
    return plan;
}

cudaError_t statistics(const DeviceTokens& p, bool pairs, const Plan& plan, double* work, unsigned* counter,
                       double* sums, const Solve* solve, cudaStream_t stream) {
    const bool presence = static_cast<bool>(p.objective_mask);
    double* const rows = plan.row_doubles ? work : nullptr;
    if (rows) {
        const cudaError_t status = row_sums(p, plan, rows, stream);
        if (status != cudaSuccess) return status;
    }
    const Partials partials{work + plan.row_doubles, plan.blocks};
    const Launch to{p,
                    plan,
                    {partials, sums, counter, static_cast<unsigned>(plan.layers), p.n, pairs, presence,
                     solve != nullptr, solve ? *solve : Solve{}},
                    stream};
    const double* const counts = plan.counted ? rows : nullptr;
    if (plan.by_row) {
        const RowTokens source{p, plan.counted ? nullptr : rows, counts, plan.segments, plan.blocks * kRowThreads};
        return launch(&rows_kernel, to.grid(), kRowThreads, stream, to.task(source));
    }
    if (!plan.flat) {
        const AnyTokens source{p, Walk(p, plan.blocks * kFewThreads, row_mean(p)), counts, row_mean(p)};
        return p.wide ? launch(&tokens_kernel<double>, to.grid(), kFewThreads, stream, to.task(source))
                      : launch(&tokens_kernel<float>, to.grid(), kFewThreads, stream, to.task(source));
    }
    switch (p.n) {
        case 1:
            return to.flat<1, false>();
        case 2:
            return in_vectors(p) ? to.flat<2, true>() : to.flat<2, false>();
        case 3:
            return to.flat<3, false>();
        default:
            return in_vectors(p) ? to.flat<kGroup, true>() : to.flat<kGroup, false>();
    }
}

}  // namespace cuda
}  // namespace pama
