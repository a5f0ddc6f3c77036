#define PAMA_ISA avx512
#include "kernels.inl"

namespace pama {
const Kernels kernels_avx512 = avx512::table("avx512", matrices_avx512, upgrad_batch_avx512);
}
