// Min-norm problems of few objectives in registers: the exchange with its certificate, one matrix per SIMD lane of V,
// or a single matrix. Problems that the exchange does not solve (a singular support, a tie, a number that is not
// finite) are left to the general solver.
#pragma once

#include <cstddef>

#include "small_system.hpp"

PAMA_BEGIN
namespace min_norm {

constexpr double kSmallestSigma = 1e-290;
constexpr int kSmallestSmall = 3;
#if defined(__CUDACC__)
constexpr int kLargestSmall = 8;  // more would take the CUDA build too long
#else
constexpr int kLargestSmall = 12;
#endif

PAMA_HD inline bool is_small(int n, double regularization) {
    return n >= kSmallestSmall && n <= kLargestSmall && regularization <= 1.0;
}

// s.m: M, scaled so that 1 <= `largest` < 2, its largest diagonal entry. c: N weights. Returns where the problem was
// solved; elsewhere c and optimum are undefined.
template <class V, int N>
PAMA_HD inline ldlt::Mask<V> solve_small(nnqp::SmallSystem<V, N>& s, V largest, const double* preference,
                                         double regularization, V* c, V* optimum, V* residual) {
    const V zero = V{}, one = zero + 1.0;
    ldlt::Mask<V> ok = largest > zero;
    const V rho = largest * regularization;
    if (regularization > 0.0)  // duplicates are averaged elsewhere
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < i; ++j) {
                const ldlt::Mask<V> differs = s.m(i, j) != s.m(i, i), too = s.m(i, j) != s.m(j, j);
                ok &= differs | too;
            }
    double norm2 = 0.0;
    V smallest = s.m(0, 0), poison = zero, mean = zero;
    for (int i = 0; i < N; ++i) {
        norm2 += preference[i] * preference[i];
        smallest = min_of(s.m(i, i), smallest);
        s.product[i] = zero;
        for (int j = 0; j < N; ++j) s.product[i] += s.m.symmetric(i, j);
        poison += 0.0 * s.product[i];
        mean += s.product[i];
    }
    mean /= static_cast<double>(N);
    const V sigma = smallest + rho;
    ok &= (sigma > kSmallestSigma) & (poison == zero);
    for (int i = 0; i < N; ++i) {
        s.shift[i] = 0.5 * (sigma + rho * (norm2 - 2.0 * preference[i]));
        s.diagonal[i] = s.m(i, i) + 2.0 * s.shift[i] + rho;
        s.target[i] = one;
        s.inside[i] = choose(s.product[i] - mean <= s.m(i, i) + rho, one, zero);
    }
    ldlt::Mask<V> optimal = nnqp::exchange<V>(s, N, ok);
    optimal &= (s.tied == (zero != zero)) | (rho >= nnqp::kRidge);
    const V share = 1.0 / s.total;
    V value = zero, along = zero, least = zero + nnqp::kLargestDouble;
    for (int i = 0; i < N; ++i) {
        c[i] = s.y[i] * share;
        const V own = s.product[i] * share, gradient = own + rho * (c[i] - preference[i]);
        value += c[i] * own;
        along += c[i] * gradient;
        least = min_of(gradient, least);
    }
    *optimum = max_of(value, zero);
    *residual = max_of(along - least, zero);
    return optimal & (*residual <= nnqp::kCertified * (1.0 + rho));
}

// Solves for the objectives `index` of one matrix of any scale and type. Returns whether it was solved.
template <int N, class T>
PAMA_HD inline bool solve_one(const int* index, const T* gram, std::ptrdiff_t row_stride, std::ptrdiff_t column_stride,
                              const double* preference, double regularization, double* weights, SolverResult* result) {
    const auto entry = [&](int i, int j) {
        return static_cast<double>(gram[index[i] * row_stride + index[j] * column_stride]);
    };
    double largest = 0.0, mass = 0.0, p[N], c[N];
    for (int i = 0; i < N; ++i) {
        largest = max_of(entry(i, i), largest);
        mass += preference ? preference[index[i]] : 0.0;
    }
    const double share = 1.0 / (mass != 0.0 ? mass : N);
    for (int i = 0; i < N; ++i) p[i] = mass != 0.0 ? preference[index[i]] * share : share;
    const nnqp::Scale scale(largest);
    nnqp::SmallSystem<double, N> s;
    for (int i = 0; i < N; ++i)
        for (int j = 0; j <= i; ++j) s.m(i, j) = 0.5 * scale(entry(i, j)) + 0.5 * scale(entry(j, i));
    const double size = scale(largest) * (1.0 + regularization);
    if (!solve_small<double, N>(s, scale(largest), p, regularization, c, &result->optimum, &result->residual))
        return false;
    result->optimum = scale.undo(result->optimum);
    result->residual /= size;
    for (int i = 0; i < N; ++i) weights[index[i]] = c[i];
    return true;
}
template <class T>
PAMA_HD inline bool solve_one(int n, const T* gram, std::ptrdiff_t row_stride, std::ptrdiff_t column_stride,
                              const double* preference, const unsigned char* present, double regularization,
                              double* weights, SolverResult* result) {
    int index[kLargestSmall], count = 0;
    for (int i = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        if (count == kLargestSmall) return false;
        index[count++] = i;
    }
    if (!is_small(count, regularization)) return false;
    for (int i = 0; i < n; ++i) weights[i] = 0.0;
    return nnqp::with_size<kSmallestSmall, kLargestSmall>(count, [&](auto size) {
        return solve_one<decltype(size)::value>(index, gram, row_stride, column_stride, preference, regularization,
                                                weights, result);
    });
}

}  // namespace min_norm
PAMA_END
