#define PAMA_ISA portable
#include "kernels.inl"

namespace pama {
const Kernels kernels_portable = {"portable",   scratch_size,     statistics_entry, apply_entry,
                                  weights_rows, min_norm_scratch, min_norm_rows,    upgrad_rows};
}
