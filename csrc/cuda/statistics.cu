#include <cstdint>

#include "launch.hpp"
#include "statistics.cuh"

namespace pama {
namespace cuda {
namespace {

// Padded sequences without a gap between them are one long sequence.
Tokens collapsed(Tokens p) {
    if (p.offsets || p.rows == 1) return p;
    for (const Array* array :
         {&p.advantages, &p.mask, &p.objective_mask, &p.logprobs, &p.old_logprobs, &p.importance_weights})
        if (*array && array->row != p.width * array->token) return p;
    p.width *= p.rows;
    p.rows = 1;
    return p;
}

bool all_float32(const Tokens& p) {
    for (const Array* array : {&p.advantages, &p.logprobs, &p.old_logprobs, &p.importance_weights})
        if (*array && array->dtype != Dtype::f32) return false;
    return true;
}

bool in_vectors(const Tokens& p) {
    const int size = p.n % 4 == 0 ? 4 : p.n;
    const Array& a = p.advantages;
    return (size == 2 || size == 4) && a.objective == 1 && a.row % size == 0 && a.token % size == 0 &&
           reinterpret_cast<std::uintptr_t>(a.data) % (sizeof(float) * static_cast<unsigned>(size)) == 0;
}

}  // namespace

Plan statistics_plan(const Tokens& p, bool pairs, int most) {
    constexpr long kPerBlock = 2 * kThreads, kMostPartials = 1L << 25;
    const int groups = groups_of(p.n), kinds = pair_kinds(static_cast<bool>(p.objective_mask));
    const long layers = groups + (pairs ? static_cast<long>(kinds) * groups * groups : 0);
    const long size = statistics_size(p.n, pairs), tokens = p.offsets ? p.width : p.rows * p.width;
    long blocks = most / layers < kMostPartials / size ? most / layers : kMostPartials / size;
    if (tokens >= 0 && (tokens + kPerBlock - 1) / kPerBlock < blocks) blocks = (tokens + kPerBlock - 1) / kPerBlock;
    if (blocks < 1) blocks = 1;
    return {static_cast<int>(blocks), static_cast<int>(layers), size * blocks};
}

cudaError_t statistics(const Tokens& given, bool pairs, const Plan& plan, double* partials, unsigned* counter,
                       double* sums, const Solve& solve, cudaStream_t stream) {
    const Tokens p = collapsed(given);
    const bool f32 = !p.wide && all_float32(p);
    const StatisticsTask task{
        p,    Walk(p, static_cast<long>(plan.blocks) * kThreads), f32 && in_vectors(p), pairs, partials, sums, counter,
        solve};
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.layers));
    const auto run = [&](auto kernel) {
        const cudaError_t status = launch(kernel, grid, kThreads, stream, task);
        return status == cudaSuccess && solve.bound == Bound::gram ? batch_weights(sums, p.n, solve, stream) : status;
    };
    if (pairs) return run(&statistics_kernel<double, false, kGroup, true>);
    if (p.wide) return run(&statistics_kernel<double, false, kGroup, false>);
    if (!f32) return run(&statistics_kernel<float, false, kGroup, false>);
    switch (p.n) {
        case 1:
            return run(&statistics_kernel<float, true, 1, false>);
        case 2:
            return run(&statistics_kernel<float, true, 2, false>);
        case 3:
            return run(&statistics_kernel<float, true, 3, false>);
        default:
            return run(&statistics_kernel<float, true, kGroup, false>);
    }
}

}  // namespace cuda
}  // namespace pama
