// Functions shared by `statistics` and `apply`: token weights, denominators, sums of rows.
#pragma once

#include <vector>

#include "../core/statistics.hpp"
#include "blocks.hpp"
#include "driver.hpp"

namespace pama {

// Number of valid tokens of each row.
std::vector<int64_t> count_rows(const Tokens& tokens, int threads);

// Token weights of each row: 1 / (number of valid tokens), 0 for a row without valid tokens. Empty if every token has
// weight 1.
std::vector<double> token_weights(const Tokens& tokens, const std::vector<int64_t>& counts);

// Copies the upper triangles of the symmetric pair statistics to the lower ones, and computes the pair statistics that
// follow from the fields if every objective is present at every token.
void complete_pairs(const Tokens& tokens, double* sums);

// Whether advantages and presence are the same for all tokens of a row, so that sums per row suffice.
inline bool by_row_sums(const Tokens& tokens) {
    return tokens.per_sequence && (!tokens.objective_mask || tokens.mask_per_sequence);
}

// Splits `units` (tokens or rows) into blocks, computes partial sums with work(first, last, part) and adds them into
// out (size).
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

// For advantages per sequence: computes the sums of every row (rows, kRowSums), and the gradient if `pass` contains its
// inputs.
std::vector<double> row_sums(const Tokens& tokens, RowPass pass, int threads);
void row_gradient(const Tokens& tokens, const RowPass& pass, int threads);
void row_statistics(const Tokens& tokens, const double* omega, const std::vector<double>& rows, bool pairs, double* out,
                    int threads);

}  // namespace pama
