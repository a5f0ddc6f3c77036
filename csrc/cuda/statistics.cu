#include <cstdint>

#include "count.cuh"
#include "launch.hpp"
#include "statistics.cuh"

namespace pama {
namespace cuda {
namespace {

constexpr int64_t kLeastRow = 16;      // minimum average number of tokens per sequence for one warp per sequence
constexpr int64_t kMostSegments = 32;  // of a sequence
constexpr int kRowThreads = limited(128);
constexpr int64_t kMostRounds = 8;  // of the last block that adds the partial sums; beyond, a second launch adds them

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

// Whether the tokens are contiguous in memory and float32.
bool flat(const DeviceTokens& p) {
    if (p.per_sequence || p.wide || p.objective_mask || row_mean(p) || p.tokens() > kMostFlat) return false;
    for (const Array* array : {&p.logprobs, &p.old_logprobs, &p.importance_weights, &p.mask, &p.advantages}) {
        const int64_t step = array == &p.advantages ? p.n : 1;
        if (!*array) continue;
        if (array != &p.mask && array->dtype != Dtype::f32) return false;
        if (array->token != step || (!p.starts && p.rows > 1 && array->row != p.width * step)) return false;
    }
    return p.n == 1 || p.advantages.objective == 1;
}

// The number of positions before the first token that makes every group aligned for vector loads; -1 if there is none.
int skipped(const DeviceTokens& p) {
    const int64_t n = p.n < kGroup ? p.n : 0;  // advantages of kGroup or more objectives are loaded per token
    const auto starts = [](const Array& array, int64_t bytes, unsigned alignment) {
        return !array || aligned(static_cast<const char*>(array.data) - bytes, alignment);
    };
    if (n == 0 && p.n % kGroup != 0) return -1;
    for (int skip = 0; skip < kTogether; ++skip)
        if (starts(p.logprobs, 4 * skip, 16) && starts(p.old_logprobs, 4 * skip, 16) &&
            starts(p.importance_weights, 4 * skip, 16) && starts(p.advantages, 4 * n * skip, 16) &&
            (size_of(p.mask.dtype) != 1 || starts(p.mask, skip, 4)))
            return skip;
    return -1;
}

FlatTokens flat_tokens(const DeviceTokens& p, int64_t threads) {
    const auto floats = [](const Array& array) { return static_cast<const float*>(array.data); };
    const int skip = skipped(p);
    FlatTokens x;
    x.advantages = floats(p.advantages);
    x.logp = floats(p.logprobs);
    x.old = p.logprobs ? floats(p.old_logprobs) : nullptr;
    x.w = floats(p.importance_weights);
    x.mask = p.mask;
    x.vectors = skip >= 0;
    x.mask_bytes = x.vectors && size_of(p.mask.dtype) == 1 ? static_cast<const unsigned char*>(p.mask.data) : nullptr;
    x.n = p.n;
    x.skip = skip < 0 ? 0 : skip;
    x.count = static_cast<unsigned>(p.tokens());
    x.groups = x.count > 0 ? (x.count + x.skip + kTogether - 1) / kTogether : 0;
    x.stride = static_cast<unsigned>(threads);
    x.first_whole = x.skip > 0 ? 1 : 0;
    x.all_whole = smaller<unsigned>((x.count + x.skip) / kTogether, x.groups) - smaller(x.first_whole, x.groups);
    if (x.count + x.skip < kTogether) x.all_whole = 0;
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

    template <int G, bool Full>
    cudaError_t flat() const {
        const FlatTask what{flat_tokens(p, plan.blocks * plan.threads), p.clip, FlatClip(p.clip, p.noon), p.noon,
                            finish};
        if constexpr (G > 1)
            if (finish.pairs) return launch(&flat_kernel<G, true, Full>, grid(), plan.threads, stream, what);
        return launch(&flat_kernel<G, false, Full>, grid(), plan.threads, stream, what);
    }
    template <int G>
    cudaError_t flat() const {
        const FlatTokens x = flat_tokens(p, 0);
        return x.logp && x.old && x.mask_bytes && !x.w && p.n <= kGroup ? flat<G, true>() : flat<G, false>();
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

cudaError_t token_sums(const Launch& to, const double* rows) {
    const DeviceTokens& p = to.p;
    const Plan& plan = to.plan;
    const double* const counts = plan.counted ? rows : nullptr;
    if (plan.by_row) {
        const RowTokens source{p, plan.counted ? nullptr : rows, counts, plan.segments, plan.blocks * kRowThreads};
        return launch(&rows_kernel, to.grid(), kRowThreads, to.stream, to.task(source));
    }
    if (!plan.flat) {
        const AnyTokens source{p, Walk(p, plan.blocks * kFewThreads, row_mean(p)), counts, row_mean(p)};
        return p.wide ? launch(&tokens_kernel<double>, to.grid(), kFewThreads, to.stream, to.task(source))
                      : launch(&tokens_kernel<float>, to.grid(), kFewThreads, to.stream, to.task(source));
    }
    switch (p.n) {
        case 1:
            return to.flat<1>();
        case 2:
            return to.flat<2>();
        case 3:
            return to.flat<3>();
        default:
            return to.flat<kGroup>();
    }
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
    int64_t work = shares(tokens, 2);  // of a thread: two tokens at least, a sequence, or a group of tokens
    plan.threads = kFewThreads;
    if (plan.by_row) {
        work = p.rows;
        plan.threads = kRowThreads;
    } else if (plan.flat) {
        work = shares(tokens, kTogether);
        plan.threads = limited(128);  // more threads once every multiprocessor has a block
        while (plan.threads < kManyThreads && plan.threads * multiprocessors < work * plan.layers) plan.threads *= 2;
    }
    if (plan.by_row && has_factors(p) && p.rows > 0) {
        const int64_t warps = static_cast<int64_t>(multiprocessors) * (2 * kFewThreads / kWarp);
        plan.segments = smaller(smaller(shares(warps, p.rows), kMostSegments), shares(tokens, 4 * kWarp * p.rows));
        plan.segments = plan.segments < 1 ? 1 : plan.segments;
        plan.row_doubles = kRowStatistics * plan.segments * p.rows;
    } else if (plan.counted) {
        plan.row_doubles = p.rows;
    }
    // One block per multiprocessor, or at most four if there are many layers, which divide unevenly.
    const int64_t most = (4 * plan.layers > multiprocessors ? 4 * multiprocessors : multiprocessors) / plan.layers;
    plan.blocks = smaller(smaller(most, kMostPartials / size), shares(work, plan.threads));
    plan.blocks = plan.blocks < 1 ? 1 : plan.blocks;
    plan.partials = size * plan.blocks;
    const int64_t written = added_statistics(p.n, pairs, static_cast<bool>(p.objective_mask));
    plan.apart = written * Partials{nullptr, plan.blocks}.lanes() > kMostRounds * plan.threads;
    return plan;
}

cudaError_t statistics(const DeviceTokens& p, bool pairs, const Plan& plan, double* work, unsigned* counter,
                       double* sums, const Solve* solve, cudaStream_t stream) {
    double* const rows = plan.row_doubles ? work : nullptr;
    if (rows) {
        const cudaError_t status = row_sums(p, plan, rows, stream);
        if (status != cudaSuccess) return status;
    }
    Finish finish{{work + plan.row_doubles, plan.blocks},
                  sums,
                  counter,
                  static_cast<unsigned>(plan.layers),
                  p.n,
                  pairs,
                  static_cast<bool>(p.objective_mask),
                  solve != nullptr,
                  solve ? *solve : Solve{}};
    if (plan.apart) finish.counter = nullptr;
    const cudaError_t status = token_sums({p, plan, finish, stream}, rows);
    if (status != cudaSuccess || !plan.apart) return status;
    const int64_t written = added_statistics(p.n, pairs, finish.presence) * finish.partials.lanes();
    const auto blocks = static_cast<unsigned>(smaller<int64_t>(shares(written, kFewThreads), 1024));
    return launch(&add_kernel, dim3(blocks), kFewThreads, stream, finish);
}

}  // namespace cuda
}  // namespace pama
