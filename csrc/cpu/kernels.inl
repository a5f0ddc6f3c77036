// The kernels of one instruction set; PAMA_ISA names it.
#include "count.hpp"
#include "direct.hpp"
#include "row_objectives.hpp"
#include "score_rows.hpp"

PAMA_BEGIN

namespace {

int64_t scratch_entry(int n) {
    const int64_t tiles = scratch_size(n), rows = row_scratch_size(n);
    return tiles > rows ? tiles : rows;
}

int64_t count_entry(const Array& mask, int64_t offset, int64_t stride, int64_t count) {
    return count_nonzero(mask, offset, stride, count);
}

void statistics_entry(const Tokens& tokens, const double* omega, bool pairs, int64_t first, int64_t last, double* sums,
                      void* scratch) {
    if (tokens.wide)
        statistics_block<double>(tokens, omega, pairs, first, last, sums, scratch);
    else
        statistics_block<float>(tokens, omega, pairs, first, last, sums, scratch);
}

void apply_entry(const Pass& pass, int64_t first, int64_t last, Partial& partial, void* scratch) {
    if (pass.tokens.wide)
        apply_block<double>(pass, first, last, partial, scratch);
    else
        apply_block<float>(pass, first, last, partial, scratch);
}

void row_pass_entry(const Tokens& tokens, const RowPass& pass, int64_t first, int64_t last, double* head) {
    if (tokens.wide)
        row_pass<double>(tokens, pass, first, last, head);
    else
        row_pass<float>(tokens, pass, first, last, head);
}

constexpr Kernels table(const char* name, const MatrixSolvers& matrices,
                        BatchResult (*upgrad_batch)(const BatchGram&)) {
    return {name,           scratch_entry, count_entry,  statistics_entry, apply_entry, row_pass_entry,
            row_statistics, row_apply,     weights_rows, &matrices,        upgrad_batch};
}

}  // namespace

PAMA_END
