// Blocks of work on threads: OpenMP where it is there, else one after the other.
#pragma once

#include <cstdint>
#include <exception>

namespace pama {

// An exception of a block is thrown when all have ended: it may not leave a parallel region.
template <class Work>
inline void for_each_block(int64_t blocks, int threads, Work work) {
    if (blocks <= 1 || threads <= 1) {
        for (int64_t block = 0; block < blocks; ++block) work(block);
        return;
    }
    std::exception_ptr error;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        try {
            work(block);
        } catch (...) {
#pragma omp critical(pama_error)
            error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace pama
