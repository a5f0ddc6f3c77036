// Runs the kernels on the host, to test them without a GPU: every thread of the grid is a fibre, and the
// next one is picked at random. Missing barriers, wrong indices and errors in the detection of the last block then show
// in tests; a barrier or shuffle that some threads never reach ends the program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define PAMA_NOINLINE inline
#define PAMA_ROLLED
#define PAMA_UNROLL_BY(count)
#define PAMA_SHARED(type, name) \
    static char name##_key;     \
    type& name = *static_cast<type*>(::pama::emulation::shared(&name##_key, sizeof(type)))
#if !defined(PAMA_CUDA_THREADS)
#define PAMA_CUDA_THREADS 64
#endif

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pama {
namespace emulation {

constexpr int kLanes = 32;

struct Fibre {
    ucontext_t context;
    dim3 thread, block;
    unsigned block_number;
    unsigned exchanges;
    bool done;
};

struct Warp {
    double slots[2][kLanes];
    std::vector<Fibre*> waiting;
};

struct Block {
    std::map<const void*, std::unique_ptr<char[]>> shared;
    std::vector<Fibre*> waiting;
    std::vector<Warp> warps;
    unsigned running;
};

struct Grid {
    ucontext_t scheduler;
    std::vector<Fibre> fibres;
    std::vector<Block> blocks;
    std::vector<Fibre*> ready;
    Fibre* current;
    const std::function<void()>* body;
};

inline Grid* grid = nullptr;
inline std::mt19937 order{1};
inline int launches = 0;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
}

inline Block& own_block() { return grid->blocks[grid->current->block_number]; }

// Shared memory of the block, initialised with NaN.
inline void* shared(const void* key, std::size_t bytes) {
    auto& memory = own_block().shared[key];
    if (!memory) {
        memory.reset(new char[bytes]);
        std::memset(memory.get(), 0xff, bytes);
    }
    return memory.get();
}

// Takes a random thread from those that can go on, to run next.
inline void pick() {
    std::vector<Fibre*>& ready = grid->ready;
    std::swap(ready[order() % ready.size()], ready.back());
    grid->current = ready.back();
    ready.pop_back();
    threadIdx = grid->current->thread;
    blockIdx = grid->current->block;
}

// Goes on with another thread, without the scheduler in between: switches are most of the time that tests take.
inline void pause() {
    Fibre* const from = grid->current;
    if (grid->ready.empty()) {  // all wait
        swapcontext(&from->context, &grid->scheduler);
        return;
    }
    pick();
    if (grid->current != from) swapcontext(&from->context, &grid->current->context);
}

// Waits until `all` threads have reached the barrier `waiting`.
inline void meet(std::vector<Fibre*>& waiting, std::size_t all) {
    waiting.push_back(grid->current);
    if (waiting.size() == all) {
        grid->ready.insert(grid->ready.end(), waiting.begin(), waiting.end());
        waiting.clear();
    }
    pause();
}

inline void entry() {
    (*grid->body)();
    grid->current->done = true;
}

// Exchanges values between all lanes: calls read(slots) when every lane has stored its value.
template <class T, class Read>
inline auto exchange(T value, Read read) {
    Fibre& fibre = *grid->current;
    Warp& warp = own_block().warps[fibre.thread.x / kLanes];
    double* slots = warp.slots[fibre.exchanges++ % 2];
    slots[fibre.thread.x % kLanes] = static_cast<double>(value);
    meet(warp.waiting, kLanes);
    return read(slots, fibre.thread.x % kLanes);
}

inline void prepare(ucontext_t& context, char* stack, std::size_t bytes, ucontext_t& after) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = &after;
    makecontext(&context, entry, 0);
}

inline void run(dim3 size, unsigned threads, const std::function<void()>& body) {
    constexpr std::size_t kStack = 128 << 10;
    static std::vector<std::unique_ptr<char[]>> stacks;
    if (threads % kLanes != 0) fail("the number of threads is not one of whole warps");
    ++launches;
#if defined(PAMA_CUDA_IDLE)  // no kernel runs: the time of the host alone
    return;
#endif
    Grid state;
    grid = &state;
    state.body = &body;
    const unsigned count = size.x * size.y;
    state.blocks.resize(count);
    for (Block& block : state.blocks) {
        block.running = threads;
        block.warps.resize(threads / kLanes);
    }
    state.fibres.resize(static_cast<std::size_t>(count) * threads);
    while (stacks.size() < state.fibres.size()) stacks.emplace_back(new char[kStack]);
    for (std::size_t k = 0; k < state.fibres.size(); ++k) {
        Fibre& fibre = state.fibres[k];
        fibre.block_number = static_cast<unsigned>(k / threads);
        fibre.thread = dim3(static_cast<unsigned>(k % threads));
        fibre.block = dim3(fibre.block_number % size.x, fibre.block_number / size.x);
        fibre.exchanges = 0;
        fibre.done = false;
        prepare(fibre.context, stacks[k].get(), kStack, state.scheduler);
        state.ready.push_back(&fibre);
    }
    blockDim = dim3(threads);
    gridDim = size;
    std::size_t done = 0;
    while (!state.ready.empty()) {
        pick();
        swapcontext(&state.scheduler, &state.current->context);
        done += state.current->done;
    }
    if (done != state.fibres.size()) fail("some threads wait for others that never come");
    grid = nullptr;
}

}  // namespace emulation

template <class Kernel, class... Arguments>
inline cudaError_t launch(Kernel kernel, dim3 grid, int threads, cudaStream_t, const Arguments&... arguments) {
    emulation::run(grid, static_cast<unsigned>(threads), [&] { kernel(arguments...); });
    return cudaSuccess;
}

}  // namespace pama

inline void __syncthreads() {
    auto& block = pama::emulation::own_block();
    pama::emulation::meet(block.waiting, block.running);
}
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline double __shfl_xor_sync(unsigned, double value, int mask) {
    return pama::emulation::exchange(value, [mask](const double* slots, unsigned lane) { return slots[lane ^ mask]; });
}
inline double __shfl_sync(unsigned, double value, int from) {
    return pama::emulation::exchange(value, [from](const double* slots, unsigned) { return slots[from]; });
}
inline void __syncwarp() { __shfl_xor_sync(0, 0.0, 0); }
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    return pama::emulation::exchange(value, [](const double* slots, unsigned) {
        double sum = 0;
        for (int k = 0; k < pama::emulation::kLanes; ++k) sum += slots[k];
        return static_cast<unsigned>(sum);
    });
}
inline bool __any_sync(unsigned, bool value) {
    return pama::emulation::exchange(value, [](const double* slots, unsigned) {
        double some = 0;
        for (int k = 0; k < pama::emulation::kLanes; ++k) some += slots[k];
        return some > 0;
    });
}
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
    const unsigned old = *counter;
    *counter = old >= limit ? 0 : old + 1;
    return old;
}
template <class T>
inline T __ldcg(const T* from) {
    return *from;
}
