#define PAMA_ISA matrices_of_avx2
#include "matrices.inl"

namespace pama {
const MatrixSolvers matrices_avx2 = matrices_of_avx2::table();

unsigned min_norm_one_avx2(const Gram& gram, const double* preference, double regularization, int64_t row,
                           unsigned* passed) {
    return matrices_of_avx2::min_norm_one(gram, preference, regularization, row, passed);
}
}  // namespace pama
