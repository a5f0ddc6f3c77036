// Runs blocks of work on threads with OpenMP, or sequentially if OpenMP is not available.
#pragma once

#include <cstdint>
#include <exception>

namespace pama {

// An exception thrown by a block is rethrown when all blocks have ended, since it must not leave a parallel region.
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
