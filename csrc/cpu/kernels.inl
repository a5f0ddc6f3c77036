// The kernels of one instruction set; PAMA_ISA names it.
#include "min_norm_rows.hpp"
#include "passes.hpp"

PAMA_BEGIN

namespace {

void statistics_entry(const Problem& problem, bool pairs, long first, long last, double* sums, void* scratch) {
    if (problem.wide)
        statistics_block<double>(problem, pairs, first, last, sums, scratch);
    else
        statistics_block<float>(problem, pairs, first, last, sums, scratch);
}

void apply_entry(const Problem& problem, const Apply& apply, long first, long last, Partial& partial, void* scratch) {
    if (problem.wide)
        apply_block<double>(problem, apply, first, last, partial, scratch);
    else
        apply_block<float>(problem, apply, first, last, partial, scratch);
}

}  // namespace

PAMA_END
