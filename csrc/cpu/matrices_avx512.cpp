#define PAMA_ISA matrices_of_avx512
#include "matrices.inl"

namespace pama {
const MatrixSolvers matrices_avx512 = matrices_of_avx512::table();
}
