// Splits work into blocks whose number and order depend only on the input: threads take blocks, and partial sums are
// added in the order of the blocks, so results are bitwise equal for any number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "threads.hpp"

namespace pama {

constexpr int64_t kBlockTokens = 4096, kTileMultiple = 256, kMaxBlocks = 256;
constexpr int64_t kMaxPartials = 1 << 24;  // doubles
// The minimum work of a thread (about 100 us). Less work does not pay for a parallel region: on busy cores a region
// ends only when the scheduler has run every thread, which can take milliseconds.
constexpr int64_t kThreadTokens = 1 << 14;

// Aligned memory, kept until it is too small.
class Memory {
    std::unique_ptr<char[]> data;
    int64_t size = 0;

  public:
    void* of(int64_t bytes) {
        if (size < bytes + 64) {
            data.reset(new char[static_cast<size_t>(bytes + 64)]);
            size = bytes + 64;
        }
        const auto address = reinterpret_cast<size_t>(data.get());
        return data.get() + (64 - address % 64) % 64;
    }
    void release_above(int64_t bytes) {
        if (size <= bytes + 64) return;
        data.reset();
        size = 0;
    }
};

// The scratch memory of one thread, kept between calls.
inline void* scratch(int64_t bytes) {
    thread_local Memory memory;
    return memory.of(bytes);
}

// Splits `units` tokens or rows, with `tokens` tokens in total, into blocks of equal size (a multiple of a tile).
struct Blocks {
    int64_t units, tokens, size, count;
    Blocks(int64_t units, int64_t tokens, int64_t multiple, int64_t partial_size = 1) : units(units), tokens(tokens) {
        const int64_t most = kMaxPartials / partial_size < kMaxBlocks ? kMaxPartials / partial_size : kMaxBlocks;
        int64_t wanted = (tokens + kBlockTokens - 1) / kBlockTokens;
        wanted = wanted > most ? most : wanted;
        wanted = wanted < 1 ? 1 : wanted;
        size = (units + wanted - 1) / wanted;
        size = (size + multiple - 1) / multiple * multiple;
        count = units == 0 ? 0 : (units + size - 1) / size;
    }
    int64_t first(int64_t block) const { return block * size; }
    int64_t last(int64_t block) const { return (block + 1) * size < units ? (block + 1) * size : units; }
    int threads(int most) const {
        return tokens / kThreadTokens < most ? static_cast<int>(tokens / kThreadTokens) : most;
    }
};

inline void add(const std::vector<double>& parts, int64_t count, int64_t size, double* out) {
    std::memset(out, 0, sizeof(double) * static_cast<size_t>(size));
    for (int64_t part = 0; part < count; ++part)
        for (int64_t k = 0; k < size; ++k) out[k] += parts[static_cast<size_t>(part * size + k)];
}

}  // namespace pama
