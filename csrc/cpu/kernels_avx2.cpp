#define PAMA_ISA avx2
#include "kernels.inl"

namespace pama {
const Kernels kernels_avx2 = {"avx2",       scratch_size,     statistics_entry, apply_entry,
                              weights_rows, min_norm_scratch, min_norm_rows,    upgrad_rows};
}
