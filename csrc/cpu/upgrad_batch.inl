// UPGrad's weights of a batch for one instruction set; PAMA_ISA names it. Without contraction (fused multiply-add),
// ranks on different processors get bitwise equal weights from equal sums: no sum of the solver depends on the width of
// the vectors.
#include "../core/upgrad.hpp"
#include "kernels.hpp"

PAMA_BEGIN

namespace {

BatchResult upgrad_batch(const BatchGram& g) {
    const MatrixView<double> view = {g.n, g.matrix, g.n, 1};
    const SolverResult result = upgrad_solve(view, g.preference, g.present, g.weights, g.workspace);
    return {result.optimum, result.residual, !unsolved(result)};
}

}  // namespace

PAMA_END
