#define PAMA_ISA matrices_of_portable
#include "matrices.inl"

namespace pama {
const MatrixSolvers matrices_portable = matrices_of_portable::table();
}
