// What `statistics` and `apply` share: token weights, denominators, the sums of rows.
#pragma once

#include <vector>

#include "../core/statistics.hpp"
#include "blocks.hpp"
#include "driver.hpp"

namespace pama {

// Valid tokens of each row.
std::vector<int64_t> count_rows(const Tokens& tokens, int threads);

// One over the valid tokens of each row, 0 where there are none; empty where every token has the weight 1.
std::vector<double> token_weights(const Tokens& tokens, const std::vector<int64_t>& counts);

// Where every objective is present everywhere, the pairwise sums follow from the single ones.
void complete_pairs(const Tokens& tokens, double* sums);

// Whether a row's tokens need not be told apart by objective.
inline bool by_row_sums(const Tokens& tokens) {
    return tokens.per_sequence && (!tokens.objective_mask || tokens.mask_per_sequence);
}

// Adds the partial sums of work(first, last, part) over blocks of `units` (tokens or rows) into out (size).
template <class Work>
inline void sum_blocks(int64_t units, int64_t tokens, int64_t multiple, int64_t size, int threads, double* out,
                       Work work) {
    const Blocks blocks(units, tokens, multiple, size);
    if (blocks.count == 1) {
        std::memset(out, 0, sizeof(double) * static_cast<size_t>(size));
        return work(blocks.first(0), blocks.last(0), out);
    }
    std::vector<double> parts(static_cast<size_t>(size * blocks.count));
    for_each_block(blocks.count, blocks.threads(threads),
                   [&](int64_t block) { work(blocks.first(block), blocks.last(block), parts.data() + block * size); });
    add(parts, blocks.count, size, out);
}

// Advantages per sequence: the sums of every row (rows, kRowSums), and what else `pass` asks for of its tokens.
std::vector<double> row_sums(const Tokens& tokens, RowPass pass, int threads);
void row_gradient(const Tokens& tokens, const RowPass& pass, int threads);
void row_statistics(const Tokens& tokens, const double* omega, const std::vector<double>& rows, bool pairs, double* out,
                    int threads);

}  // namespace pama
