// The solvers of matrices for one instruction set; PAMA_ISA names it.
#include "min_norm_rows.hpp"

PAMA_BEGIN

namespace {

constexpr MatrixSolvers table() { return {solver_scratch, min_norm_rows, upgrad_rows}; }

}  // namespace

PAMA_END
