// Computes the weights of a batch from its statistics.
#pragma once

#include "../core/weights.hpp"
#include "load.cuh"
#include "slots.cuh"

namespace pama {
namespace cuda {

// The statistics of one objective in the layout of n = 1, for the functions of core/statistics.hpp.
struct OwnStatistics {
    double field[kFields];
    __device__ OwnStatistics(const double* sums, int n, int i) {
        PAMA_UNROLL
        for (int f = 0; f < kFields; ++f) field[f] = sums[f * n + i];
    }
    __device__ bool signal(bool bound) const { return has_signal(field, 1, 0, bound); }
};

struct Chosen {
    int count;    // objectives with a signal
    double mass;  // the sum of their preferences
};

// Writes 1 for each objective with a signal, else 0, to `weights`, and the preference normalised over those to
// `effective`. Called by all threads of a block, to which the sums must be visible; one warp does it.
__device__ inline Chosen choose_objectives(const Solve& s) {
    PAMA_SHARED(Chosen, chosen);
    double mass = 0;
    unsigned count = 0;
    PAMA_ROLLED
    for (int i = threadIdx.x; threadIdx.x < kWarp && i < s.n; i += kWarp) {
        const bool signal = OwnStatistics(s.sums, s.n, i).signal(s.rule.kind == Kind::gram);
        s.weights[i] = signal ? 1 : 0;
        s.effective[i] = s.preference ? s.preference[i] : 1.0 / s.n;
        mass += signal ? s.effective[i] : 0;
        count += signal ? 1 : 0;
    }
    if (threadIdx.x < kWarp) {
        mass = warp_sum(mass);
        count = __reduce_add_sync(kAllLanes, count);
        PAMA_ROLLED
        for (int i = threadIdx.x; i < s.n; i += kWarp)
            if (mass > 0) s.effective[i] = s.weights[i] * s.effective[i] / mass;
        if (threadIdx.x == 0) chosen = {static_cast<int>(count), mass};
    }
    __syncthreads();
    return chosen;
}

// Solves rules without pair statistics for N objectives. Called by all threads of a block: one thread per objective
// reads the statistics, then one thread solves in registers.
template <int N>
__device__ PAMA_NOINLINE void solve_few_scores(const Solve& s) {
    using Table = double[N][4];
    PAMA_SHARED(Table, table);
    if (threadIdx.x < N) {
        const int i = threadIdx.x;
        const double preference = s.preference ? s.preference[i] : 1.0 / N;
        const OwnStatistics own(s.sums, N, i);
        table[i][0] = own.signal(false) ? 1 : 0;
        table[i][1] = score(own.field, 1, 0);
        table[i][2] = second_moment(own.field, 1, 0);
        table[i][3] = preference;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    double a[N], p[N], c[N], mass = 0, count = 0, scale = 0, optimum = 0;
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) {
        c[i] = table[i][0], a[i] = table[i][1], p[i] = table[i][3];
        const double moment = c[i] != 0 ? table[i][2] : 0;
        scale = moment > scale || moment != moment ? moment : scale;
        mass += c[i] * p[i];
        count += c[i];
    }
    const double share = 1 / mass;
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) {
        p[i] = mass > 0 ? c[i] * p[i] * share : p[i];
        s.effective[i] = p[i];
    }
    if (count == 0 || s.rule.kind == Kind::fixed) {
        PAMA_UNROLL
        for (int i = 0; i < N; ++i) {
            c[i] = p[i];
            optimum += count != 0 && p[i] != 0 ? p[i] * a[i] : 0;
        }
    } else {
        optimum = vector_weights<N, true>(s.rule, N, a, p, scale, c);
    }
    PAMA_UNROLL
    for (int i = 0; i < N; ++i) s.weights[i] = c[i];
    *s.optimum = optimum;
}

// The same for any number of objectives, with the workspace `work`.
__device__ PAMA_NOINLINE void solve_many_scores(const Solve& s) {
    const int n = s.n;
    const bool some = choose_objectives(s).count > 0;
    double *const a = s.work, *const p = a + n, *const moments = p + n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        a[i] = score(s.sums, n, i);
        p[i] = s.effective[i];
        moments[i] = s.weights[i] != 0 ? second_moment(s.sums, n, i) : 0;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    double optimum = 0, scale = 0;
    if (!some || s.rule.kind == Kind::fixed) {
        for (int i = 0; i < n; ++i) {
            s.weights[i] = p[i];
            optimum += some && p[i] != 0 ? p[i] * a[i] : 0;
        }
    } else {
        for (int i = 0; i < n; ++i) scale = moments[i] > scale || moments[i] != moments[i] ? moments[i] : scale;
        optimum = vector_weights<0, true>(s.rule, n, a, p, scale, s.weights);
    }
    *s.optimum = optimum;
}

// Stores the results in the dtype of the call. Done by the thread that solved.
__device__ inline void store_rounded(const Solve& s) {
    if (threadIdx.x != 0 || !s.rounded[0]) return;
    for (int i = 0; i < s.n; ++i) store_number(s.rounded[0], i, s.weights[i]);
    store_number(s.rounded[1], 0, *s.optimum);
}

// Solves rules without pair statistics. N > 0: the number of objectives; N = 0: kGroup or more objectives.
template <int N>
__device__ inline void solve_scores(const Solve& s) {
    if (N > 0)
        solve_few_scores<N ? N : kGroup>(s);
    else if (s.n == kGroup)
        solve_few_scores<kGroup>(s);
    else
        solve_many_scores(s);
    store_rounded(s);
}

}  // namespace cuda
}  // namespace pama
