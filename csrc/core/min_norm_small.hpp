// Min-norm problems of few objectives in registers: the exchange with its certificate, one matrix per SIMD lane of V,
// or a single matrix. Problems that the exchange does not solve (a singular support, a tie) take two proximal steps if
// they are small; what is not solved then, such as a number that is not finite, is left to the general solver.
#pragma once

#include <cstddef>

#include "small_system.hpp"

PAMA_BEGIN
namespace min_norm {

constexpr double kSmallestSigma = 1e-290;
constexpr double kProximalSigma = 1e-2;  // keeps H regular along c where c'Mc = 0
constexpr double kFlat = 1e-6;           // an optimum of this size beside entries of 1 is flat
constexpr double kNegligible = 1e-15;    // a weight below 0 by less is rounding
constexpr double kRounding = 1e-13;      // of the sum of the weights
constexpr int kSmallestSmall = 3;
#if defined(__CUDACC__)
constexpr int kLargestSmall = 8;     // more would take the CUDA build too long
constexpr int kLargestSingular = 0;  // of the matrices that are solved here although a support is singular
#else
constexpr int kLargestSmall = 13;
constexpr int kLargestSingular = 8;
#endif

PAMA_HD inline bool is_small(int n, double regularization) {
    return n >= kSmallestSmall && n <= kLargestSmall && regularization <= 1.0;
}

// The numbers of a problem: M is in s.m, scaled so that 1 <= `largest` < 2.
template <class V>
struct Numbers {
    const double* preference;  // p
    V rho, smallest;           // smallest: min_i M_ii
    double norm2;              // |p|^2
};
template <class V>
struct Answer {
    V *c, optimum, residual;  // c: N weights
};

// Wolfe's gap and the optimum of c = factor * y, where s.product = M y.
template <class V, int N>
PAMA_HD inline void certify(const nnqp::SmallSystem<V, N>& s, const Numbers<V>& p, V factor, Answer<V>* answer) {
    const V zero = V{};
    V value = zero, along = zero, least = zero + nnqp::kLargestDouble;
    for (int i = 0; i < N; ++i) {
        const V c = answer->c[i], own = s.product[i] * factor, gradient = own + p.rho * (c - p.preference[i]);
        value += c * own;
        along += c * gradient;
        least = min_of(gradient, least);
    }
    answer->optimum = max_of(value, zero);
    answer->residual = max_of(along - least, zero);
}

// u, b and H_ii, with r = rho for each objective.
template <class V, int N>
PAMA_HD inline void set(nnqp::SmallSystem<V, N>& s, const Numbers<V>& p, V rho, V sigma) {
    for (int i = 0; i < N; ++i) {
        s.shift[i] = 0.5 * (sigma + rho * (p.norm2 - 2.0 * p.preference[i]));
        s.diagonal[i] = s.m(i, i) + 2.0 * s.shift[i] + rho;
        s.target[i] = V{} + 1.0;
    }
}

// The first support: see Problem::start. s.product: M e.
template <class V, int N>
PAMA_HD inline void start(nnqp::SmallSystem<V, N>& s, V rho, V mean) {
    const V zero = V{}, one = zero + 1.0;
    for (int i = 0; i < N; ++i) s.inside[i] = choose(s.product[i] - mean <= s.m(i, i) + rho, one, zero);
}

template <class V, int N>
PAMA_HD inline V sum_rows(nnqp::SmallSystem<V, N>& s) {
    V mean = V{};
    for (int i = 0; i < N; ++i) {
        s.product[i] = V{};
        for (int j = 0; j < N; ++j) s.product[i] += s.m.symmetric(i, j);
        mean += s.product[i];
    }
    return mean / static_cast<double>(N);
}

template <class V, int N>
PAMA_HD inline ldlt::Mask<V> equal(nnqp::SmallSystem<V, N>& s, int i, int j) {
    return (s.m.symmetric(i, j) == s.m(i, i)) & (s.m.symmetric(i, j) == s.m(j, j));
}

// c: x with the mean over equal objectives of equal preference.
template <class V, int N>
PAMA_HD inline void share_equally(nnqp::SmallSystem<V, N>& s, const Numbers<V>& p, const V* x, V* c) {
    const V zero = V{}, one = zero + 1.0;
    for (int i = 0; i < N; ++i) {
        V sum = zero, count = zero;  // in the same order for each of them
        for (int j = 0; j < N; ++j) {
            if (p.preference[i] != p.preference[j]) continue;
            const ldlt::Mask<V> same = equal(s, i, j);
            sum += choose(same, x[j], zero);
            count += choose(same, one, zero);
        }
        c[i] = sum / count;
    }
}

// Two proximal steps (active_set.hpp), of which the second one keeps the support and thus the factor of the first: the
// minimiser nearest to p where it is not unique. Returns where the residual is small enough.
template <class V, int N>
PAMA_OUT_OF_LINE ldlt::Mask<V> solve_singular(nnqp::SmallSystem<V, N>& s, const Numbers<V>& p, ldlt::Mask<V> where,
                                              Answer<V>* answer) {
    const V zero = V{}, r = p.rho + nnqp::kRidge;
    start(s, p.rho, sum_rows(s));
    set(s, p, r, max_of(p.smallest + r, zero + kProximalSigma));
    nnqp::RidgeSystem<V, N> ridge{s, {}, {}};
    where &= nnqp::exchange<V>(ridge, N, where);
    // About x = y / e'y: H c = nu e + ridge (x - p) on the support, where Hy = e.
    V z[N], x[N], moved = zero, sum = zero;
    const V share = 1.0 / s.total;
    for (int i = 0; i < N; ++i) z[i] = choose(s.inside[i] > zero, s.y[i] * share - p.preference[i], zero);
    ldlt::substitute<V, N>(ridge.h, ridge.inverse, z);
    ldlt::substitute_back<V, N>(ridge.h, ridge.inverse, z);
    for (int i = 0; i < N; ++i) moved += z[i];
    const V factor = (1.0 - nnqp::kRidge * moved) * share, relative = nnqp::kRidge / factor;
    for (int i = 0; i < N; ++i) {
        x[i] = (s.y[i] + relative * z[i]) * factor;
        where &= x[i] >= -kNegligible;
        x[i] = max_of(x[i], zero);
        sum += x[i];
    }
    where &= (sum >= 1.0 - kRounding) & (sum <= 1.0 + kRounding);  // else M is far from semidefinite
    share_equally(s, p, x, answer->c);
    s.multiply(answer->c);
    certify(s, p, zero + 1.0, answer);
    return where & (answer->residual <= nnqp::kCertified * (1.0 + p.rho));
}

// Returns where the problem was solved; elsewhere the answer is undefined.
template <class V, int N>
PAMA_HD inline ldlt::Mask<V> solve_small(nnqp::SmallSystem<V, N>& s, V largest, const double* preference,
                                         double regularization, Answer<V>* answer) {
    constexpr bool here = N <= kLargestSingular;
    const V zero = V{};
    Numbers<V> p = {preference, largest * regularization, s.m(0, 0), 0.0};
    for (int i = 0; i < N; ++i) {
        p.norm2 += preference[i] * preference[i];
        p.smallest = min_of(s.m(i, i), p.smallest);
    }
    const V mean = sum_rows(s);
    V poison = zero;
    for (int i = 0; i < N; ++i) poison += 0.0 * s.product[i];
    const ldlt::Mask<V> usable = (largest > zero) & (poison == zero);
    const V sigma = p.smallest + p.rho;
    ldlt::Mask<V> regular = usable & (sigma > kSmallestSigma);
    if (here || regularization > 0.0)  // at regularization 0 duplicates are ties
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < i; ++j) regular &= !equal(s, i, j);
    ldlt::Mask<V> optimal = zero != zero;
    if (any(regular)) {
        set(s, p, p.rho, sigma);
        start(s, p.rho, mean);
        optimal = nnqp::exchange<V>(s, N, regular);
        optimal &= (s.tied == (zero != zero)) | (p.rho >= nnqp::kRidge);
        const V share = 1.0 / s.total;
        for (int i = 0; i < N; ++i) answer->c[i] = s.y[i] * share;
        certify(s, p, share, answer);
        optimal &= answer->residual <= nnqp::kCertified * (1.0 + p.rho);
    }
    if constexpr (here) {
        const ldlt::Mask<V> rest = usable & !optimal;
        if (!any(rest)) return optimal;
        V c[N];
        Answer<V> other = {c, zero, zero};
        const Numbers<V> numbers = p;  // copies, so that the variables above are in registers
        nnqp::SmallSystem<V, N> copy;
        for (int i = 0; i < N; ++i)
            for (int j = 0; j <= i; ++j) copy.m(i, j) = s.m(i, j);
        const ldlt::Mask<V> solved = solve_singular(copy, numbers, rest, &other);
        for (int i = 0; i < N; ++i) answer->c[i] = choose(optimal, answer->c[i], c[i]);
        answer->optimum = choose(optimal, answer->optimum, other.optimum);
        answer->residual = choose(optimal, answer->residual, other.residual);
        optimal |= rest & solved;
    }
    return optimal;
}

// Solves for the objectives `index` of one matrix of any scale and type. Returns whether it was solved.
template <int N, class T>
PAMA_HD inline bool solve_one(const int* index, const MatrixView<T>& gram, const double* preference,
                              double regularization, double* weights, SolverResult* result) {
    const auto entry = [&](int i, int j) { return gram(index[i], index[j]); };
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
    Answer<double> answer = {c, 0.0, 0.0};
    if (!solve_small<double, N>(s, scale(largest), p, regularization, &answer)) return false;
    result->optimum = scale.undo(answer.optimum);
    result->residual = answer.residual / size;
    for (int i = 0; i < N; ++i) weights[index[i]] = c[i];
    return true;
}
template <class T>
PAMA_HD inline bool solve_one(const MatrixView<T>& gram, const double* preference, const unsigned char* present,
                              double regularization, double* weights, SolverResult* result) {
    const int n = gram.n;
    int index[kLargestSmall], count = 0;
    for (int i = 0; i < n; ++i) {
        if (present && !present[i]) continue;
        if (count == kLargestSmall) return false;
        index[count++] = i;
    }
    if (!is_small(count, regularization)) return false;
    for (int i = 0; i < n; ++i) weights[i] = 0.0;
    return nnqp::with_size<kSmallestSmall, kLargestSmall>(count, [&](auto size) {
        return solve_one<decltype(size)::value>(index, gram, preference, regularization, weights, result);
    });
}

}  // namespace min_norm
PAMA_END
