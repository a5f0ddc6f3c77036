#define PAMA_ISA batch_avx512
#include "upgrad_batch.inl"

namespace pama {
BatchResult upgrad_batch_avx512(const BatchGram& gram) { return batch_avx512::upgrad_batch(gram); }
}  // namespace pama
