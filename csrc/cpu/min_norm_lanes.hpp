// Small min-norm problems by core/min_norm_small.hpp, one matrix per SIMD lane (V = DoubleV) or a single one, mostly
// with V = double, with bitwise equal results.
#pragma once

#include "../core/gram_check.hpp"
#include "../core/min_norm.hpp"
#include "simd.hpp"

PAMA_BEGIN
namespace min_norm {

inline bool lane_of(bool mask, int) { return mask; }
template <class M>
inline bool lane_of(const M& mask, int lane) {
    return mask[lane] != 0;
}

// full: N x N entries, scaled so that 1 <= `largest` < 2. Checked: as is_gram; `passed`: where that holds.
template <class V, int N>
inline ldlt::Mask<V> solve_lanes(const V* full, V largest, const double* preference, double regularization,
                                 bool checked, Answer<V>* answer, ldlt::Mask<V>* passed) {
    nnqp::SmallSystem<V, N> s;
    ldlt::Mask<V> ok = largest > V{};
    for (int i = 0; i < N; ++i)
        for (int j = 0; j <= i; ++j) {
            const V lower = full[i * N + j], upper = full[j * N + i], gap = lower - upper;
            s.m(i, j) = 0.5 * lower + 0.5 * upper;
            if (checked) ok &= (gap <= largest * kGramTolerance) & (gap >= -(largest * kGramTolerance));
        }
    if (checked) ok &= nearly_semidefinite<V, N>(s.m, largest * (kGramTolerance * gram_ridge(N)));
    *passed = ok;
    return ok & solve_small<V, N>(s, largest, preference, regularization, answer);
}

// The same for n x n entries. Not inlined: compiled once for matrices of both types.
template <class V>
PAMA_OUT_OF_LINE ldlt::Mask<V> solve_lanes(int n, const V* full, V largest, const double* preference,
                                           double regularization, bool checked, Answer<V>* answer,
                                           ldlt::Mask<V>* passed) {
    return nnqp::with_size<kSmallestSmall, kLargestSmall>(n, [&](auto size) {
        return solve_lanes<V, size>(full, largest, preference, regularization, checked, answer, passed);
    });
}

}  // namespace min_norm

// Solves those of the `used` matrices from `first` on that need no general solver. Returns a bit mask of the solved
// ones; in `passed`, of those that need no is_gram.
template <class V, class T>
inline unsigned min_norm_lanes(const Gram& gram, const double* preference, double regularization, int64_t first,
                               int used, unsigned* passed) {
    using namespace min_norm;
    constexpr int lanes = sizeof(V) / sizeof(double);
    const int n = gram.n;
    alignas(V) double full[kLargestSmall * kLargestSmall * lanes], c[kLargestSmall * lanes];
    alignas(V) double largest[lanes], optimum[lanes], powers[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        const T* from = static_cast<const T*>(gram.data) + (first + (lane < used ? lane : 0)) * gram.batch;
        double diagonal = 0.0;
        for (int i = 0; i < n; ++i)
            diagonal = max_of(static_cast<double>(from[i * (gram.row + gram.column)]), diagonal);
        const nnqp::Scale scale(diagonal);  // subnormal matrices are left to the general solver
        powers[lane] = diagonal > 0.0 && diagonal <= nnqp::kLargestDouble && scale.lift == 1.0 ? scale.power : 0.0;
        largest[lane] = diagonal * powers[lane];
        double* to = full + lane;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j, to += lanes)
                *to = static_cast<double>(from[i * gram.row + j * gram.column]) * powers[lane];
    }
    ldlt::Mask<V> gram_like;
    Answer<V> answer = {reinterpret_cast<V*>(c), V{}, V{}};
    const ldlt::Mask<V> solved =
        solve_lanes<V>(n, reinterpret_cast<const V*>(full), *reinterpret_cast<const V*>(largest), preference,
                       regularization, gram.checked, &answer, &gram_like);
    *reinterpret_cast<V*>(optimum) = answer.optimum;
    unsigned bits = 0;
    for (int lane = 0; lane < used; ++lane) {
        if (lane_of(gram_like, lane)) *passed |= 1u << lane;
        if (!lane_of(solved, lane)) continue;
        bits |= 1u << lane;
        T* weights = static_cast<T*>(gram.weights) + (first + lane) * n;
        for (int i = 0; i < n; ++i) weights[i] = static_cast<T>(c[i * lanes + lane]);
        static_cast<T*>(gram.optimum)[first + lane] = static_cast<T>(optimum[lane] / powers[lane]);
    }
    return bits;
}

// The same for a single one.
inline unsigned min_norm_one(const Gram& gram, const double* preference, double regularization, int64_t row,
                             unsigned* passed) {
#if defined(__AVX512F__)
    return min_norm_one_avx2(gram, preference, regularization, row, passed);
#else
    // In vectors of two numbers a single matrix takes no longer, and needs no code of its own.
    typedef std::conditional<Lanes<double>::count == 2, DoubleV, double>::type One;
    return gram.wide ? min_norm_lanes<One, double>(gram, preference, regularization, row, 1, passed)
                     : min_norm_lanes<One, float>(gram, preference, regularization, row, 1, passed);
#endif
}

PAMA_END
