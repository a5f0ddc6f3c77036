#define PAMA_ISA batch_avx2
#include "upgrad_batch.inl"

namespace pama {
BatchResult upgrad_batch_avx2(const BatchGram& gram) { return batch_avx2::upgrad_batch(gram); }
}  // namespace pama
