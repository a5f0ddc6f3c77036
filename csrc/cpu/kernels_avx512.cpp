#define PAMA_ISA avx512
#include "kernels.inl"

namespace pama {
const Kernels kernels_avx512 = {"avx512",     scratch_size,     statistics_entry, apply_entry,
                                weights_rows, min_norm_scratch, min_norm_rows,    upgrad_rows};
}
