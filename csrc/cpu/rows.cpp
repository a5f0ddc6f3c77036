// The passes over tokens and over objectives for advantages per sequence.
#include "plan.hpp"

namespace pama {
namespace {

constexpr int64_t kChunkMultiple = 512;

// The row that holds a token.
int64_t row_of(const Tokens& tokens, int64_t token) {
    if (!tokens.offsets) return token / tokens.width;
    int64_t low = 0, high = tokens.rows;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (tokens.offsets[middle] <= token ? low : high) = middle;
    }
    return low;
}

void run(const Tokens& tokens, const RowPass& pass, int threads) {
    const Kernels& k = kernels();
    const Blocks blocks(tokens.tokens(), tokens.tokens(), kChunkMultiple);
    // A row may span several blocks: the sums of its later parts are added in order.
    std::vector<double> heads(static_cast<size_t>(blocks.count * kRowSums));
    for_each_block(blocks.count, blocks.threads(threads), [&](int64_t block) {
        k.row_pass(tokens, pass, blocks.first(block), blocks.last(block), heads.data() + block * kRowSums);
    });
    for (int64_t block = 1; pass.sums && block < blocks.count; ++block) {
        const int64_t row = row_of(tokens, blocks.first(block));
        if (tokens.begin(row) == blocks.first(block)) continue;
        for (int64_t s = 0; s < kRowSums; ++s)
            pass.sums[row * kRowSums + s] += heads[static_cast<size_t>(block * kRowSums + s)];
    }
}

}  // namespace

std::vector<double> row_sums(const Tokens& tokens, RowPass pass, int threads) {
    std::vector<double> sums(static_cast<size_t>(tokens.rows * kRowSums));
    pass.sums = sums.data();
    if (tokens.logprobs || tokens.importance_weights) {
        run(tokens, pass, threads);
        return sums;
    }
    const std::vector<int64_t> counts = count_rows(tokens, threads);  // every factor is 1
    for (size_t row = 0; row < counts.size(); ++row)
        for (int sum = 0; sum < kRowSums; ++sum)
            if (factors_are_one(sum))
                sums[row * kRowSums + static_cast<size_t>(sum)] = static_cast<double>(counts[row]);
    return sums;
}

void row_gradient(const Tokens& tokens, const RowPass& pass, int threads) { run(tokens, pass, threads); }

void row_statistics(const Tokens& tokens, const double* omega, const std::vector<double>& rows, bool pairs, double* out,
                    int threads) {
    const Kernels& k = kernels();
    // With pair statistics, a block must have more rows than sums per pair.
    const int64_t n = tokens.n, work = tokens.rows * (pairs ? 8 : n);
    sum_blocks(
        tokens.rows, work, 1, statistics_size(n, pairs), threads, out, [&](int64_t first, int64_t last, double* part) {
            k.row_statistics(tokens, omega, rows.data(), pairs, first, last, part, scratch(k.scratch_size(tokens.n)));
        });
    if (pairs) complete_pairs(tokens, out);
}

}  // namespace pama
