// Blocks of work on threads: OpenMP where it is there, else one after the other.
#pragma once

namespace pama {

template <class Work>
inline void for_each_block(long blocks, int threads, Work work) {
    if (blocks <= 1 || threads <= 1) {
        for (long block = 0; block < blocks; ++block) work(block);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; ++block) work(block);
}

}  // namespace pama
