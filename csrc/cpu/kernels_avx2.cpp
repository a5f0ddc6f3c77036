#define PAMA_ISA avx2
#include "kernels.inl"

namespace pama {
const Kernels kernels_avx2 = avx2::table("avx2", matrices_avx2, upgrad_batch_avx2);
}
