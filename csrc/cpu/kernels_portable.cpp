#define PAMA_ISA portable
#include "kernels.inl"

namespace pama {
const Kernels kernels_portable = portable::table("portable", matrices_portable, upgrad_batch_portable);
}
