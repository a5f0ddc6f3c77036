#include "driver.hpp"

#include <cstring>
#include <memory>
#include <vector>

#include "../core/weights.hpp"
#include "batch_solve.hpp"
#include "threads.hpp"

namespace pama {
namespace {

constexpr long kBlockTokens = 4096, kTileMultiple = 256, kMaxBlocks = 256;
constexpr long kMaxPartials = 1 << 24;  // doubles
// A thread that gets less than this (about 100 us) is not worth its parallel region: where the cores are busy, the
// region ends when the scheduler has found time for everybody, after milliseconds.
constexpr long kThreadTokens = 1 << 14;

#if defined(PAMA_HAVE_AVX512)
bool supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* best() {
#if defined(PAMA_HAVE_AVX512)
    if (supports_avx512()) return &kernels_avx512;
    if (supports_avx2()) return &kernels_avx2;
#endif
    return &kernels_portable;
}

// Aligned memory for one thread, kept between calls.
void* scratch(long bytes) {
    thread_local std::unique_ptr<char[]> memory;
    thread_local long size = 0;
    if (size < bytes + 64) {
        memory.reset(new char[static_cast<size_t>(bytes + 64)]);
        size = bytes + 64;
    }
    const auto address = reinterpret_cast<size_t>(memory.get());
    return memory.get() + (64 - address % 64) % 64;
}

// `units` tokens or rows, of `tokens` tokens together, in blocks of equal size (a multiple of a tile).
struct Blocks {
    long units, tokens, size, count;
    Blocks(long units, long tokens, long multiple, long partial_size = 1) : units(units), tokens(tokens) {
        const long most = kMaxPartials / partial_size < kMaxBlocks ? kMaxPartials / partial_size : kMaxBlocks;
        long wanted = (tokens + kBlockTokens - 1) / kBlockTokens;
        wanted = wanted > most ? most : wanted;
        wanted = wanted < 1 ? 1 : wanted;
        size = (units + wanted - 1) / wanted;
        size = (size + multiple - 1) / multiple * multiple;
        count = units == 0 ? 0 : (units + size - 1) / size;
    }
    long first(long block) const { return block * size; }
    long last(long block) const { return (block + 1) * size < units ? (block + 1) * size : units; }
    int threads(int most) const {
        return tokens / kThreadTokens < most ? static_cast<int>(tokens / kThreadTokens) : most;
    }
};

void add(std::vector<double>& parts, long count, long size, double* out) {
    std::memset(out, 0, sizeof(double) * static_cast<size_t>(size));
    for (long part = 0; part < count; ++part)
        for (long k = 0; k < size; ++k) out[k] += parts[static_cast<size_t>(part * size + k)];
}

// Where every objective is present everywhere, the pairwise sums follow from the single ones.
void complete_pairs(const Problem& problem, double* sums) {
    if (problem.objective_mask) return;
    const long n = problem.n;
    for (long i = 0; i < n; ++i)
        for (long j = 0; j < n; ++j) {
            sums[pair_offset(n, kPairCount) + i * n + j] = sums[kCount * n + i];
            sums[pair_offset(n, kPairAdvantage) + i * n + j] = sums[kAdvantageSum * n + i];
            sums[pair_offset(n, kPairAdvantageSquare) + i * n + j] = sums[kAdvantageSquareSum * n + i];
        }
}

// Padded sequences without a gap between them are one long sequence.
Problem collapsed(Problem problem) {
    if (problem.offsets || problem.rows == 1) return problem;
    for (const Array* array : {&problem.advantages, &problem.mask, &problem.objective_mask, &problem.logprobs,
                               &problem.old_logprobs, &problem.ref_logprobs, &problem.importance_weights})
        if (*array && array->row != problem.width * array->token) return problem;
    problem.width *= problem.rows;
    problem.rows = 1;
    return problem;
}

bool is_zero(const Array& mask, long at) {
    switch (mask.dtype) {
        case Dtype::f32:
            return static_cast<const float*>(mask.data)[at] == 0;
        case Dtype::f64:
            return static_cast<const double*>(mask.data)[at] == 0;
        case Dtype::bf16:
        case Dtype::f16:
            return (static_cast<const unsigned short*>(mask.data)[at] & 0x7fff) == 0;
        case Dtype::i16:
            return static_cast<const short*>(mask.data)[at] == 0;
        case Dtype::i32:
            return static_cast<const int*>(mask.data)[at] == 0;
        case Dtype::i64:
            return static_cast<const long*>(mask.data)[at] == 0;
        default:
            return static_cast<const unsigned char*>(mask.data)[at] == 0;
    }
}

long count_valid(const Problem& problem, long row) {
    const Array& mask = problem.mask;
    const long begin = problem.offsets ? problem.offsets[row] : 0;
    const long length = problem.begin(row + 1) - problem.begin(row);
    if (!mask) return length;
    const long base = row * mask.row + begin * mask.token;
    long count = 0;
    if ((mask.dtype == Dtype::u8 || mask.dtype == Dtype::i8) && mask.token == 1) {
        const unsigned char* bytes = static_cast<const unsigned char*>(mask.data) + base;
        for (long t = 0; t < length; ++t) count += bytes[t] != 0;
    } else {
        for (long t = 0; t < length; ++t) count += !is_zero(mask, base + t * mask.token);
    }
    return count;
}

bool any_valid(const Problem& problem) {
    for (long row = 0; row < problem.rows; ++row)
        if (count_valid(problem, row) > 0) return true;
    return false;
}

void store_scalar(const Array& array, double value) {
    if (!array) return;
    if (array.dtype == Dtype::f64)
        *static_cast<double*>(array.data) = value;
    else
        *static_cast<float*>(array.data) = static_cast<float>(value);
}

void store_weights(const Array& array, int n, const double* c) {
    if (!array) return;
    for (int i = 0; i < n; ++i) {
        if (array.dtype == Dtype::f64)
            static_cast<double*>(array.data)[i] = c[i];
        else
            static_cast<float*>(array.data)[i] = static_cast<float>(c[i]);
    }
}

}  // namespace

const Kernels& kernels(const char* name) {
    static const Kernels* chosen = best();
    if (name) {
        const Kernels* wanted = &kernels_portable;
#if defined(PAMA_HAVE_AVX512)
        if (std::strcmp(name, "avx2") == 0 && supports_avx2()) wanted = &kernels_avx2;
        if (std::strcmp(name, "avx512") == 0 && supports_avx512()) wanted = &kernels_avx512;
        if (std::strcmp(name, "best") == 0) wanted = best();
#endif
        chosen = wanted;
    }
    return *chosen;
}

void statistics(const Problem& given, bool pairs, double* out, int threads) {
    const Problem problem = collapsed(given);
    const Kernels& k = kernels();
    const long size = statistics_size(problem.n, pairs), bytes = k.scratch_size(problem.n);
    const Blocks blocks(problem.tokens(), problem.tokens(), kTileMultiple, size);
    std::vector<double> parts(static_cast<size_t>(size * blocks.count));
    for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
        k.statistics(problem, pairs, blocks.first(block), blocks.last(block), parts.data() + block * size,
                     scratch(bytes));
    });
    add(parts, blocks.count, size, out);
    if (pairs) complete_pairs(problem, out);
}

double batch_weights(const double* sums, int n, bool gram, const double* prior, double regularization, double* c) {
    if (!gram) {
        std::vector<double> work(static_cast<size_t>(2 * n));
        return statistics_weights(sums, n, prior, regularization, work.data(), work.data() + n, c);
    }
    return solve_batch_gram(sums, n, prior, regularization, c);
}

namespace {

template <class Solve>
long each_matrix(const Gram& gram, long work, int threads, Solve solve) {
    const Kernels& k = kernels();
    const long bytes = k.min_norm_scratch(gram.n);
    const Blocks blocks(gram.rows, gram.rows * work, 1);
    std::vector<Refused> refused(static_cast<size_t>(blocks.count));
    for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
        refused[static_cast<size_t>(block)] = solve(k, blocks.first(block), blocks.last(block), scratch(bytes));
    });
    for (const Refused& r : refused)
        if (r) {
            if (r.residual != 0) throw_unsolved(r.row, r.residual);
            return r.row;
        }
    return -1;
}

}  // namespace

long min_norm(const Gram& gram, const double* preference, double regularization, int threads) {
    const long work = static_cast<long>(gram.n) * gram.n;
    return each_matrix(gram, work, threads, [&](const Kernels& k, long first, long last, void* scratch) {
        return k.min_norm(gram, preference, nullptr, regularization, first, last, scratch);
    });
}

long upgrad(const Gram& gram, const double* preference, int threads) {
    const long work = static_cast<long>(gram.n) * gram.n * gram.n;  // n problems for each matrix
    return each_matrix(gram, work, threads, [&](const Kernels& k, long first, long last, void* scratch) {
        return k.upgrad(gram, preference, first, last, scratch);
    });
}

void apply(Problem problem, Apply apply, int threads) {
    const Kernels& k = kernels();
    const int n = problem.n;
    const long bytes = k.scratch_size(n);
    const bool batch = apply.weights_per == WeightsPer::batch || apply.weights_per == WeightsPer::gram;
    const bool given = apply.weights_per == WeightsPer::given;
    const bool row_weights = apply.weights_per == WeightsPer::sequence || apply.given_per_row;
    const bool rows_mode = row_weights || apply.combined_per_row;
    double* sums = apply.statistics;

    std::vector<double> solved(static_cast<size_t>(n));
    if (batch) {
        statistics(problem, apply.pairs, sums, threads);
        const double optimum = batch_weights(sums, n, apply.weights_per == WeightsPer::gram, apply.prior,
                                             apply.regularization, solved.data());
        store_scalar(apply.optimum, optimum);
        store_weights(apply.weights, n, solved.data());
        apply.weights = apply.optimum = Array{};
        apply.statistics = nullptr;
        apply.pairs = false;
        apply.weights_per = WeightsPer::given;
        apply.given = Array{solved.data(), Dtype::f64, 0, 0, 1};
    }
    const Array weights_out = apply.weights, optimum_out = apply.optimum;
    if (!row_weights) apply.weights = apply.optimum = Array{};

    std::vector<double> row_scale;
    if (apply.loss) {
        double denominator = problem.rows > 0 ? static_cast<double>(problem.rows) : 1;
        if (apply.aggregation == Aggregation::sequence_mean_token_mean) {
            row_scale.resize(static_cast<size_t>(problem.rows));
            for (long row = 0; row < problem.rows; ++row) {
                const long count = count_valid(problem, row);
                row_scale[static_cast<size_t>(row)] = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
            }
            apply.row_scale = row_scale.data();
        } else if (apply.aggregation == Aggregation::token_mean && apply.normalizer == kNoNormalizer) {
            double count = 0;
            if (batch)
                count = sums[total_offset(n) + kTokenCount];
            else
                for (long row = 0; row < problem.rows; ++row) count += static_cast<double>(count_valid(problem, row));
            denominator = count > 0 ? count : 1;
        }
        apply.scale = 1 / (apply.normalizer == kNoNormalizer ? denominator : apply.normalizer);
        if (apply.normalizer == 0 && !any_valid(problem)) apply.scale = 0;
    }

    if (!rows_mode && !apply.row_scale) problem = collapsed(problem);
    const long tokens = problem.tokens();
    const long size = (apply.statistics ? statistics_size(n, apply.pairs) : 0) + n + 2;
    const Blocks blocks(rows_mode ? problem.rows : tokens, tokens, rows_mode ? 1 : kTileMultiple, size);
    std::vector<double> parts(static_cast<size_t>(size * blocks.count));
    for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
        double* part = parts.data() + block * size;
        Partial partial{apply.statistics ? part + n + 2 : nullptr, part + 2, 0, 0};
        k.apply(problem, apply, blocks.first(block), blocks.last(block), partial, scratch(bytes));
        part[0] = partial.loss;
        part[1] = partial.optimum;
    });
    std::vector<double> merged(static_cast<size_t>(size));
    add(parts, blocks.count, size, merged.data());
    store_scalar(apply.loss, merged[0]);
    if (apply.statistics) {
        std::memcpy(sums, merged.data() + n + 2, sizeof(double) * static_cast<size_t>(size - n - 2));
        if (apply.pairs) complete_pairs(problem, sums);
    }
    if (batch || row_weights) return;
    double optimum = merged[1];
    std::vector<double> c(merged.begin() + 2, merged.begin() + 2 + n);
    const double count = sums[total_offset(n) + kTokenCount];
    for (int i = 0; i < n; ++i) {
        if (given) {
            c[static_cast<size_t>(i)] = apply.given.dtype == Dtype::f64
                                            ? static_cast<const double*>(apply.given.data)[i * apply.given.objective]
                                            : static_cast<const float*>(apply.given.data)[i * apply.given.objective];
            optimum += c[static_cast<size_t>(i)] * score(sums, n, i);
        } else {
            c[static_cast<size_t>(i)] = count > 0 ? c[static_cast<size_t>(i)] / count : apply.prior[i];
        }
    }
    if (!given && count > 0) optimum /= count;
    store_scalar(optimum_out, optimum);
    store_weights(weights_out, n, c.data());
}

void weights(long rows, int n, const Array& scores, const double* prior, bool uniform, double regularization,
             const Array& scale, void* weights, void* optimum, int threads) {
    const Kernels& k = kernels();
    const Blocks blocks(rows, rows * n, 64);
    if (scores.dtype == Dtype::f32 && n <= kLaneObjectives) {
        for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
            const long first = blocks.first(block);
            k.weights(blocks.last(block) - first, n, static_cast<const float*>(scores.data) + first * scores.row,
                      scores.row, scores.objective, prior, uniform, regularization,
                      scale ? static_cast<const double*>(scale.data) + first * scale.row : nullptr, scale.row,
                      static_cast<float*>(weights) + first * n, static_cast<float*>(optimum) + first,
                      scratch(k.scratch_size(n)));
        });
        return;
    }
    const auto solve = [&](auto zero) {
        using T = decltype(zero);
        for_each_block(blocks.count, blocks.threads(threads), [&](long block) {
            double* a = static_cast<double*>(scratch(static_cast<long>(sizeof(double)) * 3 * n));
            double *p = a + n, *c = p + n;
            for (long row = blocks.first(block); row < blocks.last(block); ++row) {
                const T* source = static_cast<const T*>(scores.data) + row * scores.row;
                for (int i = 0; i < n; ++i) {
                    a[i] = static_cast<double>(source[i * scores.objective]);
                    p[i] = prior[i];
                    c[i] = 1;
                }
                const double size = scale ? static_cast<const double*>(scale.data)[row * scale.row] : -1.0;
                static_cast<T*>(optimum)[row] = static_cast<T>(simplex_row(n, a, p, regularization, size, c));
                for (int i = 0; i < n; ++i) static_cast<T*>(weights)[row * n + i] = static_cast<T>(c[i]);
            }
        });
    };
    if (scores.dtype == Dtype::f64)
        solve(0.0);
    else
        solve(0.0f);
}

}  // namespace pama
